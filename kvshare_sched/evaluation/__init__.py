"""`kvshare eval`: answer quality of reuse on real text, a real model and the real server path.

texts -> tasks (cases) -> measure (the server) -> figures (statistics) -> report; `run` puts them together.
A method to compare is a line in `methods.py`, a task a function in `tasks.py`.
"""
