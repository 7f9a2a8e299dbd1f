"""Measured prices of one engine: measured once at start-up, the same on all tensor-parallel ranks."""

from __future__ import annotations

from dataclasses import dataclass

from kvshare_sched.records.plan import ReusePlan


@dataclass(frozen=True, slots=True)
class CostModel:
    """Measured prices of this engine, in seconds."""

    cell_s: float  # one (layer x token) cell of prefill
    copy_s: float  # copy and rotate one token on all layers
    overhead_s: float  # a request with reuse over one without: planning, extra batch metadata, selection
    layers: int
    pass_rows: float = 0.0  # fixed cost of a forward pass, in rows of ordinary prefill

    def prefill_s(self, tokens: int) -> float:
        """Seconds that one pass over so many tokens takes without any reuse; attention over long prompts takes more."""
        return (tokens + self.pass_rows) * self.layers * self.cell_s

    def saving_s(self, plan: ReusePlan, cells: int) -> float:
        """Seconds a plan that computes `cells` cells is expected to save; negative when it costs."""
        ordinary = (plan.prompt_len - plan.exact_len) * self.layers
        return (ordinary - cells) * self.cell_s - plan.copied_len * self.copy_s - self.overhead_s
