"""Stage `engine`: the real server with dummy weights, reuse off and on. Needs SGLang.

One server a model shape. Every measured prompt holds documents an earlier prompt had in another order; off is the same
server with the request opted out in a namespace of its own. Then prompts that never repeat, opted in and out in turn:
what our code costs when nothing matches.
"""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path

from kvshare_sched.client import launch
from kvshare_sched.client.http import Client

from .results import Results
from .shapes import SHAPES

_DOCUMENT = 1000  # tokens, less in short prompts: one document alone could not move
_REPEATS = 3
_PAIRS = 20


class Prompts:
    """Random ids below a vocabulary's size."""

    def __init__(self, vocabulary: int):
        self.vocabulary, self.random, self.number = vocabulary, random.Random(20260730), 0

    def ids(self, count: int) -> list[int]:
        return [self.random.randrange(100, self.vocabulary) for _ in range(count)]

    def namespace(self) -> str:
        self.number += 1
        return f"gpu-check-{self.number}"

    def moved(self, tokens: int) -> tuple[list[int], list[int]]:
        """A donor's prompt, and one with the same documents the other way round."""
        size = min(_DOCUMENT, tokens // 8)
        documents = [self.ids(size) for _ in range((tokens - 100) // size)]
        rest = tokens - 64 - size * len(documents)
        return [*self.ids(40), *sum(documents, [])], [*self.ids(rest), *sum(reversed(documents), []), *self.ids(64)]


def pair(client: Client, prompts: Prompts, tokens: int, share: float):
    """(answer with reuse off, answer with reuse on) of one prompt."""
    donor, prompt = prompts.moved(tokens)
    here = prompts.namespace()
    client.generate(donor, new_tokens=1, namespace=here)
    off = client.generate(prompt, new_tokens=1, namespace=prompts.namespace(), reuse=False)
    return off, client.generate(prompt, new_tokens=1, namespace=here, reuse={"ratio": share})


def shape(results: Results, name: str, lengths: list[int], shares: list[float], folder: Path) -> bool:
    """One server, all lengths and ratios, then prompts without a match; whether every prompt reused what it could."""
    reused = True
    config = folder / "models" / name / "config.json"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(json.dumps(SHAPES[name].config()))
    arguments = launch.fill_defaults(
        ["--model-path", str(config.parent), "--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "bfloat16"]
    )
    environment = {"KVSHARE_AUDIT_SHARE": "0", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1"}
    with launch.running(arguments, env=environment, log=folder / f"engine-{name}.log") as url:
        client, prompts = Client(url), Prompts(SHAPES[name].vocabulary)
        for _ in range(2):
            pair(client, prompts, lengths[0], shares[0])  # kernels are compiled on their first call
        for tokens in lengths:
            for share in shares:
                pair(client, prompts, tokens, share)
                pairs = [pair(client, prompts, tokens, share) for _ in range(_REPEATS)]
                report = pairs[-1][1].report
                if report.get("outcome") != "reused":
                    results.add(model_shape=name, engine="sglang", prompt_tokens=tokens, ratio=share, report=report)
                    reused = False
                    continue
                off, on = (statistics.median(p[i].ttft_s for p in pairs) for i in (0, 1))
                rows = report["reused"] + report["fresh"]
                computed = report["computed_cells"] / (rows * report["layers"])
                results.add(
                    model_shape=name, engine="sglang", prompt_tokens=tokens, ratio=share, ttft_off_s=off,
                    ttft_on_s=on, ttft_ratio=off / on, computed_cells=computed, share_of_limit=off * computed / on,
                    recomputed=report["recomputed"] / report["reused"],
                )  # fmt: skip
        for tokens in lengths[:2]:
            ratios = []
            for i in range(_PAIRS):
                first, spent = i % 2 == 0, {}
                for reuse in (first, not first):
                    prompt = prompts.ids(tokens)
                    spent[reuse] = client.generate(
                        prompt, new_tokens=1, namespace=prompts.namespace(), reuse=reuse
                    ).ttft_s
                ratios.append(spent[True] / spent[False])
            quartiles = statistics.quantiles(ratios, n=4)
            results.add(
                model_shape=name, engine="sglang", prompt_tokens=tokens, ratio=None, pairs=_PAIRS,
                nothing_matches_on_over_off=quartiles[1], quartiles=[round(x, 4) for x in quartiles],
            )  # fmt: skip
    return reused


def run(results: Results, shapes: list[str], lengths: list[int], shares: list[float], folder: Path) -> bool:
    """Every shape, and whether all went well; one whose server does not come up leaves its reason and not the others
    out."""
    well = True
    for name in shapes:
        try:
            well &= shape(results, name, lengths, shares, folder)
        except Exception as why:
            results.add(model_shape=name, engine="sglang", failed=f"{type(why).__name__}: {why}"[-2000:])
            well = False
    return well
