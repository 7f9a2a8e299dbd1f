"""One result file a stage, whole again after every result, so that a run that is cut keeps what it has."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("torch", "triton", "flashinfer-python", "sglang", "sglang-kernel", "transformers", "numpy", "kvshare-sched")


def device() -> dict:
    """The GPU and its machine; `name` is "cpu" without one."""
    import torch

    found = {"name": "cpu", "processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    if torch.cuda.is_available():
        p = torch.cuda.get_device_properties(0)
        found |= {
            "name": p.name,
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gb": round(p.total_memory / 2**30, 1),
            "driver": _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        }
    return found


def versions() -> dict:
    """Python, the CUDA compiler and the packages that matter; None for what is not there."""
    import torch

    found = {"python": platform.python_version(), "cuda": torch.version.cuda, "nvcc": _line("nvcc", "--version")}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _line(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return (done.stdout.strip().splitlines() or [None])[-1]


class Results:
    """`results` of one stage: a list of dictionaries, written as it grows."""

    def __init__(self, folder: Path, stage: str, settings: dict):
        folder.mkdir(parents=True, exist_ok=True)
        self.file = folder / f"{stage}.json"
        self.found = {"stage": stage, "complete": False, "device": device(), "versions": versions()}
        self.found |= {"settings": settings, "results": []}
        self.started = time.monotonic()
        self._write()

    def add(self, **result) -> None:
        """One result, printed and kept."""
        rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in result.items()}
        self.found["results"].append(rounded)
        print(f"[{time.monotonic() - self.started:6.1f}s]", *(f"{k}={v}" for k, v in rounded.items()), flush=True)
        self._write()

    def note(self, **settings) -> None:
        """Something measured once that the results are read against."""
        self.found["settings"] |= {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in settings.items()}
        self._write()

    def complete(self) -> None:
        self.found["complete"] = True
        self._write()

    def _write(self) -> None:
        draft = self.file.with_suffix(".part")
        draft.write_text(json.dumps(self.found, indent=1) + "\n")
        draft.replace(self.file)


def seconds(work: Callable[[], object], *, device: str, repeats: int = 7, warm_up: int = 2) -> float:
    """Median time of one call: by events on a GPU, where calls only queue work, by the clock on a CPU."""
    import torch

    times = []
    for i in range(warm_up + repeats):
        if device == "cpu":
            started = time.perf_counter()
            work()
            spent = time.perf_counter() - started
        else:
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            after.synchronize()
            spent = before.elapsed_time(after) / 1e3
        if i >= warm_up:
            times.append(spent)
    return sorted(times)[len(times) // 2]
