"""Rows of measured cases -> the figures of `report.json`. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from kvshare_sched.evaluation.statistics import gap_recovered, geometric_ratio, mean_interval

YARDSTICK = "kvshare"
CELL_TOLERANCE = 0.01  # methods whose measured cell shares differ by no more count as equally expensive


def summarise(rows: Sequence[dict]) -> dict[str, dict]:
    """Method name -> figures over all its cases. A figure is None where nothing was measured."""
    return {name: _figures(rows, name) for name in rows[0]["methods"]}


def _figures(rows: Sequence[dict], name: str) -> dict:
    found = [row["methods"][name] for row in rows if row["methods"][name] is not None]
    scored = [row["methods"] for row in rows if row["methods"]["full"]["task_score"] is not None]

    def over(key: str, reduce: Callable = statistics.fmean) -> float | None:
        values = [m[key] for m in found if m.get(key) is not None]
        return round(float(reduce(values)), 12) if values else None

    def score_of(method: str) -> float | None:
        return statistics.fmean(m[method]["task_score"] for m in scored) if scored else None

    gaps = [m["full"]["task_score"] - m[name]["task_score"] for m in scored]
    gap, low, high = (round(x, 6) for x in mean_interval(gaps)) if gaps else (None, None, None)
    full_s = [row["methods"]["full"]["ttft_s"] for row in rows]
    own_s = [(row["methods"][name] or {}).get("ttft_s") for row in rows]
    ratios = [a / b for a, b in zip(full_s, own_s, strict=True) if b]
    recovered = gap_recovered(score_of(name), score_of("full"), score_of("no_context")) if scored else None
    return {
        "cases": len(found),
        "reused_cases": sum(m.get("outcome") == "reused" for m in found),
        "kl_mean": over("kl"),
        "kl_median": over("kl", statistics.median),
        "kl_p90": over("kl", lambda v: np.percentile(v, 90)),
        "kl_first_mean": over("kl_first"),
        "first_token_agreement": over("first_token_agreement"),
        "greedy_agreement": over("greedy_agreement"),
        "task_score": over("task_score"),
        "task_score_gap": gap,
        "task_score_gap_low": low,
        "task_score_gap_high": high,
        "gap_recovered": None if recovered is None else round(recovered, 6),
        "swaps": sum(m["swapped"] for m in found),
        "computed_cells": over("computed_cells"),
        "cells": over("cells"),
        "ttft_s": over("ttft_s", statistics.median),
        "ttft_ratio": round(statistics.median(ratios), 6) if ratios else None,
        "tpot_s": over("tpot_s", statistics.median),
    }


def compare(rows: Sequence[dict], settings: dict, summary: dict[str, dict]) -> list[dict]:
    """Every method against the yardstick of the same budget: geometric KL ratio, above 1 where the yardstick wins."""
    methods = settings["methods"]
    yardsticks = {m["budget"]: name for name, m in methods.items() if m["family"] == YARDSTICK}
    found = []
    for name, method in methods.items():
        against = yardsticks.get(method["budget"])
        if against is None or against == name:
            continue
        kl = [[row["methods"][n]["kl"] for row in rows] for n in (name, against)]
        ratio, low, high = geometric_ratio(*kl)
        difference = summary[name]["computed_cells"] - summary[against]["computed_cells"]
        found.append(
            {
                "method": name,
                "against": against,
                "kl_ratio": round(ratio, 4),
                "kl_ratio_low": round(low, 4),
                "kl_ratio_high": round(high, 4),
                "cell_difference": round(difference, 4),
                "equal_cells": abs(difference) <= CELL_TOLERANCE,
            }
        )
    return found


def assemble(settings: dict, rows: Sequence[dict]) -> dict:
    """The content of `report.json`."""
    summary = summarise(rows)
    return {
        "settings": settings,
        "summary": summary,
        "comparison": compare(rows, settings, summary),
        "by_task": _split(rows, "task"),
        "by_donor_kind": _split(rows, "donor_kind"),
        "cases": list(rows),
    }


def _split(rows: Sequence[dict], key: str) -> dict[str, dict]:
    parts = dict.fromkeys(row[key] for row in rows)
    return {part: summarise([row for row in rows if row[key] == part]) for part in parts}
