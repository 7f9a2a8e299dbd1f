"""The metrics of one engine on a registry of its own: names, fixed labels, sums."""

from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from kvshare_sched.metrics import AUDIT_RESULTS, ORDER_RESULTS, ORIGINS, PHASES, ShareMetrics
from kvshare_sched.scheduling.fairness import Accounts
from kvshare_sched.scheduling.order import Waiting
from kvshare_sched.scheduling.queue import Order, Queue
from kvshare_sched.types import Outcome, Reason, ShareReport


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return ShareMetrics(registry=registry)


def samples(registry) -> dict:
    """(name, sorted label values) -> value, without the creation times."""
    return {
        (s.name, tuple(v for _, v in sorted(s.labels.items()))): s.value
        for family in registry.collect()
        for s in family.samples
        if not s.name.endswith("_created")
    }


def reports() -> list[ShareReport]:
    one = ShareReport(
        5,
        40,
        7,
        12,
        Outcome.REUSED,
        Reason.NONE,
        computed_cells=80,
        match_s=0.25,
        copy_s=0.5,
        recompute_s=1.0,
    )
    two = ShareReport(0, 0, 0, 30, Outcome.ORDINARY, Reason.SHORT, computed_cells=60, match_s=0.25)
    three = ShareReport(3, 0, 0, 20, Outcome.DISCOVERED, Reason.NONE, discovered=16, computed_cells=40)
    return [one, two, three]


def test_every_name_has_the_prefix_and_a_help_text(metrics, registry):
    families = list(registry.collect())
    assert len(families) == 25
    assert all(f.name.startswith("kvshare_") and f.documentation.endswith(".") for f in families)
    text = generate_latest(registry).decode()
    assert all(line.startswith(("#", "kvshare_")) for line in text.splitlines())


def test_counters_end_in_total_and_times_in_seconds(metrics, registry):
    kinds = {f.name: f.type for f in registry.collect()}
    assert {name for name, kind in kinds.items() if kind == "gauge"} == {
        *(f"kvshare_{n}" for n in ("index_tokens", "index_entries", "donors", "leases_held", "enabled")),
        *(f"kvshare_controller_{n}" for n in ("ratio", "off")),
        *("kvshare_order_rounds", "kvshare_waiting_requests"),
        *(f"kvshare_tenant_{n}_tokens" for n in ("deficit", "service")),
    }
    counters = [name for name, kind in kinds.items() if kind == "counter"]
    assert all((f"{name}_total") in {n for n, _ in samples(registry)} for name in counters)
    assert not any("ms" in name.split("_") or "milliseconds" in name for name in kinds)


def test_all_label_values_exist_from_the_start(metrics, registry):
    seen = samples(registry)
    assert set(seen.values()) == {0.0}
    assert {k[1] for k in seen if k[0] == "kvshare_prompt_tokens_total"} == {(o,) for o in ORIGINS}
    assert {k[1] for k in seen if k[0] == "kvshare_phase_seconds_total"} == {(p,) for p in PHASES}
    pairs = {k[1] for k in seen if k[0] == "kvshare_requests_total"}
    ordinary = {("ordinary", r.value) for r in Reason if r is not Reason.NONE}
    audits = {(k[1][1], k[1][0]) for k in seen if k[0] == "kvshare_audits_total"}
    assert audits == set(AUDIT_RESULTS)
    assert pairs == ordinary | {("reused", "none"), ("reused", "error"), ("discovered", "none")}


def test_recording_adds_no_label_value(metrics, registry):
    before = samples(registry).keys()
    for report in reports():
        metrics.record(report)
    assert samples(registry).keys() == before


