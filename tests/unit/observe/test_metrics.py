"""The metrics of one engine on a registry of its own: names, fixed labels, sums."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from kvshare_sched.observe.metrics import EdgeMetrics, ShareMetrics
from kvshare_sched.observe.series import AUDIT_RESULTS, ORDER_RESULTS, ORIGINS, OTHER, PHASES, PREFIX, SERIES, TENANTS
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.scheduling.fairness import Accounts
from kvshare_sched.scheduling.order import Waiting
from kvshare_sched.scheduling.queue import Order, Queue
from kvshare_sched.settings import KVShareConfig


@pytest.fixture
def registry():
    return CollectorRegistry()


@pytest.fixture
def metrics(registry):
    return ShareMetrics(registry=registry)


@pytest.fixture
def edge(metrics, registry):
    """The series of the process that talks HTTP, behind the engine's."""
    return EdgeMetrics(registry=registry)


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


def test_every_name_has_the_prefix_and_a_help_text(edge, registry):
    families = list(registry.collect())
    assert [f.name for f in families] == [PREFIX + s.name for s in SERIES]
    assert all(f.name.startswith("kvshare_") and f.documentation.endswith(".") for f in families)
    text = generate_latest(registry).decode()
    assert all(line.startswith(("#", "kvshare_")) for line in text.splitlines())


def test_what_is_exposed_is_what_the_table_says(metrics, edge, registry):
    fill(metrics)
    edge.refused("a", "requests")
    exposed = {
        (f.name, f.type): {s.name for s in f.samples if not s.name.endswith("_created")} for f in registry.collect()
    }
    assert exposed == {(PREFIX + s.name, s.kind): set(s.samples) for s in SERIES}
    labels = {f.name: {tuple(s.labels.keys() - {"le"}) for s in f.samples} for f in registry.collect()}
    assert all({frozenset(found) for found in labels[PREFIX + s.name]} == {frozenset(s.labels)} for s in SERIES)


def test_names_follow_the_conventions():
    for s in SERIES:
        words = s.name.split("_")
        assert not {"ms", "us", "milliseconds", "kb", "mb", "count", "total"} & set(words), s.name
        assert "seconds" not in words or words[-1] == "seconds", s.name
        assert s.across in ("sum", "max", "min") and s.help.endswith("."), s.name


def test_all_label_values_exist_from_the_start(edge, registry):
    seen = samples(registry)
    assert set(seen.values()) == {0.0}
    with_fixed_values = {s.samples[0] for s in SERIES if s.values or not s.labels}
    assert with_fixed_values <= {name for name, _ in seen}
    assert {k[1] for k in seen if k[0] == "kvshare_prompt_tokens_total"} == {(o,) for o in ORIGINS}
    assert {k[1] for k in seen if k[0] == "kvshare_phase_seconds_total"} == {(p,) for p in PHASES}
    pairs = {k[1] for k in seen if k[0] == "kvshare_requests_total"}
    ordinary = {("ordinary", r.value) for r in Reason if r is not Reason.NONE}
    audits = {(k[1][1], k[1][0]) for k in seen if k[0] == "kvshare_audits_total"}
    assert audits == set(AUDIT_RESULTS)
    half_way = {("reused", reason) for reason in ("error", "mixed_input", "donor_lost")}
    assert pairs == ordinary | half_way | {("reused", "none"), ("discovered", "none")}


def test_recording_adds_no_label_value_but_tenants(metrics, registry):
    before = samples(registry).keys()
    for report in reports():
        metrics.record(report)
    assert {name for name, _ in samples(registry).keys() - before} == {
        *("kvshare_tenant_prompt_tokens_total", "kvshare_tenant_requests_total"),
        "kvshare_tenant_saved_prefill_seconds_total",
    }


