"""The state of a server right now, read off its own metrics: for `kvshare top` and the page /kvshare/ alike."""

from __future__ import annotations

from collections.abc import Iterable

from kvshare_sched.observe.series import ORIGINS, OTHER, PREFIX, WAITS

_SGLANG = "sglang:"
_WAITS = {"turn": "may start", "deficit": "others come first", "duplicate": "somebody computes their text"}
Samples = dict[str, list[tuple[dict, float]]]  # sample name -> (labels, value)


def samples_of(families: Iterable) -> Samples:
    """prometheus_client's metric families as a dictionary; only ours and SGLang's."""
    found: Samples = {}
    for family in families:
        for sample in family.samples:
            if sample.name.startswith((PREFIX, _SGLANG)):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def samples_in(text: str) -> Samples:
    """The same from what /metrics answers."""
    from prometheus_client.parser import text_string_to_metric_families

    return samples_of(text_string_to_metric_families(text))


class State:
    """Questions about one look at the metrics; `before`: an earlier look, to count only what has happened since.

    A counter that is lower than before has started over with its server, and counts from nothing.
    """

    def __init__(self, samples: Samples, before: Samples | None = None):
        self.samples, self.before = samples, before

    def now(self, name: str, **labels: str) -> float:
        """Sum of the samples of one of our series that have these labels."""
        return _sum(self.samples, PREFIX + name, labels)

    def grown(self, name: str, **labels: str) -> float:
        """What a counter has counted since the earlier look, or since the start."""
        name = f"{PREFIX}{name}_total"
        now, then = _sum(self.samples, name, labels), _sum(self.before, name, labels) if self.before else 0.0
        return now - then if now >= then else now

    def sglang(self, name: str) -> list[float]:
        """One of SGLang's gauges for each engine, of which every tensor-parallel rank may show one."""
        engines: dict[tuple, float] = {}
        for labels, value in self.samples.get(_SGLANG + name, ()):
            engine = tuple(sorted((k, v) for k, v in labels.items() if k != "tp_rank"))
            engines[engine] = max(value, engines.get(engine, 0.0))
        return list(engines.values())

    def values(self, name: str, label: str) -> list[str]:
        """Values of a label, in order of their first appearance."""
        return list(dict.fromkeys(labels[label] for labels, _ in self.samples.get(PREFIX + name, ())))


def _sum(samples: Samples, name: str, labels: dict[str, str]) -> float:
    return sum(value for has, value in samples.get(name, ()) if labels.items() <= has.items())


def sections(state: State) -> list[tuple[str, tuple[str, ...], list[tuple]]]:
    """(title, column heads, rows) of the tables that show a state. A new subject is a line here."""
    return [
        ("Reuse", ("", "", ""), _reuse(state)),
        ("Queue", ("", ""), _queue(state)),
        ("Index and pool", ("", ""), _index(state)),
        ("Quality", ("", ""), _quality(state)),
        (
            "Tenants",
            ("tenant", "requests", "prompt tokens", "reused", "saved s", "KL", "ratio", "deficit"),
            _tenants(state),
        ),
        ("Why requests were ordinary", ("reason", "requests"), _reasons(state)),
    ]


def _reuse(s: State) -> list[tuple]:
    prompt = sum(s.grown("prompt_tokens", origin=o) for o in ORIGINS)
    rows = [("wired in", "yes" if s.now("enabled") else "no", "")]
    for origin in ORIGINS:
        tokens = s.grown("prompt_tokens", origin=origin)
        rows.append((f"tokens, {origin}", _n(tokens), _share(tokens, prompt)))
    rows.append(("of reused: recomputed", _n(s.grown("recomputed_tokens")), ""))
    requests = s.grown("requests")
    rows.append(("requests that reused", _n(s.grown("requests", outcome="reused")), f"of {_n(requests)}"))
    saved, lost = s.grown("saved_prefill_seconds"), s.grown("lost_prefill_seconds")
    rows.append(("prefill seconds saved (cost model)", f"{saved - lost:.1f}", ""))
    return rows


def _queue(s: State) -> list[tuple]:
    waiting = [(f"waiting, {_WAITS[w]}", _n(s.now("waiting_requests", **{"for": w}))) for w in WAITS]
    return [
        ("running", _n(sum(s.sglang("num_running_reqs")))),
        *waiting,
        ("oldest wait", f"{s.now('oldest_wait_seconds'):.1f} s"),
        ("passes ordered, failed", f"{_n(s.grown('order_passes'))}, {_n(s.grown('order_passes', result='failed'))}"),
        ("rounds of quanta", _n(s.grown("order_rounds"))),
    ]


def _index(s: State) -> list[tuple]:
    tokens, limit = s.now("index_tokens"), s.now("index_limit_tokens")
    left = ", ".join(f"{_n(s.grown('donors_left', reason=r))} {r}" for r in s.values("donors_left_total", "reason"))
    return [
        ("donors", _n(s.now("donors"))),
        ("indexed tokens", f"{_n(tokens)} ({_share(tokens, limit)} of {_n(limit)})"),
        ("memory", f"{s.now('index_bytes') / 1e6:.1f} MB"),
        ("donors gone", left),
        ("leases held", _n(s.now("leases_held"))),
        ("KV pool in use", _share(max(s.sglang("token_usage"), default=0.0), 1)),
    ]


def _quality(s: State) -> list[tuple]:
    audits, kl = s.now("audit_kl_nats_count", span="sent"), s.now("audit_kl_nats_sum", span="sent")
    return [
        ("mean KL of audited answers", f"{kl / audits:.4f} nats ({_n(audits)} audits)" if audits else "no audit yet"),
        ("target", f"{s.now('target_kl_nats'):.4f} nats"),
        ("tenants that are off", _n(s.now("controller_off"))),
        ("donors removed for harm", _n(s.grown("sources_shut"))),
    ]


def _tenants(s: State) -> list[tuple]:
    rows = []
    for name in s.values("tenant_requests_total", "tenant"):
        tokens, reused = (
            s.grown("tenant_prompt_tokens", tenant=name),
            s.grown("tenant_prompt_tokens", tenant=name, origin="reused"),
        )
        audits = s.now("tenant_audit_kl_nats_count", tenant=name, span="sent")
        kl = f"{s.now('tenant_audit_kl_nats_sum', tenant=name, span='sent') / audits:.4f}" if audits else ""
        ratio = "off" if s.now("controller_off", tenant=name) else f"{s.now('controller_ratio', tenant=name):.3f}"
        known = name in s.values("controller_ratio", "tenant")
        rows.append(
            (
                *(name, _n(s.grown("tenant_requests", tenant=name)), _n(tokens), _share(reused, tokens)),
                f"{s.grown('tenant_saved_prefill_seconds', tenant=name):.1f}",
                *(kl, ratio if known else "", _n(s.now("tenant_deficit_tokens", tenant=name)) if name != OTHER else ""),
            )
        )
    return rows


def _reasons(s: State) -> list[tuple]:
    counts = [(r, s.grown("requests", outcome="ordinary", reason=r)) for r in s.values("requests_total", "reason")]
    return [(reason, _n(count)) for reason, count in sorted(counts, key=lambda c: -c[1]) if count]


def _n(value: float) -> str:
    return f"{value:,.0f}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else ""
