#!/usr/bin/env python
"""What reuse costs traffic that never repeats. Writes benchmarks/overhead.json.

    python scripts/bench_overhead.py

One stock server with reuse on; prompts of random ids, so nothing ever matches. Two readings:
- pairs: the same length with reuse and opted out, alternating, so that a machine that slows down hits both;
- accounting: seconds our code spent on lookups and indexing (`kvshare_phase_seconds_total`) over wall time.
The pairs show what a client sees, with the machine's noise; the accounting is exact but cannot see what it does
not time (hook calls, a dictionary look-up per step).
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path

import requests

from kvshare_sched.client import launch, model
from kvshare_sched.client.http import Client

PROMPT_TOKENS, NEW_TOKENS = 600, 4


def our_seconds(url: str) -> float:
    """Seconds spent on matching and indexing so far."""
    lines = requests.get(f"{url}/metrics", timeout=60).text.splitlines()
    wanted = ('kvshare_phase_seconds_total{phase="match"}', 'kvshare_phase_seconds_total{phase="index"}')
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(wanted))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--pairs", type=int, default=40)
    pairs = options.parse_args().pairs
    rng = random.Random(20260730)
    arguments = launch.fill_defaults(["--model-path", str(model.prepare())])
    with launch.running(arguments, log=Path("out/overhead-server.log")) as url:
        client = Client(url)

        def seconds(reuse: bool) -> float:
            prompt = [rng.randrange(200, 40_000) for _ in range(PROMPT_TOKENS)]
            started = time.perf_counter()
            answer = client.generate(prompt, new_tokens=NEW_TOKENS, namespace="n", reuse=reuse)
            assert answer.report["reused"] == 0
            return time.perf_counter() - started

        for _ in range(3):
            seconds(True)
        before, started = our_seconds(url), time.perf_counter()
        rows = []
        for number in range(pairs):
            first = number % 2 == 0
            spent = {reuse: seconds(reuse) for reuse in (first, not first)}
            rows.append((spent[False], spent[True]))
            print(f"\rpair {number + 1}/{pairs}", end="", flush=True)
        wall = time.perf_counter() - started
        ours = our_seconds(url) - before
    ratios = sorted(off / on for off, on in rows)
    result = {
        "settings": {"prompt_tokens": PROMPT_TOKENS, "new_tokens": NEW_TOKENS, "pairs": pairs},
        "throughput_ratio": statistics.median(off for off, _ in rows) / statistics.median(on for _, on in rows),
        "pair_ratio_quartiles": statistics.quantiles(ratios, n=4),
        "share_of_time_in_our_code": ours / wall,
        "milliseconds_a_request_in_our_code": 1000 * ours / (2 * pairs),
    }
    Path("benchmarks").mkdir(exist_ok=True)
    Path("benchmarks/overhead.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{json.dumps(result, indent=1)}")


if __name__ == "__main__":
    main()
