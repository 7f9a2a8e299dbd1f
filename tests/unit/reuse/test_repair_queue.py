"""Which positions a decode step repairs, and what of the prompt counts as exact meanwhile."""

import numpy as np
import pytest
from fakes import FakeTree, NamedPipeline

from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.repair_queue import RepairQueue
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

HERE = Namespace("here")
SETTINGS = {"window": 16, "min_run": 32, "min_suffix": 64, "strategy": "naive"}


def queue(order: str, rows: int = 2, stale=(10, 11, 12, 13), length: int = 20, **deviation) -> RepairQueue:
    made = RepairQueue(np.arange(length), rows, order)
    made.stale[list(stale)] = True
    for position, value in deviation.items():
        made.deviation[int(position[1:])] = value
    return made


def attended(made: RepairQueue, **attention) -> RepairQueue:
    made.attention = np.zeros(len(made.tokens), np.float32)
    for position, value in attention.items():
        made.attention[int(position[1:])] = value
    return made


@pytest.mark.parametrize("rows", [1, 3, 7, 64])
def test_fifo_walks_every_position_once_in_ascending_order(rows):
    made, seen, start = queue("fifo", rows), [], 5
    while made.waiting(start):
        step = made.next(start)
        assert 0 < len(step) <= rows
        seen += step.tolist()
        start = int(step[-1]) + 1
    assert seen == list(range(5, 20)), "fresh and recomputed positions too, and none below the first approximate one"


@pytest.mark.parametrize("order", ["lagged", "attention"])
def test_other_orders_repair_each_stale_position_once(order):
    made = attended(queue(order, 3, p11=2.0, p13=1.0), p12=0.5, p19=0.9)
    seen = []
    while made.waiting(0):
        step = made.next(0)
        made.stale[step] = False
        seen += step.tolist()
    assert sorted(seen) == [10, 11, 12, 13]


def test_lagged_takes_deviation_first_within_what_is_attended_to():
    assert queue("lagged", p11=3.0, p13=2.0).next(0).tolist() == [11, 13]  # no step seen yet: by deviation
    stale = range(100)
    made = attended(
        queue("lagged", 2, stale, 100, p99=9.0, p40=2.0, p20=1.0), **{f"p{i}": 1.0 - i / 100 for i in stale}
    )
    assert made.next(0).tolist() == [20, 40], "position 99 deviates most but is not among the 64 attended to most"
    made.rows = 70
    assert 99 in made.next(0), "filled up from the rest by deviation"


def test_without_deviations_attention_alone_decides():
    for order in ("lagged", "attention"):
        assert attended(queue(order), p12=0.5, p13=0.25).next(0).tolist() == [12, 13]


def test_attention_order_weighs_deviation_by_attention():
    made = attended(queue("attention", 1, p10=1.0, p11=10.0, p12=3.0), p10=0.6, p11=0.05, p12=0.3)
    assert made.next(0).tolist() == [12]


# ---- a request's session ----


def text(seed: int, length: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


PROMPT = np.concatenate((text(9, 10), text(1), text(8, 20)))  # 130 tokens, 10 to 109 reused


@pytest.fixture
def pipeline():
    made = NamedPipeline(KVShareConfig(**SETTINGS), FakeTree(), CostModel(1e-4, 1e-7, 0.0, 4))
    made.publish("donor", HERE, np.concatenate((text(51, 5), text(1))))
    return made


def admitted(pipeline, **wishes):
    view = RequestView("r", HERE, PROMPT, 0, len(PROMPT), wishes)
    session = pipeline.admit(view, "r", len(PROMPT), 0)
    pipeline.begin(session)
    assert session.plan is not None
    session.approximate_from = session.plan.approximate_from  # as the executor does with the first copy
    pipeline.chunk_done(session, len(PROMPT))
    return session


def test_no_rows_no_queue(pipeline):
    assert not admitted(pipeline).to_repair


def test_a_fifo_walk_raises_what_may_be_published(pipeline):
    session = admitted(pipeline, repair_rows=7)
    assert pipeline.exact_up_to("r") == 10
    steps = 0
    while session.to_repair:
        positions = session.repair.next(session.approximate_from)
        assert positions[0] == pipeline.exact_up_to("r"), "nothing that may already be published is written"
        assert np.array_equal(session.repair.tokens[positions], PROMPT[positions])
        pipeline.repaired(session, positions, 0.0)
        assert pipeline.exact_up_to("r") == positions[-1] + 1
        steps += 1
    assert steps == -(-120 // 7)
    assert pipeline.exact_up_to("r") == len(PROMPT), "the output was computed from stale KV and stays private"


def test_other_orders_publish_nothing_more(pipeline):
    session = admitted(pipeline, repair_rows=50, repair_order="lagged")
    session.repair.stale[10:110] = True
    while session.to_repair:
        pipeline.repaired(session, session.repair.next(session.approximate_from), 0.0)
    assert pipeline.exact_up_to("r") == 10


def test_nothing_is_repaired_after_a_failure_or_without_copies(pipeline):
    session = admitted(pipeline, repair_rows=4)
    assert session.to_repair
    session.approximate_from = None
    assert not session.to_repair
    session.approximate_from = 10
    pipeline.abandon(session)
    assert not session.to_repair


def test_a_retracted_request_repairs_nothing(pipeline):
    admitted(pipeline, repair_rows=4)
    pipeline.release("r")
    assert not pipeline.admit(Reason.RETRACTED, "r", len(PROMPT), 0).to_repair
