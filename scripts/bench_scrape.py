#!/usr/bin/env python
"""What our series add to a scrape of /metrics, in CPU time. Writes benchmarks/scrape.json. Needs no server.

    python scripts/bench_scrape.py

Engines in processes of their own count requests of 10,000 tenants into files, as under SGLang; then this process does
what the one that talks HTTP does: read all files and write the text. Subtracted is the same over an empty folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kvshare_sched.evaluation.report import made_with

ROOT = Path(__file__).resolve().parents[1]
# One engine, or the process that talks HTTP: everything is counted for every tenant, by the tests' made-up events.
_ENGINE = """
import sys
sys.path.insert(0, sys.argv[1])
import engine
from kvshare_sched.observe.metrics import EdgeMetrics, ShareMetrics
metrics, edge = ShareMetrics(), EdgeMetrics()
for n in range(int(sys.argv[2]) // 3 + 1):
    engine.TENANTS = [f"tenant {3 * n + i}" for i in range(3)]
    engine.move(metrics, n)
    engine.move_edge(edge, n)
"""


def scrape_s(folder: str, repeats: int) -> tuple[float, float, bytes]:
    """(median, largest) CPU seconds of a scrape of a folder of metric files, and its text."""
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)
    times = []
    for _ in range(repeats):
        started = time.process_time()
        text = generate_latest(registry)
        times.append(time.process_time() - started)
    return statistics.median(times), max(times), text


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", type=int, default=1, help="data-parallel engines behind one /metrics")
    parser.add_argument("--tenants", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=100)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as nothing:
        environment = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": folder}
        for _ in range(options.engines):
            arguments = [str(ROOT / "tests" / "dashboards"), str(options.tenants)]
            subprocess.run([sys.executable, "-c", _ENGINE, *arguments], env=environment, check=True)
        median, largest, text = scrape_s(folder, options.repeats)
        empty, _, _ = scrape_s(nothing, options.repeats)
    found = {
        **{"engines": options.engines, "tenants": options.tenants, "repeats": options.repeats},
        "samples": sum(not line.startswith(b"#") for line in text.splitlines()),
        "bytes": len(text),
        "cpu_ms": {"median": round(1000 * (median - empty), 2), "largest": round(1000 * (largest - empty), 2)},
        **made_with(),
    }
    print(json.dumps(found, indent=1))
    (ROOT / "benchmarks" / "scrape.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
