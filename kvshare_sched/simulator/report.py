"""Figures of one simulated run, and the command behind `kvshare simulate`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from kvshare_sched.errors import ConfigError
from kvshare_sched.loadtest.statistics import jain
from kvshare_sched.scheduling.fairness import Accounts
from kvshare_sched.scheduling.queue import Queue
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.simulator import profile as profiles
from kvshare_sched.simulator import traffic
from kvshare_sched.simulator.engine import Done, Engine


def summary(done: Iterable[Done]) -> dict:
    """Means and percentiles over all requests, and the spread over tenants. Consumes `done`."""
    rows: list[tuple[float, ...]] = []
    waits: dict[str, list[float]] = {}
    for d in done:
        tpot = (d.end_s - d.first_s) / (d.new_tokens - 1) if d.new_tokens > 1 else 0.0
        rows.append((d.first_s - d.due_s, tpot, d.end_s, d.due_s, d.prompt, d.exact, d.reused, d.new_tokens))
        waits.setdefault(d.tenant, []).append(d.first_s - d.due_s)
    if not rows:
        raise ConfigError("no request was simulated; the trace is empty.")
    ttft, tpot, end, due, prompt, exact, reused, new = np.array(rows).T
    makespan = float(end.max() - due.min())
    means = {tenant: float(np.mean(w)) for tenant, w in waits.items()}
    return {
        "requests": len(rows),
        "tenants": len(means),
        "makespan_s": makespan,
        "requests_s": len(rows) / makespan,
        "ttft_s": _spread(ttft),
        "tpot_s": _spread(tpot[new > 1]),
        "share_exact": float(exact.sum() / prompt.sum()),
        "share_reused": float(reused.sum() / prompt.sum()),
        "tenant_ttft_worst_s": max(means.values()),
        "tenant_ttft_jain": jain(list(means.values())),
    }


def _spread(x: np.ndarray) -> dict[str, float]:
    if not len(x):
        return {}
    return {"mean": float(x.mean()), **{f"p{q}": float(np.percentile(x, q)) for q in (50, 95, 99)}}


def queue_of(policy: str, config: KVShareConfig, profile: profiles.Profile) -> Queue:
    """A queue as the server would make it."""
    accounts = Accounts(config.quantum, config.weights, config.unknown_tenants)
    return Queue(policy, accounts, config.duplicate_wait, config.pool_keep)


def run(options) -> int:
    """`kvshare simulate`: one line a policy, and a JSON file."""
    profile, config, results = profiles.read(options.profile), KVShareConfig.load(), {}
    print(f"{'order':10} {'TTFT mean':>10} {'p50':>8} {'p95':>8} {'p99':>8} {'req/s':>8} {'reused':>7} {'took':>7}")
    for policy in options.orders:
        if options.trace:
            requests = traffic.read(options.trace, options.speed)
        else:
            requests = traffic.library(options.requests, options.tenants, options.rate, seed=options.seed)
        started = time.perf_counter()
        engine = Engine(profile, queue_of(policy, config, profile), reuse=config.mode == "on")
        found = results[policy] = summary(engine.run(requests))
        ttft = found["ttft_s"]
        took = time.perf_counter() - started
        print(
            f"{policy:10} {ttft['mean']:10.3f} {ttft['p50']:8.3f} {ttft['p95']:8.3f} {ttft['p99']:8.3f} "
            f"{found['requests_s']:8.2f} {found['share_reused']:7.1%} {took:6.0f}s",
            flush=True,
        )
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=1) + "\n")
    return 0
