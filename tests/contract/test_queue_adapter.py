"""The hooks of the waiting queue around SGLang's own policy and results, with stand-ins for requests and adder."""

from __future__ import annotations

import sys
import zlib
from array import array
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from sglang.srt.managers.schedule_policy import AddReqResult, SchedulePolicy

from kvshare_sched.engine.sglang import queue_hooks
from kvshare_sched.engine.sglang.requests import namespace_of
from kvshare_sched.engine.sglang.waiting_queue import ServerQueue, _name
from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.observe.series import WAITS
from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.session import attach
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.policy import Stamp

sys.path.append(str(Path(__file__).parents[1] / "unit"))
from fakes import FakeTree, NamedPipeline  # noqa: E402

COSTS = CostModel(cell_s=1e-5, copy_s=1e-6, overhead_s=0.0, layers=10)
DOC = np.random.default_rng(7).integers(0, 40_000, 600)


class Req:
    """The attributes of SGLang's request that we read."""

    def __init__(self, rid, tokens=100, tenant="t", priority=None, wish=None):
        ids = (
            np.random.default_rng(zlib.crc32(rid.encode())).integers(0, 40_000, tokens)
            if np.isscalar(tokens)
            else tokens
        )
        self.rid, self.extra_key, self.cache_salt, self.lora_id, self.priority = rid, tenant, None, None, priority
        self.origin_input_ids, self.output_ids = array("q", np.asarray(ids, np.int64).tobytes()), array("q")
        self.full_untruncated_fill_ids = self.origin_input_ids
        self.sampling_params = SimpleNamespace(custom_params={"kvshare": wish} if wish else None, max_new_tokens=8)
        self.prefix_len, self.done = 0, False
        self.input_embeds = self.multimodal_inputs = self.positional_embed_overrides = self.session = None
        self.return_hidden_states = self.return_pooled_hidden_states = self.skip_radix_cache_insert = False
        self.beam_group = None
        self.extend_end = len(self.origin_input_ids)
        self.extend_len = self.extend_end

    def finished(self):
        return self.done


class Adder:
    """Takes requests until `budget` tokens are gone, as SGLang does."""

    def __init__(self, cache, budget=1 << 30):
        self.tree_cache, self.budget, self.can_run_list, self.new_chunked_req = cache, budget, [], None
        self.running_batch, self.rem_total_tokens = None, 100_000
        self.token_to_kv_pool_allocator = SimpleNamespace(size=100_000)

    def add_one_req(self, req, has_chunked_req=False, truncation_align_size=None):
        if self.budget <= 0:
            return AddReqResult.OTHER
        req.extend_end = min(len(req.origin_input_ids), req.prefix_len + self.budget)
        self.budget -= req.extend_end - req.prefix_len
        self.can_run_list.append(req)
        if req.extend_end < len(req.origin_input_ids):
            self.new_chunked_req = req
        return AddReqResult.CONTINUE


class World:
    """One engine: SGLang's real policy object over a cache that carries our queue."""

    def __init__(self, policy="fair", priority=False, **settings):
        config = KVShareConfig(audit_share=0.0, **settings)
        self.pipeline = NamedPipeline(config, FakeTree(), COSTS)
        self.queue = ServerQueue(policy, config, self.pipeline, chunk=1000)
        self.cache = SimpleNamespace(queue=self.queue, supports_fast_match_prefix=lambda: False, disable=False)
        self.cache.supports_prefix_sharing = lambda: False
        self.policy = SchedulePolicy.__new__(SchedulePolicy)
        self.policy.policy, self.policy.tree_cache = (
            SchedulePolicy._validate_and_adjust_policy(self.policy, "fcfs", self.cache),
            self.cache,
        )
        self.policy.enable_priority_scheduling, self.policy.priority_sign = priority, -1
        self.original = lambda *args, **kwargs: None
        self.waiting: list[Req] = []

    def order(self) -> list[str]:
        queue_hooks.calc_priority(self.original, self.policy, self.waiting, None, processed_tokens=0)
        return [req.rid for req in self.waiting]

    def go(self, budget=1 << 30) -> list[str]:
        """One pass of SGLang's loop; returns who was admitted."""
        self.order()
        adder = Adder(self.cache, budget)
        for req in self.waiting:
            if queue_hooks.add_one_req(partial(Adder.add_one_req), adder, req) != AddReqResult.CONTINUE:
                break
        self.waiting = [r for r in self.waiting if r not in adder.can_run_list]
        return [r.rid for r in adder.can_run_list]

    def begin(self, req, session):
        """It was admitted, as far as reuse is concerned."""
        attach(req, session)
        self.pipeline.begin(session)

    def name(self, rid: str) -> str:
        """By which the queue knows the waiting request of that id."""
        [found] = {_name(req) for req in self.waiting if req.rid == rid}
        return found

    def publish(self, req):
        self.pipeline.publish(req.rid, namespace_of(req), np.array(req.origin_input_ids))


