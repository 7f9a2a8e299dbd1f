"""The record of one admitted request: its plan, what has run of it, and what follows from both.

It hangs on SGLang's request object, and everybody finds it there. Request ids are the client's: two requests may carry
the same one at the same time, also one that we use ourselves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvshare_sched.methods.base import Method
from kvshare_sched.methods.registry import get as get_method
from kvshare_sched.quality.audit import Capture
from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.promotion import Bill
from kvshare_sched.reuse.repair_queue import RepairQueue
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.borrow_log import Source
from kvshare_sched.tenants.delayed_answers import Hold
from kvshare_sched.tenants.policy import Stamp
from radix_ext.records import Namespace
from radix_ext.stores.base import DonorLease

_ATTRIBUTE = "kvshare_session"


def session_of(req) -> Session | None:
    """The session of a request that was admitted; None before."""
    return getattr(req, _ATTRIBUTE, None)


def attach(req, session: Session) -> None:
    """The request is admitted with this session; one of before a retraction is forgotten."""
    setattr(req, _ATTRIBUTE, session)


class Rids(list):
    """The ids of a ForwardBatch's requests, with the requests: what SGLang passes on when it copies a batch."""

    def __init__(self, requests):
        super().__init__(req.rid for req in requests)
        self.requests = tuple(requests)


def sessions_of(batch) -> list[Session | None]:
    """The sessions of a ForwardBatch's requests, in its order; empty for a batch that no scheduler has made."""
    return [session_of(req) for req in batch.rids.requests] if isinstance(batch.rids, Rids) else []


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
    # Its client's report is made of this plan where it must not reveal other tenants' text; None: of the real plan.
    public_plan: ReusePlan | Reason | None = None
    sources: dict[int, Source] = field(default_factory=dict)  # whom it borrows from, for the record
    tenant: str = ""  # as metrics name it; known of requests that cannot take part too
    probe: bool = False  # SGLang's own health check
    audit: bool = False  # a piece of an audit's reference
    partial: bool = False  # such a piece with more to come: the donor is whatever the last one ends with
    weights: int = 0  # which weights computed it, see `Pipeline.weights`
    wished: bool = False  # the request brought its own preset, strategy or ratio
    match_s: float = 0.0
    started_s: float = 0.0  # when it was admitted, by `time.perf_counter`; decides nothing
    leases: dict[int, DonorLease] = field(default_factory=dict)
    bill: Bill | None = None  # what it computes exactly, and what others will compute again, see `promotion`
    promoted: int = 0  # tokens computed exactly that could have been reused
    done_upto: int = 0  # prompt tokens whose chunk has run
    recomputed: int = 0
    repaired: int = 0  # rows computed again while decoding
    cells: int = 0
    copy_s: float = 0.0
    recompute_s: float = 0.0
    outcome: Outcome = Outcome.ORDINARY
    discovered: int = 0
    approximate_from: int | None = None  # first position with approximate KV; set when copies are made
    repair: RepairQueue | None = None  # what may be repaired while decoding; None: nothing
    donor_id: int | None = None  # the donor that it grows
    capture: Capture | None = None  # what an audit will compare, while it is chosen for one
    ended: bool = False  # its KV row was given back
    reported: bool = False
    on_report: Callable[[ShareReport], None] | None = None  # hands the report to the client's answer

    @property
    def own(self) -> bool:
        """Whether the server has sent it itself, to compute or to drop a document of the library."""
        return self.stamp is not None and bool(self.stamp.document)

    @property
    def of_client(self) -> bool:
        """Whether metrics and pages speak of it."""
        return not (self.own or self.probe or self.audit)

    @property
    def hidden(self) -> bool:
        """Whether its tenant sees nothing of reuse: neither in what it pays, nor in numbers, nor by the clock."""
        return self.stamp is not None and self.stamp.hide_reuse is not None

    @property
    def reported_plan(self) -> ReusePlan | None:
        """The plan that its client's report is made of."""
        if self.public_plan is None:
            return self.plan
        return self.public_plan if isinstance(self.public_plan, ReusePlan) and self.config.mode == "on" else None

    @property
    def method(self) -> Method:
        return get_method(self.config.strategy)

    @property
    def to_repair(self) -> bool:
        """Whether a decode step of this request may take repair rows along."""
        if self.repair is None or self.approximate_from is None:
            return False
        return self.repair.waiting(self.approximate_from)

    # ---- what runs ----

    def copied(self) -> None:
        """Copies stand in its slots from now on: what follows them is approximate."""
        if self.approximate_from is None:
            self.approximate_from = self.plan.approximate_from

    def ran(self, cells: int, recomputed: int = 0, copy_s: float = 0.0, compute_s: float = 0.0) -> None:
        """A chunk has run: (layer x token) cells, reused tokens computed again above the check layers, seconds."""
        self.cells += cells
        self.recomputed += recomputed
        self.copy_s += copy_s
        self.recompute_s += compute_s

    def blended(self, seconds: float) -> None:
        """Blending takes place inside the time of the layers, and counts as copying."""
        self.copy_s += seconds
        self.recompute_s -= seconds

    def stop_repair(self) -> None:
        """No further row of its prompt is repaired."""
        self.repair = None

    # ---- what it costs ----

    def charge(self, start: int, end: int, costs: CostModel) -> int:
        """What running the chunk [start, end) costs, in tokens of ordinary prefill: cells / layers, rounded up."""
        if self.plan is None or self.hidden:
            return end - start
        return -(-sum(self.plan.rows(start, end)) // costs.layers)

    def end_for_budget(self, start: int, budget: int, end: int, costs: CostModel) -> int:
        """Largest chunk end in [start, end] whose charge stays within `budget` tokens."""
        if self.charge(start, end, costs) <= budget:
            return end
        low, high = start, end
        while low < high:
            middle = (low + high + 1) // 2
            if self.charge(start, middle, costs) <= budget:
                low = middle
            else:
                high = middle - 1
        return low

    def hold(self, costs: CostModel) -> Hold:
        """When a hidden answer may leave, by what is known now."""
        factor, saved_s = self.stamp.hide_reuse, self.exact_len * costs.layers * costs.cell_s
        if self.plan is not None:
            saved_s += max(0.0, costs.saving_s(self.plan, self.cells))
        return Hold(self.started_s, factor * costs.prefill_s(self.prompt_len), factor * saved_s)

    def report(self, costs: CostModel) -> ShareReport:
        """What is known about the request by now."""
        reused, donors, expected, expected_s, saved_s = 0, 0, 0, 0.0, 0.0
        computed = (self.prompt_len - self.exact_len) * costs.layers
        if self.plan is not None:
            reused, donors, computed = self.plan.reused_len, len(self.plan.donor_ids), self.cells
            expected = self.plan.expected_cells
            expected_s = costs.saving_s(self.plan, expected)
            if self.done_upto >= self.prompt_len:  # else it was aborted, and has not computed its cells
                saved_s = costs.saving_s(self.plan, self.cells)
        return ShareReport(
            exact=self.exact_len,
            reused=reused,
            recomputed=min(self.recomputed, reused),
            fresh=self.prompt_len - self.exact_len - reused,
            outcome=self.outcome,
            reason=self.reason,
            donors=donors,
            discovered=self.discovered,
            promoted=self.promoted if self.plan is not None or self.reason is Reason.PROMOTED else 0,
            strategy=self.config.strategy,
            computed_cells=computed,
            layers=costs.layers,
            expected_cells=expected,
            expected_s=expected_s,
            saved_s=saved_s,
            match_s=self.match_s,
            copy_s=self.copy_s,
            recompute_s=self.recompute_s,
        )
