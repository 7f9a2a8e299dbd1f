"""A pool too small for the load: donors are evicted, running requests retracted, nothing is lost or leaked."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import chat, sections, settled

pytestmark = pytest.mark.gpu  # on a CPU: engine/test_reuse.py, on a tiny model and in seconds
ARGUMENTS = ["--max-total-tokens", "3000", "--schedule-conservativeness", "0.1"]
ENVIRONMENT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "17"}
DOCS = sections()


def test_eviction_and_retraction(server):
    namespace = server.namespace()

    def ask(i):
        parts = [DOCS[(i + k) % 6] for k in range(3)]
        prompt = chat(f"You are number {i}.", parts, f"Question {i}?")
        repair = {"repair_rows": 8, "repair_order": ("fifo", "lagged", "attention")[i % 3]}
        body = server._body(prompt, 24, namespace, repair if i % 4 != 3 else False)
        body["sampling_params"]["ignore_eos"] = True
        return server.post("/generate", body).json()

    before = server.origins()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(ask, range(12)))
    for answer in answers:
        report, meta = answer["meta_info"]["kvshare"], answer["meta_info"]
        assert meta["completion_tokens"] == 24
        assert report["exact"] + report["reused"] + report["fresh"] == meta["prompt_tokens"]
    outcomes = [a["meta_info"]["kvshare"]["outcome"] for a in answers]
    assert "reused" in outcomes
    assert any(a["meta_info"]["num_retractions"] > 0 for a in answers), "nobody was retracted"
    told = {o: sum(a["meta_info"]["kvshare"][o] for a in answers) for o in before}
    assert {o: n - before[o] for o, n in server.origins().items()} == told, "who runs again does not count again"


def test_donors_that_left_are_not_used(server):
    namespace = server.namespace()
    server.generate(chat("First.", DOCS[6:10]), new_tokens=1, namespace=namespace)
    for i in range(6):  # push the donors out
        server.generate(chat(f"Filler {i}.", DOCS[10 + i : 14 + i]), new_tokens=1, namespace=server.namespace())
    prompt = server.tokenize(chat("Second.", DOCS[9:5:-1]))
    answer = server.generate(prompt, new_tokens=8, namespace=namespace)
    assert settled(answer)["reused"] < 0.3 * len(prompt)
