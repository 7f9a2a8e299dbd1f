"""The waiting queue: who comes first, and who has had enough. Pure: no SGLang, no torch, no clock.

order (records, keys) -> fairness (deficits), duplicates (who waits for whose text) -> table (the waiting by row) ->
queue (all of it, up to date).
`estimate` says what a request still costs. `queue_adapter` puts it into SGLang, `simulator` runs it on a model.
"""
