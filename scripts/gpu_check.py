#!/usr/bin/env python
"""Everything that needs a GPU, in stages; `make gpu-check` runs them all. Result files in benchmarks/gpu.

    python scripts/gpu_check.py [--stages ops,kernels,prefill] [--shapes llama-3.1-8b] [--tokens 2048,32768] [--out DIR]

    ops      the operators' tests on the GPU: against the reference, scattered rows, a misaligned mask that must fail
    kernels  each operator against the device's copy bandwidth and product rate
    prefill  a plain-torch decoder of the model's shape around the operators, reuse off and on
    e2e      end-to-end tests on the real server
    engine   the real server with dummy weights: time to first token off and on, and what it costs when nothing matches
    quality  the demo on the embedded model: time and KL to full prefill
    tune     the Triton attention cut in every way, at the longest prompt; only when named

The first three need torch and Triton alone and run from the checkout with any python. A stage that lacks a package
says so and counts as left out. Every stage has a process and a time limit of its own, and every result is in its file
as soon as it is there. Exit code 1 when a stage that ran has failed, or none ran.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT), str(ROOT / "kernels")]

from gpu.shapes import SHAPES  # noqa: E402

# On a fresh machine FlashInfer builds some ten kernels first, a minute or two each; `tune` builds 36 of ours. Where a
# machine is lent for less, --limit-s.
LIMITS_S = {"ops": 1800, "kernels": 1200, "prefill": 1200, "e2e": 3600, "engine": 3600, "quality": 900, "tune": 1200}
NEEDS = {"ops": ("pytest", "hypothesis")} | dict.fromkeys(("e2e", "engine", "quality"), ("sglang", "requests"))
OPS = ("copy_rotate", "deviation", "paged_attention", "flashinfer", "consensus_ops", "gpu_check")
# The others compare float32 numbers closely.
E2E = ("gpu", "default", "pages_and_chunks", "same_context", "memory_pressure", "lora")


def missing(stage: str, device: str) -> str | None:
    """Why a stage cannot run here; None when it can."""
    names = ("torch", "triton", "numpy", *NEEDS.get(stage, ()))
    if absent := [name for name in names if importlib.util.find_spec(name) is None]:
        return f"needs {', '.join(absent)}"
    import torch

    if device != "cpu" and not torch.cuda.is_available():
        return "needs a GPU"
    if device == "cpu" and stage not in ("kernels", "prefill", "tune"):
        return "needs a GPU; on a CPU the ordinary tests do this"
    return None


def tested(results, paths: list[str], device: str) -> None:
    """Run pytest; its counts are kept as they grow, its failures with their reason at the end."""
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "--device", device, *paths]
    if importlib.util.find_spec("xdist") and results.found["stage"] == "ops":
        # Most of the time goes into compiling; FlashInfer's tests stay together, its compiler takes all cores itself.
        command += ["-n", "8", "--dist", "loadgroup"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    counts = Counter()
    try:
        for line in process.stdout:
            if outcome := re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line) if "%]" in line else None:
                counts[outcome[1].lower()] += 1
                results.note(**counts)
            elif line.startswith(("FAILED", "ERROR")):
                results.add(failed=line.strip()[:300])
            if outcome is None or outcome[1] in ("FAILED", "ERROR"):
                print(line, end="", flush=True)
    finally:
        process.wait()  # out of time as well: pytest was told so too, and has a server to stop
    results.add(tests=" ".join(paths), exit_code=process.returncode, **counts)
    if process.returncode:
        sys.exit(1)


def of_demo(demo: dict) -> dict:
    """The demo's figures, medians over its cases, under the names that every measured result has; and its quality."""
    from kvshare_sched.settings import KVShareConfig

    same = ("prompt_tokens", "ttft_off_s", "ttft_on_s", "ttft_ratio", "share_of_limit")
    found = {"model_shape": demo["model"], "engine": "sglang", "ratio": KVShareConfig.load().ratio}
    found |= {name: demo[f"{name}_median"] for name in same}
    return found | {name: demo[name] for name in ("kl_mean", "kl_max", "kl_noise_floor", "first_token_agreement")}


