"""SGLang's waiting list and ours, kept alike: `queue_adapter` hangs this into the scheduler.

SGLang takes requests off the front of its list until memory or budget is gone. We sort that list, refuse whom the
deficits or a running duplicate hold back, and charge what really runs. After an exception the list stays as it is and
nobody is refused in that pass; what tenants have been charged is kept.
"""

from __future__ import annotations

import itertools
import logging
import time
from array import array
from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

import numpy as np
from sglang.srt.mem_cache.radix_cache import RadixKey

from kvshare_sched.engine.sglang.requests import REPORT_KEY, namespace_of, stamp_of, takes_part
from kvshare_sched.observe.metrics import QueueMetrics
from kvshare_sched.reuse.session import session_of
from kvshare_sched.reuse.waiting_costs import Peek, Prompt
from kvshare_sched.scheduling.fairness import Accounts
from kvshare_sched.scheduling.in_use import SAMPLE, places
from kvshare_sched.scheduling.order import Waiting
from kvshare_sched.scheduling.queue import Order, Queue, room_beside

logger = logging.getLogger(__name__)
_AUDITS = "(audits)"  # their work is no tenant's
_LOG_EVERY = 1000  # failures
_NAME = "kvshare_name"
_names = itertools.count()


@dataclass(slots=True)
class _Running:
    req: object
    charged: int  # output tokens
    session: object  # its `session.Session`, or None
    prompt: Prompt | None  # while others may wait for its text
    until: int  # its text before this position enters the tree
    repaired: int = 0  # prompt tokens computed again while decoding, charged