def test_tokens_of_tenants_sum_to_those_of_all(metrics, registry):
    for n in range(100):
        metrics.record(reports()[n % 3], f"tenant {n}")
    seen = samples(registry)
    for origin in ORIGINS:
        by_tenant = [
            v for (name, labels), v in seen.items() if name.endswith("tenant_prompt_tokens_total") and origin in labels
        ]
        assert sum(by_tenant) == seen["kvshare_prompt_tokens_total", (origin,)]
        assert len(by_tenant) == TENANTS + 1


def test_ten_thousand_tenants_leave_a_bounded_number_of_series(metrics, edge, registry):
    """Everything that names a tenant, moved for each of them."""
    found = SimpleNamespace(kl=0.1, kl_first=0.1, same=1.0, same_first=1.0)
    tenants = [f"tenant {n}" for n in range(10_000)]
    deficits = dict.fromkeys(tenants, 5.0)
    accounts = SimpleNamespace(refills=1, deficits=deficits, served=deficits)
    metrics.queue.observe(SimpleNamespace(accounts=accounts), Order((), np.arange(0)))
    for n, tenant in enumerate(tenants):
        metrics.record(reports()[n % 3], tenant)
        metrics.audits.measured(tenant, "blend", found)
        metrics.audits.controlled(tenant, 0.2, False)
        metrics.queue.started(tenant, 700)
        edge.refused(tenant, "tokens")
    shown = {s.name: set() for s in SERIES if "tenant" in s.labels}
    for family in registry.collect():
        if (name := family.name.removeprefix(PREFIX)) in shown:
            shown[name] |= {sample.labels["tenant"] for sample in family.samples}
    assert len(shown) == 10 and all(TENANTS <= len(names) <= TENANTS + 1 for names in shown.values()), shown
    seen = samples(registry)
    assert seen["kvshare_tenant_requests_total", ("ordinary", OTHER)] > 3000
    assert len(seen) < 1200


def test_one_gauge_does_not_stand_for_many_tenants(metrics, registry):
    for n in range(TENANTS + 5):
        metrics.audits.controlled(f"t{n}", 0.5, True)
    shown = {k[1][0] for k in samples(registry) if k[0] in ("kvshare_controller_ratio", "kvshare_controller_off")}
    assert shown == {f"t{n}" for n in range(TENANTS)}


def test_a_name_that_is_no_text_breaks_no_scrape(metrics, registry):
    metrics.record(reports()[1], "half \ud800")
    assert b'tenant="half ?"' in generate_latest(registry)


def test_a_request_without_a_tenant_still_has_a_name(metrics, registry):
    metrics.record(reports()[1])
    metrics.record(reports()[1], "x" * 200)
    tenants = {k[1][1] for k in samples(registry) if k[0] == "kvshare_tenant_requests_total"}
    assert tenants == {"(default)", "x" * 64}


def test_seconds_saved_and_lost_are_told_apart(metrics, registry):
    metrics.record(replace(reports()[0], saved_s=2.5), "a")
    metrics.record(replace(reports()[0], saved_s=-0.5), "a")
    seen = samples(registry)
    assert (
        seen["kvshare_saved_prefill_seconds_total", ()]
        == seen["kvshare_tenant_saved_prefill_seconds_total", ("a",)]
        == 2.5
    )
    assert seen["kvshare_lost_prefill_seconds_total", ()] == 0.5


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


def index_of(tokens: int, entries: int, donors: int, **left):
    return FakeIndex(tokens=tokens, entries=entries, nbytes=100 * entries, donors=donors, left=Counter(left))


def test_gauges_show_the_last_state(metrics, registry):
    metrics.observe(index_of(900, 80, 3, limit=2), SimpleNamespace(active=2))
    metrics.observe(index_of(500, 40, 1, limit=5, evicted=1), SimpleNamespace(active=0))
    seen = samples(registry)
    names = ("index_tokens", "index_entries", "index_bytes", "donors", "leases_held")
    assert [seen[f"kvshare_{n}", ()] for n in names] == [500, 40, 4000, 1, 0]
    left = {k[1][0]: v for k, v in seen.items() if k[0] == "kvshare_donors_left_total"}
    assert left == {"limit": 5, "quota": 0, "evicted": 1, "flushed": 0}


