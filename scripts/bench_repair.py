#!/usr/bin/env python
"""What decode-stage repair costs and what it is worth. Writes benchmarks/repair.json.

    python scripts/bench_repair.py cost     # about two minutes
    python scripts/bench_repair.py worth    # about two minutes a case

One stock server, prompts of some 2,000 tokens whose documents come back in another order behind another prefix.
- cost: time per output token with repair over without. The settings take turns within a round, so that a machine that
  slows down hits all of them; the ratio is one of a round, the figure the median over the rounds.
- worth: KL from full prefill before every token of full prefill's own answer, by teacher forcing that decodes
  (`evaluation/forced.py`), averaged over parts of the answer. A `fifo` walk publishes what it has repaired, so every
  run has donors of its own.
Each part keeps the other's last figures in the file.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from kvshare_sched.client import launch, model
from kvshare_sched.client.http import Client, kl_divergence
from kvshare_sched.evaluation.forced import decoded
from kvshare_sched.tools.demo import library, prompt_of

PLAIN = "plain"
SETTINGS = {
    PLAIN: {},
    "fifo 1": {"repair_rows": 1, "repair_order": "fifo"},
    "fifo 2": {"repair_rows": 2, "repair_order": "fifo"},
    "fifo 3": {"repair_rows": 3, "repair_order": "fifo"},
    "fifo 8": {"repair_rows": 8, "repair_order": "fifo"},
    "lagged 3": {"repair_rows": 3, "repair_order": "lagged"},
    "attention 3": {"repair_rows": 3, "repair_order": "attention"},
}
WORTH = [PLAIN, "fifo 3", "lagged 3"]
STRATEGIES = ["consensus", "naive"]
PARTS = [(0, 24), (24, 100), (100, 200), (200, 300)]  # tokens of the answer
DOCUMENTS = 4
FILE = Path("benchmarks/repair.json")


class Bench:
    """Prompts of one server."""

    def __init__(self, client: Client):
        self.client = client
        self.sections = library(client)

    def case(self, number: int) -> tuple[str, list[int]]:
        """A donor's prompt, and one with the same documents the other way round."""
        chosen = [self.sections[(number * DOCUMENTS + i) % len(self.sections)] for i in range(DOCUMENTS)]
        prompt = prompt_of("Answer at length.", chosen[::-1], "Explain every section in turn.")
        return prompt_of("Be brief.", chosen, "?"), self.client.tokenize(prompt)

    def cost(self, rounds: int) -> dict:
        """Time per output token of each setting, one short answer a round."""
        donor, prompt = self.case(0)
        taken = {name: [] for name in SETTINGS}
        for number in range(rounds + 1):
            namespace = f"cost {number}"  # a `fifo` walk publishes what it has repaired; the donors last a round
            self.client.generate(donor, new_tokens=1, namespace=namespace)
            for name, wish in SETTINGS.items():
                reuse = {"strategy": "dhd", **wish}
                answer = self.client.generate(prompt, new_tokens=32, namespace=namespace, reuse=reuse)
                assert answer.report["outcome"] == "reused", answer.report
                if number:  # the first round warms up
                    taken[name].append(answer.tpot_s)
            print(f"\rround {number}/{rounds}", end="", flush=True)
        ratios = {name: sorted(a / b for a, b in zip(taken[name], taken[PLAIN], strict=True)) for name in SETTINGS}
        return {
            "rounds": rounds,
            "prompt_tokens": len(prompt),
            "tpot_s": {name: statistics.median(taken[name]) for name in SETTINGS},
            "ratio_median": {name: statistics.median(ratios[name]) for name in SETTINGS},
            "ratio_quartiles": {name: statistics.quantiles(ratios[name], n=4)[::2] for name in SETTINGS},
        }

    def worth(self, number: int) -> dict | None:
        """Mean KL over each part of one case's answer, by strategy and setting; None when the answer is too short."""
        donor, prompt = self.case(number)
        length, file = PARTS[-1][1], Path("out/repair-heard.bin")
        asked = {"new_tokens": length, "namespace": f"full {number}", "reuse": False}
        full = self.client.generate(prompt, **asked).token_ids
        if len(full) < length:
            return None
        reference = decoded(self.client, prompt, full, f"full {number}", False, file)
        found = {}
        for strategy in STRATEGIES:
            for name in WORTH:
                namespace = f"{strategy} {name} {number}"
                self.client.generate(donor, new_tokens=1, namespace=namespace)
                reuse = {"strategy": strategy, **SETTINGS[name]}
                heard = decoded(self.client, prompt, full, namespace, reuse, file)
                found[f"{strategy}, {name}"] = [kl_divergence(reference[a:b], heard[a:b]) for a, b in PARTS]
                print(f"case {number} {strategy}, {name}: {[round(x, 5) for x in found[f'{strategy}, {name}']]}")
        file.unlink()
        return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("part", choices=["cost", "worth"])
    options.add_argument("--rounds", type=int, default=5, help="of cost")
    options.add_argument("--cases", type=int, nargs="+", default=[0, 1, 2], help="of worth, by number")
    options = options.parse_args()
    arguments = [*launch.fill_defaults(["--model-path", str(model.prepare())]), *launch.SMALL_POOL]
    arguments += ["--log-level", "warning", "--enable-custom-logit-processor"]
    environment, log = {"KVSHARE_AUDIT_SHARE": "0"}, Path("out/repair-server.log")
    kept = json.loads(FILE.read_text()) if FILE.exists() else {}
    with launch.running(arguments, env=environment, log=log) as url:
        bench = Bench(Client(url))
        if options.part == "cost":
            kept["cost"] = bench.cost(options.rounds)
        else:
            cases = kept.setdefault("worth", {"parts": PARTS, "kl": {}})["kl"]
            for number in options.cases:
                cases[str(number)] = bench.worth(number)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(kept, indent=1) + "\n")
    print(f"\n{json.dumps(kept[options.part], indent=1)}")


if __name__ == "__main__":
    main()
