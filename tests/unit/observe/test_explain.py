"""One request explained: its runs cover the prompt and agree with the report; donors of others stay unnamed."""

from dataclasses import replace

import numpy as np
import pytest
from test_lifecycle import COSTS, HERE, PROMPT, World, text

from kvshare_sched.observe import explain
from kvshare_sched.observe.series import ORIGINS
from kvshare_sched.records.request import Reason
from radix_ext.records import Namespace


@pytest.fixture
def world():
    return World()


def explained(world, session, namespace=HERE) -> dict:
    details = explain.details(session, namespace, world.pipeline.index)
    report = session.report(COSTS).to_json()
    return {"rid": session.rid, "report": report, "details": details}


def lengths(record) -> dict:
    runs = record["details"]["runs"]
    return {o: sum(r["length"] for r in runs if r["origin"] == o) for o in ORIGINS}


def test_the_runs_are_the_prompt_from_end_to_end_and_sum_to_the_report(world):
    record = explained(world, world.begin(exact_len=4))
    runs = record["details"]["runs"]
    assert [r["origin"] for r in runs] == ["exact", "fresh", "reused", "fresh", "reused", "fresh"]
    assert [r["start"] for r in runs] == [0, *np.cumsum([r["length"] for r in runs])[:-1].tolist()]
    assert lengths(record) == {o: record["report"][o] for o in ORIGINS}
    assert sum(lengths(record).values()) == len(PROMPT)


def test_a_donor_of_the_same_namespace_is_named(world):
    (lender,) = next(r for r in explained(world, world.begin())["details"]["runs"] if r["origin"] == "reused")["donors"]
    assert lender["rid"] == "donor 1" and lender["start"] == 5 and 0 < lender["foreign"] <= 1


def test_a_donor_of_another_namespace_or_one_that_left_is_not_named(world):
    session = world.begin()
    foreign = explained(world, session, Namespace("elsewhere"))
    world.pipeline.index.clear()
    for record in (foreign, explained(world, session)):
        lenders = [d for r in record["details"]["runs"] for d in r.get("donors", ())]
        assert lenders and all(set(d) == {"foreign"} for d in lenders)
        told = str(explain.sections(record)[3])
        assert "donor" not in told and "another namespace's, or gone" in told


def test_an_ordinary_request_says_why(world):
    record = explained(world, world.admit("r", text(33, 200)))
    assert lengths(record) == {"exact": 0, "reused": 0, "fresh": 200}
    told = dict(row[:2] for row in explain.sections(record)[1][2])
    assert told["outcome"] == f"ordinary, no_match: {Reason.NO_MATCH.sentence}"


def test_every_reason_is_explained():
    assert all(reason.sentence for reason in Reason)


def test_costs_expected_and_actual(world):
    session = world.begin()
    session.cells = 400
    session.done_upto = len(PROMPT)
    record = explained(world, session)
    report = record["report"]
    assert 0 < report["expected_cells"] < len(PROMPT) * COSTS.layers
    rows = {row[0]: row[1:] for row in explain.sections(record)[2][2]}
    assert rows["(layer x token) cells, plain prefill"] == ("", len(PROMPT) * COSTS.layers)
    assert rows["cells with reuse"] == (report["expected_cells"], 400)
    saved = (len(PROMPT) * COSTS.layers - 400) * COSTS.cell_s - report["reused"] * COSTS.copy_s
    assert report["saved_s"] == pytest.approx(saved, abs=1e-6)


def test_an_aborted_request_has_saved_nothing(world):
    session = world.begin()
    world.pipeline.release("r")
    assert world.reports[0].saved_s == 0 < world.reports[0].expected_s
    assert session.plan is not None


def test_a_prompt_of_very_many_runs_is_cut_and_still_whole(world):
    session = world.begin()
    one = session.plan.segments[0]
    many = tuple(replace(one, start=10 + 2 * i, length=1, others=()) for i in range(1000))
    session.plan = replace(session.plan, prompt_len=3000, segments=many)
    session.prompt_len = 3000
    runs = explain.details(session, HERE, world.pipeline.index)["runs"]
    assert len(runs) == explain.RUNS + 1 and runs[-1]["origin"] == explain.UNLISTED
    assert sum(r["length"] for r in runs) == 3000
