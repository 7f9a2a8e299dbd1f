#!/usr/bin/env python
"""What decode-stage repair costs and what it is worth. Writes benchmarks/repair.json.

    python scripts/bench_repair.py

One stock server, prompts of some 2,000 tokens whose documents come back in another order behind another prefix.
- cost: time per output token with repair over without, alternating, so that a machine that slows down hits both;
- worth: how long the greedy answer stays the one of full prefill. The first token that differs ends it, so the
  figure is coarse, but it is what a client would see; teacher forcing cannot show it, because it does not decode.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from kvshare_sched import model, server
from kvshare_sched.client import Client
from kvshare_sched.demo import library, prompt_of

SETTINGS = {
    "plain": {},
    "fifo 3": {"repair_rows": 3, "repair_order": "fifo"},
    "fifo 8": {"repair_rows": 8, "repair_order": "fifo"},
    "lagged 3": {"repair_rows": 3, "repair_order": "lagged"},
    "attention 3": {"repair_rows": 3, "repair_order": "attention"},
}
DOCUMENTS = 4
STRATEGY = "kvshare"  # its check layer knows the deviations that `lagged` and `attention` go by


def common_beginning(a, b) -> int:
    """Tokens until two answers differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--cases", type=int, default=8)
    options.add_argument("--answer", type=int, default=300, help="tokens")
    options = options.parse_args()
    arguments = [*server.fill_defaults(["--model-path", str(model.prepare())]), "--log-level", "warning"]
    environment, log = {"KVSHARE_AUDIT_SHARE": "0"}, Path("out/repair-server.log")
    tpot = {name: [] for name in SETTINGS}
    same = {name: [] for name in SETTINGS}
    with server.running(arguments, env=environment, log=log) as url:
        client = Client(url)
        sections = library(client)
        for number in range(options.cases):
            chosen = [sections[(number * DOCUMENTS + i) % len(sections)] for i in range(DOCUMENTS)]
            prompt = client.tokenize(prompt_of("Answer at length.", chosen[::-1], "Explain every section in turn."))
            asked = {"new_tokens": options.answer, "namespace": f"full {number}", "reuse": False}
            full = client.generate(prompt, **asked).token_ids
            for name, wish in SETTINGS.items():
                # A `fifo` walk publishes what it has repaired: every run gets donors of its own.
                namespace = f"{name} {number}"
                client.generate(prompt_of("Be brief.", chosen, "?"), new_tokens=1, namespace=namespace)
                wish = {"strategy": STRATEGY, **wish}
                answer = client.generate(prompt, new_tokens=options.answer, namespace=namespace, reuse=wish)
                assert answer.report["outcome"] == "reused", answer.report
                tpot[name].append(answer.tpot_s)
                same[name].append(common_beginning(answer.token_ids, full))
            print(f"\rcase {number + 1}/{options.cases}", end="", flush=True)
    plain = tpot["plain"]
    result = {
        "settings": {"cases": options.cases, "answer_tokens": options.answer, "strategy": STRATEGY},
        "tpot_plain_s": statistics.median(plain),
        "results": {
            name: {
                "tpot_ratio_median": statistics.median(a / b for a, b in zip(tpot[name], plain, strict=True)),
                "tpot_ratio_range": [f(a / b for a, b in zip(tpot[name], plain, strict=True)) for f in (min, max)],
                "common_beginning_mean": statistics.fmean(same[name]),
                "common_beginning": same[name],
            }
            for name in SETTINGS
        },
    }
    Path("benchmarks").mkdir(exist_ok=True)
    Path("benchmarks/repair.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{json.dumps(result, indent=1)}")


if __name__ == "__main__":
    main()
