"""What becomes a plan and what does not, and what a plan is expected to cost."""

import math
from dataclasses import replace

import numpy as np
import pytest

from kvshare_sched.methods.registry import get, names
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.planning import build_plan
from kvshare_sched.reuse.session import Session
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace, Segment

CHEAP = CostModel(cell_s=1e-5, copy_s=1e-7, overhead_s=0.0, layers=6)
CONFIG = KVShareConfig(min_run=32, ratio=0.1, forced_head=4)


def plan(segments, *, length=300, exact_len=0, fresh_from=None, strategy="dhd", config=CONFIG, costs=CHEAP):
    view = RequestView("r", Namespace(), np.arange(length), exact_len, length if fresh_from is None else fresh_from)
    return build_plan(view, tuple(Segment(*s) for s in segments), get(strategy), config, costs)


def kept(result):
    assert isinstance(result, ReusePlan), result
    return [(s.donor_start, s.start, s.length) for s in result.segments]


def test_nothing_found():
    assert plan([]) is Reason.NO_MATCH


def test_segments_go_in_unchanged_where_they_may():
    assert kept(plan([(0, 7, 50, 60), (1, 0, 200, 40)])) == [(7, 50, 60), (0, 200, 40)]


def test_last_prompt_token_is_never_reused():
    result = plan([(0, 0, 200, 100)])
    assert kept(result) == [(0, 200, 99)]
    assert not result.reused_mask(0, 300)[-1] and result.fresh_len >= 1


def test_exact_prefix_is_not_reused_twice():
    assert kept(plan([(0, 10, 50, 100)], exact_len=90)) == [(50, 90, 60)]


def test_pieces_below_min_run_are_dropped():
    assert kept(plan([(0, 0, 50, 32), (1, 0, 100, 31)])) == [(0, 50, 32)]
    assert plan([(0, 0, 50, 40)], exact_len=59) is Reason.NO_MATCH
    assert plan([(0, 0, 268, 32)]) is Reason.NO_MATCH  # 31 tokens are left beside the last one


def test_rows_whose_logprobs_are_wanted_are_cut_off():
    assert kept(plan([(0, 0, 50, 100), (1, 0, 200, 60)], fresh_from=120)) == [(0, 50, 70)]
    assert plan([(0, 0, 50, 100)], fresh_from=70) is Reason.PROMPT_LOGPROBS
    assert plan([(0, 0, 50, 100)], fresh_from=0) is Reason.PROMPT_LOGPROBS


def test_logprobs_that_leave_no_room_are_named_even_when_the_lookup_was_cut_short():
    assert plan([], fresh_from=31) is Reason.PROMPT_LOGPROBS
    assert plan([], exact_len=100, fresh_from=100) is Reason.PROMPT_LOGPROBS
    assert plan([], fresh_from=32) is Reason.NO_MATCH  # there was room; nothing was found


def test_cost_gate():
    dear = CostModel(cell_s=1e-5, copy_s=1e-7, overhead_s=10.0, layers=6)
    assert plan([(0, 0, 50, 100)], costs=dear) is Reason.NOT_WORTH
    slow_copy = CostModel(cell_s=1e-5, copy_s=1e-4, overhead_s=0.0, layers=6)
    assert plan([(0, 0, 50, 100)], costs=slow_copy) is Reason.NOT_WORTH
    nearly_all = KVShareConfig(ratio=0.995, min_run=32, forced_head=4)  # saves no cell
    assert plan([(0, 0, 50, 100)], config=nearly_all) is Reason.NOT_WORTH
    assert kept(plan([(0, 0, 50, 100)]))


def test_reference_runs_even_when_it_costs():
    dear = CostModel(cell_s=1e-5, copy_s=1e-7, overhead_s=10.0, layers=6)
    assert kept(plan([(0, 0, 50, 100)], strategy="full", costs=dear)) == [(0, 50, 100)]
    everything = KVShareConfig(ratio=1.0, min_run=32)
    assert kept(plan([(0, 0, 50, 100)], config=everything, costs=dear)) == [(0, 50, 100)]


def test_saving_is_cells_less_copies_less_overhead():
    costs = CostModel(cell_s=2.0, copy_s=3.0, overhead_s=5.0, layers=10)
    made = ReusePlan(110, 10, (Segment(0, 0, 20, 40),))
    assert costs.saving_s(made, cells=700) == (100 * 10 - 700) * 2.0 - 40 * 3.0 - 5.0


