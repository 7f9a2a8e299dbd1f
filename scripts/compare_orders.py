"""The orders of the queue against each other in the simulator, at the load where the usual ones give up.

    python scripts/compare_orders.py [--profile P] [--pool 60000] [--requests 400] [--seeds 6] [--out FILE]

`rag`: the load test's RAG mix. `hot_cold`: a tenant whose documents are all cached, and one that asks something new
every 10 s. Saturation is the smallest rate, in steps of 0.1 requests a second, of which fcfs (lpm) completes less than
95 %. Reuse is on in all runs, the caches are warm, every seed is another trace.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from kvshare_sched.loadtest import workloads
from kvshare_sched.scheduling.fairness import OUTPUT_PRICE
from kvshare_sched.scheduling.order import KEYS
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.simulator import profile as profiles
from kvshare_sched.simulator import report
from kvshare_sched.simulator.engine import Engine
from kvshare_sched.simulator.traffic import Request, of_trace

SATURATED = 0.95  # of the offered rate
START_S = 1000.0  # of what is measured; the warm-up comes before, one request after the other
COLD_S = 10.0
RATES = [round(0.1 * n, 1) for n in range(5, 40)]  # requests a second

Traffic = Callable[[float], list[Request]]  # rate -> requests


def spaced(requests: list[Request]) -> list[Request]:
    return [replace(r, at_s=10.0 * n) for n, r in enumerate(requests)]


def rag(seed: int, requests: int) -> Traffic:
    trace = workloads.build("rag", requests, seed=seed)
    found = list(of_trace(list(map(asdict, trace.requests))))
    warm, body = found[: trace.warm_up], found[trace.warm_up :]
    return lambda rate: spaced(warm) + [replace(r, at_s=START_S + r.at_s / rate) for r in body]


def hot_cold(seed: int, requests: int) -> Traffic:
    """The rate is that of the hot tenant."""
    trace = workloads.build("hot-cold", requests, seed=seed)
    found = list(of_trace(list(map(asdict, trace.requests))))
    hot = [r for r in found if r.tenant == "hot"]
    warm, body = hot[: trace.warm_up], hot[trace.warm_up :]
    cold = [r for r in found if r.tenant == "cold"]

    def at(rate: float) -> list[Request]:
        played = [replace(r, at_s=START_S + r.at_s * len(hot) / len(found) / rate) for r in body]
        times = np.arange(START_S + COLD_S / 2, played[-1].at_s, COLD_S).tolist()
        asked = [replace(r, at_s=t, session=f"cold{t}") for r, t in zip(itertools.cycle(cold), times, strict=False)]
        return spaced(warm) + sorted(played + asked, key=lambda r: r.at_s)

    return at


def simulate(profile, policy: str, requests: list[Request]) -> dict:
    """Figures of one run; waits of the tenant `cold` in tokens of service to others, too."""
    config = KVShareConfig()
    queue = report.queue_of(policy, config, profile)
    waited, charges, running, own = {}, [0.0], [0], 0.0  # own: service to `cold` so far
    came: dict[str, float] = {}
    start, add, charge = queue.start, queue.add, queue.accounts.charge

    def added(waiting, texts):
        add(waiting, texts)
        came[waiting.rid] = own

    def started(rid, work, computing=(), hits=()):
        before = own
        start(rid, work, computing, hits)
        waited[rid] = queue.running[rid].waited - (before - came[rid])
        charges.append(work)
        running.append(len(queue.running))

    def charged(account, tokens):
        nonlocal own
        own += tokens if account == "cold" else 0.0
        return charge(account, tokens)

    queue.start, queue.add, queue.accounts.charge = started, added, charged
    done = [d for d in Engine(profile, queue).run(requests) if d.due_s >= START_S]
    first = np.array([d.first_s - d.due_s for d in done])
    offered = len(done) / (max(d.due_s for d in done) - START_S)
    rate = len(done) / (max(d.end_s for d in done) - START_S)
    found = {
        "mean": float(first.mean()),
        "p50": float(np.median(first)),
        "p95": float(np.percentile(first, 95)),
        "requests_s": rate,
        "kept_up": rate / offered,
        "hit": sum(d.exact + d.reused for d in done) / sum(d.prompt for d in done),
    }
    if cold := [d.first_s - d.due_s for d in done if d.tenant == "cold"]:
        answers = max(running) * max(r.new_tokens for r in requests)
        found["cold_max"] = max(cold)
        found["cold_max_tokens"] = max(w for rid, w in waited.items() if rid.startswith("cold"))
        found["cold_bound_tokens"] = config.quantum + max(charges) + OUTPUT_PRICE * answers
    return found


def at_saturation(profile, base: str, traffic: Traffic) -> dict:
    """All orders at the smallest rate that `base` does not keep up with."""
    for rate in RATES:
        if (found := simulate(profile, base, traffic(rate)))["kept_up"] < SATURATED:
            rest = {policy: simulate(profile, policy, traffic(rate)) for policy in KEYS if policy != base}
            return {"rate": rate, base: found, **rest}
    raise SystemExit(f"{base} keeps up with {RATES[-1]} requests a second; the profile is of a faster engine.")


def main() -> None:
    """Simulate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--profile", default="benchmarks/profile-cpu.json")
    parser.add_argument("--pool", type=int, default=60_000, help="tokens of KV, as in `kvshare bench`")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--out", default="benchmarks/orders.json")
    options = parser.parse_args()
    profile = replace(profiles.read(options.profile), capacity=options.pool)
    results = {"pool": options.pool, "requests": options.requests, "seconds": "TTFT", "runs": {}}
    for name, base, make in (("rag", "fcfs", rag), ("hot_cold", "lpm", hot_cold)):
        for seed in range(options.seeds):
            found = at_saturation(profile, base, make(seed, options.requests))
            results["runs"].setdefault(name, []).append(found)
            fair, other = found["fair"], found[base]
            best = max(found[policy]["requests_s"] for policy in KEYS)
            print(
                f"{name:8} {found['rate']:.1f}/s  fair over {base}: mean {fair['mean'] / other['mean']:.2f}, "
                f"median {fair['p50'] / other['p50']:.2f}; requests/s over best {fair['requests_s'] / best:.3f}, "
                f"hits over lpm {fair['hit'] / found['lpm']['hit']:.3f}",
                *(
                    f"cold waits {found[p]['cold_max']:.0f} s, {found[p]['cold_max_tokens']:.0f} tokens of "
                    f"{found[p]['cold_bound_tokens']:.0f} ({p})"
                    for p in (("lpm", "fair") if name == "hot_cold" else ())
                ),
                sep="; ",
                flush=True,
            )
    Path(options.out).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
