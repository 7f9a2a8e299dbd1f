"""How far captured distributions are from the reference's: KL and agreement, pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_LEAST = 1e-9  # probability of the ids beyond the compared ones, at least


@dataclass(frozen=True, slots=True)
class Measurement:
    """How far one answer's distributions are from full prefill; KL(full || approximate) in nats."""

    kl_first: float
    kl: float  # mean over the tokens sent
    same_first: float  # 1.0 when both have the same likeliest first token
    same: float  # share of the positions


def bucketed_kl(p_log: np.ndarray, q_log: np.ndarray) -> float:
    """KL(p || q) in nats from log-probabilities float64 [n] of the same ids; all other ids form one bucket.

    Raises ValueError when the two name different numbers of ids.
    """
    if p_log.shape != q_log.shape:
        raise ValueError(
            f"log-probabilities of {p_log.shape} and {q_log.shape} ids; expected the same ids on both sides"
        )
    p_rest, q_rest = (max(_LEAST, 1 - float(np.exp(x).sum())) for x in (p_log, q_log))
    return float((np.exp(p_log) * (p_log - q_log)).sum()) + p_rest * math.log(p_rest / q_rest)


def compare(rows, reference: Sequence[Sequence[float]], ids: Sequence[int], best: Sequence[int]) -> Measurement:
    """Captured rows against the reference at the same positions.

    rows: (ids int64 [n], log q float32 [n]) a position, likeliest first; reference: log p of `ids` (ascending,
    holding every captured id) a position; best: the reference's likeliest id a position. What is left of each
    distribution is compared as one bucket, so the KL is a lower bound.
    """
    kl, same = [], []
    for (row_ids, log_q), log_p, likeliest in zip(rows, reference, best, strict=True):
        p_log = np.asarray(log_p, np.float64)[np.searchsorted(ids, row_ids.numpy())]
        q_log = log_q.numpy().astype(np.float64)
        kl.append(bucketed_kl(p_log, q_log))
        same.append(float(likeliest == int(row_ids[0])))
    found = Measurement(kl[0], sum(kl) / len(kl), same[0], sum(same) / len(same))
    if not math.isfinite(found.kl):
        raise ValueError(f"KL is {found.kl}; expected finite log-probabilities")
    return found