def test_tokens_by_origin_sum_to_the_prompts(metrics, registry):
    for report in reports():
        metrics.record(report)
    seen = samples(registry)
    by_origin = {o: seen["kvshare_prompt_tokens_total", (o,)] for o in ORIGINS}
    assert by_origin == {"exact": 8, "reused": 40, "fresh": 62}
    assert sum(by_origin.values()) == sum(r.prompt_len for r in reports())
    assert seen["kvshare_recomputed_tokens_total", ()] == 7
    assert seen["kvshare_discovered_tokens_total", ()] == 16
    assert seen["kvshare_prefill_cells_total", ()] == 180
    metrics.indexed(0.25)
    metrics.repaired(3, 0.125)
    metrics.repaired(2, 0.125)
    seen = samples(registry)
    assert {p: seen["kvshare_phase_seconds_total", (p,)] for p in PHASES} == {
        "index": 0.25,
        "match": 0.5,
        "copy": 0.5,
        "recompute": 1.0,
        "repair": 0.25,
    }
    assert seen["kvshare_repaired_tokens_total", ()] == 5


def test_prompt_that_runs_again_counts_its_tokens_once(metrics, registry):
    metrics.record(reports()[0])
    metrics.record(ShareReport(20, 0, 0, 37, Outcome.ORDINARY, Reason.RETRACTED, computed_cells=74))
    seen = samples(registry)
    assert [seen["kvshare_prompt_tokens_total", (o,)] for o in ORIGINS] == [5, 40, 12]
    assert seen["kvshare_requests_total", ("ordinary", "retracted")] == 1


def test_each_report_counts_one_request(metrics, registry):
    for report in [*reports(), reports()[0]]:
        metrics.record(report)
    counted = {k[1]: v for k, v in samples(registry).items() if k[0] == "kvshare_requests_total" and v}
    assert counted == {("reused", "none"): 2, ("ordinary", "short"): 1, ("discovered", "none"): 1}


class FakeIndex(SimpleNamespace):
    def __len__(self):
        return self.donors


def test_gauges_show_the_last_state(metrics, registry):
    metrics.observe(FakeIndex(tokens=900, entries=80, donors=3), SimpleNamespace(active=2))
    metrics.observe(FakeIndex(tokens=500, entries=40, donors=1), SimpleNamespace(active=0))
    seen = samples(registry)
    names = ("index_tokens", "index_entries", "donors", "leases_held")
    assert [seen[f"kvshare_{n}", ()] for n in names] == [500, 40, 1, 0]


@pytest.mark.parametrize(("mode", "value"), [("on", 1), ("discover", 0), ("off", 0)])
def test_enabled_means_reuse_may_happen(metrics, registry, mode, value):
    metrics.enabled(mode)
    assert samples(registry)["kvshare_enabled", ()] == value


def test_two_engines_on_two_registries_do_not_mix(metrics, registry):
    other = CollectorRegistry()
    ShareMetrics(registry=other).record(reports()[0])
    assert set(samples(registry).values()) == {0.0}
    assert samples(other)["kvshare_prompt_tokens_total", ("reused",)] == 40


def test_the_queue_shows_who_waits_for_what_and_names_few_tenants(metrics, registry):
    queue = Queue("fair", Accounts(1000.0), 8)
    for n in range(100):
        queue.add(Waiting(f"r{n}", f"t{n}", n, 10, 10.0))
    queue.accounts.charge("t0", 250)
    metrics.queue.ordered("sorted", 0.002)
    metrics.queue.observe(queue, Order(("r0", "r1"), np.arange(5), held=1))
    seen = samples(registry)
    waits = {k[1][0]: v for k, v in seen.items() if k[0] == "kvshare_waiting_requests"}
    assert waits == {"turn": 2, "deficit": 2, "duplicate": 1}
    shown = {k[1][0]: v for k, v in seen.items() if k[0] == "kvshare_tenant_deficit_tokens"}
    assert len(shown) == 32 and shown["t0"] == 750 and shown["t1"] == 1000
    assert seen["kvshare_tenant_service_tokens", ("t0",)] == 250
    assert {k[1][0] for k in seen if k[0] == "kvshare_order_passes_total"} == set(ORDER_RESULTS)
    assert seen["kvshare_order_seconds_total", ()] == pytest.approx(0.002)
