"""The queue itself: kept up to date by events, ordered when asked. The server and the simulator run this very code.

Ordering sorts arrays and walks the first few hundred: 10,000 requests take some milliseconds (benchmarks/order.json),
and a queue nothing has happened to is answered from memory.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from kvshare_sched.scheduling.duplicates import Duplicates, Texts
from kvshare_sched.scheduling.fairness import OUTPUT_PRICE, Accounts, sequence
from kvshare_sched.scheduling.in_use import InUse
from kvshare_sched.scheduling.order import Rows, Waiting, ranked
from kvshare_sched.scheduling.table import Table

LIMIT = 256  # requests that one pass may start
_MEMORY = 2.0  # pools of prompt tokens: a text that so many have not hit is not in use
_STEP = 256.0  # tokens of service after which waiting times are looked at again
_NOTHING = Texts()


def room_beside(left: float, chunk: float) -> float:
    """Tokens that others may have beside the next piece of a long prompt with `left` to do; its last makes no room."""
    return chunk / 2 if left > chunk else 0.0


@dataclass(frozen=True, slots=True)
class Order:
    """`ready`: who should start, in this order. The others must not start in this pass."""

    ready: tuple[str, ...]
    rows: np.ndarray  # all row numbers, those of `ready` first, int64
    held: int = 0  # of the others: wait for somebody else's text


@dataclass(slots=True)
class _Running:
    waiting: Waiting
    account: str
    waited: float  # tokens of service
    charged: float = 0.0  # prefill


class Queue:
    """Waiting and running requests of one engine under one policy (a key of `order.KEYS`)."""

    def __init__(self, policy: str, accounts: Accounts, duplicate_wait: int, keep: float = 0):
        self.policy = policy
        self.keep = keep if policy == "fair" else 0.0  # share of the pool for cached text, see `has_room`
        self.accounts = accounts
        self.duplicates = Duplicates(duplicate_wait if policy == "fair" else 0)
        self.table = Table()  # the waiting ones
        self.clock = 0.0  # tokens of service given so far
        self.running: dict[str, _Running] = {}
        self.sorts = 0
        self._order: Order | None = None
        self._ordered_at = (0.0, 0.0)  # clock, room
        self._may: dict[str, tuple[int, str]] = {}  # (tier, account) of the requests that may start in this pass
        self._left: Counter[tuple[int, str]] = Counter()  # how many of them have not
        self._refused: set[str] = set()  # did not fit beside the long prompt that is half done
        self.in_use = InUse()

    def __len__(self) -> int:
        return len(self.table)

    def __contains__(self, rid: str) -> bool:
        return rid in self.table.row

    def work(self, rid: str) -> float:
        """What a waiting request will cost, tokens of ordinary prefill."""
        return self.table.work(rid)

    # ---- events ----

    def add(self, waiting: Waiting, texts: Texts = _NOTHING, item: object = None) -> None:
        """A request starts to wait; `item` goes with it into `table.items`.

        Raises ValueError when its id is waiting already.
        """
        if waiting.rid in self:
            raise ValueError(f"request {waiting.rid} waits already")
        account = self.accounts.enter(waiting.tenant)
        self.table.add(waiting, account, self.accounts.numbers[account], texts, item)
        self._order = None

    def revise(self, rid: str, *, work: float, exact: int, reused: int, texts: Texts) -> None:
        """What a waiting request will cost is known better now, or who may wait for whom."""
        if self.table.revise(rid, work, exact, reused, texts):
            self._order = None

    def remove(self, rid: str) -> None:
        """A waiting request is gone; nothing was charged, so nothing is given back."""
        self.accounts.close(self._take(rid)[1])

    def start(self, rid: str, work: float, computing=(), hits: Iterable[tuple[Hashable, float]] = ()) -> None:
        """A waiting request runs: `work` tokens of its prompt now; `computing`: texts others may wait for.

        hits: cached texts it is made of, (key, tokens).
        """
        waiting, account = self._take(rid)
        self.in_use.hit(hits, waiting.prompt)
        self.running[rid] = _Running(waiting, account, self.clock - waiting.since)
        self.duplicates.computing(rid, computing)
        self.charge(rid, work)

    def charge(self, rid: str, work: float) -> None:
        """A running request computed `work` more tokens of its prompt."""
        run = self.running[rid]
        run.charged += work
        self._charge(run.account, work)

    def generated(self, rid: str, tokens: int) -> None:
        """A running request made that many more output tokens."""
        self._charge(self.running[rid].account, OUTPUT_PRICE * tokens)

    def finish(self, rid: str) -> None:
        """A running request has finished or was aborted: it pays for what ran."""
        self.duplicates.done(rid)
        self.accounts.close(self.running.pop(rid).account)

    def retract(self, rid: str) -> Waiting:
        """A running request lost its KV: its prompt will be computed again, so that is given back.

        Returns what it was when it came; the caller adds it again.
        """
        self.duplicates.done(rid)
        run = self.running.pop(rid)
        self.accounts.charge(run.account, -run.charged)
        self.accounts.close(run.account)
        self._order = None
        return run.waiting

    def _charge(self, account: str, tokens: float) -> None:
        before = self.accounts.rounds(account)
        self.accounts.charge(account, tokens)
        self.clock += tokens
        if self.accounts.rounds(account) != before:  # its turn is over, or comes later still: the order is another
            self._order = None

    def _take(self, rid: str) -> tuple[Waiting, str]:
        waiting, account = self.table.take(rid)
        if (place := self._may.pop(rid, None)) is not None:
            self._left[place] -= 1
        self._refused.discard(rid)
        self.accounts.leave(account)
        self.duplicates.gone(rid)
        self._order = None
        return waiting, account

    # ---- the order ----

    def order(self, room: float = 0.0) -> Order:
        """The order of this pass; the same object as long as nothing has happened.

        room: see `room_beside`; what does not fit comes last. 0: no long prompt is half done.
        """
        if not room:
            self._refused.clear()
        if (
            self._order is not None
            and room == self._ordered_at[1]
            and self.clock - self._ordered_at[0] < _STEP
            and not self.duplicates.counting
        ):
            return self._order
        self.sorts += 1
        if self.policy == "fair":
            self.table.price()
        rows = self.table.rows
        places = ranked(self.policy, rows, self.clock)
        if self.policy == "fair":
            self._order = self._fair(places, rows, room)
        else:
            self._order = Order(tuple(self.table.rids[row] for row in places.tolist()), places)
        self._ordered_at = (self.clock, room)
        return self._order

    def _fair(self, places: np.ndarray, rows: Rows, room: float) -> Order:
        credit, table = dict(self.accounts.deficits), self.table
        self.duplicates.begin_pass()
        ready: list[int] = []
        held = 0
        self._may = {}
        fits = rows.work <= room if room else np.ones(len(table), bool)
        fits[[table.row[rid] for rid in self._refused]] = False
        for tier, group in _groups(places, rows, fits):
            if len(ready) >= LIMIT:
                break
            work, row_of = rows.work[group].tolist(), group.tolist()
            started, kept = sequence(
                self._by_account(rows.account[group], row_of),
                work.__getitem__,
                credit,
                self.accounts.grant,
                LIMIT - len(ready),
                lambda at: self.duplicates.holds(table.rids[row_of[at]], table.texts[row_of[at]], work[at]),  # noqa: B023
            )
            ready += (row_of[at] for at in started)
            held += kept
            self._may |= {table.rids[row_of[at]]: (tier, table.accounts[row_of[at]]) for at in started}
        self._left = Counter(self._may.values())
        others = np.ones(len(places), bool)
        others[ready] = False
        ordered = np.concatenate((np.array(ready, np.int64), places[others[places]]))
        return Order(tuple(self._may), ordered, held)

    def _by_account(self, numbers: np.ndarray, row_of: list[int]) -> dict[str, list[int]]:
        """Places of each account, best last."""
        places = np.argsort(numbers, kind="stable")
        edges = np.flatnonzero(np.diff(numbers[places])) + 1
        return {self.table.accounts[row_of[part[0]]]: part[::-1].tolist() for part in np.split(places, edges)}

    def chunk(self, left: float, budget: int, page: int = 1) -> int:
        """Tokens the next piece of a long prompt may have when `left` of it are to do, so that others run beside it.

        Short ones whose turn it is get what they need, half of the budget at most; the last piece makes no room.
        """
        reserved = 0
        if self.policy == "fair" and self._order is not None and left > budget:
            claims = {tier for (tier, account), n in self._left.items() if n and self.accounts.deficits[account] > 0}
            for rid, (tier, account) in self._may.items():
                work = -(-math.ceil(self.work(rid)) // page) * page
                turn = tier not in claims or self.accounts.deficits[account] > 0
                if turn and rid not in self._refused and work < left and reserved + work <= budget // 2:
                    reserved += work
        return max(page, (budget - reserved) // page * page)

    def refused(self, rid: str) -> None:
        """A request whose turn it was did not fit into the room beside a long prompt: it costs more than was thought.

        Until that prompt is through, nothing is reserved for it and those that fit come before it.
        """
        if self.policy == "fair" and rid in self and rid not in self._refused:
            self._refused.add(rid)
            self._order = None

    def has_room(self, held: float, need: float, capacity: float) -> bool:
        """Whether a pool of `capacity` tokens, `held` by running requests, should take `need` more while others run.

        Answers that wait for their turn to decode would push out the texts that make the next prompts cheap. So as much
        is kept for them as prompts have hit lately, a share of `keep` at most.
        """
        kept = min(self.keep * capacity, self.in_use.tokens(_MEMORY * capacity))
        return held + need <= capacity - kept

    def may_start(self, rid: str) -> bool:
        """Asked for one request after the other in the order given: whether this one may start in this pass.

        False also ends the pass: everybody behind it has no better claim.
        """
        if self.policy != "fair":
            return True
        if rid not in self._may:
            return False
        tier, account = self._may[rid]
        others = (a for (t, a), left in self._left.items() if left and t == tier)
        if self.accounts.may_start(account, others):
            return True
        self._order = None  # somebody else's turn
        return False


def _groups(places: np.ndarray, rows: Rows, fits: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the tier, rows), tier by tier, and inside a tier those that fit beside a long prompt first."""
    edges = np.flatnonzero(np.diff(rows.tier[places])) + 1
    for number, tier in enumerate(np.split(places, edges)):
        for group in (tier[fits[tier]], tier[~fits[tier]]):
            if len(group):
                yield number, group
