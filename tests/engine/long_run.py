"""A long run of the random traffic: `python tests/engine/long_run.py --seeds 64 --requests 10000`.

Prints a line for each seed and ends with the numbers; exits 1 at the first finding, after Hypothesis has printed the
steps that lead to it (the same seed finds it again).
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import models
import torch
import traffic
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test
from traffic import Traffic


def machine(folder: Path) -> type[Traffic]:
    """The state machine on models in a folder."""
    made = {
        kind: [models.write_llama(folder / f"{kind}-{n}", flat=kind == "flat", seed=n) for n in (0, 1)]
        for kind in ("flat", "deep")
    }
    adapters = [models.write_adapter(folder / f"adapter-{n}", seed=n) for n in (2, 3)]
    return type("SeededTraffic", (Traffic,), {"models": made, "adapters": adapters, "numbers": Counter()})


def run_seed(kind: type[Traffic], number: int, *, examples: int, steps: int, shrink: bool = False) -> None:
    """Some engines with random traffic, the same for the same number."""
    phases = [Phase.generate, Phase.shrink] if shrink else [Phase.generate]
    run_state_machine_as_test(
        seed(number)(kind),
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            derandomize=False,
            phases=phases,
            suppress_health_check=list(HealthCheck),
        ),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=64, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--requests", type=int, default=10_000, help="go on with further seeds until so many were sent")
    parser.add_argument("--examples", type=int, default=2, help="engines a seed")
    parser.add_argument("--steps", type=int, default=40, help="steps an engine")
    parser.add_argument("--shrink", action="store_true", help="look for the shortest steps that lead to a finding")
    parser.add_argument("--stock", action="store_true", help="with all of ours off, to tell SGLang's faults from ours")
    parser.add_argument("--out", type=Path, help="JSON file the numbers go into, such as benchmarks/core.json")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    traffic.STOCK = args.stock
    started, findings, number = time.time(), 0, args.first
    with tempfile.TemporaryDirectory() as folder:
        kind = machine(Path(folder))
        while number < args.first + args.seeds or kind.numbers["requests"] < args.requests:
            logging.getLogger().setLevel(logging.ERROR)
            try:
                run_seed(kind, number, examples=args.examples, steps=args.steps, shrink=args.shrink)
            except BaseException as error:
                findings += 1
                print(f"seed {number}: {type(error).__name__}: {error}", flush=True)
                for note in getattr(error, "__notes__", ()):
                    print(note, flush=True)
                break
            number += 1
            print(f"seed {number - 1}: {dict(kind.numbers)} after {time.time() - started:.0f} s", flush=True)
        found = {"seeds": number - args.first, "findings": findings, "minutes": round((time.time() - started) / 60, 1)}
        found |= kind.numbers
    print(json.dumps(found))
    if args.out:
        kept = json.loads(args.out.read_text()) if args.out.exists() else {}
        kept["traffic"] = found
        kept["figures"] = kept.get("figures", {}) | {"bench_requests": found["requests"], "bench_findings": findings}
        args.out.write_text(json.dumps(kept, indent=1) + "\n")
    return min(findings, 1)


if __name__ == "__main__":
    sys.exit(main())
