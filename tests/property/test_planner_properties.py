"""Every prompt token has one origin, chunks partition a plan, and charges behave like costs."""

import math
from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvshare_sched.methods.registry import get, names
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.planning import build_plan
from kvshare_sched.reuse.session import Session
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace, Segment

configs = st.builds(
    KVShareConfig,
    strategy=st.sampled_from(names()),
    ratio=st.floats(0, 1),
    check_layer=st.integers(1, 6),
    min_run=st.integers(16, 40),
    forced_head=st.integers(0, 30),
)
layer_counts = st.integers(1, 12)


@st.composite
def segment_lists(draw):
    """Disjoint ascending segments, some of them touching."""
    edge, found = 0, []
    for gap, length, donor in draw(
        st.lists(st.tuples(st.integers(0, 30), st.integers(1, 90), st.integers(0, 3)), max_size=5)
    ):
        found.append(Segment(donor, draw(st.integers(0, 50)), edge + gap, length))
        edge += gap + length
    return tuple(found)


@st.composite
def plans(draw):
    segments = draw(segment_lists())
    end = segments[-1].end if segments else 0
    exact_len = draw(st.integers(0, segments[0].start if segments else 20))
    prompt_len = max(end, exact_len) + draw(st.integers(1, 40))
    return ReusePlan(prompt_len, exact_len, segments, draw(st.integers(0, 30)))


@st.composite
def blended_plans(draw):
    """Plans whose segments have contexts and up to three other donors, bare ones among them."""
    segments = []
    for segment in draw(segment_lists()):
        others = []
        for _ in range(draw(st.integers(0, 3))):
            low, high = sorted(draw(st.tuples(*(st.integers(segment.start, segment.end),) * 2)))
            if low < high:
                place = draw(st.tuples(st.integers(4, 9), st.integers(0, 400)))
                others.append(Segment(*place, low, high - low, draw(st.integers(0, low))))
        context = draw(st.sampled_from([0, segment.start]) | st.integers(0, segment.start))
        segments.append(replace(segment, context=context, others=tuple(others)))
    end = segments[-1].end if segments else 0
    return ReusePlan(end + draw(st.integers(1, 40)), 0, tuple(segments), draw(st.integers(0, 30)))


def plain_rows(plan, start, end, strategy, config, layers):
    """`Schedule.rows` by its definition: a walk over every token, and over every segment's part of the chunk."""
    parts = [part for s in plan.segments if (part := s.clip(start, end)) is not None]
    heads = [p for s in plan.segments for p in range(s.start, s.end)[: plan.forced_head] if start <= p < end]
    rows, reused, forced = end - start, sum(part.length for part in parts), len(heads)
    fresh = rows - reused
    per_layer, current, checks = [], rows, list(strategy.checks(config, layers))
    if not checks and (strategy.upfront or strategy.first_pass):
        share = {"full": 1.0, "naive": 0.0}.get(strategy.name, config.ratio)
        doubtful = sum(part.length * part.foreign**0.5 for part in parts)
        current = fresh + max(forced, math.ceil(share * (doubtful if strategy.by_doubt and share < 1 else reused)))
    alone = sum(part.length * (-1 if part.lone else 1) for part in parts) < 0
    looking = strategy.first_pass(layers).stop if strategy.first_pass and alone else 0
    for layer in range(layers):
        per_layer.append(min(rows, current + (fresh if layer < looking else 0)))
        while checks and checks[0].layer == layer:
            current = fresh + max(forced, math.ceil(checks.pop(0).share * reused))
    return per_layer


def plain_end(plan, start, budget, end, charge):
    """`end_for_budget` by its definition."""
    if charge(start, end) <= budget:
        return end
    low, high = start, end
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if charge(start, middle) <= budget else (low, middle - 1)
    return low


@st.composite
def cuts(draw, plan):
    """Ascending chunk borders from the exact prefix to the end of the prompt."""
    inner = draw(st.lists(st.integers(plan.exact_len, plan.prompt_len), max_size=6))
    return sorted({plan.exact_len, plan.prompt_len, *inner})


@given(segment_lists(), st.integers(0, 60), st.integers(0, 60), st.data(), configs)
def test_every_prompt_token_has_one_origin(segments, after, exact_len, data, config):
    prompt_len = max((segments[-1].end if segments else 0) + after, exact_len, 1)
    fresh_from = data.draw(st.integers(0, prompt_len))
    view = RequestView("r", Namespace(), np.zeros(prompt_len, np.int64), exact_len, fresh_from)
    free = CostModel(cell_s=1.0, copy_s=0.0, overhead_s=-1.0, layers=4)  # never refused for its price
    plan = build_plan(view, segments, get(config.strategy), config, free)
    if isinstance(plan, Reason):
        room = (s.clip(exact_len, min(fresh_from, prompt_len - 1)) for s in segments)
        assert not any(s is not None and s.length >= config.min_run for s in room)
        return
    origin = np.zeros(prompt_len, int)
    origin[:exact_len] += 1
    for s in plan.segments:
        origin[s.start : s.end] += 1
        assert s.length >= config.min_run
        assert any(t.clip(s.start, s.end) == s for t in segments)  # part of a match: same donor, same shift
    assert origin.max(initial=0) <= 1
    assert not plan.reused_mask(min(fresh_from, prompt_len - 1), prompt_len).any()
    assert plan.exact_len + plan.reused_len + plan.fresh_len == prompt_len
    assert (origin == 0).sum() == plan.fresh_len >= 1
    assert plan.reused_mask(exact_len, prompt_len).sum() == plan.reused_len
    assert (origin[: plan.approximate_from] == 0).sum() == plan.approximate_from - exact_len


