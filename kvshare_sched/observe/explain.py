"""One request explained: where every prompt token came from, whose KV stood in, what was expected and what it cost.

`details` is made in the scheduler, travels with the report and is kept by the process that talks HTTP (`recent.py`);
`sections` says it in words. Prompts themselves are never kept.
"""

from __future__ import annotations

from kvshare_sched.observe.series import DEFAULT, ORIGINS
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import Reason
from kvshare_sched.tenants.namespaces import owner_of
from radix_ext.records import Namespace

RUNS = 256  # of a prompt that are listed; what lies behind them is one run `unlisted`
UNLISTED = "unlisted"


def details(session, namespace: Namespace, index) -> dict:
    """What the report leaves out, as plain JSON types. session: `session.Session`; index: SegmentIndex.

    A donor of another namespace, or one that has left, is not named: only how foreign its context was. What was found
    in another tenant's conversations is not told at all: the runs are those of the plan that the report tells of.
    """
    plan = session.reported_plan or ReusePlan(session.prompt_len, session.exact_len, ())
    runs = [_run("exact", 0, plan.exact_len)] if plan.exact_len else []
    for start, end, segment in plan.runs():
        runs.append(_run("fresh" if segment is None else "reused", start, end - start))
        if segment is not None:
            runs[-1]["donors"] = [_lender(place, namespace, index) for place in segment.places]
    if len(runs) > RUNS:
        start = runs[RUNS]["start"]
        runs[RUNS:] = [_run(UNLISTED, start, session.prompt_len - start)]
    return {
        "extra_key": namespace.extra_key or "",
        "cache_salt": namespace.cache_salt or "",
        "ratio": session.config.ratio,
        "runs": runs,
    }


def _run(origin: str, start: int, length: int) -> dict:
    return {"origin": origin, "start": start, "length": length}


def _lender(place, namespace: Namespace, index) -> dict:
    known = {"foreign": round(place.foreign, 3)}
    donor = index.donors.get(place.donor_id)
    if donor is None or donor.namespace != namespace:
        return known
    return known | {"rid": donor.rid, "start": place.donor_start}


def sections(record: dict) -> list[tuple[str, tuple[str, ...], list[tuple]]]:
    """(title, column heads, rows) of the tables that tell what became of a request. record: of `recent.Recent`."""
    report, found = record["report"], record["details"]
    prompt = sum(report[o] for o in ORIGINS)
    tokens = [(o, report[o], f"{100 * report[o] / max(1, prompt):.1f} %") for o in ORIGINS]
    tokens += [("of reused: recomputed", report["recomputed"], ""), ("prompt", prompt, "")]
    if report["discovered"]:
        tokens.append(("could have been reused (mode discover)", report["discovered"], ""))
    if report["promoted"]:
        tokens.append(("of fresh: could have been reused, computed exactly for the next ones", report["promoted"], ""))
    ordinary = (prompt - report["exact"]) * report["layers"]
    plan = [
        ("outcome", f"{report['outcome']}, {report['reason']}: {Reason(report['reason']).sentence}"),
        ("tenant", owner_of(found["extra_key"]) or DEFAULT),
        ("strategy, ratio", f"{report['strategy']}, {found['ratio']:.3f}"),
    ]
    costs = [("(layer x token) cells, plain prefill", "", ordinary)]
    if report["reused"]:
        costs += [
            ("cells with reuse", report["expected_cells"], report["computed_cells"]),
            ("prefill seconds saved, by the cost model", _s(report["expected_s"]), _s(report["saved_s"])),
        ]
    costs += [(f"seconds: {phase}", "", _s(report[f"{phase}_s"])) for phase in ("match", "copy", "recompute")]
    runs = [(r["origin"], r["start"], r["start"] + r["length"], r["length"], _lenders(r)) for r in found["runs"]]
    return [
        ("Prompt tokens", ("origin", "tokens", "share"), tokens),
        ("What was done", ("", ""), plan),
        ("Costs", ("", "expected", "actual"), costs),
        ("Runs of the prompt", ("origin", "from", "to", "tokens", "whose KV"), runs),
    ]


def _s(seconds: float) -> str:
    return f"{seconds:.4f}"


def _lenders(run: dict) -> str:
    return "; ".join(
        (f"request {d['rid'] or '?'} from {d['start']}" if "rid" in d else "another namespace's, or gone")
        + f", {100 * d['foreign']:.0f} % of the context foreign"
        for d in run.get("donors", ())
    )
