"""The story of one request against a fake tree: match, lease, chunks, report, release."""

import numpy as np
import pytest
from fakes import FakeTree, NamedPipeline
from prometheus_client import CollectorRegistry

from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.records.request import Outcome, Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

COSTS = CostModel(cell_s=1e-4, copy_s=1e-7, overhead_s=0.0, layers=4)
HERE = Namespace("here")


def text(seed: int, length: int = 100) -> np.ndarray:
    """Ids of one seed never meet those of another."""
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


SETTINGS = {"strategy": "dhd", "window": 16, "min_run": 32, "min_suffix": 64, "forced_head": 8, "ratio": 0.1}
PROMPT = np.concatenate((text(9, 10), text(1), text(8, 20), text(2), text(7, 15)))  # 245 tokens


class World:
    """A pipeline, its tree and two donors; donor i holds text(i) after 5 tokens of its own."""

    def __init__(self, registry=None, **settings):
        self.tree = FakeTree()
        metrics = ShareMetrics(registry=registry) if registry is not None else None
        self.pipeline = NamedPipeline(KVShareConfig(**SETTINGS | settings), self.tree, COSTS, metrics)
        self.donors = [self.donate(i) for i in (1, 2)]

    def donate(self, seed: int, namespace=HERE) -> int | None:
        before = set(self.pipeline.index.donors)
        self.pipeline.publish(f"donor {seed}", namespace, np.concatenate((text(50 + seed, 5), text(seed))))
        return next(iter(set(self.pipeline.index.donors) - before), None)

    def view(self, rid="r", tokens=PROMPT, *, exact_len=0, fresh_from=None, namespace=HERE, wishes=None):
        end = len(tokens) if fresh_from is None else fresh_from
        return RequestView(rid, namespace, tokens, exact_len, end, wishes or {})

    def admit(self, rid="r", tokens=PROMPT, **changes):
        view = self.view(rid, tokens, **changes)
        return self.pipeline.admit(view, rid, view.prompt_len, view.exact_len)

    def begin(self, *args, **changes):
        session = self.admit(*args, **changes)
        self.reports = []
        session.on_report = self.reports.append
        self.pipeline.begin(session)
        return session

    def count_lookups(self) -> list:
        seen, true_hits = [], self.pipeline.index.hits
        self.pipeline.index.hits = lambda *args: seen.append(args) or true_hits(*args)
        return seen


@pytest.fixture
def world():
    made = World()
    yield made
    for rid in list(made.pipeline.sessions):
        made.pipeline.release(rid)
    assert made.tree.active == 0, "a lease leaked"
    made.pipeline.index._check()


# ---- match: a peek ----


def test_match_finds_both_passages(world):
    found = world.pipeline.lending.match(world.view())
    assert [(s.donor_id, s.donor_start, s.start, s.length) for s in found] == [
        (world.donors[0], 5, 10, 100),
        (world.donors[1], 5, 130, 100),
    ]


def test_match_touches_nothing_and_remembers(world):
    lookups = world.count_lookups()
    order = list(world.pipeline.index.donors)
    first = world.pipeline.lending.match(world.view())
    assert all(world.pipeline.lending.match(world.view()) == first for _ in range(5)) and len(lookups) == 1
    assert set(world.tree.calls) == {"live_len"} and world.tree.active == 0
    assert list(world.pipeline.index.donors) == order and world.pipeline.sessions == {}


def test_match_looks_again_when_the_index_or_the_exact_prefix_changed(world):
    lookups = world.count_lookups()
    world.pipeline.lending.match(world.view())
    world.donate(3)
    world.pipeline.lending.match(world.view())
    assert [s.start for s in world.pipeline.lending.match(world.view(exact_len=60))] == [60, 130]
    assert len(lookups) == 3


def test_match_of_another_request_under_the_same_id_looks_again(world):
    theirs = np.concatenate((text(20, 120), text(1), text(21, 25)))
    assert len(theirs) == len(PROMPT)
    world.pipeline.lending.match(world.view())
    assert [s.start for s in world.pipeline.lending.match(world.view(tokens=theirs))] == [120]
    assert world.pipeline.lending.match(world.view(namespace=Namespace("there"))) == ()
    assert [s.end for s in world.pipeline.lending.match(world.view(fresh_from=60))] == [60]


