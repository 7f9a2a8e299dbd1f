"""What would an order do at my scale? The server's own queue code on a model of the engine, no accelerator needed.

profile (measured costs), traffic (traces, or made up) and cache (who has which text) -> engine -> report.
"""
