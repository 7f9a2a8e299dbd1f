"""Who is asking, who may lend, how much, and the record of it. Without a tenants file nothing in here runs.

Imports nothing of SGLang except in `hooks` and `librarian`, which live in the HTTP process.
"""
