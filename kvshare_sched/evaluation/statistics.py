"""Paired bootstrap over cases: what may be said about a difference. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from kvshare_sched.evaluation.cases import SEED

RESAMPLES = 10_000
_KL_FLOOR = 1e-9  # nats; below this a divergence is rounding of the measurement


def mean_interval(differences: Sequence[float]) -> tuple[float, float, float]:
    """Mean of paired differences with its 95 % bootstrap interval (low, high); equal for equal input."""
    values = np.asarray(differences, float)
    picks = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[picks].mean(axis=1), (2.5, 97.5))
    return float(values.mean()), float(low), float(high)


def geometric_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean of paired ratios of divergences with its 95 % interval."""
    logs = [math.log(max(a, _KL_FLOOR) / max(b, _KL_FLOOR)) for a, b in zip(numerators, denominators, strict=True)]
    return tuple(math.exp(x) for x in mean_interval(logs))


def gap_recovered(score: float, full: float, without_context: float) -> float | None:
    """(score - no context) / (full - no context); None when full prefill gains nothing from the context."""
    return (score - without_context) / (full - without_context) if full > without_context else None