def test_one_lookup_serves_whoever_sends_the_same_prompt(world):
    lookups = world.count_lookups()
    for rid in ("r", "another"):
        assert world.pipeline.lending.match(world.view(rid))
    assert len(lookups) == 1
    world.pipeline.lending.match(world.view("r", namespace=Namespace("elsewhere")))
    world.pipeline.lending.match(world.view("r", exact_len=10))
    assert len(lookups) == 3


def test_memory_of_lookups_is_bounded(world, monkeypatch):
    monkeypatch.setattr("kvshare_sched.reuse.lookup._MEMO_SIZE", 3)
    lookups = world.count_lookups()
    for i in range(5):
        world.pipeline.lending.match(world.view(exact_len=i))
    world.pipeline.lending.match(world.view(exact_len=4))
    assert len(lookups) == 5
    world.pipeline.lending.match(world.view(exact_len=0))
    assert len(lookups) == 6


def test_evicted_donor_is_shortened_and_the_rest_matched_again(world):
    world.tree.evict(world.donors[0], 55)
    found = world.pipeline.lending.match(world.view())
    assert [(s.start, s.length) for s in found] == [(10, 50), (130, 100)]
    assert len(world.pipeline.index.donors[world.donors[0]].tokens) == 55


def test_donor_that_is_gone_leaves_the_index(world):
    world.tree.evict(world.donors[0], 0)
    assert [s.start for s in world.pipeline.lending.match(world.view())] == [130]
    assert list(world.pipeline.index.donors) == [world.donors[1]]


def test_gives_up_when_one_donor_after_another_is_dead(world):
    for _ in range(30):
        world.pipeline.index.add(HERE, np.concatenate((text(60 + _, 5 + _), text(1))))
    for donor in list(world.pipeline.index.donors):
        world.tree.evict(donor, 0)
    assert world.pipeline.lending.match(world.view()) == ()


# ---- admit, begin, withdraw ----


def test_reuse_from_admission_to_report(world):
    session = world.admit()
    assert (session.outcome, session.reason) == (Outcome.REUSED, Reason.NONE)
    assert world.tree.active == 2 and set(session.leases) == set(world.donors)
    assert world.pipeline.sessions == {} and world.tree.touched == []
    world.pipeline.begin(session)
    assert world.pipeline.sessions == {"r": session} and sorted(world.tree.touched) == sorted(world.donors)
    assert not session.reported
    for segment, lease in world.pipeline.copies(session, 0, 245):
        slots = lease.slots[segment.donor_start : segment.donor_end]
        assert slots.tolist() == [1000 * segment.donor_id + 5 + i for i in range(100)]


def test_withdrawn_request_gives_its_pins_back(world):
    session = world.admit()
    world.pipeline.withdraw(session)
    world.pipeline.withdraw(session)
    assert world.tree.active == 0 and world.pipeline.sessions == {} and not session.reported


def test_admitting_again_after_a_withdrawal(world):
    for _ in range(3):
        world.pipeline.withdraw(world.admit())
    assert world.begin().outcome is Outcome.REUSED and world.tree.active == 2


def test_what_is_computed_again_and_again_is_computed_exactly_once():
    """New text behind a borrowed one comes back before ever another: the beginning is bought, the rest is borrowed."""
    world, found = World(ratio=0.25), []
    for other in (2, 3, 4, 5, 6):
        if other > 2:
            world.donate(other)
        session = world.begin(
            f"r{other}", np.concatenate((text(9, 10), text(1), text(8, 60), text(other), text(7, 15)))
        )
        world.pipeline.chunk_done(session, session.prompt_len)
        found.append((session.plan.reused_len, session.report(COSTS).promoted, session.plan.approximate_from))
        world.pipeline.release(session.rid)
    # 45 are paid for the new text and 63 for the borrowed one before it, whose price is 37.
    assert found == [(200, 0, 10), (100, 100, 170), (200, 0, 10), (100, 100, 170), (200, 0, 10)]
    assert world.tree.active == 0


