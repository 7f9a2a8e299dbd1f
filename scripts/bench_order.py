"""What ordering the waiting queue costs: a pass over 100 to 10,000 requests; milliseconds.

    python scripts/bench_order.py [--out benchmarks/order.json]

Kinds of pass: all of them have come at once (`flood`, once for each size); they are looked at, a bounded number in each
pass (`looking`); a few leave and come, a new donor is there and the engine has worked (`changed`); nothing has happened
(`unchanged`); all lack one text, which one of them computes (`duplicates`).

The server's own path, from the hook on: SGLang's list is mirrored, some requests are looked up in the index, the order
is made and written back. Stand-ins for SGLang's requests, the real index with 400 donors of 3,200 tokens.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from array import array
from pathlib import Path
from types import SimpleNamespace

import numpy as np

from kvshare_sched.engine.sglang.queue_hooks import calc_priority
from kvshare_sched.engine.sglang.waiting_queue import ServerQueue
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

SIZES = (100, 1_000, 10_000)
PASSES = 60


class Tree:
    """Stands in for SGLang's tree: nothing is an exact prefix."""

    active = 0

    def prefix_len(self, key) -> int:
        return 0


def world(rng) -> tuple[ServerQueue, Pipeline, list[np.ndarray]]:
    config = KVShareConfig()
    pipeline = Pipeline(config, Tree(), CostModel(cell_s=4e-5, copy_s=1e-6, overhead_s=1e-3, layers=30))
    documents = [rng.integers(0, 49_000, 400) for _ in range(1000)]
    for number in range(400):
        tokens = np.concatenate([documents[i] for i in rng.integers(0, 1000, 8)])
        pipeline.index.add(Namespace(f"t{number % 20}"), tokens)
    return ServerQueue("fair", config, pipeline, 4096), pipeline, documents


def request(number: int, rng, documents, tenants: int = 20) -> SimpleNamespace:
    return asking(number, np.concatenate([documents[i] for i in rng.integers(0, 1000, rng.integers(1, 6))]), tenants)


def asking(number: int, tokens: np.ndarray, tenants: int = 20) -> SimpleNamespace:
    return SimpleNamespace(
        rid=f"r{number}",
        extra_key=f"t{number % tenants}",
        cache_salt=None,
        lora_id=None,
        origin_input_ids=array("q", tokens.astype(np.int64).tobytes()),
        output_ids=array("q"),
        sampling_params=SimpleNamespace(custom_params=None),
        priority=None,
        input_embeds=None,
        multimodal_inputs=None,
        positional_embed_overrides=None,
        session=None,
        beam_group=None,
        return_hidden_states=False,
        return_pooled_hidden_states=False,
        skip_radix_cache_insert=False,
    )


def timed(queue: ServerQueue, waiting: list) -> float:
    policy = SimpleNamespace(
        enable_priority_scheduling=False, priority_sign=-1, tree_cache=SimpleNamespace(queue=queue)
    )
    started = time.perf_counter()
    calc_priority(lambda *_: None, policy, waiting)
    return (time.perf_counter() - started) * 1e3


def measure(size: int) -> dict:
    """Median and worst of each kind of pass, ms."""
    rng = np.random.default_rng(0)
    queue, pipeline, documents = world(rng)
    waiting = [request(n, rng, documents) for n in range(size)]
    flood = [timed(queue, waiting)]
    looking = [timed(queue, waiting) for _ in range(2 + size // 20)]
    unchanged = [timed(queue, waiting) for _ in range(PASSES)]
    changed = []
    for number in range(PASSES):  # the donor makes every estimate stale
        del waiting[:4]
        waiting += [request(size + 4 * number + n, rng, documents) for n in range(4)]
        pipeline.index.add(Namespace("t0"), np.concatenate(documents[number : number + 8]))
        queue.queue.clock += 4000
        changed.append(timed(queue, waiting))
    assert queue.failures == 0
    kinds = {"flood": flood, "looking": looking, "changed": changed, "unchanged": unchanged}
    kinds["duplicates"] = duplicates(size, rng)
    return {name: {"median": statistics.median(t), "worst": max(t)} for name, t in kinds.items()}


def duplicates(size: int, rng) -> list[float]:
    """Passes over requests of one tenant for the same 2,000 tokens; the engine has worked between them."""
    queue, _, _ = world(rng)
    text = rng.integers(0, 49_000, 2000)
    waiting = [asking(n, np.concatenate((text, rng.integers(0, 49_000, 40))), 1) for n in range(size)]
    for _ in range(2 + size // 15):
        timed(queue, waiting)
    passes = []
    for _ in range(PASSES):
        queue.queue.clock += 4000
        passes.append(timed(queue, waiting))
    assert queue.failures == 0 and queue.queue.order().held
    return passes


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/order.json")
    options = parser.parse_args()
    found = {str(size): measure(size) for size in SIZES}
    for size, kinds in found.items():
        print(f"{size:>7}", *(f"{k} {v['median']:.3f} (worst {v['worst']:.2f}) ms" for k, v in kinds.items()), sep="  ")
    report = {"unit": "ms a pass", "machine": platform.processor() or platform.machine(), "waiting": found}
    Path(options.out).write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
