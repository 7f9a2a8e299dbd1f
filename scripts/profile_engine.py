"""Measure what a live engine's work costs, for `kvshare simulate`: prefill, reuse, decode steps.

    python scripts/profile_engine.py [--out benchmarks/profile-cpu.json] [SGLang arguments]

Prompts are random ids, so nothing is cached that was not sent on purpose. Some four minutes on a CPU.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import random
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from kvshare_sched.client import launch, model
from kvshare_sched.client.http import Client
from kvshare_sched.simulator.profile import Profile, write

LENGTHS = (64, 256, 512, 1024, 2048, 3072)
DOCUMENTS = (1, 2, 3, 4, 6)  # of one prompt with reuse
BATCHES = (1, 2, 4, 8, 16, 32)
DOCUMENT = 512
ROUNDS = 3  # of prefill and reuse, one after the other: a machine that slows down does so for prefill and reuse alike
ANSWER = 24
CONTEXT = 1024  # tokens before an answer, for what attention costs in a decode step


class Probe:
    """Requests nobody has sent before."""

    def __init__(self, client: Client, vocabulary: int):
        self.client, self._top = client, vocabulary
        self._names = (f"profile-{n}" for n in itertools.count())
        self._random = random.Random(0)

    def ids(self, count: int) -> list[int]:
        return [self._random.randrange(100, self._top) for _ in range(count)]

    def prefill_s(self, length: int) -> float:
        return self.client.generate(self.ids(length), new_tokens=1, namespace=next(self._names)).ttft_s

    def reuse(self, documents: int) -> tuple[float, dict]:
        """(TTFT, report) of a prompt over documents that another prompt had in another order."""
        name, texts = next(self._names), [self.ids(DOCUMENT) for _ in range(documents)]
        self.client.generate([*self.ids(30), *sum(texts, [])], new_tokens=1, namespace=name)
        prompt = [*self.ids(20), *sum(reversed(texts), []), *self.ids(20)]
        answer = self.client.generate(prompt, new_tokens=1, namespace=name)
        return answer.ttft_s, answer.report

    def step_s(self, batch: int, context: int = 0) -> float:
        """Seconds of a decode step with `batch` requests at once behind `context` tokens that are cached."""
        name, before = next(self._names), self.ids(context)
        self.client.generate([*before, 1], new_tokens=1, namespace=name)

        def one(tail: list[int], tokens: int) -> float:
            body = self.client._body([*before, *tail], tokens, name, True)
            body["sampling_params"]["ignore_eos"] = True
            return Client(self.client.url).post("/generate", body).json()["meta_info"]["e2e_latency"]

        with ThreadPoolExecutor(batch) as pool:
            prefill, whole = (
                max(pool.map(one, [self.ids(16) for _ in range(batch)], [tokens] * batch)) for tokens in (1, 1 + ANSWER)
            )
        return max(0.0, whole - prefill) / ANSWER


def measure(probe: Probe) -> dict:
    """The costs of a `Profile`.

    Time to first token is fitted as fixed + rows x row_s + rows x keys x key_s + copied x copy_s (+ reuse_s), none of
    them negative and every prompt with the same weight whatever its length, over the medians of the rounds.
    """
    probe.prefill_s(256), probe.reuse(1)  # whatever happens only once
    seconds: dict[tuple[str, int], list[float]] = {}
    reports: dict[int, dict] = {}
    for _ in range(ROUNDS):
        for length in LENGTHS:
            seconds.setdefault(("prefill", length), []).append(probe.prefill_s(length))
        for documents in DOCUMENTS:
            ttft, reports[documents] = probe.reuse(documents)
            seconds.setdefault(("reuse", documents), []).append(ttft)
    terms = [(1, n, n * n / 2, 0, 0) for n in LENGTHS]
    for report in reports.values():
        prompt = sum(report[name] for name in ("exact", "reused", "fresh"))
        rows = report["recomputed"] + report["fresh"]
        terms.append((1, rows, rows * (report["exact"] + prompt) / 2, report["reused"], bool(report["reused"])))
    medians = np.array([statistics.median(s) for s in seconds.values()])
    (fixed, row_s, key_s, copy_s, reuse_s), _ = nnls(np.array(terms) / medians[:, None], np.ones(len(medians)))
    for (kind, size), median, row in zip(seconds, medians, terms, strict=True):
        fitted = float(np.dot(row, (fixed, row_s, key_s, copy_s, reuse_s)))
        print(f"{kind:8} {size:5}  {median:7.3f} s, fitted {fitted:7.3f}", flush=True)
    decode = [(n, probe.step_s(n)) for n in BATCHES]
    behind = [probe.step_s(n, CONTEXT) for n in BATCHES]
    print("decode ", *(f"{n}: {a:.3f} s, {b:.3f} behind {CONTEXT}" for (n, a), b in zip(decode, behind, strict=True)))
    more = sum(b - a for (_, a), b in zip(decode, behind, strict=True))
    pass_s = max(0.0, min(fixed, decode[0][1] - row_s))
    return {
        "pass_s": pass_s,
        "row_s": row_s,
        "key_s": key_s,
        "copy_s": copy_s,
        "reuse_s": reuse_s,
        "recompute": statistics.fmean(r["recomputed"] / max(1, r["reused"]) for r in reports.values()),
        "decode_s": tuple(decode),
        "decode_key_s": max(0.0, more / (CONTEXT * sum(BATCHES))),
        "request_s": fixed - pass_s,
    }


def main() -> None:
    """Start a server, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/profile-cpu.json")
    options, rest = parser.parse_known_args()
    arguments = launch.fill_defaults(rest)
    if not any(a.split("=")[0] in ("--model-path", "--model") for a in rest):
        arguments += ["--model-path", str(model.prepare())]
    with launch.running(arguments, env={"KVSHARE_AUDIT_SHARE": "0"}, log=Path("out/profile.log")) as url:
        client = Client(url)
        info = client._http.get(f"{url}/server_info", timeout=60).json()
        found = measure(Probe(client, vocabulary=40_000))
    state = (info.get("internal_states") or [{}])[0]
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in found.items()}
    rounded["decode_s"] = tuple((n, float(f"{s:.4g}")) for n, s in found["decode_s"])
    profile = Profile(
        **rounded,
        chunk=info.get("chunked_prefill_size") or info["max_prefill_tokens"],
        capacity=int(info.get("max_total_num_tokens") or state.get("max_total_num_tokens") or 100_000),
        running=int(info.get("max_running_requests") or state.get("effective_max_running_requests_per_dp") or 256),
        machine=f"{platform.processor() or platform.machine()}, {info['model_path'].rstrip('/').split('/')[-1]}",
    )
    write(options.out, profile)
    print(profile)


if __name__ == "__main__":
    main()
