"""Every metric of the project, in one place. Prefix `kvshare_`, base units, fixed label values.

`prometheus_client` is imported in the constructor: SGLang must have set PROMETHEUS_MULTIPROC_DIR before. One
rank records (rank 0), so tensor parallelism multiplies nothing.
"""

from __future__ import annotations

from kvshare_sched.types import Outcome, Reason, ShareReport

ORIGINS = ("exact", "reused", "fresh")
REPORTED_PHASES = ("match", "copy", "recompute")
PHASES = (*REPORTED_PHASES, "index", "repair")
# Every pair that can occur. (reused, error): a later chunk of a long prompt failed and ran as ordinary prefill.
LABELS = (
    (Outcome.REUSED, Reason.NONE),
    (Outcome.REUSED, Reason.ERROR),
    (Outcome.DISCOVERED, Reason.NONE),
    *((Outcome.ORDINARY, reason) for reason in Reason if reason is not Reason.NONE),
)


AUDIT_RESULTS = (
    ("done", "none"),
    ("failed", "capture"),  # the approximate logits could not be kept
    ("failed", "reference"),  # the full prefill gave nothing to compare
    ("dropped", "retracted"),
    ("dropped", "abandoned"),  # reuse failed half-way
    ("dropped", "no_answer"),  # nothing was sent that could be compared
    ("dropped", "queue_full"),
    ("dropped", "no_room"),
    ("dropped", "lost"),  # aborted
)
ORDER_RESULTS = ("sorted", "unchanged", "failed")
WAITS = ("turn", "deficit", "duplicate")
_TENANTS = 32  # named in labels; the others share one value
_KL = (0.0001, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3)  # nats, around the default target 0.03


class ShareMetrics:
    """Counters and gauges of one engine; `registry` is for tests, the default is the process's own."""

    def __init__(self, *, registry=None):
        import prometheus_client as prom

        where = {"registry": registry or prom.REGISTRY}
        live = where | {"multiprocess_mode": "mostrecent"}
        self._tokens = prom.Counter(
            "kvshare_prompt_tokens", "Prompt tokens by origin of their KV.", ["origin"], **where
        )
        self._recomputed = prom.Counter(
            "kvshare_recomputed_tokens", "Reused prompt tokens whose KV was computed again.", **where
        )
        self._repaired = prom.Counter(
            "kvshare_repaired_tokens", "Prompt tokens whose KV was computed again while decoding.", **where
        )
        self._discovered = prom.Counter(
            "kvshare_discovered_tokens", "Prompt tokens that could have been reused (mode discover).", **where
        )
        self._requests = prom.Counter(
            "kvshare_requests", "Requests by outcome and reason.", ["outcome", "reason"], **where
        )
        self._cells = prom.Counter("kvshare_prefill_cells", "(Layer x token) cells computed in prefill.", **where)
        self._seconds = prom.Counter("kvshare_phase_seconds", "Seconds spent on reuse, by phase.", ["phase"], **where)
        self._index_tokens = prom.Gauge("kvshare_index_tokens", "Donor tokens indexed.", **live)
        self._index_entries = prom.Gauge("kvshare_index_entries", "Places in the index.", **live)
        self._donors = prom.Gauge("kvshare_donors", "Donors indexed.", **live)
        self._leases = prom.Gauge("kvshare_leases_held", "Donor pins held right now.", **live)
        self._enabled = prom.Gauge(
            "kvshare_enabled", "1 when the kvshare cache backend is wired in and may reuse KV.", **live
        )
        self.audits = AuditMetrics(where, live)
        self.queue = QueueMetrics(where, live)
        for origin in ORIGINS:
            self._tokens.labels(origin)
        for phase in PHASES:
            self._seconds.labels(phase)
        for outcome, reason in LABELS:
            self._requests.labels(outcome.value, reason.value)

    def record(self, report: ShareReport) -> None:
        """Count one request; a prompt that runs again after a retraction counts its tokens only once."""
        self._requests.labels(report.outcome.value, report.reason.value).inc()
        if report.reason is Reason.RETRACTED:
            return
        for origin in ORIGINS:
            self._tokens.labels(origin).inc(getattr(report, origin))
        self._recomputed.inc(report.recomputed)
        self._discovered.inc(report.discovered)
        self._cells.inc(report.computed_cells)
        for phase in REPORTED_PHASES:
            self._seconds.labels(phase).inc(getattr(report, f"{phase}_s"))

    def indexed(self, seconds: float) -> None:
        """Count the time one donor took to enter the index."""
        self._seconds.labels("index").inc(seconds)

    def repaired(self, tokens: int, seconds: float) -> None:
        """Count one request's repair rows of a decode step and the time it took to choose and place them."""
        self._repaired.inc(tokens)
        self._seconds.labels("repair").inc(seconds)

    def observe(self, index, tree) -> None:
        """Set the gauges from the live index and the leases held."""
        self._index_tokens.set(index.tokens)
        self._index_entries.set(index.entries)
        self._donors.set(len(index))
        self._leases.set(tree.active)

    def enabled(self, mode: str) -> None:
        """Say once at start-up whether reuse is wired in."""
        self._enabled.set(1 if mode == "on" else 0)


