"""The table of all metrics: what exists, its labels, what it means; `metrics.py` says what is counted when.

Prometheus conventions: base units, counters end in `_total`, label values that are known exist from the start, tenants
are the first few by name and `other`. `python dashboards/generate.py` makes the table of the docs from this one.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.tenants.policy import DOCUMENT, OWN, TRUSTED

ORIGINS = ("exact", "reused", "fresh")
REPORTED_PHASES = ("match", "copy", "recompute")
PHASES = (*REPORTED_PHASES, "index", "repair")
# Every pair that can occur. (reused, error): a later chunk of a long prompt failed and ran as ordinary prefill.
LABELS = (
    (Outcome.REUSED, Reason.NONE),
    *((Outcome.REUSED, reason) for reason in (Reason.ERROR, Reason.MIXED_INPUT, Reason.DONOR_LOST)),  # half-way
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
    ("dropped", "unloaded"),
    ("dropped", "flushed"),
    ("dropped", "weights"),  # other weights answered
    ("dropped", "lost"),  # aborted
)
SPANS = ("first", "sent")
ORDER_RESULTS = ("sorted", "unchanged", "failed")
WAITS = ("turn", "deficit", "duplicate")
LEFT = ("limit", "quota", "evicted", "flushed")
KINDS = (OWN, DOCUMENT, TRUSTED)  # of donors, with a tenants file
QUOTAS = ("requests", "tokens")  # in flight
RESIDENT = ("resident", "missing")
PREFIX = "kvshare_"
OTHER, DEFAULT = "other", "(default)"  # tenants beyond the first, and requests without an extra_key
TENANTS = 32  # named in labels; the others share one value
KL_BUCKETS = (0.0001, 0.001, 0.003, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 3)  # nats, around the default target 0.03
WAIT_BUCKETS = (512, 1024, 2048, 4096, 6144, 8192, 16384, 65536)  # tokens of service, around a quantum and a prompt


@dataclass(frozen=True, slots=True)
class Series:
    """One metric. values: the label values that exist from the start, none of a label with values to come."""

    kind: str  # counter, gauge, histogram, summary
    name: str  # without the prefix, and without the _total of counters
    help: str
    labels: tuple[str, ...] = ()
    values: tuple[tuple[str, ...], ...] = ()
    across: str = "sum"  # gauges, over the engines of one server: sum, max, min
    edge: bool = False  # counted by the process that talks HTTP, where a tenants file is in force
    buckets: tuple[float, ...] = ()  # of a histogram

    @property
    def samples(self) -> tuple[str, ...]:
        """The names that queries use."""
        ends = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
        return tuple(f"{PREFIX}{self.name}{end}" for end in ends.get(self.kind, ("_sum", "_count")))


def _with(**fixed) -> dict:
    """Labels and all combinations of their values; an empty tuple for values that are not known before."""
    return {"labels": tuple(fixed), "values": tuple(product(*fixed.values()))}


_TENANT = _with(tenant=())
SERIES = (
    Series("gauge", "enabled", "1 when the cache backend is wired in and may reuse KV.", across="min"),
    Series("counter", "prompt_tokens", "Prompt tokens by origin of their KV.", **_with(origin=ORIGINS)),
    Series("counter", "recomputed_tokens", "Reused prompt tokens whose KV was computed again in prefill."),
    Series("counter", "repaired_tokens", "Prompt tokens whose KV was computed again while decoding."),
    Series("counter", "discovered_tokens", "Prompt tokens that could have been reused (mode discover)."),
    Series("counter", "promoted_tokens", "Prompt tokens computed exactly that could have been reused."),
    Series(
        "counter",
        "requests",
        "Requests by outcome and, when ordinary, the reason why; a retraction counts again.",
        labels=("outcome", "reason"),
        values=tuple((outcome.value, reason.value) for outcome, reason in LABELS),
    ),
    Series("counter", "prefill_cells", "(Layer x token) cells computed in prefill."),
    Series(
        "counter",
        "phase_seconds",
        "Seconds of requests that reuse; recompute: of all rows that run.",
        **_with(phase=PHASES),
    ),
    Series(
        "counter", "saved_prefill_seconds", "Prefill seconds that reuse saved, by the cost model; where it saved any."
    ),
    Series(
        "counter", "lost_prefill_seconds", "Prefill seconds that reuse cost, by the cost model; where it cost more."
    ),
    Series("gauge", "donors", "Donors indexed."),
    Series("gauge", "leases_held", "Donor pins held right now; 0 when idle."),
    Series("gauge", "index_tokens", "Donor tokens indexed."),
    Series("gauge", "index_entries", "Places in the index."),
    Series("gauge", "index_bytes", "Memory of the index, estimated from tokens and places."),
    Series("gauge", "index_limit_tokens", "Donor tokens the index may hold (KVSHARE_INDEX_TOKENS)."),
    Series(
        "counter",
        "donors_left",
        "Donors gone: limit of the index, of their tenant, evicted by SGLang's tree, flushed.",
        **_with(reason=LEFT),
    ),
    # by tenant
    Series("counter", "tenant_prompt_tokens", "Prompt tokens of a tenant by origin.", ("tenant", "origin")),
    Series("counter", "tenant_requests", "Requests of a tenant by outcome.", ("tenant", "outcome")),
    Series(
        "counter", "tenant_saved_prefill_seconds", "Prefill seconds saved for a tenant, by the cost model.", **_TENANT
    ),
    # quality
    Series(
        "counter",
        "audits",
        "Audits by result and, unless done, the reason why.",
        labels=("result", "reason"),
        values=AUDIT_RESULTS,
    ),
    Series("counter", "audit_tokens", "Tokens spent on audits, cached ones included."),
    Series(
        "counter",
        "audit_prefill_seconds",
        "Seconds of audits' full prefills: by the clock, by the cost model.",
        **_with(by=("clock", "model")),
    ),
    Series(
        "histogram",
        "audit_kl_nats",
        "KL(full || approximate) of audited answers: first token, mean over those sent.",
        labels=("strategy", "span"),
        buckets=KL_BUCKETS,
    ),
    Series("summary", "tenant_audit_kl_nats", "The same by tenant.", ("tenant", "span")),
    Series(
        "summary",
        "audit_agreement",
        "Share of positions with the same likeliest token as full prefill.",
        labels=("strategy", "span"),
    ),
    Series("gauge", "target_kl_nats", "Mean KL the controller holds (KVSHARE_TARGET_KL).", across="max"),
    Series(
        "gauge",
        "controller_ratio",
        "Recompute ratio of each tenant that has a name of its own.",
        **_TENANT,
        across="max",
    ),
    Series(
        "gauge", "controller_off", "1 while reuse is off for a tenant that misses its target.", **_TENANT, across="max"
    ),
    Series("counter", "sources_shut", "Donors removed for the harm they did."),
    # the waiting queue
    Series(
        "counter",
        "order_passes",
        "Scheduling passes; failed: an error, SGLang's order stayed.",
        **_with(result=ORDER_RESULTS),
    ),
    Series("counter", "order_seconds", "Seconds spent on ordering the queue."),
    Series("counter", "order_rounds", "Rounds of quanta granted: how often tenants ran against their share."),
    Series(
        "gauge",
        "waiting_requests",
        "Waiting: for their turn, for others' deficits, for a text somebody computes.",
        **_with(**{"for": WAITS}),
    ),
    Series("gauge", "oldest_wait_seconds", "How long the oldest waiting request has waited.", across="max"),
    Series(
        "histogram",
        "tenant_wait_tokens",
        "What the engine served between a request's arrival and its start, in tokens of prefill.",
        **_TENANT,
        buckets=WAIT_BUCKETS,
    ),
    Series("gauge", "tenant_deficit_tokens", "What a tenant may still spend before others come.", **_TENANT),
    Series("gauge", "tenant_service_tokens", "Tokens charged to a tenant since it came.", **_TENANT),
    # with a tenants file
    Series(
        "counter",
        "borrowed_tokens",
        "Donor tokens read: of the tenant itself, of documents, of trusted members.",
        **_with(kind=KINDS),
    ),
    Series(
        "counter",
        "quota_refusals",
        "Requests refused (429) for what their tenant has in flight.",
        **_with(tenant=(), quota=QUOTAS),
        edge=True,
    ),
    Series("gauge", "documents", "Documents of the library, computed or not.", **_with(state=RESIDENT), edge=True),
    Series("gauge", "document_tokens", "Tokens of the same.", **_with(state=RESIDENT), edge=True),
)
