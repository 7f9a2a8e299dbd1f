"""`kvshare eval`: answer quality of reuse on real text, a real model and the real server path.

texts -> tasks (cases) -> measure (the server) -> report, with statistics on the side; `run` puts them together.
"""