def test_a_prompt_bought_to_the_end_borrows_nothing():
    world, prompt = World(ratio=0.25), np.concatenate((text(9, 10), text(1), text(2), text(8, 60)))
    reasons = []
    for number in range(4):
        session = world.begin(f"r{number}", prompt)
        reasons.append(session.reason)
        world.pipeline.release(session.rid)
    assert reasons == [Reason.NONE, Reason.PROMOTED] * 2
    assert (session.report(COSTS).promoted, world.tree.active) == (200, 0)


def test_who_measures_or_discovers_is_not_promoted():
    measuring = {"wishes": {"ratio": 0.25}}, {"fresh_from": 265}, {}
    for settings, changes in zip(({}, {}, {"mode": "discover"}), measuring, strict=True):
        world, prompt = World(ratio=0.25, **settings), np.concatenate((text(9, 10), text(1), text(2), text(8, 60)))
        for number in range(8):
            session = world.begin(f"r{number}", prompt, **changes)
            assert (session.reason, session.report(COSTS).promoted) == (Reason.NONE, 0)
            world.pipeline.release(session.rid)


def test_discover_reports_and_holds_nothing():
    world = World(mode="discover")
    session = world.begin()
    assert (session.plan, world.tree.active, session.leases) == (None, 0, {})
    (report,) = world.reports
    assert (report.outcome, report.reason, report.discovered) == (Outcome.DISCOVERED, Reason.NONE, 200)
    assert (report.exact, report.reused, report.fresh) == (0, 0, 245)


def test_off_looks_up_nothing_and_indexes_nothing():
    world = World(mode="off")
    lookups = world.count_lookups()
    assert world.donors == [None, None] and len(world.pipeline.index) == 0
    assert world.begin().reason is Reason.MODE_OFF and lookups == []


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": PROMPT[:63]}, Reason.SHORT),
        ({"exact_len": 245 - 63}, Reason.SHORT),
        ({"tokens": text(33, 200)}, Reason.NO_MATCH),
        ({"namespace": Namespace("there")}, Reason.NO_MATCH),
        ({"namespace": Namespace("here", "salt")}, Reason.NO_MATCH),
        ({"fresh_from": 0}, Reason.PROMPT_LOGPROBS),
        ({"exact_len": 20, "fresh_from": 40}, Reason.PROMPT_LOGPROBS),
    ],
)
def test_reasons_for_ordinary_prefill(world, changes, reason):
    session = world.begin(**changes)
    assert (session.plan, session.outcome, session.reason) == (None, Outcome.ORDINARY, reason)
    assert world.tree.active == 0 and [r.reason for r in world.reports] == [reason]


def test_reason_given_by_the_adapter_is_kept(world):
    session = world.pipeline.admit(Reason.OPTED_OUT, "r", 245, 5)
    world.pipeline.begin(session)
    assert (session.reason, session.outcome, session.plan) == (Reason.OPTED_OUT, Outcome.ORDINARY, None)
    assert world.tree.calls == []


def test_not_worth_holds_no_lease():
    world = World()
    world.pipeline.costs = CostModel(cell_s=1e-9, copy_s=1e-3, overhead_s=0.0, layers=4)
    assert world.admit().reason is Reason.NOT_WORTH and world.tree.active == 0


@pytest.mark.parametrize("lost", [0, 1])
def test_donor_lost_between_match_and_lease(world, lost):
    world.tree.refuse_lease.add(world.donors[lost])
    session = world.begin()
    assert (session.plan, session.reason) == (None, Reason.DONOR_LOST) and world.tree.active == 0
    assert session.leases == {} and world.reports[0].fresh == 245


@pytest.mark.parametrize("broken", [0, 1])
def test_failing_lease_leaves_no_pin_behind(world, broken):
    world.tree.fail_lease.add(world.donors[broken])
    session = world.begin()
    assert (session.plan, session.reason) == (None, Reason.ERROR)
    assert world.tree.active == 0


def test_anything_unexpected_means_ordinary_prefill(world, monkeypatch, caplog):
    monkeypatch.setattr("kvshare_sched.reuse.lookup.find_segments", lambda *a, **k: 1 / 0)
    session = world.begin()
    assert (session.plan, session.outcome, session.reason) == (None, Outcome.ORDINARY, Reason.ERROR)
    assert world.tree.active == 0 and "request r" in caplog.text
    monkeypatch.undo()
    assert world.begin("next").outcome is Outcome.REUSED