def test_requests_are_sorted_by_what_they_cost_beyond_128_too():
    world = World()
    world.waiting = [Req(f"r{n}", tokens=600 - n) for n in range(500)]
    for _ in range(10):  # a bounded number is looked at in each pass
        found = world.order()
    assert found[:3] == ["r499", "r498", "r497"] and len(set(found)) == 500
    assert world.queue.failures == 0


def test_a_prompt_over_cached_text_comes_first_but_only_in_its_own_namespace():
    world = World()
    world.publish(Req("donor", DOC, tenant="mine"))
    order = np.concatenate((DOC[300:], DOC[:300]))
    world.waiting = [Req("theirs", order, "other"), Req("long", 590, "mine"), Req("mine", order, "mine")]
    assert world.order()[0] == "mine"
    assert world.queue.queue.work(world.name("theirs")) == 600


def test_looking_changes_nothing_in_the_tree():
    world = World()
    world.publish(Req("donor", DOC))
    world.waiting = [Req("a", DOC), Req("b", DOC)]
    world.order()
    assert set(world.pipeline.tree.calls) <= {"prefix_len"} and not world.pipeline.tree.active


def test_text_that_becomes_known_moves_a_waiting_request_forward():
    world = World()
    world.waiting = [Req("short", 400), Req("over", np.concatenate((DOC, DOC[:50])))]
    assert world.order() == ["short", "over"]
    world.publish(Req("donor", DOC))
    assert world.order() == ["over", "short"]


def test_the_second_request_over_one_text_waits_until_the_first_has_published():
    world = World(quantum=100_000)
    first, second = Req("first", DOC), Req("second", DOC)
    world.waiting = [first, second, Req("other", 600)]
    assert world.go() == ["first", "other"]
    assert world.go() == []
    world.publish(first)
    assert world.go() == ["second"]


def test_nobody_waits_for_a_text_that_somebody_else_computes_in_another_namespace():
    world = World(quantum=100_000)
    world.waiting = [Req("mine", DOC, "mine"), Req("theirs", DOC, "theirs"), Req("cheaper", 599, "theirs")]
    assert world.go() == ["cheaper", "mine", "theirs"], "nor does a price drop because others want the text"


def test_nobody_waits_for_ever_for_a_text_that_never_comes():
    world = World(duplicate_wait=3)
    world.waiting = [Req("first", DOC), Req("second", DOC)]
    assert [world.go() for _ in range(5)] == [["first"], [], [], [], ["second"]]


def test_prompt_tokens_repaired_while_decoding_are_paid_too():
    world = World(quantum=1000)
    req = Req("r", 300)
    world.begin(req, world.pipeline.admit(Reason.OPTED_OUT, "r", 300, 0))
    world.waiting = [req]
    world.go()
    before = world.queue._accounts.deficits["t"]
    world.pipeline.sessions["r"].repaired = 64
    world.waiting = [Req("next", 10, "other")]  # SGLang asks only while somebody waits
    world.order()
    assert world.queue._accounts.deficits["t"] == before - 64
    world.pipeline.sessions["r"].repaired = 70
    world.pipeline.release("r")  # as the cache backend does it: before the queue hears of it
    req.done = True
    world.queue.released(req)
    assert world.queue._accounts.deficits.get("t", before - 70) == before - 70 and world.queue.failures == 0


