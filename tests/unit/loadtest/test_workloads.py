"""Workloads, arrivals and traces: the same on every machine, shaped as they say, readable by others."""

from __future__ import annotations

import json
import random
import statistics
from collections import Counter
from pathlib import Path

import pytest

from kvshare_sched.errors import ConfigError
from kvshare_sched.loadtest import blocks, traces, workloads
from kvshare_sched.loadtest.arrivals import ARRIVALS
from kvshare_sched.loadtest.traces import Request, Trace

FROZEN = Path(__file__).resolve().parents[3] / "benchmarks" / "traces"


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_the_frozen_trace_is_what_the_generator_draws(name):
    frozen = traces.read(FROZEN / f"{name}.jsonl")
    drawn = workloads.build(name, workloads.REQUESTS)
    # The texts belong to one Python; names, lengths and times do not.
    assert frozen.requests == drawn.requests and frozen.warm_up == drawn.warm_up, (
        "a generator changed: python -m kvshare_sched.loadtest.workloads benchmarks/traces"
    )
    assert workloads.build(name, workloads.REQUESTS, seed=1).requests != drawn.requests


@pytest.mark.parametrize("name", workloads.WORKLOADS)
def test_every_block_has_a_text_and_every_answer_is_known_before_it_is_needed(name):
    seen = set()
    for request in workloads.build(name, 60).requests:
        assert all((request.session, step) in seen and step < request.step for step in request.needs)
        seen.add((request.session, request.step))
        assert all(len(blocks.text_of(b)) > 15 for b, _ in request.blocks if blocks.answer_step(b) is None)


def test_popularity_follows_zipf():
    rng = random.Random(0)
    counts = Counter(workloads.zipf(rng, range(10), 1)[0] for _ in range(20_000))
    whole = sum(1 / k for k in range(1, 11))
    for place in range(10):
        expected = 20_000 / (place + 1) / whole
        assert abs(counts[place] - expected) < 5 * expected**0.5  # five standard deviations of a count
    assert len(set(workloads.zipf(rng, range(10), 10))) == 10


def test_rag_shuffles_documents_of_one_tenant():
    requests = workloads.build("rag", 200).requests[12:]
    libraries = {t: set() for t in ("north", "south")}
    leading = Counter()
    for request in requests:
        documents = [name for name, _ in request.blocks if name.startswith("prose/")]
        assert len(set(documents)) == len(documents) in (3, 4, 5)
        libraries[request.tenant].update(documents)
        leading[documents[0]] += 1
    assert not libraries["north"] & libraries["south"]
    assert max(leading.values()) < 0.25 * len(requests), "no document always stands first"


def test_agents_share_material_and_read_each_other():
    trace = workloads.build("agents", 60)
    sessions = list(traces.sessions_of(trace.requests).values())
    for session in sessions[trace.warm_up :]:
        material = [{b for b in request.blocks if b[0].startswith("prose/")} for request in session]
        assert len(session) == 4 and all(m == material[0] for m in material)
        assert len({request.blocks[0] for request in session}) == 4, "four roles"
        assert [request.needs for request in session] == [(), (0,), (0, 1), (1, 2)]


@pytest.mark.parametrize(("name", "documents"), [("rag", 48), ("agents", 32)])
def test_the_warm_up_reads_every_document_and_a_little_more(name, documents):
    trace = workloads.build(name, 60)
    warm_up, _ = traces.parts(trace, [1])
    read = {b for r in warm_up for b in r.blocks if b[0].startswith("prose/")}
    assert len(read) == documents and len(warm_up) == 12


def test_an_edited_file_keeps_its_ends():
    session = next(iter(traces.sessions_of(workloads.build("code-edit", 8).requests).values()))
    for before, after in zip(session, session[1:], strict=False):
        assert before.blocks[:2] == after.blocks[:2] and before.blocks[5] == after.blocks[5]
        assert before.blocks[2:5] != after.blocks[2:5]


def test_no_repeat_repeats_nothing():
    names = [b for r in workloads.build("no-repeat", 100).requests for b in r.blocks]
    assert len(set(names)) == len(names)
    texts = [blocks.text_of(name)[:80] for name, _ in names[:40]]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("name", ARRIVALS)
def test_arrivals_are_one_a_second_and_seeded(name):
    times = ARRIVALS[name](20_000, random.Random(3))
    assert times == ARRIVALS[name](20_000, random.Random(3)) == sorted(times)
    assert times[-1] / len(times) == pytest.approx(1, abs=0.05)


