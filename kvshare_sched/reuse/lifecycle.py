"""match -> lease -> (executor: copy, recompute) -> report: the story of one request.

One instance a rank, used by the scheduler thread only. Decisions are pure functions of the request, the index
and the tree, which are the same on every tensor-parallel rank. Anything unexpected means ordinary prefill
for that request and a counted reason.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kvshare_sched.errors import ConfigError
from kvshare_sched.quality.audit import Auditor
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.lookup import DonorLost, Lending
from kvshare_sched.reuse.planning import build_plan
from kvshare_sched.reuse.promotion import Ledger
from kvshare_sched.reuse.public_report import public_report
from kvshare_sched.reuse.repair_queue import RepairQueue
from kvshare_sched.reuse.session import Session
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.policy import Stamp
from kvshare_sched.tenants.scheduler_state import Desk, lenders_of
from radix_ext.records import Namespace, Segment
from radix_ext.stores.base import DonorLease, DonorStore

logger = logging.getLogger(__name__)


class Pipeline:
    """Admission, accounting and publishing for one engine."""

    def __init__(
        self, config: KVShareConfig, tree: DonorStore, costs: CostModel, metrics=None, desk: Desk | None = None
    ):
        self.config = config
        self.tree = tree
        self.costs = costs
        self.metrics = metrics
        self.desk = desk or Desk()
        self.lending = Lending(config, tree, self.desk.limits)
        self.index = self.lending.index
        self.ledger = Ledger(config.window, config.min_run)
        self.auditor = Auditor(
            *(config, self.lending.shut, metrics.audits if metrics is not None else None),
            lent=lambda donor, tenant: self.index.donors[donor].owner != tenant,
            prefill_s=costs.prefill_s,
        )
        self.weights = 0  # counts how often the model's weights were replaced
        self._mixed = False  # the tree may hold KV of earlier weights

    # ---- at admission only ----

    def admit(
        self, view: RequestView | Reason, rid: str, prompt_len: int, exact_len: int, stamp: Stamp | None = None
    ) -> Session:
        """Plan a request that is about to be admitted and pin its donors. Never raises.

        `view` is a Reason when the request cannot take part; `stamp` is that of its tenant, if there is one.
        """
        started = time.perf_counter()
        # A retracted request comes back with output tokens behind its prompt, and those may be cached too.
        exact_len = min(exact_len, prompt_len)
        session = Session(rid, prompt_len, exact_len, self.config, None, Reason.NONE, stamp=stamp, weights=self.weights)
        session.asks_until = prompt_len
        try:
            session.reason = view if isinstance(view, Reason) else self._take_part(session, view)
        except ConfigError as problem:
            logger.warning("kvshare: wish of request %s refused, ordinary prefill: %s", rid, problem)
            session.reason = Reason.BAD_SETTING
        except DonorLost:
            session.reason = Reason.DONOR_LOST
        except Exception:
            logger.exception("kvshare: planning failed for request %s; ordinary prefill", rid)
            session.reason = Reason.ERROR
        session.match_s = time.perf_counter() - started
        return session

    def _take_part(self, session: Session, view: RequestView) -> Reason:
        """Plan and pin; returns why the request runs as ordinary prefill, if it does."""
        session.namespace = view.namespace
        session.wished = wished = not {"preset", "strategy", "ratio"}.isdisjoint(view.wishes)
        session.asks_until = min(view.prompt_len, view.fresh_from + 2)  # two before the first scored token
        if self.config.mode == "off":
            return Reason.MODE_OFF
        if view.prompt_len - view.exact_len < self.config.min_suffix:
            return Reason.SHORT
        base = self.config if wished else self.auditor.settings(self.config, view.namespace)
        session.config = base.for_request(view.wishes)
        refused = not wished and self.auditor.refuses(view.namespace)
        if session.stamp is not None and session.stamp.public != session.stamp and not session.hidden:
            public = replace(view, lenders=lenders_of(session.stamp.public, view.namespace))
            session.public_plan = self._plan(public, session, refused)
        plan = self._plan(view, session, refused)
        if isinstance(plan, Reason):
            return plan
        if self.config.mode == "discover":
            session.discovered, session.outcome = plan.reused_len, Outcome.DISCOVERED
            return Reason.NONE
        # Who scores an answer sends it back, and means reuse; a setting of one's own is to be seen at work.
        measures = view.wishes or view.fresh_from < view.prompt_len - 1
        if not measures and (plan := self._promoted(view, plan, session)) is None:
            return Reason.PROMOTED
        session.leases = self.lending.lease(plan.segments)
        session.plan, session.outcome = plan, Outcome.REUSED
        if session.config.repair_rows:
            session.repair = RepairQueue(view.token_ids, session.config.repair_rows, session.config.repair_order)
        return Reason.NONE

    def _plan(self, view: RequestView, session: Session, refused: bool) -> ReusePlan | Reason:
        """refused: reuse is off for this tenant."""
        segments = self.lending.match(view, session.method.donors)
        plan = build_plan(view, segments, session.method, session.config, self.costs)
        return Reason.QUALITY if refused and isinstance(plan, ReusePlan) else plan

    def _promoted(self, view: RequestView, plan: ReusePlan, session: Session) -> ReusePlan | None:
        """What is left of a plan behind the text that is to be computed exactly; None when nothing is worth it."""
        config, method, layers = session.config, session.method, self.costs.layers
        if config.ratio >= 1 or method.reference:
            return plan

        def charge(start: int, end: int) -> float:
            return sum(plan.rows(start, end)) / layers

        session.bill = bill = self.ledger.bill(view, plan, charge, config.ratio)
        if not (until := bill.exact_until):
            return plan
        rest = (s.clip(until, s.end) for s in plan.segments)
        left = build_plan(view, tuple(s for s in rest if s is not None), method, config, self.costs)
        if isinstance(left, ReusePlan):
            session.promoted = plan.reused_len - left.reused_len
            session.bill = replace(bill, exact_until=left.approximate_from)
            return left
        session.promoted = plan.reused_len  # what is left is too little
        return None

    def begin(self, session: Session) -> None:
        """The request was admitted: from now on `release` must be called once."""
        session.started_s = time.perf_counter()
        self.lending.used(session.leases)
        if session.bill is not None:
            exact = session.plan is None  # whatever the reason
            self.ledger.pay(replace(session.bill, exact_until=session.prompt_len) if exact else session.bill)
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
        self.lending.release(session.leases)

    # ---- during and after the forward pass ----

    def copies(self, session: Session, start: int, end: int) -> list[tuple[Segment, DonorLease]]:
        """Segments of one chunk with the leases that hold their donors' slots."""
        return [(s, session.leases[s.donor_id]) for s in session.plan.clip(start, end)]

    def chunk_done(self, session: Session, end: int) -> None:
        """The prompt has been computed up to `end`; report after the last chunk, unpin when nothing is left."""
        session.done_upto = max(session.done_upto, end)
        if session.plan is not None and end >= session.plan.segments[-1].end:
            self.lending.release(session.leases)
        if end >= session.prompt_len:
            self._report(session)
        self._gauges()

    def repaired(self, session: Session, positions: np.ndarray, seconds: float) -> None:
        """A decode step has computed these prompt positions (int64, ascending) again; `seconds` to prepare it."""
        session.repair.stale[positions] = False
        session.repaired += len(positions)
        if session.repair.order == "fifo":  # what the walk has passed is exact and may be published
            session.approximate_from = int(positions[-1]) + 1
        if self.metrics is not None:
            self.metrics.repaired(len(positions), seconds)

    def abandon(self, session: Session, reason: Reason = Reason.ERROR) -> None:
        """The rest of this request runs as ordinary prefill; earlier chunks stand."""
        self.lending.release(session.leases)
        session.reason, session.repair = reason, None
        kept = tuple(session.plan.clip(0, session.done_upto)) if session.plan is not None else ()
        session.plan = replace(session.plan, segments=kept) if kept else None
        self.auditor.drop(session, "abandoned")
        if session.plan is None:
            session.outcome = Outcome.ORDINARY
            self._report(session)

    def _report(self, session: Session) -> None:
        """Tell client and metrics, once. Never raises: an answer without a report beats no answer."""
        if session.reported:
            return
        session.reported = True
        try:
            report = session.report(self.costs)
            if (tell := session.on_report) is not None:
                session.on_report = None  # it holds the request, which holds the session
                tell(self._for_client(session, report))
            if self.metrics is not None and session.of_client:
                self.metrics.record(report, session.tenant)
            if session.sources and session.plan is not None:
                ran = tuple(session.plan.clip(0, session.done_upto))  # an aborted request has used nothing of the rest
                kinds = self.desk.borrowed(session.rid, session.stamp, session.namespace, ran, session.sources)
                if self.metrics is not None:
                    self.metrics.borrowed(kinds)
        except Exception:
            logger.exception("kvshare: no report for request %s", session.rid)

    def _for_client(self, session: Session, true: ShareReport) -> ShareReport:
        if session.public_plan is None:
            return true
        return public_report(true, session.public_plan, session.config.mode, self.costs)

    def release(
        self, session: Session, said: Callable[[], np.ndarray | None] = lambda: None, finished: bool = True
    ) -> None:
        """The request's KV row was given back: finished or aborted, or retracted when not `finished`.

        said(): its prompt and the first `promotion.ANSWER` tokens of its answer, int64; None when there is no answer.
        """
        if session.ended:
            return
        session.ended = True
        if session.plan is not None and (text := said()) is not None:
            self.ledger.said(session.namespace, text)
        self.lending.release(session.leases)
        self._report(session)
        self.auditor.released(session, finished)
        self._gauges()

    # ---- what becomes a donor ----

    def exact_up_to(self, session: Session, entered: int) -> int:
        """How many leading tokens of a running request may be in the exact tree; `entered` of them are."""
        if session.weights != self.weights:  # some of its KV is of other weights
            return entered
        return 1 << 62 if session.approximate_from is None else session.approximate_from

    def publish(self, session: Session, namespace: Namespace, tokens: np.ndarray) -> None:
        """What the tree now holds of a request becomes a donor, or lets it grow. Never raises.

        tokens int [n]: the request's leading tokens whose exact KV is in the tree.
        """
        if self.config.mode == "off" or len(tokens) < self.config.min_run or session.partial:
            return
        if session.weights != self.weights or (self._mixed and session.exact_len):
            return  # not computed by the weights in force, or nobody knows by which
        started = time.perf_counter()
        try:
            donor_id = self.index.add(namespace, tokens, session.donor_id)
            self._tenant_published(session, namespace, donor_id)
        except Exception:
            logger.exception("kvshare: could not index request %s as a donor", session.rid)
            return
        if donor_id is not None:
            session.donor_id = donor_id
            self.index.donors[donor_id].rid = session.rid
        if self.metrics is not None:
            self.metrics.indexed(time.perf_counter() - started)
        self._gauges()

    def _tenant_published(self, session: Session, namespace: Namespace, donor_id: int | None) -> None:
        owner = namespace.owner
        if session.own:
            self.desk.document(owner, session.stamp.document, donor_id)
        self.desk.published(owner, self.index, self.tree)

    def flush(self) -> None:
        """The tree was emptied."""
        self._mixed = False
        self._forget("flushed")

    def weights_change(self) -> None:
        """The model's weights are about to be replaced: nothing that the old ones computed may be lent or compared.

        SGLang may keep its tree. Then only what a request computes wholly by itself becomes a donor, until a flush.
        """
        self.weights += 1
        self._mixed = True
        self.desk.let_go(self.tree)
        self._forget("weights")

    def _forget(self, reason: str) -> None:
        self.lending.flush()
        self.ledger.clear()
        self.desk.flushed()
        self.auditor.forget(reason)

    def _gauges(self) -> None:
        if self.metrics is not None:
            self.metrics.observe(self.index, self.tree)