@pytest.mark.parametrize(("mode", "value"), [("on", 1), ("discover", 0), ("off", 0)])
def test_what_does_not_change_is_shown_from_the_start(metrics, registry, mode, value):
    metrics.started(KVShareConfig(mode=mode, target_kl=0.07, index_tokens=1234))
    seen = samples(registry)
    assert seen["kvshare_enabled", ()] == value  # reuse may happen
    assert seen["kvshare_audit_kl_nats_count", ("sent", KVShareConfig().strategy)] == 0
    assert (seen["kvshare_target_kl_nats", ()], seen["kvshare_index_limit_tokens", ()]) == (0.07, 1234)


def test_two_engines_on_two_registries_do_not_mix(metrics, registry):
    other = CollectorRegistry()
    ShareMetrics(registry=other).record(reports()[0])
    assert set(samples(registry).values()) == {0.0}
    assert samples(other)["kvshare_prompt_tokens_total", ("reused",)] == 40


SHOWN_ACCOUNT = ("deficit", "service")


def test_the_queue_shows_who_waits_for_what_and_names_few_tenants(metrics, registry):
    queue = Queue("fair", Accounts(1000.0), 8)
    for n in range(100):
        queue.add(Waiting(f"r{n}", f"t{n}", n, 10, 10.0))
    queue.accounts.charge("t0", 250)
    metrics.queue.ordered("sorted", 0.002, 12.5)
    metrics.queue.observe(queue, Order(("r0", "r1"), np.arange(5), held=1))
    seen = samples(registry)
    waits = {k[1][0]: v for k, v in seen.items() if k[0] == "kvshare_waiting_requests"}
    assert waits == {"turn": 2, "deficit": 2, "duplicate": 1}
    shown = {k[1][0]: v for k, v in seen.items() if k[0] == "kvshare_tenant_deficit_tokens"}
    assert len(shown) == 32 and shown["t0"] == 750 and shown["t1"] == 1000
    assert seen["kvshare_tenant_service_tokens", ("t0",)] == 250
    assert {k[1][0] for k in seen if k[0] == "kvshare_order_passes_total"} == set(ORDER_RESULTS)
    assert seen["kvshare_order_seconds_total", ()] == pytest.approx(0.002)
    assert seen["kvshare_oldest_wait_seconds", ()] == 12.5
    metrics.queue.emptied()
    seen = samples(registry)
    assert seen["kvshare_oldest_wait_seconds", ()] == 0
    assert {v for k, v in seen.items() if k[0] == "kvshare_waiting_requests"} == {0.0}


def test_waits_are_shown_in_tokens_of_service_by_tenant(metrics, registry):
    for account, waited in (("a", 0), ("a", 5000), ("b", 100_000)):
        metrics.queue.started(account, waited)
    seen = samples(registry)
    within = {t: seen["kvshare_tenant_wait_tokens_bucket", ("6144.0", t)] for t in ("a", "b")}
    assert within == {"a": 2, "b": 0} and seen["kvshare_tenant_wait_tokens_sum", ("a",)] == 5000


@pytest.mark.parametrize("multiprocess", [False, True])
def test_an_account_that_was_dropped_shows_no_deficit_of_old(metrics, registry, monkeypatch, multiprocess):
    if multiprocess:  # as under SGLang: nothing can be taken out of those files
        monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "somewhere")
    queue, order = Queue("fair", Accounts(1000.0, unknown=1), 8), Order((), np.arange(0))
    for number, tenant in enumerate(("first", "second")):
        queue.add(Waiting(f"r{number}", tenant, number, 10, 10.0))
        queue.start(f"r{number}", 400)
        queue.finish(f"r{number}")
        queue.accounts.refills += 1
        metrics.queue.observe(queue, order)
    seen = samples(registry)
    shown = [{k[1][0]: v for k, v in seen.items() if k[0] == f"kvshare_tenant_{n}_tokens"} for n in SHOWN_ACCOUNT]
    left = {"first": 0} if multiprocess else {}
    assert shown == [{"second": 600, **left}, {"second": 400, **left}]


