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
_INCH = 0.62  # of one grid row
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


def curves(prometheus: Prometheus, panel: dict, start: float, end: float, rate: str) -> dict[str, list]:
    """Legend -> points of every series a panel shows; the ones with the largest last values come first."""
    found: dict[str, list] = {}
    for name, text in panel["queries"].items():
        query = promql(text, job=".*", tenant=".*", rate=rate)
        for labels, points in prometheus.over(query, start, end, max(1.0, (end - start) / _STEPS)):
            found[legend(name, labels)] = points
    return dict(sorted(found.items(), key=lambda item: -item[1][-1][1])[:_SERIES])


def _stat(axes, panel: dict, found: dict, columns: int) -> None:
    axes.axis("off")
    (points,) = list(found.values()) or [[]]
    text = number(points[-1][1], panel["unit"]) if points else "no data"
    axes.text(0.5, 0.45, text, ha="center", va="center", fontsize=22, color="#2a6f4e")


def _series(axes, panel: dict, found: dict, columns: int) -> None:
    if not found:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", transform=axes.transAxes, color="#999999")
    if panel.get("stack") and found:
        times = sorted({t for points in found.values() for t, _ in points})
        heights = [[dict(points).get(t, 0.0) for t in times] for points in found.values()]
        axes.stackplot(_clock(times), np.array(heights), labels=list(found), alpha=0.75)
    else:
        for name, points in found.items():
            axes.plot(_clock([t for t, _ in points]), [v for _, v in points], label=name, linewidth=1.4)
    low, high = axes.get_ylim()
    axes.set_ylim(min(0.0, low), high + 0.04 * (high - low))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, panel["unit"])))
    axes.xaxis.set_major_formatter(dates.DateFormatter("%H:%M"))
    axes.xaxis.set_major_locator(dates.AutoDateLocator(minticks=3, maxticks=6))
    axes.grid(alpha=0.25)
    axes.tick_params(labelsize=7)
    if found:
        axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=columns, frameon=False)


def _clock(times: list[float]) -> np.ndarray:
    return np.array([np.datetime64(int(1000 * t), "ms") for t in times])


def draw(prometheus: Prometheus, name: str, path: Path, start: float, end: float, rate: str) -> list[str]:
    """One board as a picture; returns the titles of panels without data."""
    board = boards()[name]
    by_title = {panel["title"]: panel for row in board["rows"].values() for panel in row}
    placed = dashboard(name, board)["panels"]
    rows = max(p["gridPos"]["y"] + p["gridPos"]["h"] for p in placed)
    figure = plt.figure(figsize=(14, rows * _INCH * 0.62 + 0.5))
    figure.suptitle(board["title"], fontsize=14, y=0.995)
    top, empty = 1 - 0.45 / figure.get_figheight(), []
    for made in placed:
        at = made["gridPos"]
        left, width = at["x"] / 24, at["w"] / 24
        bottom, height = top * (1 - (at["y"] + at["h"]) / rows), top * at["h"] / rows
        if made["type"] == "row":
            figure.text(0.01, bottom + 0.3 * height, made["title"], fontsize=11, fontweight="bold", color="#444444")
            continue
        axes = figure.add_axes((left + 0.06, bottom + 0.27 * height, width - 0.07, height * 0.6))
        axes.set_title(made["title"], fontsize=9)
        panel = by_title[made["title"]]
        found = curves(prometheus, panel, start, end, rate)
        (_stat if made["type"] == "stat" else _series)(axes, panel, found, at["w"] // 3 + 1)
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
