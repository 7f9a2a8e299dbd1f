"""Three tensor-parallel ranks over gloo: they choose alike, and nothing is counted three times."""

from __future__ import annotations

from harness import SYSTEMS, chat, sections, settled

from kvshare_sched.client.http import kl_divergence

ARGUMENTS = ["--tp-size", "3", "--chunked-prefill-size", "512"]
ENVIRONMENT = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1|1", "KVSHARE_ALPHA": "colsum"}
DOCS = sections()


def requests_of(server) -> float:
    """Requests counted so far, whatever became of them."""
    return sum(value for line, value in server.metrics().items() if line.startswith("kvshare_requests_total"))


def test_ranks_agree_and_counters_do_not_multiply(server):
    namespace, cold = server.namespace(), server.namespace()
    before, requests = server.origins(), requests_of(server)
    donor = server.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=1, namespace=namespace)
    prompt = server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in (2, 0, 3, 1)]))
    warm = server.generate(prompt, new_tokens=8, namespace=namespace)
    report = settled(warm)
    assert report["outcome"] == "reused" and report["recomputed"] >= 0.1 * report["reused"]
    after = server.origins()
    for origin in ("exact", "reused", "fresh"):
        assert after[origin] - before[origin] == donor.report[origin] + report[origin]
    assert requests_of(server) - requests == 2
    full = server.generate(prompt, new_tokens=8, namespace=cold, reuse=False)
    ids = server.likely_ids(prompt, full.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, told = server.log_probabilities(prompt, full.token_ids, ids, namespace, reuse=True)
    assert told["outcome"] == "reused"
    assert kl_divergence(reference, ours) < 0.3


def test_ranks_repair_alike(server):
    for order in ("lagged", "attention", "fifo"):
        namespace = server.namespace()
        server.generate(chat(SYSTEMS[0], DOCS[:3]), new_tokens=1, namespace=namespace)
        prompt = server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in (2, 0)]))
        before = server.metrics()["kvshare_repaired_tokens_total"]
        body = server._body(prompt, 14, namespace, {"repair_rows": 64, "repair_order": order})
        body["sampling_params"]["ignore_eos"] = True
        report = server.post("/generate", body).json()["meta_info"]["kvshare"]
        repaired = server.metrics()["kvshare_repaired_tokens_total"] - before
        if order == "fifo":  # the ranks' own walks end at KV that gives one and the same answer
            assert repaired >= report["reused"]
            again = server.generate(prompt, new_tokens=8, namespace=namespace, reuse=False)
            cold = server.generate(prompt, new_tokens=8, namespace=server.namespace(), reuse=False)
            assert settled(again)["exact"] == len(prompt) - 1 and again.token_ids == cold.token_ids
        else:
            assert repaired == report["reused"] - report["recomputed"]
