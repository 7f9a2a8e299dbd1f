"""Does the simulator agree with a server? Compares TTFT of a load-test run with the same requests simulated.

    python scripts/check_simulator.py --trace TRACE --raw RAW [--profile P] [--order fair] [--out FILE]

RAW: the run's token times, JSON lines with session, step, due_s and token_s. Requests of the trace that come before
those of RAW and are not in it are its warm-up: they are simulated first and not counted.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvshare_sched.config import KVShareConfig
from kvshare_sched.simulator import profile, report, traffic
from kvshare_sched.simulator.engine import Engine

_WARM_UP_S = 1000.0  # between the warm-up and the rest


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
    requests = []
    for request in traffic.read(options.trace):
        row = real.get((request.session, request.step))
        if row is not None:
            requests.append(replace(request, at_s=_WARM_UP_S + row["due_s"], needs=()))
        elif len(requests) < len(real):
            requests.append(replace(request, at_s=0.0) if not requests or requests[-1].at_s == 0 else request)
    requests = sorted((r for r in requests if r.at_s == 0 or r.at_s >= _WARM_UP_S), key=lambda r: r.at_s)
    costs = profile.read(options.profile)
    done = Engine(costs, report.queue_of(options.order, KVShareConfig.load(), costs)).run(requests)
    found = {
        "server": spread([r["token_s"][0] - r["due_s"] for r in real.values()]),
        "simulator": spread([d.first_s - d.due_s for d in done if d.due_s >= _WARM_UP_S]),
        "requests": len(real),
        "trace": Path(options.trace).name,
    }
    found["ratio"] = {k: found["simulator"][k] / found["server"][k] for k in found["server"]}
    print(json.dumps(found, indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
