"""`kvshare bench`: traffic against a running SGLang, or several server set-ups on one trace.

blocks -> workloads -> traces: what is asked. runner: asks it, open loop. statistics, report: what came back.
compare: set-ups, load points, ratios. Only `runner` and `compare` talk to a server.
"""
