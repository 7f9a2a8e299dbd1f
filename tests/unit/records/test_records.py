"""The records check themselves when they are made, and answer questions about ranges correctly."""

import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

from kvshare_sched.errors import PlanError
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason, RequestView
from radix_ext.records import Namespace, RecordError, Segment


def view(length=10, exact_len=0, fresh_from=10):
    return RequestView("r", Namespace(), np.arange(length), exact_len, fresh_from)


def report(**changes):
    values = {"exact": 1, "reused": 4, "recomputed": 2, "fresh": 3, "outcome": Outcome.REUSED}
    return ShareReport(**(values | {"reason": Reason.NONE} | changes))


def test_namespace_parts_are_framed_not_concatenated():
    parts = [
        Namespace("ab", "c"),
        Namespace("a", "bc"),
        Namespace("abc"),
        Namespace(None, "abc"),
        Namespace(),
    ]
    parts += [Namespace(lora_id="abc"), Namespace("ab", None, "c")]
    assert len(set(parts)) == len(parts)


def test_empty_namespace_part_means_absent():
    assert Namespace("", "", "") == Namespace() == Namespace(None, None, None)
    assert hash(Namespace("")) == hash(Namespace())


def test_segment_arithmetic():
    segment = Segment(donor_id=7, donor_start=100, start=40, length=8)
    assert (segment.end, segment.donor_end, segment.shift) == (48, 108, -60)


@pytest.mark.parametrize("fields", [(0, 0, 0, 0), (0, 0, 0, -1), (0, -1, 0, 1), (0, 0, -1, 1)])
def test_impossible_segment_is_refused(fields):
    with pytest.raises(RecordError, match="length > 0"):
        Segment(*fields)


@pytest.mark.parametrize(
    ("start", "end", "wanted"),
    [
        (0, 100, (100, 40, 8)),
        (42, 46, (102, 42, 4)),
        (0, 41, (100, 40, 1)),
        (47, 100, (107, 47, 1)),
        (0, 40, None),
        (48, 60, None),
        (44, 44, None),
        (46, 42, None),
    ],
)
def test_clip_moves_donor_and_target_alike(start, end, wanted):
    part = Segment(7, 100, 40, 8).clip(start, end)
    assert (part and (part.donor_start, part.start, part.length)) == wanted
    assert part is None or (part.shift == -60 and part.donor_id == 7)


def test_records_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        Segment(0, 0, 0, 1).length = 2
    with pytest.raises(FrozenInstanceError):
        Namespace().extra_key = "other tenant"


@pytest.mark.parametrize("wrong", [{"exact_len": -1}, {"exact_len": 11}, {"fresh_from": 11}, {"fresh_from": -1}])
def test_view_outside_the_prompt_is_refused(wrong):
    with pytest.raises(PlanError, match="request r: .*prompt_len=10"):
        view(**wrong)


def test_view_bounds_are_inclusive():
    assert view(exact_len=10, fresh_from=0).prompt_len == 10


@pytest.mark.parametrize(
    ("exact_len", "segments"),
    [
        (0, [(0, 10), (9, 5)]),  # overlap
        (0, [(10, 5), (0, 5)]),  # order
        (4, [(3, 5)]),  # inside the exact prefix
        (0, [(10, 10)]),  # the last token
        (0, [(30, 5)]),  # beyond the prompt
    ],
)
def test_contradictory_plan_is_refused(exact_len, segments):
    with pytest.raises(PlanError):
        ReusePlan(20, exact_len, tuple(Segment(0, 0, start, length) for start, length in segments))


def test_plan_questions():
    plan = ReusePlan(30, 2, (Segment(0, 5, 4, 6), Segment(1, 0, 10, 5), Segment(0, 50, 20, 9)), forced_head=2)
    assert (plan.reused_len, plan.fresh_len, plan.approximate_from) == (20, 8, 4)
    assert plan.forced_positions(0, 30).tolist() == [4, 5, 10, 11, 20, 21]
    assert plan.forced_positions(5, 11).tolist() == [5, 10]
    assert plan.forced_positions(12, 20).tolist() == []
    assert np.flatnonzero(plan.reused_mask(8, 22)).tolist() == [0, 1, 2, 3, 4, 5, 6, 12, 13]
    assert [(s.donor_id, s.donor_start, s.start, s.length) for s in plan.clip(8, 22)] == [
        (0, 9, 8, 2),
        (1, 0, 10, 5),
        (0, 50, 20, 2),
    ]
    first, second, third = plan.segments
    assert list(plan.runs()) == [
        (2, 4, None),
        (4, 10, first),
        (10, 15, second),
        (15, 20, None),
        (20, 29, third),
        (29, 30, None),
    ]


