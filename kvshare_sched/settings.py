"""Configuration in one typed place: defaults, a TOML file named by KVSHARE_CONFIG, KVSHARE_* variables.

The file holds the field names below as top-level keys; a variable is `KVSHARE_` plus the name in capitals
and overrides the file. Wrong values and unknown names are refused by name.
"""

from __future__ import annotations

import difflib
import functools
import logging
import os
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from kvshare_sched.errors import ConfigError

logger = logging.getLogger(__name__)
BACKEND = "kvshare"  # name of our radix cache in `--radix-cache-backend`
MODES = ("off", "discover", "on")
ALPHA_MODES = ("colsum", "one_query")
# What a preset sets; any of it may still be set by name. The frontier they stand on: benchmarks/README.md.
PRESETS: dict[str, dict[str, object]] = {
    "quality": {"strategy": "consensus", "ratio": 0.30},
    "balanced": {"strategy": "consensus", "ratio": 0.18},
    "speed": {"strategy": "consensus", "ratio": 0.08},
}
SCHEDULERS = ("fair", "fcfs", "lpm", "hit_rate", "off")
REPAIR_ORDERS = ("fifo", "lagged", "attention")
_NOT_SETTINGS = {"KVSHARE_CONFIG", "KVSHARE_CACHE", "KVSHARE_ADMIN_KEY", "KVSHARE_STAMP_SECRET"}  # read elsewhere


def _setting(default, unit: str, reason: str, *, choices=None, low=None, high=None, request=False):
    limits = {"choices": choices, "low": low, "high": high}
    return field(default=default, metadata={"unit": unit, "reason": reason, "request": request, **limits})


@dataclass(frozen=True, slots=True)
class KVShareConfig:
    """Every setting, with its unit, its range and the reason for its default."""

    preset: str = _setting("balanced", "", "sets strategy and ratio together", choices=tuple(PRESETS), request=True)
    mode: str = _setting("on", "", "discover looks up and reports without using", choices=MODES)
    strategy: str = _setting("consensus", "", "which reused tokens are recomputed", request=True)
    ratio: float = _setting(0.18, "share of reused tokens", "recompute budget", low=0.0, high=1.0, request=True)
    check_layer: int = _setting(
        1, "layer, 0-based, below the model's last", "all rows run up to it; layer 0 shows no deviation", low=1
    )
    alpha: str = _setting("one_query", "", "attention weights of the dhd score", choices=ALPHA_MODES)
    window: int = _setting(16, "tokens", "length of the hashed windows", low=2, high=256)
    min_run: int = _setting(32, "tokens", "shorter matches are not reused", low=2)
    forced_head: int = _setting(
        8, "tokens", "first tokens of a run, always recomputed: attention sinks of the donor", low=0
    )
    min_suffix: int = _setting(
        64, "tokens", "requests with fewer tokens outside the exact prefix skip the lookup", low=1
    )
    repair_rows: int = _setting(
        0,
        "prompt tokens a decode step",
        "computed again while decoding; 0 is plain decode",
        low=0,
        high=64,
        request=True,
    )
    repair_order: str = _setting(
        "fifo", "", "order of the repaired tokens; only fifo ends at exact KV", choices=REPAIR_ORDERS, request=True
    )
    index_tokens: int = _setting(2_000_000, "tokens", "donor tokens indexed at most, about 35 bytes each", low=1024)

    audit_share: float = _setting(
        0.02, "share of approximate requests", "prefilled again in full and compared when idle", low=0.0, high=1.0
    )
    target_kl: float = _setting(0.03, "nats", "mean KL(full || approximate) the controller holds", low=0.0)

    scheduler: str = _setting("fair", "", "order of the waiting queue; off: SGLang's own", choices=SCHEDULERS)
    quantum: int = _setting(
        2048, "tokens", "service a tenant may get ahead of the others; large: locality, small: fairness", low=1
    )
    tenant_weights: str = _setting("", "name=number,...", "shares of tenants; the others have 1")
    unknown_tenants: int = _setting(
        256, "accounts", "unweighted tenants with accounts of their own; further ones share one", low=1
    )
    pool_keep: float = _setting(
        0.3,
        "share of the KV pool",
        "kept for cached text that recent prompts have hit, at most",
        low=0.0,
        high=0.9,
    )
    duplicate_wait: int = _setting(8, "passes", "wait for a running request with the same text; 0: none", low=0)

    tenants_file: str = _setting("", "path", "callers and their rights; without it extra_key is the tenant")
    library: str = _setting("", "path", "folder of the documents lent to share groups; without it there are none")
    borrow_log: str = _setting(
        "", "path", "which tenant borrowed which text of which other, JSON lines; without it the server's log"
    )

    def __post_init__(self):
        from kvshare_sched.methods.registry import names

        object.__setattr__(self, "strategy", _present_name(self.strategy))
        for item in fields(self):
            value, limits = getattr(self, item.name), item.metadata
            choices = names() if item.name == "strategy" else limits["choices"]
            if choices and value not in choices:
                raise ConfigError(
                    f"{item.name}={value!r} is not known; accepted: {', '.join(choices)}{_nearest(value, choices)}. "
                    f"Set {_variable(item.name)} or the key in KVSHARE_CONFIG."
                )
            low, high = limits["low"], limits["high"]
            if (low is not None and not value >= low) or (high is not None and not value <= high):  # NaN too
                allowed = f"{'' if low is None else f'{low} <= '}{item.name}{'' if high is None else f' <= {high}'}"
                raise ConfigError(
                    f"{item.name}={value!r} is out of range; accepted: {allowed} ({limits['unit']}). "
                    f"Set {_variable(item.name)} or the key in KVSHARE_CONFIG."
                )
        if self.min_run < self.window:
            raise ConfigError(
                f"min_run={self.min_run} is shorter than window={self.window}; accepted: min_run >= window. "
                "Raise KVSHARE_MIN_RUN or lower KVSHARE_WINDOW."
            )
        _ = self.weights  # says what is wrong with them

    @property
    def weights(self) -> dict[str, float]:
        """`tenant_weights` by name; raises ConfigError for what is no list of weights."""
        found: dict[str, float] = {}
        for part in filter(None, (p.strip() for p in self.tenant_weights.split(","))):
            name, _, number = part.rpartition("=")
            try:
                found[name] = float(number)
            except ValueError:
                found[name] = 0.0
            if not name or not 0.01 <= found[name] <= 10_000:
                raise ConfigError(
                    f"tenant_weights: {part!r} is no weight; accepted: name=number with 0.01 <= number <= 10000, "
                    "separated by commas. Set KVSHARE_TENANT_WEIGHTS or the key in KVSHARE_CONFIG."
                )
        return found

    @classmethod
    def load(cls, env: Mapping[str, str] | None = None) -> KVShareConfig:
        """Defaults, then the TOML file, then the environment. Raises ConfigError, which names the value."""
        env = os.environ if env is None else env
        types = {f.name: type(f.default) for f in fields(cls)}
        values = _read_file(env["KVSHARE_CONFIG"], types) if env.get("KVSHARE_CONFIG") else {}
        for variable, text in sorted(env.items()):
            if not variable.startswith("KVSHARE_") or variable in _NOT_SETTINGS:
                continue
            name = variable.removeprefix("KVSHARE_").lower()
            _known(name, types, variable)
            values[name] = _convert(text, types[name], variable)
        return cls(**PRESETS.get(values.get("preset"), {}) | values)

    def for_request(self, wishes: Mapping[str, object]) -> KVShareConfig:
        """These settings with what one request asks for; raises ConfigError for what a request may not set."""
        if not wishes:
            return self
        types = {f.name: type(f.default) for f in fields(self) if f.metadata["request"]}
        for name in wishes:
            _known(name, types, f"request setting {name}")
        values = {k: _typed(v, types[k], f"request setting {k}") for k, v in wishes.items()}
        return replace(self, **PRESETS.get(values.get("preset"), {}) | values)

    def describe(self) -> str:
        """One line with every value, enough to set the same configuration again."""
        return " ".join(f"{f.name}={getattr(self, f.name)}" for f in fields(self))


