"""The report for a client whose requests may borrow other tenants' conversations: it must not reveal them. Pure."""

from __future__ import annotations

from dataclasses import replace

from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.reuse.costs import CostModel


def public_report(true: ShareReport, public: ReusePlan | Reason, mode: str, costs: CostModel) -> ShareReport:
    """The report as if the request could borrow only what its client may know of.

    public: the outcome of a lookup without the others' conversations. The report is always made of it, whatever was
    borrowed: a report that changed only with a hit would reveal the hit. A plan's expected rows stand for those that
    ran; times are the cost model's. mode: the setting.
    """
    left = true.prompt_len - true.exact
    nothing = replace(
        true,
        outcome=Outcome.ORDINARY,
        reused=0,
        recomputed=0,
        fresh=left,
        donors=0,
        discovered=0,
        promoted=0,
        computed_cells=left * costs.layers,
        expected_cells=0,
        expected_s=0.0,
        saved_s=0.0,
        match_s=0.0,
        copy_s=0.0,
        recompute_s=0.0,
    )
    if isinstance(public, Reason):
        return replace(nothing, reason=public)
    if mode != "on":
        return replace(nothing, outcome=Outcome.DISCOVERED, reason=Reason.NONE, discovered=public.reused_len)
    rows = public.rows(public.exact_len, public.prompt_len)
    saved_s = costs.saving_s(public, sum(rows))
    return replace(
        nothing,
        outcome=Outcome.REUSED,
        reason=Reason.NONE,
        reused=public.reused_len,
        fresh=public.fresh_len,
        recomputed=min(public.reused_len, max(0, rows[-1] - public.fresh_len)),
        donors=len(public.donor_ids),
        computed_cells=sum(rows),
        expected_cells=sum(rows),
        expected_s=saved_s,
        saved_s=saved_s,
    )