def test_a_chunk_is_answered_for_by_its_own_segments(monkeypatch):
    plan = ReusePlan(10_100, 0, tuple(Segment(i, 0, 100 * i, 40) for i in range(100)), forced_head=2)
    looked = set()

    def look(segment, name):
        looked.add(object.__getattribute__(segment, "start"))
        return object.__getattribute__(segment, name)

    monkeypatch.setattr(Segment, "__getattribute__", look)
    assert plan.reused_mask(510, 720).sum() == 30 + 40 + 20 and looked <= {500, 600, 700}
    assert plan.forced_positions(501, 720).tolist() == [501, 600, 601, 700, 701] and looked <= {500, 600, 700}
    assert [s.donor_id for s in plan.clip(510, 720)] == [5, 6, 7] and looked <= {500, 510, 600, 700}
    looked.clear()
    assert plan.counts(510, 9020)[:3] == (30 + 84 * 40 + 20, 2 * 85, 30 + 84 * 40 + 20) and looked <= {500, 510, 9000}
    assert plan.reused_len == plan.copied_len == 4000 and looked <= {500, 510, 9000}


def test_a_plan_made_from_another_counts_its_own_segments():
    plan = ReusePlan(100, 0, (Segment(0, 50, 10, 20), Segment(1, 0, 40, 20)), forced_head=3)
    left = replace(plan, segments=plan.segments[1:])
    assert left.counts(0, 100) == plan.counts(30, 100) == (20, 3, 20, 20, 20) and left.reused_len == 20
    assert plan == ReusePlan(100, 0, plan.segments, 3) != left and "_sums" not in repr(plan)
    assert plan.counts(60, 60) == plan.counts(15, 15) == plan.counts(50, 20) == (0, 0, 0, 0, 0)


def test_plan_without_segments_is_all_exact_or_fresh():
    plan = ReusePlan(30, 12, ())
    assert (plan.reused_len, plan.fresh_len, plan.approximate_from) == (0, 18, 30)
    assert plan.forced_positions(0, 30).dtype == np.int64 and len(plan.forced_positions(0, 30)) == 0
    assert not plan.reused_mask(0, 30).any() and list(plan.clip(0, 30)) == []
    assert list(plan.runs()) == [(12, 30, None)]


def test_forced_head_never_leaves_a_short_segment():
    plan = ReusePlan(30, 0, (Segment(0, 0, 4, 3), Segment(0, 9, 8, 3)), forced_head=100)
    assert plan.forced_positions(0, 30).tolist() == [4, 5, 6, 8, 9, 10]


@pytest.mark.parametrize("wrong", [{"exact": -1}, {"reused": -1}, {"fresh": -1}, {"recomputed": 5}, {"recomputed": -1}])
def test_contradictory_report_is_refused(wrong):
    with pytest.raises(PlanError, match="contradictory"):
        report(**wrong)


def test_report_is_plain_json():
    data = report(match_s=0.00123456789, computed_cells=12).to_json()
    assert json.loads(json.dumps(data)) == data
    assert (data["outcome"], data["reason"], data["match_s"]) == ("reused", "none", 0.001235)
    assert report().prompt_len == data["exact"] + data["reused"] + data["fresh"] == 8


def test_clip_takes_other_donors_and_context_along():
    segment = Segment(1, 10, 100, 50, context=7, others=(Segment(2, 0, 100, 20), Segment(3, 5, 130, 20, context=4)))
    part = segment.clip(110, 140)
    assert (part.start, part.length, part.donor_start, part.context) == (110, 30, 20, 17)
    assert part.others == (Segment(2, 10, 110, 10, context=10), Segment(3, 5, 130, 10, context=4))
    assert segment.clip(122, 128).others == ()
    with pytest.raises(RecordError):
        Segment(1, 10, 100, 50, others=(Segment(2, 0, 99, 20),))


def test_foreign_share_of_the_left_context():
    assert Segment(1, 0, 0, 5).foreign == 0
    assert Segment(1, 50, 100, 5).foreign == 1
    assert Segment(1, 50, 100, 5, context=75).foreign == 0.25
    assert Segment(1, 50, 100, 5, context=120).foreign == 0
    assert Segment(1, 300, 0, 5).foreign == 1  # the donor saw 300 tokens that the prompt does not have
    assert Segment(1, 400, 100, 5, context=100).foreign == 0.75


def test_a_donor_on_its_own_is_twice_as_doubtful_and_tells_nothing_of_its_tokens():
    alone, elsewhere = Segment(1, 20, 200, 50), Segment(2, 90, 200, 50)
    assert alone.bare and not elsewhere.bare and alone.doubt == 2 * elsewhere.doubt == 2
    assert alone.foreign == elsewhere.foreign == 1
    assert not Segment(1, 0, 90, 50).bare  # a header more or less is no context
    assert not Segment(1, 200, 20, 50).bare  # here the prompt has less than the donor
    assert Segment(1, 20, 200, 50).lone and Segment(1, 20, 200, 50, others=(Segment(3, 30, 200, 40),)).lone
    assert not Segment(1, 20, 200, 50, others=(elsewhere,)).lone and elsewhere.lone


def test_doubt_counts_tokens_by_the_foreign_share_of_their_context():
    plan = ReusePlan(
        400, 0, (Segment(1, 50, 100, 50), Segment(1, 100, 200, 60, context=150), Segment(2, 0, 300, 40, 300))
    )
    assert plan.doubtful_len(0, 400) == 50 + 60 * 0.5
    assert plan.doubtful_len(0, 125) == 25 and plan.doubtful_len(300, 400) == 0
