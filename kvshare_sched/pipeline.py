"""match -> lease -> (executor: copy, recompute) -> report: the story of one request.

One instance a rank, used by the scheduler thread only. Decisions are pure functions of the request, the index
and the tree, which are the same on every tensor-parallel rank. Anything unexpected means ordinary prefill
for that request and a counted reason.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np

from kvshare_sched.audit import Auditor, Blamed
from kvshare_sched.config import KVShareConfig
from kvshare_sched.errors import ConfigError
from kvshare_sched.planner import CostModel, build_plan, expected_cells, rows_per_layer
from kvshare_sched.repair import RepairQueue
from kvshare_sched.strategies import get as get_strategy
from kvshare_sched.strategies.base import Strategy
from kvshare_sched.tenants.desk import Desk, lenders_of
from kvshare_sched.tenants.log import Source
from kvshare_sched.tenants.namespaces import owner_of
from kvshare_sched.tenants.policy import Stamp
from kvshare_sched.tenants.told import told
from kvshare_sched.types import Namespace, Outcome, Reason, RequestView, ReusePlan, Segment, ShareReport
from radix_ext.donors import DonorLease, DonorTree
from radix_ext.matcher import find_segments
from radix_ext.segment_index import SegmentIndex

logger = logging.getLogger(__name__)
_MEMO_SIZE = 4096  # requests whose last lookup is remembered
_SHUT_SIZE = 16_384  # pairs of borrower and donor that are kept apart
_MAX_REMATCH = 8  # donors found dead while planning one request, before it runs as ordinary prefill


@dataclass(slots=True)
class Session:
    """One admitted request, from admission until its KV is released."""

    rid: str
    prompt_len: int
    exact_len: int
    config: KVShareConfig  # the server's settings with the request's own wishes
    plan: ReusePlan | None
    reason: Reason
    namespace: Namespace | None = None  # None for a request that cannot take part
    asks_until: int = 0  # prompt tokens before those a client wants scored: the question ends here
    stamp: Stamp | None = None  # of its tenant, when a tenants file is in force
    told: ReusePlan | Reason | None = None  # what its client is told instead of the truth; None: the truth
    sources: dict[int, Source] = field(default_factory=dict)  # whom it borrows from, for the record
    tenant: str = ""  # as metrics name it; known of requests that cannot take part too
    probe: bool = False  # SGLang's own health check
    wished: bool = False  # the request brought its own preset, strategy or ratio
    match_s: float = 0.0
    leases: dict[int, DonorLease] = field(default_factory=dict)
    done_upto: int = 0  # prompt tokens whose chunk has run
    recomputed: int = 0
    cells: int = 0
    copy_s: float = 0.0
    recompute_s: float = 0.0
    outcome: Outcome = Outcome.ORDINARY
    discovered: int = 0
    approximate_from: int | None = None  # first position with approximate KV; set when copies are made
    repair: RepairQueue | None = None  # what may be repaired while decoding; None: nothing
    reported: bool = False
    on_report: Callable[[ShareReport], None] | None = None  # hands the report to the client's answer

    @property
    def own(self) -> bool:
        """Whether the server has sent it itself, to compute or to drop a document of the library."""
        return self.stamp is not None and bool(self.stamp.document)

    @property
    def of_client(self) -> bool:
        """Whether metrics and pages speak of it, audits apart."""
        return not (self.own or self.probe)

    @property
    def told_plan(self) -> ReusePlan | None:
        """The plan that its client is told of."""
        if self.told is None:
            return self.plan
        return self.told if isinstance(self.told, ReusePlan) and self.config.mode == "on" else None

    @property
    def strategy(self) -> Strategy:
        return get_strategy(self.config.strategy)

    @property
    def to_repair(self) -> bool:
        """Whether a decode step of this request may take repair rows along."""
        if self.repair is None or self.approximate_from is None:
            return False
        return self.repair.waiting(self.approximate_from)


class Pipeline:
    """Matching, leasing and accounting for one engine."""

    def __init__(
        self,
        config: KVShareConfig,
        tree: DonorTree,
        costs: CostModel,
        metrics=None,
        page_size: int = 1,
        desk: Desk | None = None,
    ):
        self.config = config
        self.tree = tree
        self.costs = costs
        self.metrics = metrics
        self.page_size = page_size
        self.desk = desk or Desk()
        self.index = SegmentIndex(
            window=config.window, min_run=config.min_run, capacity=config.index_tokens, limits=self.desk.limits
        )
        audits = metrics.audits if metrics is not None else None
        self.auditor = Auditor(
            *(config, self._shut, audits),
            lent=lambda donor, tenant: self.index.donors[donor].owner != tenant,
            token_s=costs.cell_s * costs.layers,
        )
        self._shut_for: OrderedDict[tuple[str, int], None] = OrderedDict()  # (borrower, donor) that do not go together
        self.sessions: dict[str, Session] = {}
        self._donor_of: dict[str, int] = {}  # running request -> the donor it grows
        self._memo: OrderedDict[str, tuple] = OrderedDict()

    # ---- peek: no side effects on tree or pool ----

    def match(self, view: RequestView, donors: int = 1) -> tuple[Segment, ...]:
        """Segments other requests could lend, all live in the tree right now; up to `donors` donors of each text.

        Memoised per request and index generation. Donors the tree has evicted meanwhile are shortened or
        dropped from the index on the way: that only corrects the index.
        """
        text = hash(view.token_ids.tobytes())
        for _ in range(_MAX_REMATCH):
            # A request id may come back with another prompt, so the prompt is part of the key.
            asked = (view.namespace, view.lenders)
            key = (self.index.generation, view.exact_len, view.fresh_from, asked, text, donors)
            remembered = self._memo.get(view.rid)
            if remembered is not None and remembered[0] == key:
                segments = remembered[1]
            else:
                segments = self._look_up(view, donors)
                self._memo[view.rid] = (key, segments)
                while len(self._memo) > _MEMO_SIZE:
                    self._memo.popitem(last=False)
            if self._all_live(segments):
                return segments
        return ()

    def _look_up(self, view: RequestView, donors: int) -> tuple[Segment, ...]:
        # The last token is always computed; a request never borrows from itself (it is no donor while waiting).
        hits = self.index.hits(view.namespace, view.token_ids, view.exact_len, view.lenders)
        if self._shut_for:
            borrower = owner_of(view.namespace.extra_key)
            hits = [hit for hit in hits if (borrower, hit[0]) not in self._shut_for]
        return find_segments(
            view.token_ids,
            hits,
            lambda donor_id: self.index.donors[donor_id].tokens,
            start=view.exact_len,
            end=min(view.fresh_from, view.prompt_len - 1),
            min_run=self.config.min_run,
            donors=donors,
        )

    def _shut(self, blamed: Blamed) -> None:
        """Audits blame a donor: one's own leaves the index, another's is kept from this borrower."""
        if isinstance(blamed, int):
            self.index.remove(blamed)
            return
        self._shut_for[blamed] = None
        while len(self._shut_for) > _SHUT_SIZE:
            self._shut_for.popitem(last=False)
        self._memo.clear()

    def _all_live(self, segments: tuple[Segment, ...]) -> bool:
        live = True
        for donor_id, needed in _needed(segments).items():
            donor = self.index.donors[donor_id]
            length = self.tree.live_len(donor)
            if length < needed:
                self.index.truncate(donor_id, length)
                live = False
        return live

    # ---- commit: at admission only ----

    def admit(
        self, view: RequestView | Reason, rid: str, prompt_len: int, exact_len: int, stamp: Stamp | None = None
    ) -> Session:
        """Plan a request that is about to be admitted and pin its donors. Never raises.

        `view` is a Reason when the request cannot take part; `stamp` is that of its tenant, if there is one.
        """
        started = time.perf_counter()
        config, plan, outcome, discovered = self.config, None, Outcome.ORDINARY, 0
        leases: dict[int, DonorLease] = {}
        namespace, wished, repair, asks_until, shown = None, False, None, prompt_len, None
        if isinstance(view, RequestView):
            asks_until = min(prompt_len, view.fresh_from + 2)  # fresh_from is two before the first scored token
            namespace, wished = view.namespace, not {"preset", "strategy", "ratio"}.isdisjoint(view.wishes)
        if isinstance(view, Reason):
            reason = view
        elif self.config.mode == "off":
            reason = Reason.MODE_OFF
        elif view.prompt_len - view.exact_len < self.config.min_suffix:
            reason = Reason.SHORT
        else:
            try:
                config = (config if wished else self.auditor.settings(config, namespace)).for_request(view.wishes)
                strategy = get_strategy(config.strategy)
                off = not wished and self.auditor.refuses(namespace)
                if stamp is not None and stamp.public != stamp:
                    public = replace(view, lenders=lenders_of(stamp.public, namespace))
                    shown = self._plan(public, strategy, config, off)
                planned = self._plan(view, strategy, config, off)
                reason = planned if isinstance(planned, Reason) else Reason.NONE
                if isinstance(planned, ReusePlan) and self.config.mode == "discover":
                    discovered, outcome = planned.reused_len, Outcome.DISCOVERED
                elif isinstance(planned, ReusePlan):
                    leases = self._lease(planned)
                    plan, outcome = planned, Outcome.REUSED
                    if config.repair_rows:
                        repair = RepairQueue(view.token_ids, config.repair_rows, config.repair_order)
            except ConfigError as problem:
                logger.warning("kvshare: wish of request %s refused, ordinary prefill: %s", rid, problem)
                reason = Reason.BAD_SETTING
            except _DonorLost:
                reason = Reason.DONOR_LOST
            except Exception:
                logger.exception("kvshare: planning failed for request %s; ordinary prefill", rid)
                reason = Reason.ERROR
        # A retracted request comes back with output tokens behind its prompt, and those may be cached too.
        exact_len = min(exact_len, prompt_len)
        session = Session(rid, prompt_len, exact_len, config, plan, reason, leases=leases, outcome=outcome)
        session.discovered, session.repair = discovered, repair
        session.namespace, session.wished, session.asks_until = namespace, wished, asks_until
        session.stamp, session.told = stamp, shown
        session.match_s = time.perf_counter() - started
        return session

    def _plan(self, view: RequestView, strategy: Strategy, config: KVShareConfig, off: bool) -> ReusePlan | Reason:
        """off: reuse is off for this tenant."""
        planned = build_plan(view, self.match(view, strategy.donors), strategy, config, self.costs)
        return Reason.QUALITY if off and isinstance(planned, ReusePlan) else planned

    def _lease(self, plan: ReusePlan) -> dict[int, DonorLease]:
        leases: dict[int, DonorLease] = {}
        for donor_id, needed in _needed(plan.segments).items():
            try:
                lease = self.tree.lease(self.index.donors[donor_id], needed)
                if lease is None:
                    raise _DonorLost
            except BaseException:
                self._release_leases(leases)
                raise
            leases[donor_id] = lease
        return leases

    def begin(self, session: Session) -> None:
        """The request was admitted: from now on `release` must be called once."""
        self.sessions[session.rid] = session
        for donor_id in session.leases:
            self.index.touch(donor_id)
            self.tree.touch(self.index.donors[donor_id])
        self.auditor.begun(session)
        if session.stamp is not None:
            self._tenant_begun(session)
        if session.plan is None:
            self._report(session)
        self._gauges()

    def _tenant_begun(self, session: Session) -> None:
        """Learn what the request says of its tenant, and note whom it borrows from. Never raises."""
        stamp = session.stamp
        try:
            self.desk.learn(stamp, self.tree)
            self.auditor.controller.targets[stamp.tenant] = stamp.target_kl
            if stamp.forget:
                self.desk.forget(stamp.tenant, stamp.document, self.index, self.tree)
            if session.plan is not None:
                session.sources = self.desk.sources(session.plan.segments, self.index.donors)
        except Exception:
            logger.exception("kvshare: the tenant of request %s could not be looked after", session.rid)

    def withdraw(self, session: Session) -> None:
        """The request was not admitted after all: give the pins back."""
        self._release_leases(session.leases)

    def end_for_budget(self, session: Session, start: int, budget: int, end: int) -> int:
        """Largest chunk end in [start, end] whose charge stays within `budget` tokens."""
        if self.charge(session, start, end) <= budget:
            return end
        low, high = start, end
        while low < high:
            middle = (low + high + 1) // 2
            if self.charge(session, start, middle) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def charge(self, session: Session, start: int, end: int) -> int:
        """What running the chunk [start, end) costs, in tokens of ordinary prefill: cells / layers, rounded up."""
        if session.plan is None:
            return end - start
        rows = rows_per_layer(session.plan, start, end, session.strategy, session.config, self.costs.layers)
        return -(-sum(rows) // self.costs.layers)

    # ---- during and after the forward pass ----

    def copies(self, session: Session, start: int, end: int) -> list[tuple[Segment, DonorLease]]:
        """Segments of one chunk with the leases that hold their donors' slots."""
        return [(s, session.leases[s.donor_id]) for s in session.plan.clip(start, end)]

    def chunk_done(self, session: Session, end: int) -> None:
        """The prompt has been computed up to `end`; report after the last chunk, unpin when nothing is left."""
        session.done_upto = max(session.done_upto, end)
        if session.plan is not None and end >= session.plan.segments[-1].end:
            self._release_leases(session.leases)
        if end >= session.prompt_len:
            self._report(session)
        self._gauges()

    def repaired(self, session: Session, positions: np.ndarray, seconds: float) -> None:
        """A decode step has computed these prompt positions (int64, ascending) again; `seconds` to prepare it."""
        session.repair.stale[positions] = False
        if session.repair.order == "fifo":  # what the walk has passed is exact and may be published
            session.approximate_from = int(positions[-1]) + 1
        if self.metrics is not None:
            self.metrics.repaired(len(positions), seconds)

    def abandon(self, session: Session) -> None:
        """The executor failed: the rest of this request runs as ordinary prefill; earlier chunks stand."""
        self._release_leases(session.leases)
        session.reason, session.repair = Reason.ERROR, None
        kept = tuple(session.plan.clip(0, session.done_upto)) if session.plan is not None else ()
        session.plan = replace(session.plan, segments=kept) if kept else None
        self.auditor.abandoned(session.rid)
        if session.plan is None:
            session.outcome = Outcome.ORDINARY
            self._report(session)

    def report_of(self, session: Session) -> ShareReport:
        """What is known about a request by now."""
        reused, expected, expected_s, saved_s = 0, 0, 0.0, 0.0
        if session.plan is not None:
            reused = session.plan.reused_len
            expected = expected_cells(session.plan, session.strategy, session.config, self.costs.layers)
            expected_s = self.costs.saving_s(session.plan, expected)
            if session.done_upto >= session.prompt_len:  # else it was aborted, and has not computed its cells
                saved_s = self.costs.saving_s(session.plan, session.cells)
        return ShareReport(
            exact=session.exact_len,
            reused=reused,
            recomputed=min(session.recomputed, reused),
            fresh=session.prompt_len - session.exact_len - reused,
            outcome=session.outcome,
            reason=session.reason,
            donors=len(_needed(session.plan.segments)) if session.plan else 0,
            discovered=session.discovered,
            strategy=session.config.strategy,
            computed_cells=session.cells
            if session.plan
            else (session.prompt_len - session.exact_len) * self.costs.layers,
            layers=self.costs.layers,
            expected_cells=expected,
            expected_s=expected_s,
            saved_s=saved_s,
            match_s=session.match_s,
            copy_s=session.copy_s,
            recompute_s=session.recompute_s,
        )

    def _report(self, session: Session) -> None:
        """Tell client and metrics, once. Never raises: an answer without a report beats no answer."""
        if session.reported:
            return
        session.reported = True
        try:
            report = self.report_of(session)
            if session.on_report is not None:
                session.on_report(self._for_client(session, report))
            if self.metrics is not None and session.of_client and not self.auditor.owns(session.rid):
                self.metrics.record(report, session.tenant)
            if session.sources and session.plan is not None:
                ran = tuple(session.plan.clip(0, session.done_upto))  # an aborted request has used nothing of the rest
                kinds = self.desk.borrowed(session.rid, session.stamp, session.namespace, ran, session.sources)
                if self.metrics is not None:
                    self.metrics.borrowed(kinds)
        except Exception:
            logger.exception("kvshare: no report for request %s", session.rid)

    def _for_client(self, session: Session, true: ShareReport) -> ShareReport:
        if session.told is None:
            return true
        return told(true, session.told, session.strategy, session.config, self.costs)

    def release(self, rid: str) -> None:
        """The request's KV row was given back (finished, aborted or retracted)."""
        self._donor_of.pop(rid, None)
        self._memo.pop(rid, None)
        session = self.sessions.pop(rid, None)
        if session is not None:
            self._release_leases(session.leases)
            self._report(session)
            self._gauges()

    def exact_up_to(self, rid: str) -> int:
        """How many leading tokens of a running request have exact KV; only these may enter the exact tree."""
        session = self.sessions.get(rid)
        if session is None or session.approximate_from is None:
            return 1 << 62
        return session.approximate_from

    def publish(self, rid: str, namespace: Namespace, tokens: np.ndarray) -> None:
        """What the tree now holds of a request becomes a donor, or lets it grow. Never raises.

        tokens int [n]: the request's leading tokens whose exact KV is in the tree.
        """
        if self.config.mode == "off" or len(tokens) < self.config.min_run:
            return
        started = time.perf_counter()
        try:
            donor_id = self.index.add(namespace, tokens, self._donor_of.get(rid))
            self._tenant_published(rid, namespace, donor_id)
        except Exception:
            logger.exception("kvshare: could not index request %s as a donor", rid)
            return
        if donor_id is not None:
            self._donor_of[rid] = donor_id
            self.index.donors[donor_id].rid = rid
        if self.metrics is not None:
            self.metrics.indexed(time.perf_counter() - started)
        self._gauges()

    def _tenant_published(self, rid: str, namespace: Namespace, donor_id: int | None) -> None:
        owner, session = owner_of(namespace.extra_key), self.sessions.get(rid)
        if session is not None and session.own:
            self.desk.document(owner, session.stamp.document, donor_id)
        self.desk.published(owner, self.index, self.tree)

    def flush(self) -> None:
        """The tree was emptied."""
        self.index.clear()
        self.desk.flushed()
        self._memo.clear()
        self._donor_of.clear()

    def _release_leases(self, leases: dict[int, DonorLease]) -> None:
        for lease in leases.values():
            self.tree.release(lease)
        leases.clear()

    def _gauges(self) -> None:
        if self.metrics is not None:
            self.metrics.observe(self.index, self.tree)


class _DonorLost(Exception):
    """A donor left the tree between matching and leasing."""


def _needed(segments: tuple[Segment, ...]) -> dict[int, int]:
    """Donor id -> tokens of it that must be live, ascending ids."""
    needed: dict[int, int] = {}
    for segment in (place for s in segments for place in s.places):
        needed[segment.donor_id] = max(needed.get(segment.donor_id, 0), segment.donor_end)
    return dict(sorted(needed.items()))
