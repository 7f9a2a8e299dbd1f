"""Three tensor-parallel ranks over gloo: they choose alike, and nothing is counted three times."""

from __future__ import annotations

from harness import SYSTEMS, chat, sections, settled

from kvshare_sched.client import kl_divergence

ARGUMENTS = ["--tp-size", "3", "--chunked-prefill-size", "512"]
ENVIRONMENT = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|1", "KVSHARE_ALPHA": "colsum"}
DOCS = sections()


def test_ranks_agree_and_counters_do_not_multiply(server):
    namespace, cold = server.namespace(), server.namespace()
    before = server.origins()
    donor = server.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=1, namespace=namespace)
    prompt = server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in (2, 0, 3, 1)]))
    warm = server.generate(prompt, new_tokens=8, namespace=namespace)
    report = settled(warm)
    assert report["outcome"] == "reused" and report["recomputed"] >= 0.1 * report["reused"]
    after = server.origins()
    for origin in ("exact", "reused", "fresh"):
        assert after[origin] - before[origin] == donor.report[origin] + report[origin]
    full = server.generate(prompt, new_tokens=8, namespace=cold, reuse=False)
    ids = server.likely_ids(prompt, full.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, told = server.log_probabilities(prompt, full.token_ids, ids, namespace, reuse=True)
    assert told["outcome"] == "reused"
    assert kl_divergence(reference, ours) < 0.3
