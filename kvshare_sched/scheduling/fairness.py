"""Deficit round robin over tenants, charged with what really runs (DLPM, arXiv 2501.14312, with our own charge).

A tenant may start requests while its deficit is above zero. What its requests compute is taken off: prefill rows that
run, a price for copied tokens, OUTPUT_PRICE a generated token. When nobody who waits is above zero, a round is added:
weight x quantum to everyone who waits and is not. No round lifts anybody above one quantum, so idle tenants bank
nothing; a new tenant starts with one, so it is served in the first pass.

Bound: two tenants that both always have a request that may run differ in service / weight by at most
`service_gap(...)`, because each refill reaches both and each deficit lies between -U and weight x quantum.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

OUTPUT_PRICE = 2.0  # tokens of prefill charged for a generated token (the price of VTC, arXiv 2401.00588)
OVERFLOW = "(others)"  # the account that unknown tenants beyond the cap share
HELD = 256  # requests of an account that one pass may find held
_PEEK = 8  # idle accounts looked at when a new tenant needs room


def service_gap(max_work: float, max_output: float, quantum: float, least_weight: float = 1.0) -> float:
    """Largest difference in service / weight of two backlogged tenants, tokens.

    max_work: largest charge of one prompt. max_output: most output tokens that one tenant's running requests may
    still make. Together they are U: what a tenant may be charged after its deficit has reached zero.
    least_weight: the smaller of the two tenants' weights.
    """
    return 2 * ((max_work + OUTPUT_PRICE * max_output) / least_weight + quantum)


class Accounts:
    """Deficits of the tenants of one engine, in tokens. Tenants with a weight are known; the others have weight 1.

    At most `unknown` tenants without a weight have accounts of their own at a time; the rest share one, so whoever
    invents tenant names gains `unknown` + 1 shares at most. An account is dropped when its tenant is gone and
    as many rounds have passed as would have cleared its debt.
    """

    def __init__(self, quantum: float, weights: Mapping[str, float] | None = None, unknown: int = 256):
        self.quantum = quantum
        self.weights = dict(weights or {})
        self.unknown = unknown
        self.deficits: dict[str, float] = {}
        self.numbers: dict[str, int] = {}  # of accounts, small; that of a dropped one is given again
        self._free: list[int] = []
        self.served: Counter[str] = Counter()  # charged so far, what was given back taken off
        self.refills = 0  # rounds
        self._waiting: Counter[str] = Counter()
        self._open: Counter[str] = Counter()  # requests waiting or running
        self._left: dict[str, int] = {}  # nobody waits: the round when that began
        self._idle: dict[str, None] = {}  # those of `_left` that may be dropped one day, the next to look at first
        self._own = 0  # accounts of tenants without a weight

    def weigh(self, tenant: str, weight: float) -> None:
        """A tenant's weight is known, or has changed; from the next round on."""
        if tenant not in self.weights and tenant in self.deficits:
            self._own -= 1
            self._idle.pop(tenant, None)
        self.weights[tenant] = weight

    def grant(self, account: str) -> float:
        """What one round gives."""
        return self.quantum * self.weights.get(account, 1.0)

    def enter(self, tenant: str) -> str:
        """A request starts to wait; returns the account it is charged to."""
        account = self._account(tenant)
        self._open[account] += 1
        self.wait(account)
        return account

    def wait(self, account: str) -> None:
        """A request of an account waits (again); rounds missed while nobody waited count against a debt only."""
        self._waiting[account] += 1
        self._idle.pop(account, None)
        if (since := self._left.pop(account, None)) is not None:
            missed = min(self.refills - since, self.rounds(account))
            self.deficits[account] += missed * self.grant(account)

    def leave(self, account: str) -> None:
        """A request stopped waiting: it runs, or is gone (then `close` too)."""
        self._waiting[account] -= 1
        if not self._waiting[account]:
            del self._waiting[account]
            self._rest(account)

    def close(self, account: str) -> None:
        """A request has finished or was aborted."""
        self._open[account] -= 1

    def forget_requests(self) -> None:
        """Nobody waits or runs any longer as far as is known; what was charged stays."""
        waited = list(self._waiting)
        self._waiting.clear()
        self._open.clear()
        for account in waited:
            self._rest(account)

    def charge(self, account: str, tokens: float) -> None:
        """Take off what ran; negative gives back."""
        self.deficits[account] -= tokens
        self.served[account] += tokens

    def may_start(self, account: str, others: Iterable[str]) -> bool:
        """Whether a request of `account` may start now; `others`: accounts with requests that may run in this pass.

        Adds rounds when nobody of them is above zero.
        """
        if self.deficits[account] > 0:
            return True
        may_run = {account, *others}
        if any(self.deficits[other] > 0 for other in may_run):
            return False
        self._refill(min(map(self.rounds, may_run)))
        return self.deficits[account] > 0

    def _refill(self, rounds: int) -> None:
        for account in self._waiting:
            self.deficits[account] += min(rounds, self.rounds(account)) * self.grant(account)
        self.refills += rounds

    def rounds(self, account: str) -> int:
        """Rounds until an account is above zero."""
        return rounds_owed(self.deficits[account], self.grant(account))

    def _account(self, tenant: str) -> str:
        if tenant in self.deficits:
            return tenant
        known = tenant in self.weights
        if not known and self._own >= self.unknown:
            self._drop_one()
            if self._own >= self.unknown:
                return OVERFLOW if OVERFLOW in self.deficits else self._open_account(OVERFLOW)
        self._own += not known
        return self._open_account(tenant)

    def _open_account(self, account: str) -> str:
        self.deficits[account] = self.grant(account)
        self.numbers[account] = self._free.pop() if self._free else len(self.numbers)
        return account

    def _rest(self, account: str) -> None:
        """Nobody of an account waits any longer."""
        self._left[account] = self.refills
        if account not in self.weights and account != OVERFLOW:
            self._idle[account] = None

    def _drop_one(self) -> None:
        for _ in range(min(_PEEK, len(self._idle))):
            account = next(iter(self._idle))
            del self._idle[account]
            if self._open[account] or self.refills - self._left[account] < max(1, self.rounds(account)):
                self._idle[account] = None  # not yet; the others are looked at first
            else:
                del self.deficits[account], self._left[account], self._open[account], self.served[account]
                self._free.append(self.numbers.pop(account))
                self._own -= 1
                return