# ---- chunks ----


def test_chunks_cover_every_segment_once(world):
    session = world.begin()
    parts = [
        (s.donor_id, s.donor_start + i, s.start + i)
        for low, high in ((0, 64), (64, 128), (128, 192), (192, 245))
        for s, lease in world.pipeline.copies(session, low, high)
        for i in range(s.length)
    ]
    whole = [(s.donor_id, s.donor_start + i, s.start + i) for s in session.plan.segments for i in range(s.length)]
    assert parts == whole


def test_leases_end_with_the_last_reused_chunk(world):
    session = world.begin()
    for end, held in ((64, 2), (200, 2), (230, 0), (245, 0)):
        world.pipeline.chunk_done(session, end)
        assert world.tree.active == held, end
    world.pipeline.release("r")
    assert world.tree.active == 0


def test_charge_is_what_runs(world):
    session = world.begin()
    assert session.charge(0, 10, COSTS) == 10
    # All 65 rows on two layers, 10 fresh and 8 forced ones on the other two: 41.5 tokens, rounded up.
    assert session.charge(0, 65, COSTS) == 42
    assert session.charge(0, 245, COSTS) == (245 + 45 + 20) / 2
    assert world.begin("other", text(33, 200)).charge(0, 200, COSTS) == 200


def test_consensus_charges_a_first_pass_over_text_with_one_donor(world):
    # 45 fresh and 20 chosen rows on all four layers, the fresh ones once more on the first.
    assert world.begin(wishes={"strategy": "consensus"}).charge(0, 245, COSTS) == -(-(4 * 65 + 45) // 4)


def test_consensus_pins_every_donor_and_needs_no_first_pass_where_half_the_text_has_several(world):
    again = world.pipeline.index.add(HERE, np.concatenate((text(60, 30), text(1), text(61, 30))))
    session = world.begin(wishes={"strategy": "consensus"})
    first, second = session.plan.segments
    assert [o.donor_id for o in first.others] == [again if first.donor_id == world.donors[0] else world.donors[0]]
    assert second.others == () and set(session.leases) == {*world.donors, again} and world.tree.active == 3
    assert session.report(COSTS).donors == 3 and session.plan.copied_len == 300
    assert session.charge(0, 245, COSTS) == 65


@pytest.mark.parametrize("budget", [0, 1, 9, 10, 50, 100, 160, 400])
def test_chunk_end_is_the_largest_within_the_budget(world, budget):
    session = world.begin()
    end = session.end_for_budget(0, budget, 245, COSTS)
    assert session.charge(0, end, COSTS) <= budget
    assert end == 245 or session.charge(0, end + 1, COSTS) > budget


def test_report_comes_once_after_the_last_chunk(world):
    session = world.begin(exact_len=20)
    session.recomputed, session.cells, session.copy_s = 19, 500, 0.25
    world.pipeline.chunk_done(session, 200)
    assert world.reports == []
    world.pipeline.chunk_done(session, 245)
    world.pipeline.chunk_done(session, 245)
    world.pipeline.release("r")
    (report,) = world.reports
    assert (report.exact, report.reused, report.fresh, report.recomputed) == (20, 190, 35, 19)
    assert report.exact + report.reused + report.fresh == report.prompt_len == 245
    assert (report.donors, report.computed_cells, report.layers, report.copy_s) == (2, 500, 4, 0.25)
    assert (report.outcome, report.reason, report.strategy) == (Outcome.REUSED, Reason.NONE, "dhd")
    assert report.match_s > 0


def test_ordinary_request_reports_all_its_cells(world):
    world.begin("r", text(33, 200), exact_len=40)
    assert (world.reports[0].computed_cells, world.reports[0].fresh) == (160 * 4, 160)


def test_aborted_request_gives_back_and_reports(world):
    session = world.begin()
    world.pipeline.chunk_done(session, 64)
    world.pipeline.release("r")
    world.pipeline.release("r")
    assert world.tree.active == 0 and len(world.reports) == 1 and world.pipeline.sessions == {}
    world.pipeline.release("never seen")


def test_executor_failure_in_the_first_chunk(world):
    session = world.begin()
    world.pipeline.abandon(session)
    world.pipeline.chunk_done(session, 245)
    (report,) = world.reports
    assert (report.outcome, report.reason, report.reused, report.fresh) == (
        Outcome.ORDINARY,
        Reason.ERROR,
        0,
        245,
    )
    assert world.tree.active == 0 and session.charge(100, 245, COSTS) == 145


def test_executor_failure_in_a_later_chunk_keeps_what_was_reused(world):
    session = world.begin()
    world.pipeline.chunk_done(session, 64)
    world.pipeline.abandon(session)
    world.pipeline.chunk_done(session, 245)
    (report,) = world.reports
    assert (report.outcome, report.reason) == (Outcome.REUSED, Reason.ERROR)
    assert (report.reused, report.fresh) == (54, 191) and world.tree.active == 0
    assert world.pipeline.copies(session, 64, 245) == []


# ---- what may enter the exact tree ----


def test_approximate_session_caps_what_is_exact(world):
    assert world.pipeline.exact_up_to("r") > 10**9
    session = world.begin()
    assert world.pipeline.exact_up_to("r") > 10**9  # nothing has been copied yet
    session.approximate_from = session.plan.approximate_from
    assert world.pipeline.exact_up_to("r") == 10
    world.pipeline.abandon(session)
    assert world.pipeline.exact_up_to("r") == 10  # what was copied stays approximate
    world.pipeline.release("r")
    assert world.pipeline.exact_up_to("r") > 10**9


def test_published_request_grows_one_donor(world):
    whole = np.concatenate((text(40), text(41)))
    for end in (20, 90, 200):
        world.pipeline.publish("grows", HERE, whole[:end])
    assert len(world.pipeline.index) == 3 and world.pipeline.index.tokens == 2 * 105 + 200
    assert [s.length for s in world.pipeline.lending.match(world.view(tokens=np.append(whole, 5)))] == [200]
    world.pipeline.release("grows")
    world.pipeline.publish("grows", HERE, text(42))  # another request under the same id
    assert len(world.pipeline.index) == 4


def test_too_short_to_lend(world):
    world.pipeline.publish("short", HERE, text(40, 31))
    assert len(world.pipeline.index) == 2


def test_publishing_never_raises(world, monkeypatch, caplog):
    monkeypatch.setattr(world.pipeline.index, "add", lambda *a: 1 / 0)
    world.pipeline.publish("bad", HERE, text(40))
    assert "request bad" in caplog.text


def test_flush_forgets_donors_and_lookups(world):
    assert world.pipeline.lending.match(world.view())
    world.pipeline.flush()
    assert world.pipeline.lending.match(world.view()) == () and len(world.pipeline.index) == 0


def test_metrics_count_every_request_once_and_gauges_return_to_zero():
    registry = CollectorRegistry()
    world = World(registry)

    def value(name, **labels):
        return registry.get_sample_value(f"kvshare_{name}", labels)

    session = world.begin()
    assert (value("leases_held"), value("donors"), value("index_tokens")) == (2, 2, 210)
    world.begin("unknown text", text(33, 200))
    world.pipeline.chunk_done(session, 245)
    for rid in ("r", "unknown text"):
        world.pipeline.release(rid)
    assert value("leases_held") == 0
    assert value("requests_total", outcome="reused", reason="none") == 1
    assert value("requests_total", outcome="ordinary", reason="no_match") == 1
    tokens = [value("prompt_tokens_total", origin=o) for o in ("exact", "reused", "fresh")]
    assert tokens == [0, 200, 245]


# ---- a request's own settings ----


def test_a_request_chooses_its_strategy_and_ratio(world):
    session = world.admit(wishes={"strategy": "epic", "ratio": 0.3})
    assert session.outcome is Outcome.REUSED and session.report(COSTS).strategy == "epic"
    dearer = session.charge(0, 245, COSTS)
    world.pipeline.withdraw(session)
    session = world.admit()
    assert session.config is world.pipeline.config and dearer > 0.25 * 200
    world.pipeline.withdraw(session)


def test_a_wrong_wish_means_ordinary_prefill(world):
    session = world.admit(wishes={"strategy": "epik"})
    assert (session.plan, session.outcome, session.reason) == (None, Outcome.ORDINARY, Reason.BAD_SETTING)
