#!/usr/bin/env python
"""What index, matcher and planner cost the scheduler's thread: milliseconds of CPU time. Writes benchmarks/core.json.

    python scripts/bench_core.py [--before CHECKOUT] [--rounds 3]

No server and no model. The index is full, as it is on every long-running server: 2,000,000 tokens in donors of 64 or of
1,000. Measured are, medians over repeats:
- publish: one new donor, and whoever leaves for it;
- request: a lookup of a prompt with half of a donor's text, then the prompt as a donor and the same with its answer;
- lookup: a prompt of 32,000 equal tokens, which four donors hold;
- charge: where a pass cuts a prompt of 500 borrowed texts, and what the piece and the whole cost.
With `--before`, a checkout of an earlier commit is measured in the same way, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
TOKENS, LENGTHS, TENANTS = 2_000_000, (64, 1_000), 20
EQUAL, SEGMENTS, LAYERS = 32_000, 500, 30
REPEATS = 61


def cpu_ms(work: Callable[[], object]) -> float:
    started = time.thread_time()
    work()
    return (time.thread_time() - started) * 1e3


def look_up(index, space, tokens: np.ndarray) -> tuple[list, tuple]:
    """Hits and segments of a prompt, as at an admission: the default strategy takes four donors of a text."""
    from radix_ext.matcher import find_segments

    hits = index.hits(space, tokens)
    bounds = {"start": 0, "end": len(tokens) - 1, "min_run": 32, "donors": 4}
    return hits, find_segments(tokens, hits, lambda donor: index.donors[donor].tokens, **bounds)


def full_index(length: int, repeats: int, capacity: int = TOKENS) -> tuple[dict, dict]:
    """Publishes and requests at an index full of donors of `length` tokens; returns times and sizes."""
    from radix_ext.index import SegmentIndex
    from radix_ext.records import Namespace

    rng = np.random.default_rng(length)
    index = SegmentIndex(window=16, min_run=32, capacity=capacity)
    spaces = [Namespace(f"tenant {number}") for number in range(TENANTS)]
    donors = rng.integers(0, 49_000, (capacity // length + 2 * TENANTS, length))
    for number, tokens in enumerate(donors):
        index.add(spaces[number % TENANTS], tokens)
    half, answer, publishes, requests, reused = length // 2, length // 4, [], [], []
    own = (length - half - answer) // 2  # tokens before and behind the donor's that nobody has
    for number in range(repeats):
        donor_number = len(donors) - 1 - number % TENANTS
        space, tokens = spaces[donor_number % TENANTS], rng.integers(0, 49_000, length)
        publishes.append(cpu_ms(lambda: index.add(space, tokens)))  # noqa: B023
        tokens = rng.integers(0, 49_000, length)
        tokens[own : own + half] = donors[donor_number][:half]

        def request() -> None:
            prompt = tokens[:-answer]  # noqa: B023
            reused.extend(segment.length for segment in look_up(index, space, prompt)[1])  # noqa: B023
            donor = index.add(space, prompt)  # noqa: B023
            index.add(space, tokens, donor)  # noqa: B023

        requests.append(cpu_ms(request))
    sizes = {"donors": len(index), "tokens": index.tokens, "fingerprints": index.entries, "reused": reused[-1]}
    assert len(reused) == repeats and sum(index.left.values()) >= 2 * repeats
    return {f"publish_ms_full_{length}": publishes, f"request_ms_full_{length}": requests}, {f"full_{length}": sizes}


def equal_tokens(repeats: int, length: int = EQUAL) -> tuple[dict, dict]:
    """Lookups of a prompt that repeats one token."""
    from radix_ext.index import SegmentIndex
    from radix_ext.records import Namespace

    rng, space = np.random.default_rng(0), Namespace("tenant")
    index = SegmentIndex(window=16, min_run=32, capacity=TOKENS)
    repeated = np.full(length, 7)
    for number in range(4):
        index.add(space, np.concatenate((rng.integers(0, 49_000, 40 + number), repeated)))
    times = [cpu_ms(lambda: look_up(index, space, repeated)) for _ in range(repeats)]
    hits, segments = look_up(index, space, repeated)
    sizes = {"prompt": length, "hits": len(hits), "reused": sum(s.length for s in segments)}
    return {f"lookup_ms_equal_{length // 1000}k": times}, {"equal": sizes}


def charges(repeats: int, segments: int = SEGMENTS) -> tuple[dict, dict]:
    """One pass over a long prompt: where to cut it, then the charge of the piece and of the whole."""
    from kvshare_sched.methods.registry import get
    from kvshare_sched.records.plan import ReusePlan
    from kvshare_sched.records.request import Reason
    from kvshare_sched.reuse.costs import CostModel
    from kvshare_sched.reuse.session import Session
    from kvshare_sched.settings import KVShareConfig
    from radix_ext.records import Segment

    def others(at: int) -> tuple[Segment, ...]:
        return tuple(Segment(number, 40_000 + at, at, 40) for number in (2, 3, 4))

    texts = tuple(Segment(1, 90_000 + at, at, 40, at // 2, others(at)) for at in range(40, 80 * segments, 80))
    config = KVShareConfig()
    schedule = get(config.strategy).schedule(config, LAYERS)
    plan = ReusePlan(80 * segments + 100, 0, texts, forced_head=4, schedule=schedule)
    session = Session("r", plan.prompt_len, 0, config, plan, Reason.NONE)
    costs = CostModel(cell_s=4e-5, copy_s=1e-6, overhead_s=1e-3, layers=LAYERS)

    def one_pass() -> int:
        end = session.end_for_budget(0, plan.prompt_len // 3, plan.prompt_len, costs)
        session.charge(0, plan.prompt_len, costs)
        session.charge(0, end, costs)
        return end

    sizes = {"prompt": plan.prompt_len, "segments": segments, "layers": LAYERS, "cut_at": one_pass()}
    return {f"charge_ms_{segments}": [cpu_ms(one_pass) for _ in range(repeats)]}, {"charge": sizes}


def measure(repeats: int) -> dict:
    """Everything once, in this process: {"times": samples by name, "sizes": ...}."""
    parts = [full_index(length, repeats) for length in LENGTHS]
    parts += [equal_tokens(max(3, repeats // 6)), charges(max(3, repeats // 6))]
    times, sizes = ({k: v for part in parts for k, v in part[i].items()} for i in (0, 1))
    return {"times": times, "sizes": sizes}


def measured_in(checkout: Path) -> dict:
    """The same in a process of its own, with the code of a checkout."""
    path = os.pathsep.join(map(str, (checkout, checkout / "kernels")))
    arguments = [sys.executable, "-W", "ignore", __file__, "--measure", str(checkout)]
    done = subprocess.run(
        arguments, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def summary(rounds: list[dict]) -> dict:
    """Medians and quartiles over all rounds, and the sizes."""
    samples = {name: [ms for found in rounds for ms in found["times"][name]] for name in rounds[0]["times"]}
    quartiles = {name: statistics.quantiles(ms, n=4) for name, ms in samples.items()}
    return {
        "median_ms": {name: round(middle, 4) for name, (_, middle, _) in quartiles.items()},
        "quartiles_ms": {name: [round(low, 4), round(high, 4)] for name, (low, _, high) in quartiles.items()},
        "samples": {name: len(ms) for name, ms in samples.items()},
        "sizes": rounds[-1]["sizes"],
    }


def write(path: Path, found: dict) -> None:
    """Into the file, beside what others have written there."""
    report = json.loads(path.read_text()) if path.exists() else {}
    report["figures"] = report.get("figures", {}) | found["now"]["median_ms"]
    report["core"] = found
    path.write_text(json.dumps(report, indent=1) + "\n")


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="a checkout of an earlier commit, measured in turns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "core.json")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        import radix_ext

        assert Path(radix_ext.__file__).is_relative_to(Path(options.measure).resolve()), radix_ext.__file__
        print(json.dumps(measure(REPEATS)))
        return
    checkouts = {"now": ROOT} | ({"before": options.before.resolve()} if options.before else {})
    rounds: dict[str, list[dict]] = {name: [] for name in checkouts}
    for _ in range(options.rounds):
        for name, checkout in checkouts.items():
            rounds[name].append(measured_in(checkout))
    from kvshare_sched.evaluation.report import made_with

    settings = {"index_tokens": TOKENS, "tenants": TENANTS, "rounds": options.rounds}
    found = {"settings": settings, **{name: summary(done) for name, done in rounds.items()}, **made_with()}
    print(json.dumps(found, indent=1))
    write(options.out, found)


if __name__ == "__main__":
    main()