class AuditMetrics:
    """What audits found and what the controller made of it, by tenant: the first 32 by name, then `other`."""

    def __init__(self, where: dict, live: dict):
        import prometheus_client as prom

        self._ended = prom.Counter(
            "kvshare_audits", "Audits by result and, unless done, reason.", ["result", "reason"], **where
        )
        labels = ["tenant", "strategy", "span"]
        self._kl = prom.Histogram(
            "kvshare_audit_kl_nats",
            "KL(full || approximate) of audited answers, at the first token and mean over those sent.",
            *(labels,),
            buckets=_KL,
            **where,
        )
        self._agreement = prom.Summary(
            "kvshare_audit_agreement",
            "Share of positions with the same likeliest token as full prefill.",
            labels,
            **where,
        )
        self._tokens = prom.Counter("kvshare_audit_tokens", "Tokens spent on audits, cached ones included.", **where)
        self._ratio = prom.Gauge("kvshare_controller_ratio", "Recompute ratio a tenant has.", ["tenant"], **live)
        self._off = prom.Gauge(
            "kvshare_controller_off", "1 while reuse is off for a tenant that misses its target.", ["tenant"], **live
        )
        self._shut = prom.Counter("kvshare_sources_shut", "Donors removed for the harm they did.", **where)
        self._named = _Names()
        for result, reason in AUDIT_RESULTS:
            self._ended.labels(result, reason)

    def ended(self, result: str, reason: str) -> None:
        """Count one audit; see AUDIT_RESULTS."""
        self._ended.labels(result, reason).inc()

    def spent(self, tokens: int) -> None:
        """Count the tokens of an audit that starts."""
        self._tokens.inc(tokens)

    def measured(self, tenant: str, strategy: str, found) -> None:
        """Record an `audit.Measurement`."""
        tenant = self._named(tenant)
        self._kl.labels(tenant, strategy, "first").observe(found.kl_first)
        self._kl.labels(tenant, strategy, "sent").observe(found.kl)
        self._agreement.labels(tenant, strategy, "first").observe(found.same_first)
        self._agreement.labels(tenant, strategy, "sent").observe(found.same)

    def controlled(self, tenant: str, ratio: float, off: bool) -> None:
        """Show what is in force for a tenant."""
        tenant = self._named(tenant)
        self._ratio.labels(tenant).set(ratio)
        self._off.labels(tenant).set(off)

    def shut(self) -> None:
        """Count a donor removed for the harm it did."""
        self._shut.inc()


class QueueMetrics:
    """What ordering the waiting queue costs, and who waits for what."""

    def __init__(self, where: dict, live: dict):
        import prometheus_client as prom

        self._passes = prom.Counter("kvshare_order_passes", "Scheduling passes by result.", ["result"], **where)
        self._seconds = prom.Counter("kvshare_order_seconds", "Seconds spent on ordering the queue.", **where)
        self._rounds = prom.Gauge("kvshare_order_rounds", "Rounds of quanta granted since the start.", **live)
        self._waiting = prom.Gauge(
            "kvshare_waiting_requests", "Waiting requests by what they wait for.", ["for"], **live
        )
        self._deficit = prom.Gauge(
            "kvshare_tenant_deficit_tokens", "What a tenant may still spend before others come.", ["tenant"], **live
        )
        self._service = prom.Gauge(
            "kvshare_tenant_service_tokens", "Tokens charged to a tenant since it came.", ["tenant"], **live
        )
        self._named = _Names()
        for result in ORDER_RESULTS:
            self._passes.labels(result)
        for wait in WAITS:
            self._waiting.labels(wait)

    def ordered(self, result: str, seconds: float) -> None:
        """Count one pass; see ORDER_RESULTS."""
        self._passes.labels(result).inc()
        self._seconds.inc(seconds)

    def observe(self, queue, order) -> None:
        """Show a `scheduling.Queue` and the order just made. Tenants beyond the first 32 are not shown."""
        self._rounds.set(queue.accounts.refills)
        ready = len(order.ready)
        waits = (ready, len(order.rows) - ready - order.held, order.held)
        for name, count in zip(WAITS, waits, strict=True):
            self._waiting.labels(name).set(count)
        for account, deficit in queue.accounts.deficits.items():
            if (name := self._named(account)) == account:
                self._deficit.labels(name).set(deficit)
                self._service.labels(name).set(queue.accounts.served[account])


class _Names:
    """The first 32 tenants by name, then `other`."""

    def __init__(self):
        self._seen: set[str] = set()

    def __call__(self, tenant: str) -> str:
        if len(self._seen) < _TENANTS:
            self._seen.add(tenant)
        return tenant if tenant in self._seen else "other"
