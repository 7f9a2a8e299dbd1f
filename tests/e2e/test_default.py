"""Default configuration: overlap scheduling on, page size 1, strategy `consensus`."""

from __future__ import annotations

import itertools
import json
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
from harness import CONTEXT, ROUNDING, SYSTEMS, alike, chat, sections, settled

from kvshare_sched.client.http import kl_divergence

DOCS = sections()


@pytest.fixture
def tenant(server):
    """A namespace whose tree holds one prompt over DOCS[0:4]: its donors."""
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=2, namespace=namespace)
    return namespace


def moved(question="Which section is about names?") -> str:
    return chat(SYSTEMS[1], [DOCS[i] for i in (2, 0, 3, 1)], question)


def test_moved_documents_are_reused_and_answers_stay_close(server, tenant):
    prompt = server.tokenize(moved())
    cold = server.namespace()
    full = server.generate(prompt, new_tokens=16, namespace=cold, reuse=False)
    warm = server.generate(prompt, new_tokens=16, namespace=tenant)

    report = settled(warm)
    assert report["outcome"] == "reused" and report["donors"] == 1
    assert report["reused"] > 0.9 * warm.prompt_tokens
    assert report["recomputed"] >= 0.10 * report["reused"]
    assert warm.token_ids[0] == full.token_ids[0]
    ids = server.likely_ids(prompt, full.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, full.token_ids, ids, cold, reuse=False)
    reused, asked = server.log_probabilities(prompt, full.token_ids, ids, tenant, reuse=True)
    assert asked["outcome"] == "reused", "log-probabilities of the answer must not switch reuse off"
    assert 0 < kl_divergence(reference, reused) < 0.3


def test_counters_and_answers_tell_the_same_numbers(server, tenant):
    before = server.origins()
    answers = [server.generate(moved(f"Question {i}?"), new_tokens=1, namespace=tenant) for i in range(3)]
    after = server.origins()
    for origin in ("exact", "reused", "fresh"):
        assert after[origin] - before[origin] == sum(a.report[origin] for a in answers)
    assert server.metrics()["kvshare_enabled"] == 1


def test_opting_out_is_ordinary_prefill(server, tenant):
    answer = server.generate(moved(), new_tokens=1, namespace=tenant, reuse=False)
    report = settled(answer)
    assert (report["outcome"], report["reason"], report["reused"]) == ("ordinary", "opted_out", 0)


def test_the_same_prompt_again_counts_no_approximate_token_as_exact(server, tenant):
    prompt = server.tokenize(moved())
    first = settled(server.generate(prompt, new_tokens=12, namespace=tenant))
    approximate_from = first["exact"] + 40  # a little text before the first reused run is exact KV
    again = server.generate(prompt, new_tokens=12, namespace=tenant)
    assert settled(again)["exact"] <= approximate_from
    honest = server.generate(prompt, new_tokens=12, namespace=tenant, reuse=False)
    assert settled(honest)["exact"] <= approximate_from
    cold = server.generate(prompt, new_tokens=12, namespace=server.namespace(), reuse=False)
    assert alike(honest, cold)


def test_a_second_turn_after_an_approximate_one_is_not_poisoned(server, tenant):
    prompt = server.tokenize(moved())
    first = server.generate(prompt, new_tokens=8, namespace=tenant)
    assert first.report["outcome"] == "reused"
    turn = [*prompt, *first.token_ids, *server.tokenize("<|im_end|>\n<|im_start|>user\nGo on.<|im_end|>\n")]
    second = server.generate(turn, new_tokens=8, namespace=tenant, reuse=False)
    cold = server.generate(turn, new_tokens=8, namespace=server.namespace(), reuse=False)
    assert settled(second)["exact"] <= first.report["exact"] + 40
    assert alike(second, cold)


def test_a_conversation_over_borrowed_text_is_computed_exactly_from_its_second_turn_on(server, tenant):
    said, reports = server.tokenize(moved()), []
    for turn in range(4):
        answer = server.generate(said, new_tokens=8, namespace=tenant)
        reports.append(settled(answer) | {"prompt": len(said)})
        more = f"<|im_end|>\n<|im_start|>user\n{DOCS[10 + turn][:200]}<|im_end|>\n<|im_start|>assistant\n"
        said = [*said, *answer.token_ids, *server.tokenize(more)]
    assert reports[0]["reused"] and reports[1]["promoted"] == reports[0]["reused"]
    assert (reports[1]["outcome"], reports[1]["reason"]) == ("ordinary", "promoted")
    for before, after in itertools.pairwise(reports[1:]):
        assert after["exact"] >= before["prompt"] and after["promoted"] == 0, "from then on as stock SGLang"
    cold = server.generate(said, new_tokens=8, namespace=server.namespace(), reuse=False)
    assert alike(server.generate(said, new_tokens=8, namespace=tenant, reuse=False), cold)


