"""A donor with the same full left context has no deviation: nothing is recomputed, the answer is identical.

`SGLANG_RADIX_FORCE_MISS` keeps the exact tree from answering, so the donor is the very same prompt.
"""

from __future__ import annotations

import pytest
from harness import ROUNDING, SYSTEMS, alike, chat, sections, settled

pytestmark = pytest.mark.gpu  # on a CPU: engine/test_reuse.py, on a tiny model and in seconds
ARGUMENTS = ["--disable-overlap-schedule"]
ENVIRONMENT = {"SGLANG_RADIX_FORCE_MISS": "1"}
DOCS = sections()


@pytest.mark.parametrize("strategy", ["consensus", "dhd", "cacheblend"])
def test_no_deviation_no_recompute_same_answer(server, strategy):
    wish = {"strategy": strategy}
    namespace, cold = server.namespace(), server.namespace()
    prompt = server.tokenize(chat(SYSTEMS[0], DOCS[:4]))
    full = server.generate(prompt, new_tokens=24, namespace=namespace)
    assert settled(full)["outcome"] == "ordinary"
    warm = server.generate(prompt, new_tokens=24, namespace=namespace, reuse=wish)
    report = settled(warm)
    assert report["reused"] == len(prompt) - 1 and report["exact"] == 0
    # Deviation 0 at the check layer, no foreign context: only the forced first tokens of the run run again.
    assert report["recomputed"] == 8
    assert alike(warm, full)
    ids = server.likely_ids(prompt, full.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, told = server.log_probabilities(prompt, full.token_ids, ids, namespace, reuse=wish)
    assert told["outcome"] == "reused"
    worst = max(abs(a - b) for x, y in zip(reference, ours, strict=True) for a, b in zip(x, y, strict=True))
    assert worst < ROUNDING