def test_bursts_are_burstier_than_poisson():
    def variation(name):
        times = ARRIVALS[name](5_000, random.Random(3))
        gaps = [b - a for a, b in zip(times, times[1:], strict=False)]
        return statistics.stdev(gaps) / statistics.fmean(gaps)

    assert variation("poisson") == pytest.approx(1, abs=0.1)
    assert variation("bursty") > 2


# ---- traces ----


def request(at_s: float, session: str, step: int = 0) -> Request:
    return Request(at_s, "t", session, step, (("prose/1", 40),), 8)


def test_a_trace_survives_writing(tmp_path):
    mine = Request(0.5, "t", "s", 0, (("prose/1", 40), ("answer/0", 0)), 8, priority=3)
    trace = Trace("mine", (mine, request(1.0, "z")), 1, {"seed": 4})
    traces.write(tmp_path / "mine.jsonl", trace)
    assert traces.read(tmp_path / "mine.jsonl") == trace
    assert len(traces.read(tmp_path / "mine.jsonl", 1).requests) == 1


def test_parts_tear_no_session():
    trace = Trace("x", tuple(request(i, str(i // 3), i % 3) for i in range(12)), warm_up=1)
    warm_up, first, second = traces.parts(trace, [2, 4])
    assert [[r.session for r in part] for part in (warm_up, first, second)] == [
        ["0"] * 3,
        ["1"] * 3,
        ["2"] * 3 + ["3"] * 3,
    ]
    with pytest.raises(ConfigError, match="longer trace"):
        traces.parts(trace, [10])


def test_a_new_pace_keeps_the_rhythm():
    due = traces.retimed([request(t, str(t)) for t in (10, 11, 14)], 2.0)
    assert [r.at_s for r in due] == pytest.approx([0, 0.25, 1.0])  # three requests at two a second: 2 gaps of 0.5 s
    assert [r.at_s for r in traces.retimed(due, None)] == [r.at_s for r in due]


def test_mooncake_lines(tmp_path):
    path = tmp_path / "mooncake.jsonl"
    rows = [
        {"timestamp": 3000, "input_length": 600, "output_length": 5, "hash_ids": [7, 9]},
        {"timestamp": 1500, "input_length": 512, "output_length": 9, "hash_ids": [7]},
    ]
    path.write_text("\n".join(json.dumps(r) for r in rows))
    first, second = traces.read(path).requests
    assert (first.at_s, first.new_tokens, first.blocks) == (1.5, 9, (("words/7", 512),))
    assert (second.at_s, second.blocks) == (3.0, (("words/7", 512), ("words/9", 88)))
    assert blocks.text_of("words/7") != blocks.text_of("words/9")


def test_sharegpt_conversations(tmp_path):
    path = tmp_path / "chats.json"
    turns = [("system", "Be kind."), ("human", "Hello"), ("gpt", "Hi!"), ("human", "Bye")]
    path.write_text(json.dumps([{"id": "a", "conversations": [{"from": w, "value": t} for w, t in turns]}]))
    first, second = traces.read(path).requests
    assert first.blocks == (("text/Be kind.", 0), ("text/Hello", 0)) and first.step == 0
    assert second.blocks == (*first.blocks, ("answer/0", 0), ("text/Bye", 0)) and second.needs == (0,)
    assert blocks.text_of("text/Hello") == "Hello\n\n"


def test_sharegpt_conversations_with_one_id_are_two_sessions(tmp_path):
    """Else the answers of one would stand in the prompts of the other."""
    path = tmp_path / "chats.json"
    said = [{"id": "same", "messages": [{"role": "user", "content": text}]} for text in ("Hello", "Bye")]
    path.write_text(json.dumps(said))
    assert len({request.session for request in traces.read(path).requests}) == 2


@pytest.mark.parametrize("content", ['{"timestamp": 1}', "no json", '[{"id": 1}]', '{"trace": "x"}\n{"at_s": 1}'])
def test_other_files_are_refused_by_name(tmp_path, content):
    path = tmp_path / "other.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match="other.jsonl"):
        traces.read(path)


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="accepted: rag"):
        workloads.build("nothing", 5)
    with pytest.raises(ConfigError, match="accepted: prose"):
        blocks.text_of("poem/3")
    with pytest.raises(ConfigError, match="there are"):
        blocks.text_of("prose/99999")
