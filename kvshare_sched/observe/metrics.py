"""Counting: what is recorded when, in the series of `series.py`, the one table of all metrics.

`prometheus_client` is imported in the constructor: SGLang must have set PROMETHEUS_MULTIPROC_DIR before. Rank 0 of each
engine records, so tensor parallelism multiplies nothing; data-parallel engines add up, or show the worst (`across`).
A new number is a line in the table and a line here.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from kvshare_sched.observe.series import (
    DEFAULT,
    LEFT,
    ORIGINS,
    OTHER,
    PREFIX,
    REPORTED_PHASES,
    RESIDENT,
    SERIES,
    SPANS,
    TENANTS,
    WAITS,
)
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Reason

_NAME = 64  # characters of a tenant's name that a label shows


class _Recorder:
    """Writes to the series by name."""

    def __init__(self, made: dict, named: _Names):
        self._made, self._named = made, named
        self._known: dict[tuple, float] = {}  # latest value of running sums that others keep

    def _of(self, name: str, labels: tuple):
        return self._made[name].labels(*labels) if labels else self._made[name]

    def _add(self, name: str, amount: float = 1, *labels: str) -> None:
        self._of(name, labels).inc(amount)

    def _set(self, name: str, value: float, *labels: str) -> None:
        self._of(name, labels).set(value)

    def _drop(self, name: str, *labels: str) -> None:
        """A gauge of something that is gone. The files of SGLang's multiprocess set-up keep a series, at zero then."""
        self._set(name, 0, *labels)
        if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
            self._made[name].remove(*labels)

    def _see(self, name: str, value: float, *labels: str) -> None:
        self._of(name, labels).observe(value)

    def _follow(self, name: str, total: float, *labels: str) -> None:
        """Count what a running sum has grown by; one that starts over counts from nothing."""
        before = self._known.get((name, labels), 0)
        self._add(name, total - before if total >= before else total, *labels)
        self._known[name, labels] = total


def _made(registry, *, edge: bool) -> dict:
    """The series of an engine, or those of the process that talks HTTP, by name."""
    import prometheus_client as prom

    where = {"registry": registry or prom.REGISTRY}
    kinds = {"counter": prom.Counter, "gauge": prom.Gauge, "histogram": prom.Histogram, "summary": prom.Summary}
    made = {}
    for s in (s for s in SERIES if s.edge is edge):
        more = {"gauge": {"multiprocess_mode": f"live{s.across}"}, "histogram": {"buckets": s.buckets}}.get(s.kind, {})
        made[s.name] = kinds[s.kind](PREFIX + s.name, s.help, s.labels, **more, **where)
        for values in s.values if s.labels else ():
            made[s.name].labels(*values)
    return made


class ShareMetrics(_Recorder):
    """All series of one engine; `registry` is for tests, the default is the process's own."""

    def __init__(self, *, registry=None):
        made = _made(registry, edge=False)
        super().__init__(made, _Names())
        self.audits = AuditMetrics(made, self._named)
        self.queue = QueueMetrics(made, self._named)

    def started(self, config) -> None:
        """Show what does not change: whether reuse may happen, the target, the index's limit, the strategy."""
        self._set("enabled", config.mode == "on")
        self._set("target_kl_nats", config.target_kl)
        self._set("index_limit_tokens", config.index_tokens)
        for span in SPANS:  # else the first audit would go unseen: a rate needs a value before
            self._of("audit_kl_nats", (config.strategy, span))
            self._of("audit_agreement", (config.strategy, span))

    def record(self, report: ShareReport, tenant: str = "") -> None:
        """Count one request; one that runs again after a retraction counts as a request, but its tokens only once."""
        tenant = self._named(tenant)
        self._add("requests", 1, report.outcome.value, report.reason.value)
        self._add("tenant_requests", 1, tenant, report.outcome.value)
        if report.reason is Reason.RETRACTED:
            return
        for origin in ORIGINS:
            self._add("prompt_tokens", getattr(report, origin), origin)
            self._add("tenant_prompt_tokens", getattr(report, origin), tenant, origin)
        self._add("recomputed_tokens", report.recomputed)
        self._add("discovered_tokens", report.discovered)
        self._add("promoted_tokens", report.promoted)
        self._add("prefill_cells", report.computed_cells)
        self._add("saved_prefill_seconds", max(0.0, report.saved_s))
        self._add("lost_prefill_seconds", max(0.0, -report.saved_s))
        self._add("tenant_saved_prefill_seconds", max(0.0, report.saved_s), tenant)
        for phase in REPORTED_PHASES:
            self._add("phase_seconds", max(0.0, getattr(report, f"{phase}_s")), phase)

    def indexed(self, seconds: float) -> None:
        """Count the time one donor took to enter the index."""
        self._add("phase_seconds", seconds, "index")

    def repaired(self, tokens: int, seconds: float) -> None:
        """Count one request's repair rows of a decode step and the time it took to choose and place them."""
        self._add("repaired_tokens", tokens)
        self._add("phase_seconds", seconds, "repair")

    def borrowed(self, kinds: Mapping[str, int]) -> None:
        """Count donor tokens read, by KINDS."""
        for kind, tokens in kinds.items():
            self._add("borrowed_tokens", tokens, kind)

    def observe(self, index, tree) -> None:
        """Show the live index and the leases held."""
        self._set("index_tokens", index.tokens)
        self._set("index_entries", index.entries)
        self._set("index_bytes", index.nbytes)
        self._set("donors", len(index))
        self._set("leases_held", tree.active)
        for reason in LEFT:
            self._follow("donors_left", index.left[reason], reason)


