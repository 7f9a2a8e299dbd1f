"""A discrete-event model of SGLang's scheduler loop: prefill while somebody may start, else decode.

The queue is the server's own (`scheduling.queue`); time is added up from a profile. Decoding jumps to the next event.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, replace

from kvshare_sched.errors import ConfigError
from kvshare_sched.reuse.promotion import Bill, Rents
from kvshare_sched.scheduling.duplicates import Texts
from kvshare_sched.scheduling.order import Waiting
from kvshare_sched.scheduling.queue import Queue, room_beside
from kvshare_sched.simulator import rent
from kvshare_sched.simulator.cache import Cache, Found
from kvshare_sched.simulator.profile import Profile
from kvshare_sched.simulator.traffic import Request

_AGAIN = 64  # waiting requests looked at again in one pass, as in the server


@dataclass(slots=True)
class Done:
    """One request after its answer; times in seconds."""

    tenant: str
    due_s: float
    first_s: float
    end_s: float
    prompt: int
    new_tokens: int
    exact: int
    reused: int


@dataclass(slots=True)
class _Live:
    request: Request
    rid: str
    due_s: float
    found: Found | None = None
    bill: Bill | None = None  # of one that borrows
    rows: float = 0.0  # still to compute in prefill
    ran: float = 0.0
    first_s: float = 0.0
    left: int = 0  # output tokens to come
    held: int = 0  # tokens of KV it keeps for itself
    locked: int = 0  # blocks of its prompt that it keeps in the tree


class Engine:
    """Runs requests through one engine; `run` yields a `Done` for each as it finishes."""

    def __init__(self, profile: Profile, queue: Queue, *, reuse: bool = True):
        self.profile, self.queue = profile, queue
        self.cache = Cache(profile.capacity, reuse)
        self.rents = Rents()
        self.now = 0.0
        self.passes = 0
        self._live: dict[str, _Live] = {}
        self._running: dict[str, _Live] = {}
        self._long: _Live | None = None
        self._stale: dict[str, dict[str, None]] = {}  # tenant -> waiting requests to be looked at again
        self._of_tenant: dict[str, dict[str, None]] = {}
        self._answered: set[tuple[str, int]] = set()
        self._blocked: dict[str, list[Request]] = {}  # by session: due, but quote an answer that is not there yet
        self._held = 0
        self._keys = 0  # tokens before the next ones of the running answers
        self._arrivals = itertools.count()
        self._done: list[Done] = []

    def run(self, requests: Iterable[Request]) -> Iterator[Done]:
        """requests: in order of `at_s`."""
        source = iter(requests)
        coming = next(source, None)
        while coming is not None or self._live or self._blocked:
            while coming is not None and coming.at_s <= self.now:
                self._due(coming)
                coming = next(source, None)
            if not self._prefill() and not self._decode(coming.at_s if coming is not None else None):
                if coming is None:
                    count = sum(map(len, self._blocked.values()))
                    raise ConfigError(
                        f"{count} requests quote answers of steps that are not in the trace; give it whole."
                    )
                self.now = max(self.now, coming.at_s)
            yield from self._done
            self._done.clear()

    # ---- arrivals ----

    def _due(self, request: Request) -> None:
        if self._quotes_known(request):
            self._arrive(request, request.at_s)
        else:
            self._blocked.setdefault(request.session, []).append(request)

    def _quotes_known(self, request: Request) -> bool:
        return all((request.session, step) in self._answered for step in request.needs)

    def _arrive(self, request: Request, due_s: float) -> None:
        rid = f"{request.session}/{request.step}"
        live = self._live[rid] = _Live(request, rid, due_s)
        self._look(live)
        waiting = Waiting(
            *(rid, request.tenant, next(self._arrivals), request.prompt, live.rows),
            *(live.found.exact, live.found.reused, self.queue.clock, -float(request.priority)),
        )
        self.queue.add(waiting, self._texts(live))
        self._of_tenant.setdefault(request.tenant, {})[rid] = None

    def _look(self, live: _Live) -> None:
        tenant, blocks = live.request.tenant, live.request.blocks
        found, live.bill = self.cache.find(tenant, blocks), None
        if found.reused:
            live.bill = rent.bill(self.rents, tenant, blocks, found, self.profile.recompute)
            if until := live.bill.exact_until:
                found = self.cache.find(tenant, blocks, until)
                live.bill = replace(live.bill, exact_until=sum(tokens for _, tokens in blocks[: found.path]))
        live.found = found
        fresh = live.request.prompt - found.exact - found.reused
        live.rows = max(1.0, fresh + found.reused * (self.profile.recompute + self.profile.copy_price))

    @staticmethod
    def _texts(live: _Live) -> Texts:
        tenant, found = live.request.tenant, live.found
        return Texts(tuple(((tenant, block), block[1]) for block in found.lacks), found.gives)

    @staticmethod
    def _hits(live: _Live) -> Iterator[tuple[Hashable, int]]:
        lacks = set(live.found.lacks)
        return (((live.request.tenant, block), block[1]) for block in live.request.blocks if block not in lacks)

    def _look_again(self) -> None:
        for _ in range(_AGAIN):
            if not self._stale:
                return
            tenant, rids = next(iter(self._stale.items()))
            rid = next(iter(rids))
            del rids[rid]
            if not rids:
                del self._stale[tenant]
            if rid in self.queue:
                live = self._live[rid]
                self._look(live)
                found = live.found
                self.queue.revise(rid, work=live.rows, exact=found.exact, reused=found.reused, texts=self._texts(live))

    # ---- one pass ----

    def _prefill(self) -> bool:
        if not len(self.queue) and self._long is None:
            return False
        self._look_again()
        profile, budget, batch = self.profile, self.profile.chunk, []
        long = self._long
        left = long.rows - long.ran if long is not None else 0.0
        order = self.queue.order(room_beside(left, budget))
        if long is not None:
            piece = min(left, self.queue.chunk(left, budget))
            self.queue.charge(long.rid, piece)
            batch.append((long, piece))
            budget -= piece
            self._long = long if long.ran + piece < long.rows else None
        for rid in order.ready:
            if budget <= 0 or len(self._running) + len(batch) >= profile.running:
                break
            live = self._live[rid]
            self._look(live)
            if (self._long is not None and live.rows > budget) or not self.queue.may_start(rid):
                break
            need = live.request.prompt - live.found.exact + live.request.new_tokens
            busy = self._running or batch
            if busy and not self.queue.has_room(self._held + self.cache.locked, need, profile.capacity):
                break
            self._lock(live, live.found.depth)
            if live.bill is not None:
                self.rents.pay(live.bill)
            if live.found.reused:
                self.cache.touch(live.request.tenant, live.request.blocks)
            piece = min(live.rows, budget)
            live.held, live.left = need, live.request.new_tokens
            self._held += need
            del self._of_tenant[live.request.tenant][rid]
            self.queue.start(rid, piece, self._texts(live).given, self._hits(live))
            batch.append((live, piece))
            budget -= piece
            if piece < live.rows:
                self._long = live
        if not batch:
            return False
        self._spend(batch)
        return True

    def _spend(self, batch: list[tuple[_Live, float]]) -> None:
        profile, seconds = self.profile, self.profile.pass_s
        for live, piece in batch:
            reused = live.found.reused
            if reused and not live.ran:
                seconds += profile.reuse_s + reused * profile.copy_s
            share = piece / live.rows
            rows = share * (live.rows - reused * profile.copy_price)
            start = live.found.exact + (live.request.prompt - live.found.exact) * live.ran / live.rows
            seconds += profile.prefill(rows, start + (live.request.prompt - live.found.exact) * share / 2)
            live.ran += piece
        self.now += seconds
        self.passes += 1
        for live, _ in batch:
            if live is not self._long:
                self._first_token(live)

    def _first_token(self, live: _Live) -> None:
        request = live.request
        self.queue.duplicates.done(live.rid)
        exact = request.blocks[: live.found.path]
        moved = sum(tokens for _, tokens in exact) - live.found.exact
        live.held -= moved
        self._held -= moved
        self._publish(request, exact)
        self._lock(live, live.found.path)
        self._shrink()
        live.first_s = self.now
        self.queue.generated(live.rid, 1)
        live.left -= 1
        self._running[live.rid] = live
        self._keys += request.prompt + 1
        if live.left <= 0:
            self._finish(live)

    def _publish(self, request: Request, blocks) -> None:
        if self.cache.publish(request.tenant, blocks) and (waiting := self._of_tenant.get(request.tenant)):
            self._stale[request.tenant] = dict(waiting)

    def _lock(self, live: _Live, blocks: int) -> None:
        """Keep the first so many blocks of a prompt in the tree, instead of those kept before."""
        tenant = live.request.tenant
        self.cache.lock(tenant, live.request.blocks[:blocks], 1)
        self.cache.lock(tenant, live.request.blocks[: live.locked], -1)
        live.locked = blocks

    def _shrink(self) -> None:
        self.cache.shrink(max(0, self.profile.capacity - self._held))

    def _decode(self, until_s: float | None) -> bool:
        """Steps of everybody who runs, up to the next finish or arrival."""
        if not self._running:
            return False
        running = len(self._running)
        step = self.profile.decode(running, self._keys)
        steps = min(live.left for live in self._running.values())
        if until_s is not None:
            steps = min(steps, max(1, int((until_s - self.now) / step) + 1))
        self.now += steps * self.profile.decode(running, self._keys + running * (steps - 1) / 2)
        self._keys += steps * running
        for live in list(self._running.values()):
            self.queue.generated(live.rid, steps)
            live.left -= steps
            if live.left <= 0:
                self._finish(live)
        return True

    def _finish(self, live: _Live) -> None:
        request, found = live.request, live.found
        del self._running[live.rid], self._live[live.rid]
        self._held -= live.held
        self._lock(live, 0)
        self._keys -= request.prompt + request.new_tokens
        self.queue.finish(live.rid)
        whole = (*request.blocks, (f"{request.session}:answer/{request.step}", request.new_tokens))
        if found.path == len(request.blocks):  # exact to the end, so the answer is too
            self._publish(request, whole)
        else:
            rent.answered(self.rents, request.tenant, whole)
        self._shrink()
        self._done.append(
            Done(
                *(request.tenant, live.due_s, live.first_s + self.profile.request_s, self.now + self.profile.request_s),
                *(request.prompt, request.new_tokens, found.exact, found.reused),
            )
        )
        self._answered.add((request.session, request.step))
        blocked = self._blocked.pop(request.session, [])
        for other in blocked:
            if self._quotes_known(other):
                self._arrive(other, self.now)
            else:
                self._blocked.setdefault(other.session, []).append(other)
