"""Which prompt positions are computed again while decoding (KVShare 4.6, decode-stage DHD): pure choices.

A request that reused KV may take a few of its own prompt positions along in every decode step. Orders:

- `fifo`: every position from the first approximate one to the prompt's end, ascending. A position then only ever
  sees exact KV before it, so everything below the walk is exact, and in the end the whole prompt is.
- `lagged`: of the reused positions that were not recomputed, the ones the previous step attended to most form a
  pool; of these the ones that deviated most at prefill come first.
- `attention`: the attention of the current step times the deviation at prefill.

The last two lower the error without ending at exact KV: what was recomputed at prefill saw stale neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

_POOL = 64  # positions with the most attention among which `lagged` looks for deviation


@dataclass(slots=True)
class RepairQueue:
    """What one request still has to repair."""

    tokens: np.ndarray  # int64 [prompt_len]
    rows: int  # positions a step, > 0
    order: str  # a value of the setting `repair_order`
    stale: np.ndarray = field(init=False)  # bool [prompt_len], reused and not computed again
    deviation: np.ndarray = field(init=False)  # float32 [prompt_len], of the values at the check layer; 0 if unseen
    attention: np.ndarray | None = None  # float32 [prompt_len], received from the latest token; None: not known

    def __post_init__(self):
        self.stale = np.zeros(len(self.tokens), bool)
        self.deviation = np.zeros(len(self.tokens), np.float32)

    def waiting(self, approximate_from: int) -> bool:
        """Whether anything is left; `approximate_from` is the first position whose KV is not exact."""
        return approximate_from < len(self.tokens) if self.order == "fifo" else bool(self.stale.any())

    def next(self, approximate_from: int) -> np.ndarray:
        """The positions for the next step, int64 ascending, at most `rows`. Never below `approximate_from`."""
        if self.order == "fifo":
            return np.arange(approximate_from, min(len(self.tokens), approximate_from + self.rows))
        left = np.flatnonzero(self.stale)
        return np.sort(left[self._ranking(left)[: self.rows]])

    def _ranking(self, left: np.ndarray) -> np.ndarray:
        """Indices into `left`, best first; ties go to more attention, then to the lower position."""
        deviation = self.deviation[left]
        if self.attention is None:
            return _descending(deviation)
        attention = self.attention[left]
        by_attention = _descending(attention)
        if self.order == "attention":
            return by_attention if not deviation.any() else _descending(attention * deviation)
        pool, rest = by_attention[:_POOL], by_attention[_POOL:]
        return np.concatenate([part[_descending(deviation[part])] for part in (pool, rest)])


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")  # stable: all tensor-parallel ranks choose alike
