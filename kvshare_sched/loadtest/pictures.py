"""One picture a workload: who waits how long, how fast work is done, where prompt tokens come from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kvshare_sched.loadtest.statistics import answered, origins, ttft

_COLOURS = ("#9aa5b1", "#2a7de1", "#f2a33a", "#4caf7a", "#d6455d")


def draw(workload: str, runs: Sequence, path: Path) -> None:
    """runs: `report.Run`s of one workload. TTFT at the lowest load, completions at the highest."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = [r for r in runs if r.repeat == 0]
    low, high = (pick((r.load or 0) for r in runs) for pick in (min, max))
    names = list(dict.fromkeys(r.setup for r in sorted(runs, key=lambda r: r.setup != "stock")))
    colour = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    figure, (waits, work, sources) = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for run in runs:
        done = answered(run.rows)
        if (run.load or 0) == low:
            times = np.sort([ttft(r) for r in done])
            waits.step(times, (np.arange(len(times)) + 1) / len(times), where="post", **_line(run, colour))
        if (run.load or 0) == high:
            ends = np.sort([r["token_s"][-1] for r in done])
            work.step([0, *ends], range(len(ends) + 1), where="post", **_line(run, colour))
    arrivals = sorted(r["due_s"] for r in next(r for r in runs if (r.load or 0) == high).rows)
    work.step(arrivals, range(1, len(arrivals) + 1), where="post", color="black", lw=0.8, ls=":", label="due")
    waits.set(
        title=_title(f"{workload}: time to first token", low), xlabel="seconds since due", ylabel="share of requests"
    )
    work.set(title=_title("completed requests", high), xlabel="seconds")
    _sources(sources, names, runs)
    for axis in (waits, work):
        axis.legend(fontsize=8)
    for axis in (waits, work, sources):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(run, colour: dict[str, str]) -> dict:
    return {"label": run.setup, "color": colour[run.setup]}


def _title(text: str, load: float) -> str:
    return f"{text}, load {load:g}" if load else text


def _sources(axis, names: Sequence[str], runs: Sequence) -> None:
    shares = [origins([row for r in runs if r.setup == name for row in answered(r.rows)]) for name in names]
    parts = (
        ("exact prefix", "#4caf7a", lambda o: o["exact"]),
        ("reused as it is", "#2a7de1", lambda o: o["reused"] - o["recomputed"]),
        ("reused, recomputed", "#f2a33a", lambda o: o["recomputed"]),
        ("fresh", "#d6455d", lambda o: o["fresh"]),
    )
    bottom = np.zeros(len(names))
    for label, color, tokens in parts:
        heights = np.array([tokens(o) / (o["exact"] + o["reused"] + o["fresh"]) for o in shares])
        axis.bar(names, heights, 0.6, bottom=bottom, label=label, color=color)
        bottom += heights
    axis.set(title="where prompt tokens came from", ylabel="share of prompt tokens", ylim=(0, 1.25))
    axis.legend(fontsize=8, ncols=2, loc="upper center")
