"""Measure what a live engine's work costs, for `kvshare simulate`: prefill, reuse, decode steps.

    python scripts/profile_engine.py [--out benchmarks/profile-cpu.json] [SGLang arguments]

Prompts are random ids, so nothing is cached that was not sent on purpose. Some two minutes on a CPU.
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

from kvshare_sched import model, server
from kvshare_sched.client import Client
from kvshare_sched.simulator.profile import Profile, write

LENGTHS = (64, 256, 512, 1024, 2048, 3072)
BATCHES = (1, 2, 4, 8, 16, 32)
DOCUMENT = 512
ANSWER = 48


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

    def step_s(self, batch: int) -> float:
        """Seconds of a decode step with `batch` requests at once; prompts are short."""

        def one(_) -> float:
            body = self.client._body(self.ids(16), ANSWER, next(self._names), True)
            body["sampling_params"]["ignore_eos"] = True
            meta = Client(self.client.url).post("/generate", body).json()["meta_info"]
            return meta["e2e_latency"] / ANSWER

        with ThreadPoolExecutor(batch) as pool:
            return statistics.median(pool.map(one, range(batch)))


def measure(probe: Probe) -> dict:
    """The costs of a `Profile`."""
    probe.prefill_s(256)
    times = [(n, min(probe.prefill_s(n) for _ in range(2))) for n in LENGTHS]
    sizes, seconds = np.array(times).T
    terms = np.stack([np.ones_like(sizes), sizes, sizes**2 / 2], axis=1) / seconds[:, None]  # relative errors
    fixed, row_s, key_s = np.maximum(0, np.linalg.lstsq(terms, np.ones_like(sizes), rcond=None)[0])
    decode = [(n, probe.step_s(n)) for n in BATCHES]
    pass_s = max(0.0, min(fixed, decode[0][1] - row_s))
    extra, copied, share = [], [], []
    for documents in (1, 2, 4, 6):
        ttft, report = probe.reuse(documents)
        rows = report["recomputed"] + report["fresh"]
        extra.append(ttft - fixed - rows * (row_s + key_s * (report["exact"] + report["reused"]) / 2))
        copied.append(report["reused"])
        share.append(report["recomputed"] / max(1, report["reused"]))
    copy_s, reuse_s = np.polyfit(copied, extra, 1)
    return {
        "pass_s": pass_s,
        "row_s": row_s,
        "key_s": key_s,
        "copy_s": max(0.0, copy_s),
        "reuse_s": max(0.0, reuse_s),
        "recompute": statistics.fmean(share),
        "decode_s": tuple(decode),
        "request_s": fixed - pass_s,
    }


def main() -> None:
    """Start a server, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="benchmarks/profile-cpu.json")
    options, rest = parser.parse_known_args()
    arguments = server.fill_defaults(rest)
    if not any(a.split("=")[0] in ("--model-path", "--model") for a in rest):
        arguments += ["--model-path", str(model.prepare())]
    with server.running(arguments, env={"KVSHARE_AUDIT_SHARE": "0"}, log=Path("out/profile.log")) as url:
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
