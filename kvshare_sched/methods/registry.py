"""The methods by name. To add one: a file here with its paper in the docstring, a line in `_ALL`,
a line in the test matrix (tests/unit/methods/test_methods.py), a changelog line.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvshare_sched.methods.base import Method

_NAMES = ("consensus", "dhd", "cacheblend", "epic", "naive", "random", "full")


FORMER_NAMES = {"kvshare": "dhd"}  # accepted with a warning


def names() -> tuple[str, ...]:
    """Accepted values of KVSHARE_STRATEGY; needs no torch import."""
    return _NAMES


def get(name: str) -> Method:
    """The strategy of that name (see `base.Method`)."""
    return _all()[name]


@cache
def _all() -> dict[str, Method]:
    from kvshare_sched.methods import cacheblend, consensus, controls, dhd

    return {s.name: s for s in (consensus.CONSENSUS, dhd.DHD, cacheblend.CACHEBLEND, *controls.ALL)}