@pytest.mark.parametrize("name", names())
def test_forced_head_is_the_strategys(name):
    made = plan([(0, 0, 50, 100)], strategy=name)
    assert made.forced_head == (0 if name == "naive" else CONFIG.forced_head)


def test_rows_per_layer_of_one_selection():
    made = plan([(0, 0, 50, 100), (1, 0, 200, 40)])
    rows = replace(made, schedule=get("dhd").schedule(CONFIG, 6)).rows(0, 300)
    fresh, chosen = 300 - 140, 14  # a tenth of 140; the 8 forced rows are among them
    assert rows == [300, 300] + [fresh + chosen] * 4
    assert replace(made, schedule=get("dhd").schedule(CONFIG, 6)).expected_cells == sum(rows)


def test_forced_rows_count_when_they_are_more_than_the_budget():
    config = KVShareConfig(ratio=0.01, forced_head=20)
    made = plan([(0, 0, 50, 100)], config=config)
    assert replace(made, schedule=get("dhd").schedule(config, 4)).rows(0, 300) == [300, 300, 220, 220]
    assert replace(made, schedule=get("random").schedule(config, 4)).rows(0, 300) == [220] * 4


@pytest.mark.parametrize(("name", "share"), [("full", 1.0), ("naive", 0.0), ("random", 0.1), ("epic", 0.1)])
def test_rows_per_layer_of_a_choice_made_upfront(name, share):
    made = plan([(0, 0, 50, 100)], strategy=name)
    assert replace(made, schedule=get(name).schedule(CONFIG, 5)).rows(0, 300) == [200 + math.ceil(share * 100)] * 5


def test_gradual_filtering_shrinks_layer_by_layer():
    made = plan([(0, 0, 50, 200)], strategy="cacheblend")
    rows = replace(made, schedule=get("cacheblend").schedule(CONFIG, 8)).rows(0, 300)
    assert rows[:2] == [300, 300] and rows[2] > rows[3] > rows[4] == rows[7] > made.fresh_len


def test_chunks_without_reuse_cost_ordinary_rows():
    made = plan([(0, 0, 50, 100)])
    assert replace(made, schedule=get("dhd").schedule(CONFIG, 4)).rows(150, 300) == [150] * 4
    assert replace(made, schedule=get("naive").schedule(CONFIG, 4)).rows(0, 50) == [50] * 4
    assert replace(made, schedule=get("dhd").schedule(CONFIG, 4)).rows(60, 60) == [0] * 4


def cut_prompt(segments: int) -> ReusePlan:
    """Segments of 40 tokens with two donors each, 40 fresh tokens before each."""
    others = lambda at: (Segment(2, 5000, at, 40), Segment(3, 9000, at + 10, 20))  # noqa: E731
    found = tuple(Segment(1, 1000 + at, at, 40, at // 2, others(at)) for at in range(40, 80 * segments, 80))
    schedule = get("consensus").schedule(KVShareConfig(ratio=0.2), CHEAP.layers)
    return ReusePlan(80 * segments + 100, 0, found, forced_head=4, schedule=schedule)


def test_a_pass_looks_at_the_segments_it_cuts_however_many_there_are(monkeypatch):
    """The scheduler asks some twenty times a pass what a piece of a long prompt costs, and waits for each answer."""
    clips, foreign, config = [], [], KVShareConfig(ratio=0.2)
    clip, share = Segment.clip, Segment.foreign.fget
    monkeypatch.setattr(Segment, "clip", lambda *args: clips.append(1) or clip(*args))
    monkeypatch.setattr(Segment, "foreign", property(lambda segment: foreign.append(1) or share(segment)))

    def work(segments: int) -> tuple[int, int]:
        made = cut_prompt(segments)
        session = Session("r", made.prompt_len, 0, config, made, Reason.NONE)
        clips.clear()
        foreign.clear()
        assert 0 < session.end_for_budget(7, made.prompt_len // 3, made.prompt_len, CHEAP) < made.prompt_len
        assert session.charge(50, 150, CHEAP) < 100
        return len(clips), len(foreign)

    charges = 2 + math.ceil(math.log2(80 * 500 + 100)) + 1
    for segments in (50, 500):
        cut, asked = work(segments)
        assert cut <= (1 + 2) * 2 * charges and asked <= 2 * charges  # with its other donors; both ends of a chunk


def test_planning_is_deterministic():
    again = [plan([(0, 7, 50, 60), (1, 0, 200, 40)], strategy="cacheblend") for _ in range(3)]
    assert again[0] == again[1] == again[2]