def test_the_same_beginning_over_and_over_is_computed_exactly_in_the_end(server, tenant):
    reports = [settled(server.generate(moved(f"{i}?"), new_tokens=1, namespace=tenant)) for i in range(12)]
    bought = next(number for number, report in enumerate(reports) if report["promoted"])
    assert bought > 2 and all(report["reused"] for report in reports[:bought])
    assert all(report["exact"] > 0.9 * reports[0]["reused"] for report in reports[bought + 1 :])


def test_an_aborted_approximate_request_leaves_nothing(server, tenant):
    prompt = moved("Write a very long essay.")
    body = server._body(prompt, 400, tenant, True, stream=True)
    with server.post("/generate", body, stream=True) as response:
        next(response.iter_lines())  # the first token is there; hang up
    server.post("/abort_request", {"rid": "", "abort_all": True})
    server.assert_idle_and_clean()
    again = server.generate(prompt, new_tokens=8, namespace=tenant, reuse=False)
    cold = server.generate(prompt, new_tokens=8, namespace=server.namespace(), reuse=False)
    assert alike(again, cold)


@pytest.mark.parametrize(
    ("donor", "asker"),
    [
        ({"extra_key": "a"}, {"extra_key": "b"}),
        ({"cache_salt": "a"}, {"cache_salt": "b"}),
        ({"extra_key": "a", "cache_salt": "bc"}, {"extra_key": "ab", "cache_salt": "c"}),
        ({"extra_key": "ab"}, {"cache_salt": "ab"}),
        ({"extra_key": "näme-\u2603"}, {"extra_key": "na\u0308me-\u2603"}),
    ],
)
def test_nothing_crosses_namespaces(server, donor, asker):
    mark = server.namespace()
    donor, asker = ({k: v + mark for k, v in side.items()} for side in (donor, asker))

    def ask(text, namespace):
        body = {"text": text, "sampling_params": {"max_new_tokens": 1, "temperature": 0}, **namespace}
        return server.post("/generate", body).json()["meta_info"]["kvshare"]

    ask(chat(SYSTEMS[0], DOCS[4:8]), donor)
    target = chat(SYSTEMS[1], DOCS[7:3:-1])
    assert ask(target, asker)["reused"] == 0
    assert ask(target, donor)["reused"] > 500, "the permitted case must hit"


def test_streams_and_parallel_samples_carry_one_report_an_answer(server, tenant):
    body = {
        "text": moved("Stream?"),
        "extra_key": tenant,
        "stream": True,
        "sampling_params": {"max_new_tokens": 4, "temperature": 0, "n": 2},
    }
    chunks = [json.loads(x[6:]) for x in server.post("/generate", body).text.split("\n\n") if x.startswith("data: {")]
    assert {c["index"] for c in chunks} == {0, 1}
    for chunk in chunks:
        report, meta = chunk["meta_info"]["kvshare"], chunk["meta_info"]
        assert report["exact"] + report["reused"] + report["fresh"] == meta["prompt_tokens"]
        assert report["outcome"] == "reused"
    body = {
        "text": ["Hello", chat(SYSTEMS[2], DOCS[3:0:-1], "Batch?")],
        "extra_key": tenant,
        "sampling_params": {"max_new_tokens": 2, "n": 2},
    }
    answers = server.post("/generate", body).json()
    assert [a["meta_info"]["kvshare"]["outcome"] for a in answers] == ["ordinary"] * 2 + ["reused"] * 2


def test_openai_endpoints_tell_too(server):
    messages = [
        {"role": "system", "content": SYSTEMS[0]},
        {"role": "user", "content": "\n\n".join(DOCS[8:12])},
    ]
    chat_body = {"model": "m", "messages": messages, "max_tokens": 2, "temperature": 0}
    server.post("/v1/chat/completions", chat_body)
    messages[1]["content"] = "\n\n".join(DOCS[11:7:-1])
    plain = server.post("/v1/chat/completions", chat_body | {"n": 2}).json()
    reports = plain["metadata"]["kvshare"]
    assert len(reports) == len(plain["choices"]) == 2
    assert all(r["exact"] + r["reused"] + r["fresh"] == plain["usage"]["prompt_tokens"] for r in reports)
    assert all(r["outcome"] == "reused" for r in reports)

    text = server.post("/v1/chat/completions", chat_body | {"stream": True}).text
    chunks = [json.loads(x[6:]) for x in text.split("\n\n") if x.startswith("data: {")]
    told = [c["metadata"]["kvshare"] for c in chunks if c.get("metadata")]
    assert len(told) == 1 and told[0][0]["outcome"] == "reused"

    completion = {"model": "m", "prompt": chat(SYSTEMS[2], DOCS[9:12]), "max_tokens": 2, "temperature": 0}
    told = server.post("/v1/completions", completion).json()["metadata"]["kvshare"][0]
    assert told["outcome"] == "reused"
    out = server.post("/v1/completions", completion | {"custom_params": {"kvshare": "off"}}).json()
    assert out["metadata"]["kvshare"][0]["reason"] == "opted_out"


