"""RequestView + segments -> ReusePlan, or the reason why not. Pure and deterministic.

The cost model is measured once at start-up (`wiring`) and shared by all tensor-parallel ranks,
so every rank plans alike.
"""

from __future__ import annotations

import math

from kvshare_sched.methods.base import Strategy
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Segment


def build_plan(
    view: RequestView,
    segments: tuple[Segment, ...],
    strategy: Strategy,
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
    plan = ReusePlan(view.prompt_len, view.exact_len, kept, strategy.forced_head(config))
    if strategy.name == "full" or config.ratio >= 1:  # the reference is asked for, not chosen for speed
        return plan
    return plan if costs.saving_s(plan, expected_cells(plan, strategy, config, costs.layers)) > 0 else Reason.NOT_WORTH


def expected_cells(plan: ReusePlan, strategy: Strategy, config: KVShareConfig, layers: int) -> int:
    """(Layer x token) cells the plan will compute over a whole prompt, before the scores are known."""
    return sum(rows_per_layer(plan, plan.exact_len, plan.prompt_len, strategy, config, layers))


def rows_per_layer(
    plan: ReusePlan, start: int, end: int, strategy: Strategy, config: KVShareConfig, layers: int
) -> list[int]:
    """Rows expected at each layer for the chunk [start, end) of the prompt; O(layers + log segments)."""
    rows, chunk = end - start, plan.counts(start, end)
    fresh = rows - chunk.reused
    per_layer, current, checks = [], rows, list(strategy.checks(config, layers))
    if not checks:
        share = {"full": 1.0, "naive": 0.0}.get(strategy.name, config.ratio)
        chosen = chunk.doubtful if strategy.by_doubt and share < 1 else chunk.reused
        current = fresh + max(chunk.forced, math.ceil(share * chosen))
    looking = strategy.first_pass(layers).stop if strategy.first_pass and chunk.lone > 0 else 0  # fresh rows run twice
    for layer in range(layers):
        per_layer.append(min(rows, current + (fresh if layer < looking else 0)))
        while checks and checks[0].layer == layer:
            current = fresh + max(chunk.forced, math.ceil(checks.pop(0).share * chunk.reused))
    return per_layer