def test_a_tenant_that_has_spent_its_quantum_stops_the_pass():
    world = World(quantum=250)
    world.waiting = [Req(f"hot{n}", 100, "hot") for n in range(9)] + [Req("cold", 500, "cold")]
    assert world.go() == ["hot0", "hot1", "hot2", "cold", *(f"hot{n}" for n in range(3, 9))]
    world.queue.queue.accounts.charge("hot", 1000)
    world.waiting = [Req("hot", 10, "hot"), Req("new", 800, "new")]
    assert world.go(budget=100) == ["new"]


def test_an_abort_while_waiting_and_one_while_running():
    world = World(quantum=1000)
    running, waiting = Req("running", 400), Req("waiting", 300)
    world.waiting = [running, waiting]
    assert world.go(budget=100) == ["waiting"]
    world.waiting.remove(running)
    world.order()
    books = world.queue.queue.accounts
    assert books.deficits["t"] == 900, "100 tokens ran; nothing is owed for having waited"
    waiting.done = True
    world.queue.released(waiting)
    assert books.deficits["t"] == 900 and not world.queue.queue.running


def test_a_retracted_request_gets_its_prompt_back_and_keeps_its_place():
    world = World(quantum=1000)
    req = Req("r", 300)
    world.waiting = [req]
    world.go()
    req.output_ids = array("q", [1, 2, 3])
    world.queue.released(req)  # not finished: retracted
    assert world.queue.queue.accounts.deficits["t"] == 1000 - 6
    world.waiting = [Req("later", 303), req]
    assert world.order() == ["r", "later"]


def test_the_only_request_that_waited_is_not_lost_when_it_is_retracted_at_once():
    """SGLang's list then looks as we left it."""
    world = World(quantum=1000)
    req = Req("r", 300)
    world.waiting = [req]
    assert world.go() == ["r"]
    world.queue.released(req)
    world.waiting = [req]
    assert world.order() == ["r"] and world.go() == ["r"]
    assert world.queue.failures == 0


def test_a_list_that_would_lose_somebody_is_not_put_in_force(monkeypatch):
    world = World()
    world.waiting = [Req("a", 300), Req("b", 100)]
    original = world.queue.queue.order
    with monkeypatch.context() as broken:
        broken.setattr(world.queue.queue, "order", lambda room: replace(original(room), rows=np.array([0])))
        assert sorted(world.order()) == ["a", "b"]
    assert world.queue.failures == 1


def test_output_tokens_are_charged_while_they_come():
    world = World(quantum=1000)
    req = Req("r", 300)
    world.waiting = [req]
    world.go()
    req.output_ids = array("q", range(50))
    world.waiting = [Req("next", 10)]
    world.order()
    assert world.queue.queue.accounts.deficits["t"] == 1000 - 300 - 100


def test_priorities_are_tiers_when_sglang_has_them_enabled():
    reqs = [Req("low", 10, priority=1), Req("high", 900, priority=5), Req("none", 5, priority=-sys.maxsize - 1)]
    world = World(priority=True)
    world.waiting = list(reqs)
    assert world.order() == ["high", "low", "none"]
    world = World(priority=False)
    world.waiting = list(reqs)
    assert world.order() == ["none", "low", "high"]


def test_with_priorities_too_an_unchanged_queue_is_not_sorted_again_by_us():
    world, sorted_by_sglang, registry = World(priority=True), [], CollectorRegistry()
    world.queue._metrics = ShareMetrics(registry=registry).queue

    def original(policy, waiting, *_, **__):
        before = list(waiting)
        SchedulePolicy._sort_by_priority_and_fcfs(waiting, policy.priority_sign)
        sorted_by_sglang.append(waiting != before)

    world.original = original
    world.waiting = [Req(f"r{n}", 100 + 50 * (7 * n % 5), priority=n % 2) for n in range(10)]
    for place, req in enumerate(world.waiting):
        req.time_stats = SimpleNamespace(wait_queue_entry_time=place)
    first = world.order()
    assert [world.order() for _ in range(3)] == [first] * 3
    assert all(sorted_by_sglang), "else this shows nothing"
    assert registry.get_sample_value("kvshare_order_passes_total", {"result": "unchanged"}) == 3
    assert [req.priority for req in world.waiting] == [1] * 5 + [0] * 5
    world.waiting.append(Req("urgent", 10, priority=9))
    world.waiting[-1].time_stats = SimpleNamespace(wait_queue_entry_time=99)
    assert world.order() == ["urgent", *first] and world.queue.failures == 0


