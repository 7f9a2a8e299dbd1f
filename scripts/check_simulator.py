"""Does the simulator agree with a server? Compares TTFT of a load-test run with the same requests simulated.

    python scripts/check_simulator.py --trace TRACE --raw RAW [--profile P] [--order fair] [--out FILE]

RAW: the run's token times, JSON lines with session, step, due_s and token_s. Sessions of the trace before the first of
RAW are its warm-up: they are simulated first, one request after the other, and not counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvshare_sched.settings import KVShareConfig
from kvshare_sched.simulator import profile, report, traffic
from kvshare_sched.simulator.engine import Engine

_PAUSE_S = 30.0  # between two requests of the warm-up


def spread(seconds: list[float]) -> dict[str, float]:
    return {"mean": float(np.mean(seconds)), "p50": float(np.median(seconds)), "p95": float(np.percentile(seconds, 95))}


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trace", required=True)
    parser.add_argument("--raw", required=True)
    parser.add_argument("--profile", default="benchmarks/profile-cpu.json")
    parser.add_argument("--order", default="fair")
    parser.add_argument("--out", help="a JSON file")
    options = parser.parse_args()
    rows = [json.loads(line) for line in Path(options.raw).read_text().splitlines() if line.strip()]
    real = {(str(r["session"]), r["step"]): r for r in rows if r.get("token_s")}
    first, start_s, requests = min(int(session) for session, _ in real), 0.0, []
    trace = list(traffic.read(options.trace))
    for request in trace:
        if int(request.session) < first:
            requests.append(replace(request, at_s=start_s))
            start_s += _PAUSE_S
    for request in trace:
        if (row := real.get((request.session, request.step))) is not None:
            requests.append(replace(request, at_s=start_s + row["due_s"], needs=()))
    requests.sort(key=lambda r: r.at_s)
    costs = profile.read(options.profile)
    done = Engine(costs, report.queue_of(options.order, KVShareConfig.load(), costs)).run(requests)
    found = {
        "server": spread([r["token_s"][0] - r["due_s"] for r in real.values()]),
        "simulator": spread([d.first_s - d.due_s for d in done if d.due_s >= start_s]),
        "requests": len(real),
        "trace": Path(options.trace).name,
    }
    found["ratio"] = {k: found["simulator"][k] / found["server"][k] for k in found["server"]}
    print(json.dumps(found, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
