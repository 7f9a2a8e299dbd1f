"""Laws of the waiting queue for any traffic: nobody lost, nobody starved, shares by weight, the published bound."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from kvshare_sched.scheduling.duplicates import Texts
from kvshare_sched.scheduling.fairness import Accounts, service_gap
from kvshare_sched.scheduling.order import KEYS, Waiting
from kvshare_sched.scheduling.queue import LIMIT, Queue


def q_wanted(queue) -> Counter:
    return Counter(text for texts in queue.table.texts for text, _ in texts.lacks)


class Anything(RuleBasedStateMachine):
    """Requests come, start, are cut, finish, are aborted and retracted in any order."""

    def __init__(self):
        super().__init__()
        self.queue = Queue("fair", Accounts(300.0, {"a": 2.0}, unknown=2), duplicate_wait=2)
        self.waiting: set[str] = set()
        self.running: set[str] = set()
        self.numbers = itertools.count()

    @rule(tenant=st.sampled_from("abcde"), work=st.integers(0, 900), tier=st.integers(0, 2), text=st.integers(0, 3))
    def come(self, tenant, work, tier, text):
        number = next(self.numbers)
        lacks = ((("text", tenant, text), work),) if text else ()
        waiting = Waiting(f"r{number}", tenant, number, 1000, work, since=self.queue.clock, tier=tier)
        self.queue.add(waiting, Texts(lacks, len(lacks)))
        self.waiting.add(waiting.rid)

    @rule(budget=st.integers(1, 2000), room=st.sampled_from([0, 0, 400]))
    def one_pass(self, budget, room):
        started = 0
        for rid in self.queue.order(room).ready:
            if budget <= 0 or not self.queue.may_start(rid):
                break
            work = min(budget, self.queue.work(rid))
            self.queue.start(rid, work, [("text", rid)])
            self.waiting.remove(rid)
            self.running.add(rid)
            budget -= work
            started += 1
        assert started or not self.waiting or self.queue.order(room).held, "an idle engine starts somebody"

    @rule(room=st.sampled_from([0, 400]))
    def one_is_refused(self, room):
        ready = self.queue.order(room).ready
        if ready and self.queue.may_start(ready[0]):
            self.queue.refused(ready[0])

    @rule()
    def the_engine_falls_idle(self):
        """Nobody is held for ever: once nothing runs, somebody starts within the bound on duplicates."""
        for rid in sorted(self.running):
            self.queue.finish(rid)
        self.running.clear()
        for _ in range(self.queue.duplicates.bound + 1):
            ready = self.queue.order().ready
            if ready and self.queue.may_start(ready[0]):
                return
        assert not self.waiting, "requests wait in an idle engine"

    @rule(data=st.data(), output=st.integers(0, 50))
    def leave(self, data, output):
        if not self.running:
            return
        rid = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(rid)
        self.queue.generated(rid, output)
        if data.draw(st.booleans()):
            self.queue.finish(rid)
        else:
            self.queue.add(self.queue.retract(rid))
            self.waiting.add(rid)

    @rule(data=st.data(), output=st.integers(1, 400))
    def decode(self, data, output):
        if self.running:
            self.queue.generated(data.draw(st.sampled_from(sorted(self.running))), output)

    @rule(data=st.data())
    def abort(self, data):
        if self.waiting:
            rid = data.draw(st.sampled_from(sorted(self.waiting)))
            self.waiting.remove(rid)
            self.queue.remove(rid)

    @invariant()
    def everybody_is_there_once(self):
        order = self.queue.order()
        assert sorted(self.queue.table.rids[row] for row in order.rows) == sorted(self.waiting)
        assert len(order.ready) <= LIMIT and set(order.ready) <= self.waiting
        assert set(self.queue.running) == self.running
        tiers = [self.queue.table.waiting[self.queue.table.row[rid]].tier for rid in order.ready]
        assert tiers == sorted(tiers)

    @invariant()
    def nobody_banks_more_than_a_quantum(self):
        books = self.queue.accounts
        gain = max((run.charged for run in self.queue.running.values()), default=0.0)
        assert all(d <= 2 * books.grant(a) + 2000 + gain for a, d in books.deficits.items())
        assert sum(books._waiting.values()) == len(self.waiting)
        assert sum(books._open.values()) == len(self.waiting) + len(self.running)
        assert q_wanted(self.queue) == dict(self.queue.table._wanted._count)
        own = [a for a in books.deficits if a not in books.weights and a != "(others)"]
        assert len(own) == books._own <= 2


TestAnything = Anything.TestCase
TestAnything.settings = settings(max_examples=60, stateful_step_count=50)


class Engine:
    """Starts what the queue gives until a pass has cost `budget`; answers come a few passes later."""

    def __init__(self, quantum, weights=None, unknown=256, policy="fair"):
        self.queue = Queue(policy, Accounts(quantum, weights, unknown), 0)
        self.numbers = itertools.count()
        self.started: list[str] = []
        self.later: list[tuple[str, int]] = []

    def add(self, tenant, work, **more) -> str:
        number = next(self.numbers)
        self.queue.add(Waiting(f"{tenant}/{number}", tenant, number, 5000, work, since=self.queue.clock, **more))
        return f"{tenant}/{number}"

    def step(self, budget=1000.0, output=0) -> list[str]:
        for rid, tokens in self.later:
            self.queue.generated(rid, tokens)
            self.queue.finish(rid)
        self.later = []
        began = []
        for rid in self.queue.order().ready:
            if budget <= 0 or not self.queue.may_start(rid):
                break
            work = self.queue.work(rid)
            self.queue.start(rid, work)
            began.append(rid)
            self.later.append((rid, output))
            budget -= max(1.0, work)
        self.started += began
        return began

    def keep(self, backlog: dict[str, int], work) -> None:
        """Fill every tenant's backlog up."""
        for tenant, count in backlog.items():
            have = sum(rid.split("/")[0] == tenant for rid in self.queue.table.rids)
            for _ in range(count - have):
                self.add(tenant, work(tenant))