@given(plans(), st.data())
def test_chunks_partition_the_plan(plan, data):
    borders = data.draw(cuts(plan))
    chunks = list(zip(borders, borders[1:], strict=False))
    tokens = [
        (s.donor_id, s.donor_start + i, s.start + i)
        for a, b in chunks
        for s in plan.clip(a, b)
        for i in range(s.length)
    ]
    whole = [(s.donor_id, s.donor_start + i, s.start + i) for s in plan.segments for i in range(s.length)]
    assert tokens == whole
    forced = [p for a, b in chunks for p in plan.forced_positions(a, b).tolist()]
    assert forced == plan.forced_positions(plan.exact_len, plan.prompt_len).tolist()
    mask = np.concatenate([plan.reused_mask(a, b) for a, b in chunks]) if chunks else np.zeros(0, bool)
    assert mask.tolist() == plan.reused_mask(plan.exact_len, plan.prompt_len).tolist()
    assert set(forced) <= set((np.flatnonzero(mask) + plan.exact_len).tolist())


@given(plans(), configs, layer_counts)
def test_rows_never_grow_with_depth_and_never_exceed_ordinary(plan, config, layers):
    strategy = get(config.strategy)
    rows = replace(plan, schedule=strategy.schedule(config, layers)).rows(plan.exact_len, plan.prompt_len)
    assert len(rows) == layers and rows == sorted(rows, reverse=True)
    assert plan.fresh_len <= rows[-1] and rows[0] <= plan.prompt_len - plan.exact_len
    assert replace(plan, schedule=strategy.schedule(config, layers)).expected_cells == sum(rows)


@given(blended_plans(), configs, layer_counts, st.data())
def test_any_chunk_costs_what_a_walk_over_it_finds(plan, config, layers, data):
    """Sums over the segments are kept; a chunk's share of them is the same to the last token."""
    strategy = get(config.strategy)
    edges = st.sampled_from([edge for s in plan.segments for edge in (s.start, s.end)] or [0])
    start, end = sorted(data.draw(st.tuples(*(edges | st.integers(0, plan.prompt_len),) * 2)))
    assert replace(plan, schedule=strategy.schedule(config, layers)).rows(start, end) == plain_rows(
        plan, start, end, strategy, config, layers
    )
    parts = [part for s in plan.segments if (part := s.clip(start, end)) is not None]
    assert list(plan.clip(start, end)) == parts
    counts = plan.counts(start, end)
    assert counts.copied == sum(place.length for part in parts for place in part.places)
    assert math.isclose(counts.doubtful, sum(part.length * part.foreign**0.5 for part in parts))
    assert counts.forced == len(plan.forced_positions(start, end))
    assert counts.reused == plan.reused_mask(start, end).sum() == sum(part.length for part in parts)
    assert plan.reused_len == sum(s.length for s in plan.segments)
    assert plan.copied_len == sum(place.length for s in plan.segments for place in s.places)


@given(blended_plans(), configs, layer_counts, st.data())
def test_a_chunk_ends_where_a_walk_over_it_says(plan, config, layers, data):
    strategy, costs = get(config.strategy), costs_of(layers)

    def charge(start, end):
        return -(-sum(plain_rows(plan, start, end, strategy, config, layers)) // layers)

    start, whole = sorted(data.draw(st.tuples(*(st.integers(0, plan.prompt_len),) * 2)))
    budget = data.draw(st.integers(0, plan.prompt_len))
    session = Session("r", plan.prompt_len, 0, config, scheduled(plan, config, layers), Reason.NONE)
    assert session.end_for_budget(start, budget, whole, costs) == plain_end(plan, start, budget, whole, charge)
    assert session.charge(start, whole, costs) == charge(start, whole)


def scheduled(plan, config, layers) -> ReusePlan:
    return replace(plan, schedule=get(config.strategy).schedule(config, layers))


def costs_of(layers) -> CostModel:
    return CostModel(1.0, 0.0, 0.0, layers)


@given(plans(), configs, layer_counts, st.data())
def test_charge_grows_with_the_chunk_and_stays_below_ordinary(plan, config, layers, data):
    costs = costs_of(layers)
    plan = scheduled(plan, config, layers)
    session = Session("r", plan.prompt_len, plan.exact_len, config, plan, Reason.NONE)
    ordinary = Session("o", plan.prompt_len, plan.exact_len, config, None, Reason.NO_MATCH)
    start = data.draw(st.integers(plan.exact_len, plan.prompt_len))
    charges = [session.charge(start, end, costs) for end in range(start, plan.prompt_len + 1)]
    assert charges[0] == 0 and charges == sorted(charges)
    for end, charge in enumerate(charges, start):
        assert charge <= end - start == ordinary.charge(start, end, costs)


@given(plans(), configs, layer_counts, st.data())
def test_chunk_end_is_the_largest_within_the_budget(plan, config, layers, data):
    costs = costs_of(layers)
    plan = scheduled(plan, config, layers)
    session = Session("r", plan.prompt_len, plan.exact_len, config, plan, Reason.NONE)
    start = data.draw(st.integers(plan.exact_len, plan.prompt_len))
    whole = data.draw(st.integers(start, plan.prompt_len))
    budget = data.draw(st.integers(0, plan.prompt_len))
    end = session.end_for_budget(start, budget, whole, costs)
    assert start <= end <= whole and session.charge(start, end, costs) <= budget
    assert end == whole or session.charge(start, end + 1, costs) > budget
    assert end >= min(whole, start + budget)  # never fewer tokens than ordinary prefill would get
