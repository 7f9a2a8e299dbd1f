"""When sessions begin: seeded arrival times at one a second on average. Pure."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

_BURST = 6  # requests in a burst, on average
_BURST_GAP_S = 0.05  # between two requests of one burst


def poisson(count: int, rng: random.Random) -> list[float]:
    """Independent users: exponential gaps."""
    return list(itertools.accumulate(rng.expovariate(1.0) for _ in range(count)))


def bursty(count: int, rng: random.Random) -> list[float]:
    """Bursts of geometric size with long pauses between them; the same mean rate as `poisson`."""
    times: list[float] = []
    now = 0.0
    pause = 1.0 * _BURST - _BURST_GAP_S * (_BURST - 1)
    while len(times) < count:
        now += rng.expovariate(1 / pause)
        times.append(now)
        while rng.random() < 1 - 1 / _BURST and len(times) < count:
            now += _BURST_GAP_S
            times.append(now)
    return times


ARRIVALS: dict[str, Callable[[int, random.Random], list[float]]] = {"poisson": poisson, "bursty": bursty}
