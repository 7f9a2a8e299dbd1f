"""Tenants to whom reuse is hidden: what they pay, when their answers leave, and what those still say."""

import asyncio
import contextlib
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_lookup import COSTS, LIBRARY, MARK, TENANTS, World, prompt, space

from kvshare_sched.engine.sglang import reports
from kvshare_sched.engine.sglang.http import identity as http_identity
from kvshare_sched.engine.sglang.http import reports as http_reports
from kvshare_sched.engine.sglang.reports import attach_report
from kvshare_sched.observe import recent_requests
from kvshare_sched.records.request import RequestView
from kvshare_sched.tenants.delayed_answers import DELAY, Hold, delay_s, shifted, without_traces
from kvshare_sched.tenants.policy import STAMP_KEY, Stamp, lenders
from kvshare_sched.tenants.scheduler_state import lenders_of

LENDERS = tuple(lenders(TENANTS.tenants["acme"], TENANTS, MARK))
HIDDEN, OPEN = Stamp("acme", LENDERS, hide_reuse=2.0), Stamp("acme", LENDERS)


def admitted(world: World, stamp: Stamp, tokens, exact_len: int = 0):
    """A session whose whole prompt has run, and what travels with its answer."""
    view = RequestView("r", space("acme"), tokens, exact_len, len(tokens), {}, lenders_of(stamp, space("acme")))
    session = world.pipeline.admit(view, "r", len(tokens), exact_len, stamp)
    req = SimpleNamespace(
        customized_info=None,
        rid="r",
        sampling_params=SimpleNamespace(max_new_tokens=4),
        extra_key=space("acme").extra_key,
        cache_salt=None,
    )
    req.lora_id, req.sampling_params = None, SimpleNamespace(max_new_tokens=4)
    session.on_report = lambda report: attach_report(req, session, report, world.pipeline)
    world.pipeline.begin(session)
    session.cells = 100
    world.pipeline.chunk_done(session, len(tokens))
    world.pipeline.release("r")
    return session, req.customized_info["kvshare"][0]


def test_a_hidden_request_pays_and_is_timed_as_if_nothing_had_been_cached():
    world, tokens = World(strategy="epic"), prompt(1)
    cold, told_cold = admitted(world, HIDDEN, tokens)
    world.donate(LIBRARY, 1)
    warm, told_warm = admitted(world, HIDDEN, tokens)
    shown, told = admitted(world, OPEN, tokens)
    _, told_exact = admitted(world, HIDDEN, tokens, exact_len=len(tokens) - 1)
    assert warm.plan.reused_len == shown.plan.reused_len == 600, "it does reuse"
    assert warm.charge(0, 630, COSTS) == cold.charge(0, 630, COSTS) == 630 > shown.charge(0, 630, COSTS)
    assert told["reused"] == 600 and set(told_cold) == set(told_warm) == {"hold"}, "no report, only when to answer"
    due = [Hold(*each["hold"]).due_s for each in (told_cold, told_warm, told_exact)]
    assert due == [pytest.approx(2.0 * COSTS.prefill_s(630))] * 3
    saved = [Hold(*each["hold"]).saved_s for each in (told_cold, told_warm, told_exact)]
    assert saved[0] == 0 < saved[1] < due[0] and saved[2] == pytest.approx(2.0 * 629 * 4 * 1e-4)


def test_the_client_gets_no_report_and_nobody_a_page(monkeypatch):
    monkeypatch.setattr(recent_requests, "requests", recent_requests.Recent())
    world = World()
    world.donate(LIBRARY, 1)
    for stamp, reported in ((HIDDEN, False), (OPEN, True)):
        meta, state = {"id": "r"}, SimpleNamespace()
        info = {"kvshare": [[admitted(world, stamp, prompt(1))[1]]]}
        http_reports.update_request_meta_info(lambda *a: None, None, meta, state, info, 0, None)
        assert ("kvshare" in meta) == reported == bool(recent_requests.requests.find("r"))
        assert (getattr(state, DELAY, 0.0) > 0) != reported


def test_a_trace_that_the_client_may_have_begun_tells_nothing_of_a_hidden_request(monkeypatch):
    marked = []
    monkeypatch.setattr(reports.trace, "mark", lambda req, report: marked.append(report.reused))
    world = World(strategy="epic")
    world.donate(LIBRARY, 1)
    for stamp, expected in ((HIDDEN, []), (OPEN, [600])):
        session, _ = admitted(world, stamp, prompt(1))
        req = SimpleNamespace(customized_info={"kvshare": []}, sampling_params=SimpleNamespace(max_new_tokens=4))
        reports.tell(req, session, world.pipeline, session.report(COSTS))
        assert marked == expected


@given(st.floats(0, 10), st.floats(0, 10), st.floats(0, 20))
def test_idle_answers_leave_alike_busy_ones_by_what_was_saved(due, share, took):
    saved = min(due, share)
    kept = delay_s(Hold(100.0, due, saved), 100.0 + took)
    assert 0 <= saved <= kept + 1e-9 and kept <= due
    if took + saved <= due:
        assert took + kept == pytest.approx(due, abs=1e-6), "whatever reuse made of it"


def test_a_clock_that_makes_no_sense_keeps_nobody_longer_than_the_estimate():
    assert delay_s(Hold(1e9, 3.0, 1.0), 0.0) == 3.0 and delay_s(Hold(0.0, 3.0, 0.0), 1e9) == 0.0


# ---- the delay line, on a clock of its own ----


class Clock(asyncio.SelectorEventLoop):
    """An event loop whose time passes when nothing else is to do."""

    now = 0.0

    def time(self):
        return self.now

    def _run_once(self):
        if not self._ready and self._scheduled:
            self.now = max(self.now, self._scheduled[0]._when)
        super()._run_once()


