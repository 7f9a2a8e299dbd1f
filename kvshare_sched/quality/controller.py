"""Holds the quality target: moves each tenant's recompute ratio, and shuts donors whose KV does harm.

Pure state, fed by audits only, no clock: every tensor-parallel rank that sees the same audits decides alike.
A tenant climbs in steps of 1.5 as soon as its mean KL is above the target, and comes down by tenths while it is
clearly below. A ratio that missed the target is not tried again for a while, so the two do not chase each other.
At the highest ratio reuse is turned off, and tried again after some requests that would have reused; each
failure doubles that wait.
"""

from __future__ import annotations

import logging
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

LOWEST, HIGHEST = 0.02, 0.5  # bounds of a moved ratio; a configured ratio outside them widens them
ENOUGH = 4  # audits at one ratio before anything is concluded
WINDOW = 16  # latest audits at one ratio that count
_UP, _DOWN = 1.5, 0.9
_CLEARLY_BELOW = 0.5  # of the target
# Audits during which a ratio that missed the target is not tried again; another miss meanwhile doubles it.
_MISSED_FOR, _MISSED_AT_MOST = 64, 1024
RETRY, _RETRY_AT_MOST = 64, 4096  # refused requests until a tenant that is off is tried again
_HARMFUL, _HARMFUL_AUDITS = 5.0, 2  # mean KL in targets, over at least so many audits: the donor is shut
_TENANTS, _SOURCES = 4096, 16384  # remembered; the least recently seen start afresh


@dataclass(slots=True)
class _Tenant:
    ratio: float
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))  # nats, all at `ratio`
    missed: float = 0.0  # the ratio that missed the target last
    missed_for: int = 0  # audits until it may be tried again
    memory: int = _MISSED_FOR  # what `missed_for` starts from
    off: bool = False
    trial: bool = False  # just turned on again: every request is audited until there is a verdict
    refused: int = 0  # requests refused since it was turned off
    wait: int = RETRY  # refusals until the next trial


class Controller:
    """Recompute ratio and permission to reuse per tenant, harm per donor."""

    def __init__(self, ratio: float, target_kl: float):
        self.target = target_kl  # nats, mean
        self.targets: dict[str, float | None] = {}  # of tenants with one of their own
        self.start = ratio
        self.low, self.high = min(LOWEST, ratio), max(HIGHEST, ratio)
        self._tenants: OrderedDict[str, _Tenant] = OrderedDict()
        self._sources: OrderedDict[Hashable, list[float]] = OrderedDict()  # donor -> [audits, sum of KL]

    # ---- questions ----

    def ratio(self, tenant: str) -> float:
        """Share of the reused tokens this tenant recomputes now."""
        known = self._tenants.get(tenant)
        return self.start if known is None else known.ratio

    def target_of(self, tenant: str) -> float:
        """The mean KL held for a tenant, nats."""
        own = self.targets.get(tenant)
        return self.target if own is None else own

    def is_off(self, tenant: str) -> bool:
        """Reuse is off for this tenant until it is tried again."""
        known = self._tenants.get(tenant)
        return known is not None and known.off

    def on_trial(self, tenant: str) -> bool:
        """Reuse was just turned on again and is to be audited closely."""
        known = self._tenants.get(tenant)
        return known is not None and known.trial

    # ---- events ----

    def refused(self, tenant: str) -> None:
        """A request of a tenant that is off would have reused; enough of them, and reuse is tried again."""
        state = self._tenant(tenant)
        state.refused += 1
        if state.off and state.refused >= state.wait:
            state.off, state.trial = False, True
            state.wait = min(2 * state.wait, _RETRY_AT_MOST)
            logger.info("kvshare: tenant %r may reuse again, on trial at ratio %.3f", tenant, state.ratio)

    def audited(self, tenant: str, ratio: float, kl: float) -> None:
        """One audit of a request that ran at `ratio`: kl in nats, mean over its tokens."""
        state = self._tenant(tenant)
        if state.off or ratio != state.ratio:  # says nothing about what is in force now
            return
        state.recent.append(kl)
        state.missed_for = max(0, state.missed_for - 1)
        if len(state.recent) < ENOUGH:
            return
        mean = sum(state.recent) / len(state.recent)
        target = self.target_of(tenant)
        if mean > target:
            self._missed(tenant, state, mean)
        elif state.trial:
            state.trial, state.wait = False, RETRY
        elif mean < _CLEARLY_BELOW * target:
            lower = max(self.low, _DOWN * state.ratio)
            if lower < state.ratio and not (state.missed_for and lower <= state.missed):
                self._move(tenant, state, lower, mean)

    def charge(self, donors: Iterable[Hashable], kl: float) -> list:
        """Charge an audit's KL to the donors it borrowed from; returns those to be shut."""
        harmful = []
        for donor in donors:
            account = _recall(self._sources, donor, lambda: [0, 0.0], _SOURCES)
            account[0] += 1
            account[1] += kl
            if account[0] >= _HARMFUL_AUDITS and account[1] > _HARMFUL * self.target * account[0]:
                del self._sources[donor]
                harmful.append(donor)
        return harmful

    # ---- moves ----

    def _missed(self, tenant: str, state: _Tenant, mean: float) -> None:
        state.memory = min(2 * state.memory, _MISSED_AT_MOST) if state.missed_for else _MISSED_FOR
        state.missed, state.missed_for = state.ratio, state.memory
        if state.ratio < self.high:
            self._move(tenant, state, min(self.high, max(LOWEST, _UP * state.ratio)), mean)
            return
        state.off, state.trial, state.refused = True, False, 0
        state.recent.clear()
        logger.warning(
            "kvshare: tenant %r misses its target at the highest ratio: mean KL %.4g over %.4g nats at %.3f. "
            "Reuse is off for it and tried again after %d requests.",
            *(tenant, mean, self.target_of(tenant), state.ratio, state.wait),
        )

    def _move(self, tenant: str, state: _Tenant, ratio: float, mean: float) -> None:
        logger.info(
            "kvshare: tenant %r: mean KL %.4g, target %.4g nats: ratio %.3f -> %.3f",
            *(tenant, mean, self.target_of(tenant), state.ratio, ratio),
        )
        state.ratio = ratio
        state.recent.clear()

    def _tenant(self, tenant: str) -> _Tenant:
        return _recall(self._tenants, tenant, lambda: _Tenant(self.start), _TENANTS)


def _recall(known: OrderedDict, key, make: Callable, size: int):
    """The entry of a key, made when it is new; the least recently asked for leaves when there are too many."""
    if key not in known:
        known[key] = make()
        if len(known) > size:
            known.popitem(last=False)
    known.move_to_end(key)
    return known[key]
