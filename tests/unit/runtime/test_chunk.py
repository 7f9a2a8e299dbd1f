"""What a chunk asks of a strategy: candidates, budget, who asks, whether a first pass pays."""

from dataclasses import replace

import numpy as np
import pytest

from kvshare_sched.methods.registry import get
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import Reason
from kvshare_sched.reuse.session import Session
from kvshare_sched.runtime.chunk import Chunk
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Segment

# 200 tokens: 10 fresh, 150 of a donor whose left context is foreign, 40 fresh.
PLAN = ReusePlan(200, 0, (Segment(1, 0, 10, 150),), forced_head=8)


def chunk(plan=PLAN, *, row=1000, asks_until=200, start=0, end=None, **settings) -> Chunk:
    end = plan.prompt_len if end is None else end
    config = KVShareConfig(**settings)
    plan = replace(plan, schedule=get(config.strategy).schedule(config, 30))
    session = Session("r", plan.prompt_len, 0, config, plan, Reason.NONE, asks_until=asks_until)
    forced = np.zeros(end - start, bool)
    forced[plan.forced_positions(start, end) - start] = True
    return Chunk(session, row, start, end, plan.reused_mask(start, end), forced)


def test_candidates_are_reused_and_not_forced():
    assert chunk().candidates.tolist() == list(range(1018, 1160))
    assert chunk(start=100, row=0).candidates.tolist() == list(range(60))


@pytest.mark.parametrize("strategy", ["dhd", "cacheblend", "epic", "random"])
def test_published_rules_get_a_share_of_all_reused_rows(strategy):
    behind = ReusePlan(200, 0, (Segment(1, 0, 10, 150, context=10),), forced_head=8)
    assert chunk(strategy=strategy).budget(0.2) == chunk(behind, strategy=strategy).budget(0.2) == 30 - 8


def test_consensus_spends_nothing_where_the_left_context_agrees():
    quarter = ReusePlan(400, 0, (Segment(1, 100, 200, 100, context=150),), forced_head=8)
    alone = ReusePlan(400, 0, (Segment(1, 0, 200, 100),), forced_head=8)
    same = ReusePlan(200, 0, (Segment(1, 0, 10, 150, context=10),), forced_head=8)
    assert chunk(strategy="consensus").budget(0.2) == 30 - 8
    assert chunk(quarter, strategy="consensus").budget(0.2) == 10 - 8
    assert chunk(same, strategy="consensus").budget(0.2) == 0
    assert chunk(alone, strategy="consensus").budget(0.2) == 20 - 8  # a document on its own gets no more, only sooner
    assert chunk(same, strategy="consensus").budget(1.0) == 150 - 8  # everything means everything


def test_a_scored_continuation_does_not_ask():
    assert chunk().asking.tolist() == [*range(1000, 1010), *range(1160, 1200)]
    assert chunk(asks_until=180).asking.tolist() == [*range(1000, 1010), *range(1160, 1180)]
    assert chunk(asks_until=180, start=170, row=5).asking.tolist() == list(range(5, 15))


def test_a_first_pass_must_not_cost_more_than_it_saves():
    assert chunk(strategy="consensus").looks
    assert not chunk(strategy="dhd").looks
    assert not chunk(strategy="consensus", ratio=1.0).looks
    assert not chunk(strategy="consensus", ratio=0.8).looks  # 120 chosen + 2 x 50 fresh rows of 200
    assert not chunk(strategy="consensus", start=20, end=100).looks  # nobody asks in the middle of a document
