"""Reused KV repaired while decoding: rows ride along, nobody else notices, a finished walk makes the prompt exact."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import pytest
from harness import SYSTEMS, chat, sections, settled

DOCS = sections()
NAIVE = {"strategy": "naive"}


@pytest.fixture
def tenant(server):
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[:3]), new_tokens=2, namespace=namespace)
    return namespace


def moved(server, question="Which section is about names?", parts=(2, 0)) -> list[int]:
    return server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in parts], question))


def ask(server, prompt, new_tokens, namespace, reuse, **extra) -> dict:
    """An answer of exactly that many tokens."""
    body = server._body(prompt, new_tokens, namespace, reuse, **extra)
    body["sampling_params"]["ignore_eos"] = True
    return server.post("/generate", body).json()


def repaired(server) -> float:
    return server.metrics()["kvshare_repaired_tokens_total"]


def difference(one: list[list[float]], other: list[list[float]]) -> float:
    return max(abs(a - b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True))


def test_no_rows_is_plain_decode(server, tenant):
    prompt, before = moved(server), repaired(server)
    plain = ask(server, prompt, 24, tenant, NAIVE)
    none = ask(server, prompt, 24, tenant, NAIVE | {"repair_rows": 0, "repair_order": "attention"})
    assert none["meta_info"]["kvshare"]["outcome"] == "reused"
    assert none["output_ids"] == plain["output_ids"]
    assert repaired(server) == before


@pytest.mark.parametrize("rows", [1, 32])
def test_a_finished_walk_makes_the_prompt_exact(server, tenant, rows):
    prompt = moved(server, parts=(2, 0) if rows > 1 else (1,))
    cold, before = server.namespace(), repaired(server)
    warm = ask(server, prompt, len(prompt) // rows + 8, tenant, NAIVE | {"repair_rows": rows})
    report = warm["meta_info"]["kvshare"]
    assert (report["outcome"], report["recomputed"]) == ("reused", 0)
    walked = repaired(server) - before
    assert report["reused"] < walked <= len(prompt) - report["exact"]

    full = server.generate(prompt, new_tokens=12, namespace=cold, reuse=False)
    again = server.generate(prompt, new_tokens=12, namespace=tenant, reuse=False)
    assert settled(again)["exact"] == len(prompt) - 1
    assert again.token_ids == full.token_ids
    ids = server.likely_ids(prompt, full.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    after, used = server.log_probabilities(prompt, full.token_ids, ids, tenant, reuse=False)
    assert used["exact"] >= len(prompt) - 1
    assert difference(reference, after) < 1e-3

    other = server.namespace()  # what the same comparison sees when nothing is repaired
    server.generate(chat(SYSTEMS[0], DOCS[:3]), new_tokens=2, namespace=other)
    stale, used = server.log_probabilities(prompt, full.token_ids, ids, other, reuse=NAIVE)
    assert used["outcome"] == "reused" and difference(reference, stale) > 1e-2


def test_an_unfinished_walk_publishes_only_what_it_has_passed(server, tenant):
    prompt = moved(server)
    first = ask(server, prompt, 11, tenant, NAIVE | {"repair_rows": 8})["meta_info"]["kvshare"]
    again = server.generate(prompt, new_tokens=12, namespace=tenant, reuse=False)
    approximate_from = first["exact"] + 40
    assert 80 <= settled(again)["exact"] <= approximate_from + 8 * 11
    full = server.generate(prompt, new_tokens=12, namespace=server.namespace(), reuse=False)
    assert again.token_ids == full.token_ids


@pytest.mark.parametrize("order", ["lagged", "attention"])
@pytest.mark.parametrize("strategy", ["dhd", "naive"])
def test_other_orders_repair_stale_positions_and_publish_none(server, tenant, order, strategy):
    prompt, before = moved(server), repaired(server)
    warm = ask(server, prompt, 30, tenant, {"strategy": strategy, "repair_rows": 64, "repair_order": order})
    report = warm["meta_info"]["kvshare"]
    assert repaired(server) - before == report["reused"] - report["recomputed"], "each stale position once"
    again = server.generate(prompt, new_tokens=12, namespace=tenant, reuse=False)
    assert settled(again)["exact"] <= report["exact"] + 40
    full = server.generate(prompt, new_tokens=12, namespace=server.namespace(), reuse=False)
    assert again.token_ids == full.token_ids


def test_other_requests_of_the_batch_notice_nothing(server, tenant):
    asks = [
        (moved(server, "First?"), tenant, NAIVE | {"repair_rows": 3}),
        (moved(server, "Second?", (1, 2)), tenant, {"repair_rows": 17, "repair_order": "lagged"}),
        (moved(server, "Third?", (0, 1)), tenant, {"repair_rows": 5, "repair_order": "attention"}),
        (moved(server, "Fourth?"), tenant, NAIVE),
        (server.tokenize(chat(SYSTEMS[2], [DOCS[9]])), server.namespace(), True),
    ]
    wanted = {"return_logprob": True, "top_logprobs_num": 2}
    alone = [ask(server, prompt, 40, server.namespace(), False, **wanted) for prompt, _, _ in asks[-1:]]
    stale = ask(server, *asks[3][:1], 40, *asks[3][1:], **wanted)
    before = repaired(server)
    with ThreadPoolExecutor(len(asks)) as pool:
        answers = list(pool.map(lambda a: ask(server, a[0], 40, *a[1:], **wanted), asks))
    assert repaired(server) - before > 40 * 3
    for answer, expected in ((answers[4], alone[0]), (answers[3], stale)):
        assert answer["output_ids"] == expected["output_ids"]
        ours, theirs = (a["meta_info"]["output_token_logprobs"] for a in (answer, expected))
        assert max(abs(x[0] - y[0]) for x, y in zip(ours, theirs, strict=True)) < 1e-3
    for answer in answers:
        meta = answer["meta_info"]
        assert meta["completion_tokens"] == len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == 40
    assert [a["meta_info"]["kvshare"]["outcome"] for a in answers] == ["reused"] * 4 + ["ordinary"]


def test_an_aborted_repair_leaves_nothing(server, tenant):
    prompt, before = moved(server, "Write a very long essay."), repaired(server)
    body = server._body(prompt, 400, tenant, NAIVE | {"repair_rows": 1}, stream=True)
    with server.post("/generate", body, stream=True) as response:
        lines = (line for line in response.iter_lines() if line)
        for _ in range(6):
            next(lines)
    with contextlib.suppress(RuntimeError):
        server.post("/abort_request", {"rid": "", "abort_all": True})
    server.assert_idle_and_clean()
    assert 0 < repaired(server) - before < len(prompt)
    again = server.generate(prompt, new_tokens=8, namespace=tenant, reuse=False)
    cold = server.generate(prompt, new_tokens=8, namespace=server.namespace(), reuse=False)
    assert again.token_ids == cold.token_ids