def test_prompt_log_probabilities_are_never_approximated(server, tenant):
    prompt = server.tokenize(moved("Log-probabilities?"))

    def ask(namespace, start):
        body = server._body(prompt, 1, namespace, True, return_logprob=True, logprob_start_len=start)
        return server.post("/generate", body).json()["meta_info"]

    half = ask(tenant, len(prompt) // 2)["kvshare"]
    assert half["outcome"] == "reused" and half["fresh"] >= len(prompt) // 2
    meta = ask(tenant, 0)
    assert meta["kvshare"]["reason"] == "prompt_logprobs"
    reference = ask(server.namespace(), 0)
    for a, b in zip(meta["input_token_logprobs"][1:], reference["input_token_logprobs"][1:], strict=True):
        assert math.isclose(a[0], b[0], abs_tol=ROUNDING)


def test_constrained_output_with_reuse(server, tenant):
    body = server._body(moved("Answer with a number."), 12, tenant, True)
    body["sampling_params"]["regex"] = "(yes|no), [0-9]{3}"
    answer = server.post("/generate", body).json()
    assert answer["meta_info"]["kvshare"]["outcome"] == "reused"
    assert answer["text"].split(", ")[0] in ("yes", "no") and len(answer["text"].split(", ")[1]) == 3


def test_reusing_and_ordinary_requests_share_batches(server, tenant):
    """What a request answers does not depend on who runs beside it."""
    alone = server.generate(moved("Alone?"), new_tokens=8, namespace=tenant)
    strangers = [chat(SYSTEMS[2], [DOCS[14 + i]], f"Stranger {i}?") for i in range(4)]
    cold = [server.generate(s, new_tokens=8, namespace=server.namespace(), reuse=False) for s in strangers]
    server.generate("x", new_tokens=1, namespace=tenant)
    found = {}
    barrier = threading.Barrier(5)

    def ask(i):
        barrier.wait()
        if i < 4:
            found[i] = server.generate(strangers[i], new_tokens=8, namespace=f"batch-{i}-{tenant}")
        else:
            found[i] = server.generate(moved("Alone?"), new_tokens=8, namespace=tenant)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(5)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(alike(found[i], cold[i]) for i in range(4))
    assert found[4].report["outcome"] == "reused" and alike(found[4], alone)


def test_a_prompt_longer_than_the_context_is_refused(server):
    body = {"input_ids": [42] * (CONTEXT + 1), "sampling_params": {"max_new_tokens": 1}}
    assert requests.post(f"{server.url}/generate", json=body, timeout=60).status_code == 400


def test_flushing_forgets_donors(server):
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[16:19]), new_tokens=1, namespace=namespace)
    server.flush()
    answer = server.generate(chat(SYSTEMS[1], DOCS[18:15:-1]), new_tokens=1, namespace=namespace)
    assert settled(answer)["reason"] == "no_match"
    assert server.metrics()["kvshare_donors"] == 1


def test_a_request_may_bring_its_own_settings(server, tenant):
    asked = {"strategy": "epic", "ratio": 0.3}
    report = settled(server.generate(moved("Own?"), new_tokens=2, namespace=tenant, reuse=asked))
    assert report["strategy"] == "epic" and 0.2 < report["recomputed"] / report["reused"] <= 0.3
    wrong = settled(server.generate(moved("Own?"), new_tokens=2, namespace=tenant, reuse={"strategy": "epik"}))
    assert (wrong["outcome"], wrong["reason"]) == ("ordinary", "bad_setting")


def test_every_strategy_serves_and_all_share_one_batch(server, tenant):
    """Each alone, then all at once: what a request answers does not depend on the strategies beside it."""
    wishes = [{"strategy": s} for s in ("consensus", "dhd", "cacheblend", "epic", "random", "naive", "full")]

    def ask(wish):
        return server.generate(moved("Together?"), new_tokens=6, namespace=tenant, reuse=wish)

    alone = [ask(wish) for wish in wishes]
    for wish, answer in zip(wishes, alone, strict=True):
        report = settled(answer)
        assert (report["outcome"], report["strategy"]) == ("reused", wish["strategy"])
        assert 0 < report["computed_cells"] <= (report["reused"] + report["fresh"]) * report["layers"]
    assert settled(alone[-1])["recomputed"] == alone[-1].report["reused"]
    with ThreadPoolExecutor(len(wishes)) as pool:
        together = list(pool.map(ask, wishes))
    assert all(alike(a, b) for a, b in zip(together, alone, strict=True))
    assert [a.report["recomputed"] for a in together] == [a.report["recomputed"] for a in alone]


def test_several_donors_of_a_text_stand_in_together(server, tenant):
    # Opted out: a request that reuses is no donor of what it borrowed.
    server.generate(chat(SYSTEMS[2], [DOCS[i] for i in (5, 1, 3)]), new_tokens=1, namespace=tenant, reuse=False)
    one = settled(server.generate(moved("Donors?"), new_tokens=1, namespace=tenant, reuse={"strategy": "dhd"}))
    all_ = settled(server.generate(moved("Donors?"), new_tokens=1, namespace=tenant))
    assert all_["donors"] == 2 >= one["donors"] and all_["reused"] == one["reused"]