def rounds_owed(deficit: float, grant: float) -> int:
    """Rounds until a deficit is above zero."""
    return 0 if deficit > 0 else math.floor(-deficit / grant) + 1


def sequence(
    places: dict[str, list[int]],
    work: Callable[[int], float],
    credit: dict[str, float],
    grant: Callable[[str], float],
    limit: int,
    held: Callable[[int], bool],
) -> tuple[list[int], int]:
    """(places in the order deficit round robin starts them, `limit` at most; how many are held back).

    places: of each account in a common order by key, best last; used up. credit: deficit of each account, spent on the
    way. work, held: asked once, in order, for every place that would be next. An account is asked no further once
    HELD of its own are held: thousands of requests over one text must not make every pass long.
    """
    started: list[int] = []
    kept: Counter[str] = Counter()
    while places and len(started) < limit:
        rounds = min(rounds_owed(credit[account], grant(account)) for account in places)
        for account in places:
            credit[account] += rounds * grant(account)  # nobody is above zero, or there are no rounds
        ready = [(left[-1], account) for account, left in places.items() if credit[account] > 0]
        heapq.heapify(ready)
        while ready and len(started) < limit:
            place, account = heapq.heappop(ready)
            left = places[account]
            left.pop()
            if held(place):
                kept[account] += 1
                if kept[account] == HELD:
                    left.clear()
            else:
                started.append(place)
                credit[account] -= max(1.0, work(place))
            if not left:
                del places[account]
            elif credit[account] > 0:
                heapq.heappush(ready, (left[-1], account))
    return started, kept.total()