def within(limit_s: float, command: list[str], environment: dict[str, str], *, patience_s: float = 40) -> int:
    """Exit code of a command, 124 when its time was up.

    Its processes end with it, or the next stage would share the GPU with them; they have patience_s to stop a server.
    """

    def heeds_interrupts() -> None:  # else it inherits what a shell gives to what it starts in the background
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=heeds_interrupts)
    try:
        return process.wait(limit_s)
    except subprocess.TimeoutExpired:
        return 124
    finally:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGINT)
            process.wait(patience_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def stage(name: str, options) -> None:
    """One stage, in this process."""
    from gpu.results import Results

    shapes, lengths, shares = options.shapes, options.tokens, options.ratios
    settings = {"shapes": shapes, "prompt_tokens": lengths, "ratios": shares, "dtype": "bfloat16", "batch": 1}
    results = Results(options.out, name, {} if name in ("ops", "e2e", "quality") else settings)
    if name == "ops":
        tested(results, [f"tests/ops/test_{module}.py" for module in OPS], options.device)
    elif name == "e2e":
        tested(results, [f"tests/e2e/test_{module}.py" for module in E2E], options.device)
    elif name == "kernels":
        from gpu import kernels

        kernels.run(results, shapes, lengths, shares[0], options.device)
    elif name == "tune":
        from gpu import kernels

        kernels.tune(results, shapes, lengths, shares[0], options.device)
    elif name == "prefill":
        from gpu import prefill

        prefill.run(results, shapes, lengths, shares, options.device)
    elif name == "engine":
        from gpu import engine

        if not engine.run(results, shapes, lengths, shares, ROOT / "out" / "gpu"):
            sys.exit(1)
    else:
        from kvshare_sched.tools import demo

        folder = ROOT / "out" / "gpu-demo"
        if demo.run(cases=8, out=str(folder)):
            sys.exit(1)
        results.add(**of_demo(json.loads((folder / "demo.json").read_text())))
    results.complete()


def main() -> int:
    """Run the chosen stages, each in a process of its own; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def words(text: str) -> list[str]:
        return text.split(",")

    parser.add_argument("--stages", type=words, default=list(LIMITS_S)[:-1])
    parser.add_argument("--shapes", type=words, default=[name for name in SHAPES if name != "tiny"])
    parser.add_argument("--tokens", type=lambda text: [int(n) for n in words(text)], default=[2048, 8192, 32768, 65536])
    parser.add_argument("--ratios", type=lambda text: [float(x) for x in words(text)], default=[0.10, 0.18])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--limit-s", type=int, help="of every stage, instead of its own")
    parser.add_argument("--here", help=argparse.SUPPRESS)  # the stage this process runs
    options = parser.parse_args()
    if wrong := (set(options.stages) - set(LIMITS_S)) | (set(options.shapes) - set(SHAPES)):
        parser.error(f"unknown: {', '.join(sorted(wrong))}; stages {', '.join(LIMITS_S)}; shapes {', '.join(SHAPES)}")
    if options.here:
        stage(options.here, options)
        return 0
    folders = (str(ROOT / "scripts"), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH"))
    environment = os.environ | {"PYTHONPATH": ":".join(f for f in folders if f), "PYTHONUNBUFFERED": "1"}
    ran, failed = [], []
    for name in options.stages:
        if why := missing(name, options.device):
            print(f"== {name}: left out, {why}", flush=True)
            continue
        limit, started = options.limit_s or LIMITS_S[name], time.monotonic()
        print(f"== {name}, {limit} s at most", flush=True)
        code = within(limit, [sys.executable, __file__, *sys.argv[1:], "--here", name], environment)
        print(f"== {name}: {'passed' if code == 0 else f'exit code {code}'}, {time.monotonic() - started:.0f} s")
        ran.append(name)
        failed += [name] if code else []
        from gpu import report

        report.write(options.out)
    print(f"== results in {options.out}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed or not ran else 0


if __name__ == "__main__":
    sys.exit(main())