def test_rounds_are_counted_by_what_they_have_grown(metrics, registry):
    order = Order((), np.arange(0))
    for rounds in (3, 3, 7, 2):  # the accounts start over after an error
        metrics.queue.observe(SimpleNamespace(accounts=SimpleNamespace(refills=rounds, deficits={}, served={})), order)
    assert samples(registry)["kvshare_order_rounds_total", ()] == 9


def test_what_the_process_that_talks_http_counts(edge, registry):
    documents = [{"tokens": 5, "resident": True}, {"tokens": 7, "resident": False}, {"tokens": 11, "resident": False}]
    edge.library(documents)
    edge.library(documents[:2])
    for n in range(100):
        edge.refused(f"t{n}", "tokens")
    edge.refused("t0", "requests")
    seen = samples(registry)
    assert [seen["kvshare_documents", (s,)] for s in ("resident", "missing")] == [1, 1]
    assert [seen["kvshare_document_tokens", (s,)] for s in ("resident", "missing")] == [5, 7]
    refused = {k[1]: v for k, v in seen.items() if k[0] == "kvshare_quota_refusals_total"}
    assert refused["requests", "t0"] == refused["tokens", "t0"] == 1 and refused["tokens", OTHER] == 100 - TENANTS
    assert len(refused) == TENANTS + 2


def test_borrowed_tokens_are_counted_by_kind_of_donor(metrics, registry):
    metrics.borrowed({"own": 5, "trusted": 7})
    metrics.borrowed({"own": 0, "document": 3})
    seen = samples(registry)
    assert [seen["kvshare_borrowed_tokens_total", (k,)] for k in ("own", "document", "trusted")] == [5, 3, 7]


def fill(metrics) -> None:
    """Touch every series."""
    metrics.record(reports()[0], "a")
    metrics.audits.measured("a", "blend", SimpleNamespace(kl=0.1, kl_first=0.1, same=1.0, same_first=1.0))
    metrics.audits.controlled("a", 0.2, False)
    queue = Queue("fair", Accounts(1000.0), 8)
    queue.add(Waiting("r", "a", 0, 10, 10.0))
    metrics.queue.observe(queue, Order(("r",), np.arange(1)))
    metrics.queue.started("a", 700)


_ENGINE = """
import sys
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.observe.metrics import ShareMetrics
from types import SimpleNamespace
from collections import Counter
leases, oldest = map(int, sys.argv[1:])
metrics = ShareMetrics()
metrics.started(KVShareConfig())
metrics.queue.ordered("sorted", 0.5, oldest)
index = type("Index", (), {"tokens": 10, "entries": 1, "nbytes": 1, "left": Counter(), "__len__": lambda self: 1})()
metrics.observe(index, SimpleNamespace(active=leases))
metrics.audits.controlled("a", leases / 10, False)
sys.stdin.read()
"""


def test_data_parallel_engines_add_up_or_show_the_worst(tmp_path):
    """SGLang's set-up: every process writes files of its own, and /metrics reads them all."""
    environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)}
    engines = [
        subprocess.Popen([sys.executable, "-c", _ENGINE, leases, oldest], env=environment, stdin=subprocess.PIPE)
        for leases, oldest in (("2", "7"), ("3", "4"))
    ]
    for engine in engines:
        engine.communicate()
        assert engine.returncode == 0
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    seen = samples(registry)
    assert seen["kvshare_leases_held", ()] == 5 and seen["kvshare_index_tokens", ()] == 20
    assert seen["kvshare_oldest_wait_seconds", ()] == 7 and seen["kvshare_controller_ratio", ("a",)] == 0.3
    assert seen["kvshare_enabled", ()] == 1 and seen["kvshare_order_seconds_total", ()] == 1.0
    assert seen["kvshare_requests_total", ("reused", "none")] == 0, "label values exist before the first request"
