"""What happened to one request: goes to the client, to the metrics and to the evaluation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

from kvshare_sched.errors import PlanError
from kvshare_sched.records.request import Outcome, Reason


@dataclass(frozen=True, slots=True)
class ShareReport:
    """What happened to one request: goes to the client, to the metrics and to the evaluation alike.

    `exact + reused + fresh` is the number of prompt tokens; `recomputed` is a part of `reused`: tokens that
    ran through all remaining layers after selection. `computed_cells` counts (layer x token) cells computed,
    check layers and fresh rows included.
    """

    exact: int
    reused: int
    recomputed: int
    fresh: int
    outcome: Outcome
    reason: Reason
    donors: int = 0
    discovered: int = 0  # tokens that could have been reused (mode `discover`)
    strategy: str = ""
    computed_cells: int = 0
    layers: int = 0
    expected_cells: int = 0  # what the plan was chosen for
    expected_s: float = 0.0  # prefill seconds it was expected to save
    saved_s: float = 0.0  # the same of the cells computed, by the cost model; negative when reuse cost more
    match_s: float = field(default=0.0)
    copy_s: float = field(default=0.0)
    recompute_s: float = field(default=0.0)
    promoted: int = 0  # fresh tokens that could have been reused, see `promotion`

    def __post_init__(self):
        if min(self.exact, self.reused, self.recomputed, self.fresh) < 0 or self.recomputed > self.reused:
            raise PlanError(f"contradictory report: {self}")

    @property
    def prompt_len(self) -> int:
        return self.exact + self.reused + self.fresh

    def to_json(self) -> dict:
        """Plain JSON types, for `meta_info["kvshare"]`; times are rounded to microseconds."""
        data = asdict(self) | {"outcome": self.outcome.value, "reason": self.reason.value}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in data.items()}