def test_a_failure_leaves_sglangs_order_and_the_next_pass_is_ours_again(monkeypatch):
    world = World()
    world.waiting = [Req("b", 500), Req("a", 100)]
    with monkeypatch.context() as broken:
        broken.setattr(world.queue.queue, "order", lambda room: 1 / 0)
        assert world.order() == ["b", "a"]
    assert world.queue.failures == 1
    assert world.go() == ["a", "b"], "in force again, nobody lost"


def test_a_failure_forgets_no_debt():
    world = World(quantum=1000)
    world.waiting = [Req("a", 300)]
    world.go()
    world.queue._failed("a test")
    assert world.queue.queue.accounts.deficits["t"] == 700 and not world.queue.queue.running
    world.waiting = [Req("b", 100)]
    assert world.go() == ["b"] and world.queue.queue.accounts.deficits["t"] == 600


def test_a_prompt_that_cannot_be_read_keeps_its_price_and_the_others_their_order(monkeypatch):
    world = World()
    broken, original = Req("broken", 400), world.pipeline.index.fingerprints
    poison = np.array(broken.origin_input_ids)

    def fingerprints(tokens, thinning):
        if np.array_equal(tokens, poison):
            raise RuntimeError("unreadable")
        return original(tokens, thinning)

    monkeypatch.setattr(world.pipeline.index, "fingerprints", fingerprints)
    world.waiting = [Req("dear", 500), broken, Req("cheap", 100)]
    world.order()
    assert world.order() == ["cheap", "broken", "dear"] and world.queue.failures == 1


def test_the_oldest_wait_is_shown_while_somebody_waits_and_nothing_when_the_list_is_empty(monkeypatch):
    world, registry = World(), CollectorRegistry()
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr("kvshare_sched.engine.sglang.waiting_queue.time.perf_counter", lambda: clock.now)
    world.queue._metrics = ShareMetrics(registry=registry).queue

    def shown() -> tuple:
        waiting = sum(registry.get_sample_value("kvshare_waiting_requests", {"for": w}) for w in WAITS)
        return registry.get_sample_value("kvshare_oldest_wait_seconds"), waiting

    world.waiting = [Req("first", 900)]
    world.order()
    clock.now = 107.0
    world.waiting.append(Req("second", 50))
    world.order()
    assert shown() == (7.0, 2)
    world.waiting = [req for req in world.waiting if req.rid == "second"]  # the first one was aborted
    clock.now = 109.0
    world.order()
    assert shown() == (2.0, 1)
    assert world.go() == ["second"]  # SGLang asks for no further order now
    assert shown() == (0.0, 0)


def test_clients_that_gave_up_while_they_waited_are_forgotten_when_the_engine_is_idle():
    world, registry = World(), CollectorRegistry()
    world.queue._metrics = ShareMetrics(registry=registry).queue
    world.waiting = [Req("a", 900), Req("b", 50)]
    world.order()
    world.waiting = []  # SGLang asks for no order of an empty list
    scheduler = SimpleNamespace(tree_cache=world.cache, is_fully_idle=lambda: False)
    queue_hooks.on_idle(world.original, scheduler)
    turn = {"for": "turn"}
    assert registry.get_sample_value("kvshare_waiting_requests", turn) == 2, "something may still run"
    scheduler.is_fully_idle = lambda: True
    queue_hooks.on_idle(world.original, scheduler)
    assert registry.get_sample_value("kvshare_waiting_requests", turn) == 0
    assert not world.queue.waits and not any(world.queue.queue.table.items)
    world.waiting = [Req("b", 50), Req("c", 30)]
    assert world.go() == ["c", "b"] and world.queue.failures == 0


def test_a_wait_is_what_the_engine_served_meanwhile():
    world, registry = World(quantum=100), CollectorRegistry()
    world.queue._metrics = ShareMetrics(registry=registry).queue
    world.waiting = [Req("a", 300), Req("b", 500)]
    assert world.go() == ["a", "b"] and world.queue.failures == 0
    waits = [registry.get_sample_value(f"kvshare_tenant_wait_tokens_{n}", {"tenant": "t"}) for n in ("count", "sum")]
    assert waits == [2, 300], "the second waited while the first was served"


