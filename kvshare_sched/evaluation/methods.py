"""The methods under comparison as data, and the ratio at which each computes equally many cells. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvshare_sched.errors import ConfigError
from kvshare_sched.methods.registry import get as get_method
from kvshare_sched.settings import KVShareConfig

# Name -> settings of the request. A further method is a line here; `default` is what the server does unasked.
METHODS: dict[str, dict[str, object]] = {
    "naive": {"strategy": "naive"},
    "random": {"strategy": "random"},
    "epic": {"strategy": "epic"},
    "cacheblend": {"strategy": "cacheblend"},
    "dhd": {"strategy": "dhd"},
    "consensus": {"strategy": "consensus"},
    "default": {},
    "quality": {"preset": "quality"},
    "speed": {"preset": "speed"},
    "default+repair": {"repair_rows": 3, "repair_order": "attention"},
    "dhd+repair": {"strategy": "dhd", "repair_rows": 3, "repair_order": "attention"},
}
_YARDSTICK = "dhd"  # its ratio is the one a user gives; the others get as many cells


@dataclass(frozen=True, slots=True)
class Method:
    """One column of the comparison."""

    name: str  # unique; the first budget has the plain name, later ones "name@ratio"
    family: str
    budget: float | None  # the yardstick's ratio whose cells it matches; None: it has no budget
    reuse: bool | dict  # as `Client.generate` takes it


def cell_share(strategy: str, ratio: float, layers: int, config: KVShareConfig) -> float:
    """Cells computed for reused tokens over all of their cells, 0..1; forced heads not counted."""
    return get_method(strategy).schedule(replace(config, strategy=strategy, ratio=ratio), layers).mean_share()


def ratio_for(strategy: str, share: float, layers: int, config: KVShareConfig) -> float:
    """The ratio whose `cell_share` is `share`, to 4 digits; 0 when the check layers alone cost more."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if cell_share(strategy, middle, layers, config) < share else (low, middle)
    return round(low, 4) if low > 1e-5 else 0.0


def resolve(names: Sequence[str], ratios: Sequence[float], layers: int, config: KVShareConfig) -> list[Method]:
    """The methods of a run in order: without a budget once, the others once a ratio at equal cells."""
    methods = []
    for name in names:
        settings = METHODS[name]
        if settings.get("strategy", "naive") == "naive":  # nothing to spend, or the server's own choice
            methods.append(Method(name, name, None, settings or True))
            continue
        for number, ratio in enumerate(ratios):
            share = cell_share(_YARDSTICK, ratio, layers, config)
            own = ratio_for(str(settings["strategy"]), share, layers, config)
            label = name if number == 0 else f"{name}@{ratio:g}"
            methods.append(Method(label, name, ratio, {**settings, "ratio": own}))
    return methods


def check_names(names: Sequence[str], ratios: Sequence[float]) -> None:
    """Raises ConfigError for a method that does not exist or a ratio outside (0, 1)."""
    for name in names:
        if name not in METHODS:
            raise ConfigError(f"method {name!r} is not known; accepted: {', '.join(METHODS)}.")
    for ratio in ratios:
        if not (math.isfinite(ratio) and 0 < ratio < 1):
            raise ConfigError(f"ratio {ratio} is out of range; accepted: 0 < ratio < 1 (share of reused tokens).")
