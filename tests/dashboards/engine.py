"""An engine of fakes: the real metrics on a real /metrics, moved by made-up events, for a real Prometheus to scrape."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import numpy as np
from prometheus_client import CollectorRegistry, Gauge, Histogram, start_http_server

from kvshare_sched.observe.metrics import EdgeMetrics, ShareMetrics
from kvshare_sched.observe.series import AUDIT_RESULTS, KINDS, LABELS, LEFT, ORDER_RESULTS, QUOTAS
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome
from kvshare_sched.scheduling.fairness import Accounts
from kvshare_sched.scheduling.order import Waiting
from kvshare_sched.scheduling.queue import Order, Queue
from kvshare_sched.settings import KVShareConfig

TENANTS = ("", "blue", "green")


class _Index(SimpleNamespace):
    def __len__(self):
        return self.donors


class Engine:
    """`step()` is a second of an engine's life in which everything happens that is counted."""

    def __init__(self, port: int):
        registry = CollectorRegistry()
        self.metrics = ShareMetrics(registry=registry)
        self.metrics.started(KVShareConfig())
        self.edge = EdgeMetrics(registry=registry)
        labels = ["model_name", "tp_rank"]
        self._first = Histogram("sglang:time_to_first_token_seconds", ".", labels, registry=registry)
        self._gauges = [
            Gauge(f"sglang:{n}", ".", labels, registry=registry)
            for n in ("num_running_reqs", "num_queue_reqs", "token_usage")
        ]
        self.steps = 0
        self._server, self._thread = start_http_server(port, "127.0.0.1", registry)

    def stop(self) -> None:
        """Close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def step(self) -> None:
        """One second."""
        self.steps += 1
        move(self.metrics, self.steps)
        move_edge(self.edge, self.steps)
        self._first.labels("tiny", "0").observe(0.1 * (1 + self.steps % 5))
        for gauge, value in zip(self._gauges, (3, 2, 0.5), strict=True):
            gauge.labels("tiny", "0").set(value)


def move(m: ShareMetrics, n: int) -> None:
    """The n-th second of an engine in which everything happens that is counted."""
    for i, (outcome, reason) in enumerate(LABELS):
        reused = 80 if outcome is Outcome.REUSED else 0
        spent = {"match_s": 0.001, "copy_s": 0.002, "recompute_s": 0.01}
        found = {"computed_cells": 3000, "discovered": 0 if reused else 40, "saved_s": 0.2 if n % 5 else -0.1}
        report = ShareReport(20, reused, reused // 5, 30, outcome, reason, **found, **spent)
        m.record(report, TENANTS[i % 3])
    m.indexed(0.001)
    m.repaired(2, 0.001)
    left = Counter(dict.fromkeys(LEFT, n))
    index = _Index(tokens=1000 * n, entries=100 * n, nbytes=40_000 * n, donors=n, left=left)
    m.observe(index, SimpleNamespace(active=n % 3))
    m.borrowed(dict.fromkeys(KINDS, 30))
    for result, reason in AUDIT_RESULTS:
        m.audits.ended(result, reason)
    m.audits.spent(50)
    m.audits.timed(0.5, 0.4)
    m.audits.shut()
    for tenant in TENANTS:
        kl = 0.01 * (1 + n % 4)
        m.audits.measured(tenant, "consensus", SimpleNamespace(kl=kl, kl_first=kl / 2, same=0.8, same_first=1.0))
        m.audits.controlled(tenant, 0.18 + 0.01 * (n % 3), n % 7 == 0 and tenant == "blue")
    queue = Queue("fair", Accounts(1000.0), 8)
    for i, tenant in enumerate(TENANTS):
        queue.add(Waiting(f"r{i}", tenant or "(default)", i, 10, 10.0))
        queue.accounts.charge(tenant or "(default)", 10.0 * n * i)
    queue.accounts.refills = n
    for result in ORDER_RESULTS:
        m.queue.ordered(result, 0.002, float(n))
    m.queue.observe(queue, Order(("r0",), np.arange(3), held=1))
    for tenant in TENANTS:
        m.queue.started(tenant or "(default)", 900.0 * (n % 5))


def move_edge(m: EdgeMetrics, n: int) -> None:
    """The same second where the tenants file is in force."""
    for tenant in TENANTS[1:]:
        for quota in QUOTAS:
            m.refused(tenant, quota)
    m.library([{"tokens": 500, "resident": i < n} for i in range(5)])