def test_metrics_that_cannot_be_written_change_nothing():
    class Broken:
        def ordered(self, *_):
            raise OSError("disk full")

        observe = started = ordered

    world = World()
    world.queue._metrics = Broken()
    world.waiting = [Req("b", 500), Req("a", 100)]
    assert world.go() == ["a", "b"] and world.queue.failures == 0


def test_two_requests_with_one_id_are_two_requests():
    world = World()
    one, two = Req("same", 500), Req("same", 100)
    world.waiting = [one, two]
    assert world.go() == ["same", "same"] and world.queue.failures == 0
    assert len(world.queue.queue.running) == 2
    one.done = True
    world.queue.released(one)
    assert len(world.queue.queue.running) == 1 and not world.queue.failures


def test_room_for_cached_text_is_kept_while_others_run_and_never_when_nobody_does():
    world = World(pool_keep=0.5)
    world.waiting = [Req("a", 300)]
    world.order()
    world.queue.queue.in_use.hit([("text", 60_000)], 0)
    adder = Adder(world.cache)
    adder.rem_total_tokens = 50_200  # of 100,000
    assert world.queue.has_room(world.waiting[0], adder), "the engine is idle"
    adder.running_batch = SimpleNamespace(reqs=[Req("running")])
    assert not world.queue.has_room(world.waiting[0], adder)
    assert queue_hooks.add_one_req(Adder.add_one_req, adder, world.waiting[0]) == AddReqResult.NO_TOKEN
    assert queue_hooks.chunk_limit(None, world.policy, Req("long", 5000), [], 1000, 1) is None, "for nobody's good"
    adder.rem_total_tokens = 50_400
    assert world.queue.has_room(world.waiting[0], adder)


def test_what_a_prompt_finds_is_in_use_and_counts_once():
    world = World(duplicate_wait=0)
    long = np.random.default_rng(1).integers(0, 40_000, 20_000)
    for rid, tenant, found in (("new", "t", 0), ("half", "t", 10_000), ("again", "t", 10_000), ("other", "u", 10_000)):
        world.waiting = [req := Req(rid, long, tenant)]
        world.begin(req, world.pipeline.admit(Reason.OPTED_OUT, rid, len(long), found))
        req.prefix_len = found
        assert world.go() == [rid]
        in_use = world.queue.queue.in_use.tokens(1e9)
        wanted = {"new": 0, "other": 20_000}.get(rid, 10_000)
        assert in_use == pytest.approx(wanted, rel=0.3) and world.queue.failures == 0


def test_text_lent_by_others_is_in_use_and_hidden_reuse_is_not():
    for hidden in (False, True):
        world = World()
        document = np.random.default_rng(2).integers(0, 40_000, 20_000)
        world.publish(Req("donor", document))
        req = Req("r", np.concatenate((document[10_000:], document[:10_000])))
        ids = np.asarray(req.origin_input_ids)
        stamp = Stamp("t", hide_reuse=1.0) if hidden else None
        session = world.pipeline.admit(RequestView("r", namespace_of(req), ids, 0, len(ids)), "r", len(ids), 0, stamp)
        assert session.plan.reused_len > 19_000
        world.begin(req, session)
        world.waiting = [req]
        world.go()
        in_use = world.queue.queue.in_use.tokens(1e9)
        assert in_use == (0 if hidden else pytest.approx(20_000, rel=0.3)) and world.queue.failures == 0


def test_a_full_pool_is_no_reason_to_stop_asking_while_nobody_has_a_turn():
    """NO_TOKEN would: nobody else is looked at until a running request has left."""
    world = World(quantum=100_000, pool_keep=0.5)
    world.waiting = [Req("first", DOC), Req("second", DOC)]
    assert world.go() == ["first"]
    world.order()
    adder = Adder(world.cache)
    adder.running_batch, adder.rem_total_tokens = SimpleNamespace(reqs=[Req("running")]), 0
    assert queue_hooks.add_one_req(Adder.add_one_req, adder, world.waiting[0]) == AddReqResult.OTHER


