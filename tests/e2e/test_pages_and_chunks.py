"""Page size 16, small chunks, mixed batches, overlap and CUDA graphs off, the Python tree core."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import SYSTEMS, alike, chat, sections, settled

from kvshare_sched.client.http import kl_divergence

pytestmark = pytest.mark.gpu  # on a CPU: engine/test_chunks_of_pages.py, on tiny models and in seconds
ARGUMENTS = [
    *("--page-size", "16"),
    *("--chunked-prefill-size", "256"),
    "--enable-mixed-chunk",
    "--disable-overlap-schedule",
    "--disable-cuda-graph",  # on a GPU a captured decode step takes no repair rows
]
ENVIRONMENT = {
    "SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND": "python",
    "KVSHARE_STRATEGY": "cacheblend",
    "KVSHARE_RATIO": "0.2",
}
DOCS = sections()


def test_long_prompts_in_many_chunks(server):
    namespace, cold = server.namespace(), server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[:8]), new_tokens=2, namespace=namespace)
    prompt = server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in (5, 2, 7, 0, 3, 6, 1, 4)]))
    assert len(prompt) > 1500
    warm = server.generate(prompt, new_tokens=12, namespace=namespace)
    report = settled(warm)
    assert report["exact"] % 16 == 0
    assert report["outcome"] == "reused" and report["reused"] > 0.9 * len(prompt)
    assert report["recomputed"] >= 0.1 * report["reused"]
    full = server.generate(prompt, new_tokens=12, namespace=cold, reuse=False)
    ids = server.likely_ids(prompt, full.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, _ = server.log_probabilities(prompt, full.token_ids, ids, namespace, reuse=True)
    assert kl_divergence(reference, ours) < 0.3
    honest = server.generate(prompt, new_tokens=12, namespace=namespace, reuse=False)
    assert settled(honest)["exact"] <= report["exact"] + 48
    assert alike(honest, full)


def test_prefill_of_long_prompts_beside_running_decodes(server):
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[:6]), new_tokens=2, namespace=namespace)
    asks = [chat(f"You are number {i}.", DOCS[(i % 3) : 6], f"Question {i}?") for i in range(8)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda a: server.generate(a, new_tokens=24, namespace=namespace), asks))
    assert sum(settled(a)["outcome"] == "reused" for a in answers) >= 7
    quiet = server.generate(asks[0], new_tokens=24, namespace=namespace, reuse=False)
    cold = server.generate(asks[0], new_tokens=24, namespace=server.namespace(), reuse=False)
    assert alike(quiet, cold)


def test_a_prompt_repaired_while_decoding_is_published_in_whole_pages(server):
    namespace, repair = server.namespace(), {"strategy": "naive", "repair_rows": 64}
    server.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=2, namespace=namespace)
    prompt = server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in (3, 1, 2)]))
    body = server._body(prompt, len(prompt) // 64 + 4, namespace, repair)
    body["sampling_params"]["ignore_eos"] = True
    assert server.post("/generate", body).json()["meta_info"]["kvshare"]["outcome"] == "reused"
    again = server.generate(prompt, new_tokens=12, namespace=namespace, reuse=False)
    assert settled(again)["exact"] == (len(prompt) - 1) // 16 * 16
    cold = server.generate(prompt, new_tokens=12, namespace=server.namespace(), reuse=False)
    assert alike(again, cold)


def test_aborted_between_chunks(server):
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[8:16]), new_tokens=1, namespace=namespace)
    prompt = chat(SYSTEMS[2], DOCS[15:7:-1], "Abort me.")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(server.generate, prompt, new_tokens=64, namespace=namespace)
        while server.metrics()["kvshare_leases_held"] == 0 and not running.done():
            pass
        server.post("/abort_request", {"rid": "", "abort_all": True})
        with contextlib.suppress(KeyError):  # an aborted stream ends without its counts
            running.result()
    server.assert_idle_and_clean()
    again = server.generate(prompt, new_tokens=8, namespace=namespace, reuse=False)
    cold = server.generate(prompt, new_tokens=8, namespace=server.namespace(), reuse=False)
    assert alike(again, cold)
