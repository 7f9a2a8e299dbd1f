"""The selection rules by name. To add one: a file here with its paper in the docstring, a line in `_ALL`,
a line in the test matrix (tests/unit/test_strategies.py), a changelog line.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvshare_sched.strategies.base import Strategy

_NAMES = ("consensus", "kvshare", "cacheblend", "epic", "naive", "random", "full")


def names() -> tuple[str, ...]:
    """Accepted values of KVSHARE_STRATEGY; needs no torch import."""
    return _NAMES


def get(name: str) -> Strategy:
    """The strategy of that name (see `base.Strategy`)."""
    return _all()[name]


@cache
def _all() -> dict[str, Strategy]:
    from kvshare_sched.strategies import blend, consensus, controls

    return {s.name: s for s in (consensus.CONSENSUS, blend.KVSHARE, blend.CACHEBLEND, *controls.ALL)}
