"""What a client is told that may borrow other tenants' conversations. Pure."""

from __future__ import annotations

from dataclasses import replace

from kvshare_sched.methods.base import Method
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.settings import KVShareConfig


def told(
    true: ShareReport, planned: ReusePlan | Reason, method: Method, config: KVShareConfig, costs: CostModel
) -> ShareReport:
    """The report of a request as if it could borrow only what its client may know of.

    planned: what came of a lookup without the others' conversations. It is told whatever was borrowed: a report that
    changed only with a hit would tell of the hit. A plan's expected rows stand for those that ran; times are the cost
    model's.
    """
    left, layers = true.prompt_len - true.exact, costs.layers
    nothing = replace(
        true,
        **{"reused": 0, "recomputed": 0, "fresh": left, "donors": 0, "discovered": 0, "promoted": 0},
        **{"computed_cells": left * layers, "match_s": 0.0, "copy_s": 0.0, "recompute_s": 0.0},
        **{"expected_cells": 0, "expected_s": 0.0, "saved_s": 0.0},
    )
    if isinstance(planned, Reason):
        return replace(nothing, outcome=Outcome.ORDINARY, reason=planned)
    if config.mode != "on":
        return replace(nothing, outcome=Outcome.DISCOVERED, reason=Reason.NONE, discovered=planned.reused_len)
    rows = planned.rows(planned.exact_len, planned.prompt_len)
    saved_s = costs.saving_s(planned, sum(rows))
    return replace(
        nothing,
        **{"outcome": Outcome.REUSED, "reason": Reason.NONE},
        reused=planned.reused_len,
        fresh=planned.fresh_len,
        recomputed=min(planned.reused_len, max(0, rows[-1] - planned.fresh_len)),
        donors=len(planned.donor_ids),
        computed_cells=sum(rows),
        **{"expected_cells": sum(rows), "expected_s": saved_s, "saved_s": saved_s},
    )
