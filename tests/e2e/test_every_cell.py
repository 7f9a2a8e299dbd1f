"""Recomputing every cell must give ordinary prefill: the anchor of all numerics. Small chunks on purpose.

Once on the real model; against a float64 reference, in more orders and both loops: `engine/test_reuse.py`.
"""

from __future__ import annotations

from harness import SMALL_CHUNKS, SYSTEMS, chat, sections, settled

ARGUMENTS, ENVIRONMENT = SMALL_CHUNKS
DOCS = sections()


def test_same_tokens_and_log_probabilities_as_full_prefill(server):
    namespace, cold = server.namespace(), server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=1, namespace=namespace)
    prompt = server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in (2, 0, 3, 1)]))
    warm = server.generate(prompt, new_tokens=24, namespace=namespace, reuse={"ratio": 1.0})
    full = server.generate(prompt, new_tokens=24, namespace=cold, reuse=False)
    report = settled(warm)
    assert report["outcome"] == "reused"
    assert report["recomputed"] == report["reused"] > 600
    assert report["computed_cells"] == (report["reused"] + report["fresh"]) * report["layers"]
    assert warm.token_ids == full.token_ids
    ids = server.likely_ids(prompt, full.token_ids, cold)
    ours, told = server.log_probabilities(prompt, full.token_ids, ids, namespace, reuse={"ratio": 1.0})
    theirs, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    assert told["outcome"] == "reused"
    worst = max(abs(a - b) for x, y in zip(ours, theirs, strict=True) for a, b in zip(x, y, strict=True))
    assert worst < 1e-3
