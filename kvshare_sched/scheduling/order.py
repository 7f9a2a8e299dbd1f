"""What the order may know of a waiting request, and the keys it can be sorted by. Pure functions over arrays.

Everything is counted in tokens of ordinary prefill, waiting too: a request has waited as long as the engine has
worked since it came. So every tensor-parallel rank sees the same numbers, and no clock decides anything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True, slots=True)
class Waiting:
    """One waiting request. `exact` and `reused` count hits inside its own namespace only."""

    rid: str
    tenant: str
    arrival: int  # ascending; kept when a retracted request comes back
    prompt: int  # tokens
    work: float  # tokens of ordinary prefill it still costs: fresh + recomputed + priced copies
    exact: int = 0  # prompt tokens the exact tree has
    reused: int = 0  # prompt tokens other contexts can lend
    since: float = 0.0  # the service clock when it came
    tier: float = 0.0  # smaller first


class Rows(NamedTuple):
    """Their fields as float64 arrays, one row a request."""

    tier: np.ndarray
    arrival: np.ndarray
    since: np.ndarray
    work: np.ndarray
    exact: np.ndarray
    reused: np.ndarray
    prompt: np.ndarray
    shared: np.ndarray  # part of `work` that other waiting requests would be spared, see `duplicates.Wanted`
    account: np.ndarray  # its number


HEAD_START = 1.0  # tokens that everybody has waited on arrival


def response_ratio(rows: Rows, clock: float) -> np.ndarray:
    """Ours: waited / work, largest first. The cheap come first, and whoever has waited long for what it costs.

    What several waiting requests lack is paid by all of them: who computes it for the others counts as cheaper.
    Requests that came together are sorted by work, so a prefill batch, a stretch of this order, holds similar ones.
    """
    return -(clock - rows.since + HEAD_START) / np.maximum(1.0, rows.work - rows.shared)


def fcfs(rows: Rows, clock: float) -> np.ndarray:
    """First come, first served."""
    return np.zeros(len(rows.arrival))


def lpm(rows: Rows, clock: float) -> np.ndarray:
    """SGLang's longest prefix match: most exact tokens first, nothing against starving."""
    return -rows.exact


def hit_rate(rows: Rows, clock: float) -> np.ndarray:
    """KVShare's rule: largest reusable share of the prompt first, nothing against starving."""
    return -(rows.exact + rows.reused) / np.maximum(1.0, rows.prompt)


KEYS: dict[str, Callable[[Rows, float], np.ndarray]] = {
    "fair": response_ratio,  # with deficits and held duplicates, see `queue`
    "fcfs": fcfs,
    "lpm": lpm,
    "hit_rate": hit_rate,
}


def ranked(policy: str, rows: Rows, clock: float) -> np.ndarray:
    """Row numbers by (tier, the policy's key, arrival), int64."""
    return np.lexsort((rows.arrival, KEYS[policy](rows, clock), rows.tier))