@pytest.mark.parametrize("in_use", [0, 100_000])
def test_an_answer_without_a_limit_counts_as_sglang_counts_it(in_use):
    """A request without `max_tokens` may fill the whole context; nearly none does."""
    world = World(pool_keep=0.3)
    req = Req("a", 300)
    req.sampling_params.max_new_tokens = 99_000
    world.waiting = [req]
    world.order()
    world.queue.queue.in_use.hit([("text", in_use)], 0)
    adder = Adder(world.cache)
    adder.running_batch, adder.rem_total_tokens = SimpleNamespace(reqs=[Req("running")]), 60_000
    assert world.queue.has_room(req, adder)


def test_nothing_is_kept_where_sglang_preempts_and_nobody_is_preempted_for_a_request_that_must_wait():
    config = KVShareConfig(audit_share=0.0, pool_keep=0.5)
    assert ServerQueue("fair", config, NamedPipeline(config, FakeTree(), COSTS), 1000, preempts=True).queue.keep == 0
    world = World(quantum=100_000)
    world.waiting = [Req("first", DOC), Req("second", DOC)]
    first, second = world.waiting
    world.order()
    asked = []
    for req in (first, second):
        queue_hooks.preempt_to_schedule(lambda adder, req: asked.append(req.rid), Adder(world.cache), req)
    assert asked == ["first"], "the second waits for the first one's text"


def test_a_request_that_cannot_reuse_waits_for_nobody_and_one_without_kv_is_not_waited_for():
    world = World(quantum=100_000)
    world.waiting = [Req("first", DOC), Req("embeds", DOC), Req("opted-out", DOC, wish="off"), Req("second", DOC)]
    world.waiting[1].input_embeds = [[0.0]]
    assert sorted(world.go()) == ["embeds", "first", "opted-out"]
    world = World(quantum=100_000)
    world.waiting = [Req("first", DOC), Req("second", DOC)]
    world.waiting[0].skip_radix_cache_insert = True
    assert sorted(world.go()) == ["first", "second"]


def test_nobody_waits_for_text_of_a_request_that_answers_already():
    world = World(quantum=100_000)
    first = Req("first", DOC)
    world.waiting = [first]
    world.go()
    first.output_ids = array("q", [7])  # and yet its text never came into the index
    world.waiting = [Req("second", DOC)]
    assert world.go() == ["second"]


def test_a_long_prompt_in_chunks_leaves_half_of_the_next_one_to_short_prompts():
    world = World(quantum=100_000)
    world.waiting = [Req("long", 5000)]
    assert world.go(budget=1000) == ["long"]
    world.waiting = [Req("longer", 4900), Req("short", 200)]
    assert world.order() == ["short", "longer"]
    long = Req("long", 5000)
    limit = queue_hooks.chunk_limit(None, world.policy, long, world.waiting, 1000, 1)
    assert limit == 800


def test_room_beside_a_long_prompt_is_left_once_when_nobody_is_asked():
    world = World(quantum=100_000)
    world.waiting = [Req("short", 200)]
    world.order()

    def limit(long: Req) -> int | None:
        return queue_hooks.chunk_limit(None, world.policy, long, world.waiting, 1000, 1)

    long = Req("long", 5000)
    assert limit(long) == 800
    world.queue.may_start(world.waiting[0])
    assert limit(long) == 800, "somebody was asked in between, whatever came of it"
    assert limit(long) is None and limit(long) is None, "as many requests run as may"
    assert limit(Req("another", 5000)) == 800


@pytest.mark.parametrize(
    ("argv", "policy", "expected"),
    [
        ([], "fcfs", "fair"),
        (["--schedule-policy", "fcfs"], "fcfs", "off"),
        (["--schedule-policy=lpm"], "lpm", "off"),
        ([], "hrrn", "off"),
        (["--schedule-conservativeness", "0.3"], "fcfs", "fair"),
    ],
)
def test_sglangs_policy_wins_when_it_was_asked_for(argv, policy, expected):
    args = SimpleNamespace(schedule_policy=policy)
    assert queue_hooks.chosen(KVShareConfig(), args, ["launch_server", *argv]) == expected
    assert queue_hooks.chosen(KVShareConfig(scheduler="off"), args, argv) == "off"
