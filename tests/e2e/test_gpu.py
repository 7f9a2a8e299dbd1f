"""The real server on a GPU in bfloat16, with each of SGLang's attention backends for ordinary rows, graphs on."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import SYSTEMS, chat, sections, settled, start

from kvshare_sched.client.http import kl_divergence

pytestmark = pytest.mark.gpu
DOCS = sections()


@pytest.fixture(scope="module", params=["triton", "flashinfer", "fa3"])
def served(request):
    import torch

    if request.param == "fa3" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("FA3 is for Hopper")
    arguments = ["--attention-backend", request.param, "--dtype", "bfloat16", "--chunked-prefill-size", "1024"]
    with start(f"gpu-{request.param}", arguments, {}) as running:
        yield running


@pytest.fixture
def tenant(served):
    """A namespace whose tree holds one prompt over DOCS[0:8]: its donors."""
    namespace = served.namespace()
    served.generate(chat(SYSTEMS[0], DOCS[:8]), new_tokens=2, namespace=namespace)
    return namespace


def moved(question: str) -> str:
    return chat(SYSTEMS[1], [DOCS[i] for i in (6, 2, 7, 0, 3, 5, 1, 4)], question)


def close(served, prompt, namespace, reuse, most: float) -> dict:
    """The report of a request whose answer is that close to full prefill's."""
    cold = served.namespace()
    full = served.generate(prompt, new_tokens=16, namespace=cold, reuse=False)
    warm = served.generate(prompt, new_tokens=16, namespace=namespace, reuse=reuse)
    ids = served.likely_ids(prompt, full.token_ids, cold)
    reference, _ = served.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    ours, _ = served.log_probabilities(prompt, full.token_ids, ids, namespace, reuse=reuse)
    assert kl_divergence(reference, ours) < most
    return settled(warm)


def test_scattered_rows_have_a_kernel_of_their_own(served, tenant):
    report = close(served, served.tokenize(moved("Which section is about names?")), tenant, True, 0.3)
    assert report["outcome"] == "reused" and report["reused"] > 0.9 * (report["reused"] + report["fresh"])
    assert 0 < report["recomputed"] < report["reused"]
    assert "kvshare: scattered rows run in" in served.log.read_text(errors="replace")
    served.assert_idle_and_clean()


@pytest.mark.parametrize("strategy", ["dhd", "cacheblend", "epic"])
def test_other_strategies(served, tenant, strategy):
    report = close(served, served.tokenize(moved(f"With {strategy}?")), tenant, {"strategy": strategy}, 0.5)
    assert (report["outcome"], report["strategy"]) == ("reused", strategy)
    served.assert_idle_and_clean()


def test_every_row_computed_anew_is_full_prefill_but_for_rounding(served, tenant):
    report = close(served, served.tokenize(moved("All of it?")), tenant, {"ratio": 1.0}, 0.02)
    assert report["recomputed"] == report["reused"] > 0
    served.assert_idle_and_clean()


def test_several_donors_stand_in_together(served, tenant):
    served.generate(chat(SYSTEMS[2], DOCS[5::-1]), new_tokens=1, namespace=tenant, reuse=False)
    report = close(served, served.tokenize(moved("Donors?")), tenant, True, 0.3)
    assert report["donors"] == 2
    served.assert_idle_and_clean()


def test_reusing_and_ordinary_requests_share_batches(served, tenant):
    def ask(i: int):
        prompt = moved(f"Together {i}?") if i % 2 else chat(SYSTEMS[2], [DOCS[10 + i % 8]], f"Stranger {i}?")
        return served.generate(prompt, new_tokens=6, namespace=tenant)

    with ThreadPoolExecutor(12) as pool:
        reports = [settled(answer) for answer in pool.map(ask, range(12))]
    assert all(report["outcome"] == "reused" for report in reports[1::2])
    served.assert_idle_and_clean()