class ServerQueue:
    """SGLang's waiting list and ours, kept alike. Used by the scheduler thread only; no public method raises."""

    def __init__(self, policy: str, config, pipeline, chunk: int, metrics=None, preempts: bool = False):
        """preempts: SGLang may take memory from a running request for a more urgent one, so none is kept for text."""
        self._policy, self._config, self._pipeline = policy, config, pipeline
        self._keep = 0.0 if preempts else config.pool_keep
        self._chunk = chunk  # prefill tokens of one pass; 0: prompts are not cut
        self._metrics = metrics
        self.failures = 0
        self._accounts = Accounts(config.quantum, config.weights, config.unknown_tenants)
        self._start_over()

    def _start_over(self) -> None:
        self._accounts.forget_requests()
        self.queue = Queue(
            self._policy,
            self._accounts,
            self._config.duplicate_wait if self._config.mode == "on" else 0,
            self._keep,
        )
        self._peek = Peek(self._pipeline)
        self._arrivals = 0
        self._listed: list = []  # SGLang's list as we left it
        self._waiting: dict[str, object] = {}
        self._came_s: dict[str, float] = {}  # when each began to wait, oldest first; for the metrics only
        self._running: dict[str, _Running] = {}
        self._returning: dict[str, Waiting] = {}  # retracted, not waiting again yet
        self._long = None  # the prompt that is cut in chunks and not finished
        self._in_force = False
        self._no_room = False  # the last request that might have started found no memory
        self._unasked = None  # the long prompt beside which this pass leaves room, until SGLang asks for somebody
        self._alone = None  # the long prompt beside which nobody can start

    # ---- SGLang asks ----

    def order(self, waiting: list, policy) -> list | None:
        """SGLang's list in our order, not to be changed; None after a failure.

        waiting: as we left it but for who came and went; then an order that still holds is not made again.
        """
        started = time.perf_counter()
        try:
            order = self._sort(waiting, policy)
            self._in_force = True
        except Exception:
            self._failed("ordering the queue")
            return None
        self._tell("unchanged" if order is None else "sorted", time.perf_counter() - started, order)
        return self._listed

    def may_start(self, req) -> bool:
        """Whether it is a request's turn in this pass."""
        self._no_room, self._unasked = False, None
        try:
            return not self._in_force or self.queue.may_start(_name(req))
        except Exception:
            self._failed("admission")
            return True

    def may_preempt(self, req, adder) -> bool:
        """Whether it is a request's turn, and it fits beside a prompt that is cut; it cannot be cut itself."""
        try:
            if not self._in_force:
                return True
            fits = self._long is None or (
                self._long in adder.can_run_list and self.queue.work(_name(req)) <= adder.rem_chunk_tokens
            )
            return fits and self.queue.may_start(_name(req))
        except Exception:
            self._failed("preemption")
            return True

    def has_room(self, req, adder) -> bool:
        """Whether the KV pool should take a request while others run; asked only of those whose turn it is."""
        try:
            self._no_room = self._in_force and not self._has_room(req, adder)
            return not self._no_room
        except Exception:
            self._failed("room in the pool")
            return True

    def admitted(self, req, adder) -> None:
        """SGLang has taken a request off the list; its first piece runs."""
        try:
            if _name(req) in self._waiting:
                self._start(req)
            if adder.new_chunked_req is req:
                self._long = req
        except Exception:
            self._failed("admission")

    def refused(self, req, adder) -> None:
        """SGLang has not taken a request whose turn it was; its reasons are not those by which room was left for it."""
        try:
            # Whoever had all the room beside a prompt that goes on would have it again, and for nothing.
            if adder.new_chunked_req is None and self._long is not None and adder.can_run_list == [self._long]:
                self.queue.refused(_name(req))
        except Exception:
            self._failed("a refusal")

    def continued(self, req, unfinished: bool) -> None:
        """Another piece of a long prompt runs."""
        try:
            self._long = req if unfinished else None
            if _name(req) in self.queue.running:
                self.queue.charge(_name(req), self._work(req))
        except Exception:
            self._failed("charging a chunk")

    def chunk_limit(self, req, budget: int, page: int) -> int | None:
        """Tokens the next chunk of a long prompt may have, so that shorter ones run beside it; None: all of them."""
        try:
            self._long = req
            if self._unasked is req:  # as many run as may, or no adapter can be loaded: the next pass is no better
                self._alone = req
            if not self._in_force or self._no_room or self._alone is req or budget < 2 * page:
                return None
            left = self._work_between(req, req.prefix_len, len(req.full_untruncated_fill_ids))
            limit = self.queue.chunk(left, budget, page)
            self._unasked = req if limit < budget // page * page else None
            return limit
        except Exception:
            self._failed("the limit of a chunk")
            return None

    def released(self, req) -> None:
        """A running request gave its KV back: finished, aborted or retracted."""
        try:
            if self._long is req:
                self._long = None
            run = self._running.get(_name(req))
            if run is None or run.req is not req:
                return
            self._generated(run)
            del self._running[_name(req)]
            if req.finished():
                self.queue.finish(_name(req))
            else:
                self._returning[_name(req)] = self.queue.retract(_name(req))
        except Exception:
            self._failed("a release")

    @property
    def waits(self) -> bool:
        """Whether anybody waits, as far as the last pass knows."""
        return bool(self._waiting)

    def idle(self) -> None:
        """SGLang's list is empty and nothing runs: who was still waiting has been aborted, and no pass will tell."""
        try:
            self._forget(list(self._waiting.values()))
            self._listed = []
            self._tell("emptied")
        except Exception:
            self._failed("an idle engine")

    # ---- in detail ----

    def _sort(self, waiting: list, policy) -> Order | None:
        """Returns the order when the list was sorted anew, None when nothing has happened."""
        for run in list(self._running.values()):
            self._generated(run)
        # The same objects compare at once. One that ran and is back may make the list look as we left it.
        if self._returning or len(self._waiting) != len(waiting) or waiting != self._listed:
            self._mirror(waiting, policy)
        self._look()
        sorts = self.queue.sorts
        order = self.queue.order(self._room())
        if self.queue.sorts == sorts and waiting == self._listed:
            return None
        if len(order.rows) != len(waiting):
            raise ValueError(f"{len(waiting)} requests wait, {len(order.rows)} are ordered")
        self._listed = self.queue.table.items[order.rows].tolist()
        return order

    def _room(self) -> float:
        """Tokens that others may have beside the long prompt; 0 without one."""
        long = self._long
        if long is None:
            return 0.0
        left = self._work_between(long, long.extend_end, len(long.full_untruncated_fill_ids))
        return room_beside(left, self._chunk)

    def _look(self) -> None:
        """What requests still cost and what the running ones still compute. Who cannot be read keeps its full price."""
        try:
            for rid, found in self._peek.updates():
                self.queue.revise(rid, work=found.work, exact=found.exact, reused=found.reused, texts=found.texts)
            for rid, run in self._running.items():
                if run.prompt is not None:
                    self._computing(rid, run)
        except Exception:
            self._count_failure("looking prompts up")

    def _mirror(self, waiting: list, policy) -> None:
        gone, come = _difference(self._listed, waiting)
        if self._returning or (come and not {id(req) for req in gone}.isdisjoint(map(id, come))):
            # A request left and is back, or somebody else has sorted: compare with what we know.
            listed = {id(req) for req in waiting}
            gone = [req for req in self._waiting.values() if id(req) not in listed]
            come = [req for req in waiting if self._waiting.get(_name(req)) is not req]
        self._forget(gone)
        sign = policy.priority_sign if policy.enable_priority_scheduling else 0
        now_s = time.perf_counter()
        for req in come:
            self._arrive(req, float(sign * req.priority) if sign else 0.0)
            self._waiting[_name(req)] = req
            self._came_s[_name(req)] = now_s
        self._returning.clear()
        if len(self._waiting) != len(waiting):
            raise ValueError(f"{len(waiting)} requests wait, {len(self._waiting)} are known")

    def _forget(self, gone: list) -> None:
        for req in gone:
            if self._waiting.get(_name(req)) is req:  # else it runs
                del self._waiting[_name(req)], self._came_s[_name(req)]
                self._peek.remove(_name(req))
                self.queue.remove(_name(req))

    def _arrive(self, req, tier: float) -> None:
        namespace = namespace_of(req)
        tokens = req.origin_input_ids + req.output_ids if req.output_ids else req.origin_input_ids
        tenant = _AUDITS if self._pipeline.auditor.owns(req) else namespace.owner
        if (stamp := stamp_of(req, self._config)) is not None:
            self._accounts.weigh(tenant, stamp.weight)
        back = self._returning.get(_name(req))
        self._arrivals += 1
        arrival, since = (back.arrival, back.since) if back else (self._arrivals, self.queue.clock)
        size = len(tokens)
        self.queue.add(Waiting(_name(req), tenant, arrival, size, size, since=since, tier=tier), item=req)
        if stamp is not None and stamp.hide_reuse is not None:
            return  # it keeps its full price
        kind = takes_part(req)
        opted_out = (req.sampling_params.custom_params or {}).get(REPORT_KEY) == "off"
        reusable = kind and not req.output_ids and not opted_out
        self._peek.add(Prompt(_name(req), namespace, size, _key(req, tokens), reusable, lends=kind))

    def _start(self, req) -> None:
        del self._waiting[_name(req)], self._came_s[_name(req)]
        if not self._waiting:
            self._tell("emptied")  # SGLang asks for no order while nobody waits
        prompt = self._peek.remove(_name(req))
        session = session_of(req)
        plan = session.plan if session is not None else None
        until = plan.approximate_from if plan is not None else len(req.full_untruncated_fill_ids)
        run = self._running[_name(req)] = _Running(req, len(req.output_ids), session, prompt, until)
        hidden = req.prefix_len if session is not None and session.hidden else 0  # it pays for what it found, too
        self.queue.start(_name(req), hidden + self._work(req), hits=self._hits(req, session))
        started = self.queue.running[_name(req)]
        self._record(lambda metrics: metrics.started(started.account, started.waited))
        if prompt is not None:
            self._computing(_name(req), run)

    def _hits(self, req, session) -> list[tuple[Hashable, float]]:
        """The cached text of a prompt that starts, see `scheduling.in_use`; hidden reuse keeps nothing for anybody.

        What is lent counts for its owner: a document many tenants read is one text.
        """
        if not self.queue.keep or session is None or session.hidden:
            return []
        tokens = np.asarray(req.full_untruncated_fill_ids, np.int64)
        own, donors = namespace_of(req), self._pipeline.lending.index.donors
        cached = defaultdict(lambda: np.zeros(len(tokens), bool))
        cached[own][: req.prefix_len] = True
        for segment in session.plan.segments if session.plan is not None else ():
            donor = donors.get(segment.places[0].donor_id)  # leased, but it may have left the index
            cached[own if donor is None else donor.namespace][segment.start : segment.end] = True
        return [(place, SAMPLE) for place in places(tokens, cached, self._config.window)]

    def _computing(self, rid: str, run: _Running) -> None:
        """Say what others may wait for: until it is in the tree, which is when the first output token is."""
        left = [] if run.req.output_ids else self._peek.missing(run.prompt, run.until)
        self.queue.duplicates.computing(rid, left)
        if not left:
            run.prompt = None

    def _work(self, req) -> float:
        """What the piece of a prompt that was just admitted costs, in tokens of ordinary prefill."""
        return self._work_between(req, req.prefix_len, req.extend_end)

    def _work_between(self, req, start: int, end: int) -> float:
        session = session_of(req)
        if session is None or session.plan is None or session.hidden:
            return end - start
        copied = sum(place.length for s in session.plan.clip(start, end) for place in s.places)
        return session.charge(start, end, self._pipeline.costs) + self._peek.copy_price * copied

    def _has_room(self, req, adder) -> bool:
        from sglang.srt.managers.schedule_policy import CLIP_MAX_NEW_TOKENS

        if not adder.can_run_list and (adder.running_batch is None or not adder.running_batch.reqs):
            return True  # waiting would free nothing
        size = adder.token_to_kv_pool_allocator.size
        new = max(0, req.sampling_params.max_new_tokens - len(req.output_ids))
        need = len(req.full_untruncated_fill_ids) - req.prefix_len + min(new, CLIP_MAX_NEW_TOKENS)
        return self.queue.has_room(size - adder.rem_total_tokens, need, size)

    def _generated(self, run: _Running) -> None:
        if new := len(run.req.output_ids) - run.charged:
            self.queue.generated(_name(run.req), new)
            run.charged += new
        session = run.session
        if session is not None and not session.hidden and (new := session.repaired - run.repaired):
            self.queue.charge(_name(run.req), new)
            run.repaired += new

    def _tell(self, result: str, seconds: float = 0.0, order: Order | None = None) -> None:
        def write(metrics) -> None:
            now_s = time.perf_counter()
            if result == "emptied":
                metrics.emptied()
            else:
                metrics.ordered(result, seconds, now_s - next(iter(self._came_s.values()), now_s))
            if order is not None:
                metrics.observe(self.queue, order)

        self._record(write)

    def _record(self, write: Callable[[QueueMetrics], None]) -> None:
        """Metrics, on one rank only: they must change nothing."""
        if self._metrics is None:
            return
        try:
            write(self._metrics)
        except Exception:
            logger.exception("kvshare: the queue's metrics could not be written")

    def _failed(self, what: str) -> None:
        """Forget what is known of the requests; the next pass reads SGLang's list anew."""
        self._count_failure(what)
        self._start_over()

    def _count_failure(self, what: str) -> None:
        if self.failures % _LOG_EVERY == 0:
            logger.exception("kvshare: ordering failed (%s, %d before); ordinary order", what, self.failures)
        self.failures += 1
        self._tell("failed")


def _name(req) -> str:
    """By which the queue knows a request of SGLang's, for as long as the object lives.

    Never its id: that is the client's, and two requests may carry the same one at the same time.
    """
    if (name := getattr(req, _NAME, None)) is None:
        name = str(next(_names))
        setattr(req, _NAME, name)
    return name


def _difference(old: list, new: list) -> tuple[list, list]:
    """(objects that are gone, objects that have come).

    Right for a list that items were taken out of and others appended to, which is all that SGLang does in most modes;
    whatever else happened, items that are gone and have come appear in both.
    """
    gone, kept = [], 0
    for item in old:
        if kept < len(new) and new[kept] is item:
            kept += 1
        else:
            gone.append(item)
    return gone, new[kept:]


def _key(req, tokens: array) -> RadixKey:
    """The tree's key of all tokens but the last, which is always computed."""
    return RadixKey(tokens, req.extra_key, limit=len(tokens) - 1, cache_salt=req.cache_salt)
