#!/usr/bin/env python
"""Draw the boards as PNG files: a small renderer of our own that asks a Prometheus the boards' very queries.

    python dashboards/render.py --url http://127.0.0.1:9090 --minutes 15 --out dashboards/pictures

It knows lines, stacks and single numbers, which is all the boards have; Grafana draws them better.
"""

from __future__ import annotations

import argparse
import re
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.dates as dates
import matplotlib.pyplot as plt
import numpy as np
from generate import HERE, boards, dashboard, promql
from local_prometheus import Prometheus
from matplotlib.ticker import FuncFormatter

_STEPS = 120  # points of a curve
_SERIES = 14  # curves of a panel that are drawn, the largest ones
_INCH = 0.38  # of one grid row
_WORDS = {"reqps": " req/s", "cps": " /s", "s": " s", "short": ""}


def number(value: float, unit: str) -> str:
    """A value in Grafana's unit."""
    if unit == "bool_yes_no":
        return "Yes" if value else "No"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    scale, prefix = next(((s, p) for s, p in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if abs(value) >= s), (1, ""))
    if unit == "bytes":
        return f"{value / scale:.3g} {prefix}B"
    if unit == "s" and 0 < abs(value) < 1:
        return f"{1000 * value:.3g} ms"
    return f"{value / scale:.3g}{prefix}" + (_WORDS[unit] if unit in _WORDS else unit.removeprefix("suffix:"))


def legend(text: str, labels: dict) -> str:
    """Grafana's legend notation."""
    return re.sub(r"{{(\w+)}}", lambda found: labels.get(found[1], ""), text).strip()


def curves(prometheus: Prometheus, panel: dict, times: range, rate: str) -> dict[str, np.ndarray]:
    """Legend -> values at these times (seconds; NaN where there is none) of the series a panel shows, by name.

    Of too many those with the largest last values are kept.
    """
    found: dict[str, dict] = {}
    for name, text in panel["queries"].items():
        query = promql(text, job=".*", tenant=".*", rate=rate)
        for labels, points in prometheus.over(query, times.start, times[-1], times.step):
            found[legend(name, labels)] = dict(points)
    largest = sorted(found, key=lambda name: -list(found[name].values())[-1])[:_SERIES]
    return {name: np.array([found[name].get(t, np.nan) for t in times]) for name in sorted(largest)}


def _stat(axes, panel: dict, times: range, found: dict) -> None:
    axes.axis("off")
    text = "no data"
    for values in found.values():
        text = number(values[~np.isnan(values)][-1], panel["unit"])
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=22, color="#2a6f4e")


def _series(axes, panel: dict, times: range, found: dict) -> None:
    at = np.array(times, "datetime64[s]")
    if panel.get("stack") and found:
        axes.stackplot(at, np.nan_to_num(np.array(list(found.values()))), labels=list(found), alpha=0.75)
    else:
        for name, values in found.items():
            axes.plot(at, values, label=name, linewidth=1.4)
    low, high = min(0.0, axes.dataLim.y0), max(0.0, axes.dataLim.y1)  # nothing drawn: +inf, -inf
    span = high - low or 1.0
    axes.set_ylim(low - (0.05 * span if low else 0), low + 1.08 * span)
    if panel["unit"] == "bool_yes_no":
        axes.set_yticks([0, 1])
    axes.set_xlim(at[0], at[-1])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, panel["unit"])))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=6))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M" if times[-1] - times[0] > 600 else "%H:%M:%S"))
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=8)
    if found:
        place = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.11), "frameon": False}
        axes.legend(fontsize=7.5, ncols=4 if len(found) != 6 else 3, columnspacing=1.2, **place)
    else:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="#999999")


def draw(prometheus: Prometheus, name: str, path: Path, start: float, end: float, rate: str) -> list[str]:
    """One board as a picture; returns the titles of panels without data. start, end: seconds since 1970."""
    times = range(int(start), int(end) + 1, max(1, int((end - start) / _STEPS)))
    board = boards()[name]
    by_title = {panel["title"]: panel for row in board["rows"].values() for panel in row}
    placed = dashboard(name, board)["panels"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in placed)
    figure = plt.figure(figsize=(12.5, rows * _INCH + 0.5))
    figure.suptitle(board["title"], fontsize=14, y=0.995)
    top, empty = 1 - 0.45 / figure.get_figheight(), []
    for made in placed:
        at = made["gridPos"]
        left, width = at["x"] / 24, at["w"] / 24
        bottom, height = top * (1 - (at["y"] + at["h"]) / rows), top * at["h"] / rows
        if made["type"] == "row":
            figure.text(0.01, bottom + 0.3 * height, made["title"], fontsize=12, fontweight="bold", color="#444444")
            continue
        axes = figure.add_axes((left + 0.07, bottom + 0.25 * height, width - 0.085, height * 0.63))
        axes.set_title(made["title"], fontsize=10)
        panel = by_title[made["title"]]
        found = curves(prometheus, panel, times, rate)
        (_stat if made["type"] == "stat" else _series)(axes, panel, times, found)
        if not found:
            empty.append(made["title"])
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)
    plt.close(figure)
    return empty


def main() -> None:
    """Draw all boards."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", default="http://127.0.0.1:9090", help="a Prometheus")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--rate", default="1m", help="what stands for Grafana's rate interval")
    parser.add_argument("--out", type=Path, default=HERE / "pictures")
    options = parser.parse_args()
    end = time.time()
    for name in boards():
        path = options.out / f"{name}.png"
        empty = draw(Prometheus(options.url), name, path, end - 60 * options.minutes, end, options.rate)
        print(path, *(f"no data: {title}" for title in empty), sep="; ")


if __name__ == "__main__":
    main()