def on_a_clock(coroutine):
    with asyncio.Runner(loop_factory=Clock) as runner:
        return runner.run(coroutine)


def chunk(**meta):
    return {"text": "a", "output_ids": [1], "meta_info": {"id": "r", **meta}}


async def engine(*times, ids=None, then=None):
    """Chunks at these times; each time the list of ids that all of them share has grown."""
    ids = [] if ids is None else ids
    for at in times:
        await asyncio.sleep(at - asyncio.get_running_loop().time())
        ids.append(len(ids))
        yield chunk() | {"output_ids": ids}
    if then is not None:
        raise then


async def arrivals(answers) -> list[tuple[float, int]]:
    """(when, ids in it) of each chunk."""
    return [(asyncio.get_running_loop().time(), len(one["output_ids"])) async for one in answers]


def test_every_part_is_as_late_as_the_first_and_tells_only_what_it_had():
    assert on_a_clock(arrivals(shifted(engine(1.0, 1.5, 4.0), lambda: 2.0))) == [(3.0, 1), (3.5, 2), (6.0, 3)]
    assert on_a_clock(arrivals(shifted(engine(1.0, 1.5), lambda: 0.0))) == [(1.0, 1), (1.5, 2)]


def test_a_client_that_does_not_read_lets_nothing_pile_up():
    """And yet gets everything, on time, when it reads again."""
    ids = []

    async def slowly():
        answers = shifted(engine(*range(1, 101), ids=ids), lambda: 2.0)
        first = len((await anext(answers))["output_ids"])
        before = len(ids)
        await asyncio.sleep(90)
        piled = len(ids) - before
        return first, before, piled, [len(one["output_ids"]) async for one in answers]

    first, before, piled, rest = on_a_clock(slowly())
    assert (first, before) == (1, 2) and piled <= 1 and rest == list(range(2, 101))


def test_a_held_answer_keeps_nobody_else_waiting():
    async def both():
        held, free = shifted(engine(1.0), lambda: 50.0), shifted(engine(2.0), lambda: 0.0)
        return await asyncio.gather(arrivals(held), arrivals(free))

    assert on_a_clock(both()) == [[(51.0, 1)], [(2.0, 1)]]


def test_an_error_comes_after_what_came_before_it():
    async def collect():
        seen = []
        with contextlib.suppress(ValueError):
            async for one in shifted(engine(1.0, then=ValueError("aborted")), lambda: 2.0):
                seen.append((asyncio.get_running_loop().time(), one))
            seen.append("no error")
        return seen

    assert [at for at, _ in on_a_clock(collect())] == [3.0]


def test_a_client_that_leaves_ends_the_engines_side_too():
    closed = []

    async def endless():
        try:
            while True:
                await asyncio.sleep(1)
                yield chunk()
        finally:
            closed.append(True)

    async def leave():
        answers = shifted(endless(), lambda: 5.0)
        await anext(answers)
        await answers.aclose()
        return closed

    assert on_a_clock(leave()) == [True]


def test_numbers_that_tell_are_left_out_and_the_rest_stays():
    logprobs = [(-0.5, 7, None)]
    meta = {"cached_tokens": 512, "cached_tokens_details": {"device": 512}, "queue_time": 0.1, "e2e_latency": 1.0}
    meta |= {"prompt_tokens": 600, "finish_reason": {"type": "stop"}, "output_token_logprobs": logprobs}
    told = without_traces(chunk(**meta))
    assert told["meta_info"] == {
        **{"id": "r", "cached_tokens": 0, "prompt_tokens": 600, "finish_reason": {"type": "stop"}},
        "output_token_logprobs": [(-0.5, 7, None)],
    }
    logprobs.append("later")
    assert len(told["meta_info"]["output_token_logprobs"]) == 1


# ---- the hooks ----


def through(stamp, edge="in force") -> list[tuple[float, dict]]:
    async def original(manager, obj, state, request):
        yield chunk(cached_tokens=512)

    async def collect():
        obj = SimpleNamespace(sampling_params={"custom_params": {STAMP_KEY: stamp.to_text()}})
        state = SimpleNamespace(**{DELAY: 4.0})
        answers = http_identity.stream_one(original, None, obj=obj, state=state, request=None)
        return [(asyncio.get_running_loop().time(), one["meta_info"]) async for one in answers]

    http_identity._edge = edge
    try:
        return on_a_clock(collect())
    finally:
        http_identity._edge = None


def test_only_hidden_answers_are_held_and_only_with_a_tenants_file():
    assert through(HIDDEN) == [(4.0, {"id": "r", "cached_tokens": 0})]
    assert through(OPEN) == through(HIDDEN, edge=None) == [(0.0, {"id": "r", "cached_tokens": 512})]


@pytest.mark.parametrize("stamp", [HIDDEN, OPEN])
def test_the_engine_tells_of_a_hidden_requests_first_token_at_once(stamp, monkeypatch):
    sent = []

    async def original(manager, tokenized):
        sent.append(tokenized.stream)

    monkeypatch.setattr(http_identity, "_edge", SimpleNamespace(flights=SimpleNamespace(grow=lambda *a: None)))
    params = SimpleNamespace(custom_params={STAMP_KEY: stamp.to_text()}, max_new_tokens=1)
    tokenized = SimpleNamespace(stream=False, sampling_params=params, input_ids=[1])
    asyncio.run(http_identity.send_one(original, SimpleNamespace(context_len=10), tokenized))
    assert sent == [stamp is HIDDEN]
