"""RequestView + segments -> ReusePlan, or the reason why not. Pure and deterministic.

The cost model is measured once at start-up (`wiring`) and shared by all tensor-parallel ranks,
so every rank plans alike.
"""

from __future__ import annotations

from kvshare_sched.methods.base import Method
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Segment


def build_plan(
    view: RequestView,
    segments: tuple[Segment, ...],
    method: Method,
    config: KVShareConfig,
    costs: CostModel,
) -> ReusePlan | Reason:
    """The plan for a request's whole prompt, or the reason to run it as ordinary prefill."""
    last = min(view.fresh_from, view.prompt_len - 1)
    cut = view.fresh_from < view.prompt_len - 1
    if not segments:  # the lookup may have found nothing because there was no room for a run
        return Reason.PROMPT_LOGPROBS if cut and last - view.exact_len < config.min_run else Reason.NO_MATCH
    clipped = (s.clip(view.exact_len, last) for s in segments)
    kept = tuple(s for s in clipped if s is not None and s.length >= config.min_run)
    if not kept:
        return Reason.PROMPT_LOGPROBS if cut else Reason.NO_MATCH
    schedule = method.schedule(config, costs.layers)
    plan = ReusePlan(view.prompt_len, view.exact_len, kept, method.forced_head(config), schedule)
    if method.reference or config.ratio >= 1:  # the reference is asked for, not chosen for speed
        return plan
    return plan if costs.saving_s(plan, plan.expected_cells) > 0 else Reason.NOT_WORTH