@functools.cache
def _present_name(strategy: str) -> str:
    """The name that a method has today; a former one is logged once a process, however many requests bring it."""
    from kvshare_sched.methods.registry import FORMER_NAMES

    if (name := FORMER_NAMES.get(strategy)) is None:
        return strategy
    logger.warning("kvshare: strategy %s is now called %s; the old name will be refused", strategy, name)
    return name


def _variable(name: str) -> str:
    return f"KVSHARE_{name.upper()}"


def _nearest(value, choices) -> str:
    close = difflib.get_close_matches(str(value), choices, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _known(name: str, types: Mapping[str, type], where: str) -> None:
    if name not in types:
        raise ConfigError(
            f"{where} is not a setting{_nearest(name, types)}; accepted: {', '.join(sorted(types))}. "
            "Remove it or correct it."
        )


def _convert(text: str, kind: type, where: str):
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"{where}={text!r} is not a valid {kind.__name__}; give a number like the default.") from None


def _read_file(path: str, types: Mapping[str, type]) -> dict:
    try:
        with open(path, "rb") as file:
            data = tomllib.load(file)
    except (OSError, tomllib.TOMLDecodeError) as problem:
        raise ConfigError(f"KVSHARE_CONFIG={path!r} cannot be read: {problem}. Name a readable TOML file.") from None
    for name, value in data.items():
        _known(name, types, f"{path}: {name}")
        data[name] = _typed(value, types[name], f"{path}: {name}")
    return data


def _typed(value, kind: type, where: str):
    """The value if it has the setting's type; a whole number is fine where a fraction is meant."""
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}={value!r} must be of type {kind.__name__}.")
    return value