class AuditMetrics(_Recorder):
    """What audits found and what the controller made of it."""

    def ended(self, result: str, reason: str) -> None:
        """Count one audit; see AUDIT_RESULTS."""
        self._add("audits", 1, result, reason)

    def spent(self, tokens: int) -> None:
        """Count the tokens of an audit that starts."""
        self._add("audit_tokens", tokens)

    def timed(self, clock_s: float, model_s: float) -> None:
        """Count what a full prefill took, and what the cost model says it takes."""
        self._add("audit_prefill_seconds", clock_s, "clock")
        self._add("audit_prefill_seconds", model_s, "model")

    def measured(self, tenant: str, strategy: str, found) -> None:
        """Record an `audit.Measurement`."""
        for span, kl, same in zip(SPANS, (found.kl_first, found.kl), (found.same_first, found.same), strict=True):
            self._see("audit_kl_nats", kl, strategy, span)
            self._see("tenant_audit_kl_nats", kl, self._named(tenant), span)
            self._see("audit_agreement", same, strategy, span)

    def controlled(self, tenant: str, ratio: float, off: bool) -> None:
        """Show what is in force for a tenant. Tenants beyond the first are not: one gauge cannot stand for many."""
        if (name := self._named(tenant)) != OTHER:
            self._set("controller_ratio", ratio, name)
            self._set("controller_off", off, name)

    def shut(self) -> None:
        """Count a donor removed for the harm it did."""
        self._add("sources_shut")


class QueueMetrics(_Recorder):
    """What ordering the waiting queue costs, and who waits for what."""

    def __init__(self, made: dict, named: _Names):
        super().__init__(made, named)
        self._shown: set[str] = set()  # tenants whose accounts are shown

    def ordered(self, result: str, seconds: float, oldest_s: float = 0.0) -> None:
        """Count one pass; see ORDER_RESULTS. oldest_s: how long the oldest request has waited."""
        self._add("order_passes", 1, result)
        self._add("order_seconds", seconds)
        self._set("oldest_wait_seconds", oldest_s)

    def started(self, account: str, waited: float) -> None:
        """Count a request that starts after `waited` tokens of service."""
        self._see("tenant_wait_tokens", waited, self._named(account))

    def emptied(self) -> None:
        """Nobody waits any longer."""
        self._set("oldest_wait_seconds", 0)
        for name in WAITS:
            self._set("waiting_requests", 0, name)

    def observe(self, queue, order) -> None:
        """Show a `scheduling.Queue` and the order just made. Tenants beyond the first are not shown."""
        self._follow("order_rounds", queue.accounts.refills)
        ready = len(order.ready)
        waits = (ready, len(order.rows) - ready - order.held, order.held)
        for name, count in zip(WAITS, waits, strict=True):
            self._set("waiting_requests", count, name)
        shown = set()
        for account, deficit in queue.accounts.deficits.items():
            if (name := self._named(account)) != OTHER:
                shown.add(name)
                self._set("tenant_deficit_tokens", deficit, name)
                self._set("tenant_service_tokens", queue.accounts.served[account], name)
        for name in self._shown - shown:  # the account was dropped
            self._drop("tenant_deficit_tokens", name)
            self._drop("tenant_service_tokens", name)
        self._shown = shown


class EdgeMetrics(_Recorder):
    """What the process that talks HTTP counts where a tenants file is in force."""

    def __init__(self, *, registry=None):
        super().__init__(_made(registry, edge=True), _Names())

    def refused(self, tenant: str, quota: str) -> None:
        """Count a refusal; see QUOTAS."""
        self._add("quota_refusals", 1, self._named(tenant), quota)

    def library(self, documents: Sequence[Mapping]) -> None:
        """Show the documents, as `Librarian.list` has them."""
        for state, there in zip(RESIDENT, (True, False), strict=True):
            tokens = [document["tokens"] for document in documents if document["resident"] is there]
            self._set("documents", len(tokens), state)
            self._set("document_tokens", sum(tokens), state)


class _Names:
    """The first tenants by name, then `other`: whoever invents names cannot fill the server with series."""

    def __init__(self):
        self._seen: set[str] = set()

    def __call__(self, tenant: str) -> str:
        tenant = tenant[:_NAME].encode(errors="replace").decode() or DEFAULT  # half a surrogate pair is no label
        if len(self._seen) < TENANTS:
            self._seen.add(tenant)
        return tenant if tenant in self._seen else OTHER