works = st.lists(st.integers(50, 900), min_size=8, max_size=8)


@settings(max_examples=60)
@given(
    cheap=works,
    dear=works,
    quantum=st.sampled_from([50, 400, 3000]),
    budget=st.integers(100, 1500),
    output=st.integers(0, 40),
    weights=st.sampled_from([(1.0, 1.0), (1.0, 3.0), (2.5, 1.0), (0.1, 1.0), (0.02, 0.3)]),
)
def test_two_backlogged_tenants_stay_within_the_published_gap(cheap, dear, quantum, budget, output, weights):
    engine = Engine(quantum, dict(zip("fg", weights, strict=True)))
    sizes = {"f": itertools.cycle(cheap), "g": itertools.cycle(dear)}
    gaps = []
    most_running = 0
    for _ in range(50):
        engine.keep({"f": 40, "g": 40}, lambda tenant: next(sizes[tenant]))
        began = engine.step(budget, output)
        most_running = max(most_running, *(sum(r[0] == t for r in began) for t in "fg"))
        served = engine.queue.accounts.served
        gaps.append(served["f"] / weights[0] - served["g"] / weights[1])
    bound = service_gap(max(cheap + dear), most_running * output, quantum, min(weights))
    assert max(gaps) - min(gaps) <= bound
    assert len(engine.started) == len(set(engine.started))


def test_weights_one_to_four_give_shares_within_five_percent():
    weights = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 4.0}
    engine = Engine(500.0, weights)
    sizes = itertools.cycle([30, 700, 120, 400])
    for _ in range(300):
        engine.keep(dict.fromkeys(weights, 30), lambda _: next(sizes))
        engine.step(output=10)
    served = engine.queue.accounts.served
    total = sum(served.values())
    for tenant, weight in weights.items():
        assert abs(served[tenant] / total - weight / 10) < 0.05 * weight / 10, served


def test_a_dear_request_is_not_starved_by_an_endless_stream_of_cheap_ones_of_its_own_tenant():
    engine = Engine(1000.0)
    dear = engine.add("t", 4000)
    for passes in itertools.count(1):
        for _ in range(11):
            engine.add("t", 100)  # more than a pass takes
        if dear in engine.step(1000):
            break
        assert passes < 200
    # A cheap one that has waited w outruns it only while w / 100 > waited / 4000.
    assert engine.queue.clock < 4000 * 40


def test_lpm_starves_what_our_order_does_not():
    def passes(policy) -> int:
        engine = Engine(1000.0, policy=policy)
        cold = engine.add("cold", 2000)
        for number in range(300):
            for _ in range(11):
                engine.add("hot", 100, exact=900)
            if cold in engine.step(1000):
                return number
        return 300

    assert passes("lpm") == 300
    assert passes("fair") <= 2, "the hot tenant's quantum, then the cold one's turn"


def test_a_tenant_that_comes_and_goes_gets_its_share_while_it_is_there_and_no_more():
    engine = Engine(1000.0)
    seen = []
    for phase in range(6):
        before = dict(engine.queue.accounts.served)
        for _ in range(50):
            engine.keep({"on": 30} | ({"off": 30} if phase % 2 else {}), lambda _: 100)
            engine.step(1000)
        served = {t: engine.queue.accounts.served[t] - before.get(t, 0) for t in ("on", "off")}
        seen.append(served["off"] / sum(served.values()))
        for rid in [r for r in engine.queue.table.rids if r.startswith("off")]:
            engine.queue.remove(rid)
    assert [round(share, 1) for share in seen] == [0, 0.5, 0, 0.5, 0, 0.5]


def test_one_huge_prompt_among_small_ones_delays_other_tenants_by_itself_only():
    engine = Engine(1000.0)
    engine.add("huge", 50_000)
    engine.step(1000)
    for _ in range(20):
        engine.add("small", 100)
    began = engine.step(1000)
    assert len(began) == 10 and all(r.startswith("small") for r in began)
    engine.add("huge", 50_000)
    for _ in range(40):
        engine.keep({"small": 20}, lambda _: 100)
        assert all(r.startswith("small") for r in engine.step(1000)), "the huge one's tenant owes fifty rounds"


def test_a_thousand_invented_names_get_no_more_than_the_accounts_for_unknown_tenants():
    engine = Engine(1000.0, {"known": 1.0, "friend": 1.0}, unknown=3)
    names = itertools.count()
    for _ in range(1000):
        engine.keep({"known": 20, "friend": 20}, lambda _: 200)
        engine.add(f"invented{next(names)}", 500)
        engine.add(f"invented{next(names) % 1000}", 500)
        engine.step(1000)
    served = engine.queue.accounts.served
    honest = min(served["known"], served["friend"])
    invented = engine.queue.clock - served["known"] - served["friend"]
    assert invented <= 4 * honest * 1.05, "three accounts of their own and the one they share"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 500)), max_size=60), st.sampled_from(sorted(KEYS)))
def test_every_request_is_started_exactly_once_under_every_order(requests, policy):
    engine = Engine(200.0, policy=policy)
    rids = [engine.add(tenant, work) for tenant, work in requests]
    for _ in range(200):
        if not engine.step(400):
            break
    assert sorted(engine.started) == sorted(rids) and len(engine.queue) == 0
