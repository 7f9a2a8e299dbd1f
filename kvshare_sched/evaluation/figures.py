"""Rows of measured cases -> the figures of `report.json`. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np

from kvshare_sched.evaluation.statistics import gap_recovered, geometric_ratio, mean_interval

OWN = ("consensus", "default", "quality", "speed")
PUBLISHED = ("epic", "cacheblend", "dhd")
CELL_TOLERANCE = 0.01  # share of the reused tokens' cells: a method this little above another computes no more


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
    """Each rule of ours against each published one: the ratio of KLs, below 1 where ours is closer to full prefill.

    `kl_ratio` of the means, `kl_ratio_typical` the geometric mean of the paired ratios with its 95 % interval;
    `time_ratio` the median paired ratio of times to first token.
    """
    methods = settings["methods"]
    found = []
    for name in (n for n, m in methods.items() if m["family"] in OWN):
        for against in (n for n, m in methods.items() if m["family"] in PUBLISHED):
            own, other = ([row["methods"][n] for row in rows] for n in (name, against))
            typical, low, high = geometric_ratio([m["kl"] for m in own], [m["kl"] for m in other])
            difference = summary[name]["computed_cells"] - summary[against]["computed_cells"]
            time_ratio = statistics.median(a["ttft_s"] / b["ttft_s"] for a, b in zip(own, other, strict=True))
            found.append(
                {
                    "method": name,
                    "against": against,
                    "kl_ratio": round(summary[name]["kl_mean"] / max(summary[against]["kl_mean"], 1e-12), 4),
                    "kl_ratio_typical": round(typical, 4),
                    "kl_ratio_low": round(low, 4),
                    "kl_ratio_high": round(high, 4),
                    "cell_difference": round(difference, 4),
                    "no_more_cells": difference <= CELL_TOLERANCE,
                    "time_ratio": round(time_ratio, 4),
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
