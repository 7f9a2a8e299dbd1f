"""Statistics against hand-computed values, and the figures of a report made from two known rows."""

import json
import math

import pytest

from kvshare_sched.evaluation import figures, report, run
from kvshare_sched.evaluation.measure import computed_share
from kvshare_sched.evaluation.statistics import gap_recovered, geometric_ratio, mean_interval

PROMISED = {
    "kl_mean", "kl_median", "kl_p90", "first_token_agreement", "greedy_agreement", "task_score", "task_score_gap_high",
    "swaps", "computed_cells", "ttft_s", "tpot_s", "cases",
}  # fmt: skip


def test_an_interval_of_equal_differences_is_a_point():
    assert mean_interval([0.25] * 7) == (0.25, 0.25, 0.25)


def test_an_interval_of_two_values_holds_all_three_possible_means():
    # Resamples of (0, 1): means 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    assert mean_interval([0, 1]) == (0.5, 0.0, 1.0)


def test_an_interval_shrinks_with_the_square_root_and_repeats():
    # The mean of n fair coins: standard deviation 1 / (2 sqrt(n)).
    mean, low, high = mean_interval([0, 1] * 200)
    assert mean == 0.5 and high - low == pytest.approx(2 * 1.96 / (2 * math.sqrt(400)), rel=0.05)
    assert mean_interval([0, 1, 3]) == mean_interval([0, 1, 3])


def test_geometric_ratio_by_hand():
    assert geometric_ratio([2, 8], [1, 1])[0] == pytest.approx(4)
    assert geometric_ratio([3, 3], [1, 1]) == pytest.approx((3, 3, 3))
    assert geometric_ratio([0, 0], [-1e-15, 0])[0] == 1, "rounding below zero is no divergence"


def test_gap_recovered():
    assert gap_recovered(0.5, 0.8, 0.2) == pytest.approx(0.5)
    assert gap_recovered(0.1, 0.8, 0.2) == pytest.approx(-1 / 6)
    assert gap_recovered(0.5, 0.2, 0.2) is None


def test_cells_of_reused_tokens_by_hand():
    told = {"computed_cells": 30 * 20 + 2 * 100 + 28 * 10, "fresh": 20, "reused": 100, "layers": 30}
    assert computed_share(told) == pytest.approx((2 + 28 * 0.1) / 30)
    assert computed_share(told | {"reused": 0}) == 1


def measured(kl, score, cells=1.0, ttft=2.0, swapped=False, outcome="reused"):
    return {
        "kl": kl, "kl_first": kl / 2, "first_token_agreement": 1.0, "greedy_agreement": 0.5, "task_score": score,
        "swapped": swapped, "computed_cells": cells, "cells": 100, "ttft_s": ttft, "tpot_s": None, "outcome": outcome,
    }  # fmt: skip


def row(name, full_score, default_score, kl):
    bare = None if full_score is None else {"task_score": 0.0, "swapped": False, "text": ""}
    return {
        "name": name,
        "task": name.split("/")[0],
        "donor_kind": "foreign",
        "prompt_tokens": 900,
        "methods": {
            "full": measured(0.0, full_score, outcome="ordinary"),
            "noise_floor": measured(1e-12, full_score, ttft=None, outcome="ordinary"),
            "epic": measured(2 * kl, default_score, cells=0.16, ttft=0.5),
            "dhd": measured(kl, default_score, cells=0.165, ttft=0.5),
            "epic@0.25": measured(3 * kl, default_score, cells=0.20, ttft=0.5),
            "dhd@0.25": measured(kl, default_score, cells=0.30, ttft=0.5),
            "default": measured(kl, default_score, cells=0.165, ttft=0.5, swapped=True),
            "no_context": bare,
        },
    }


ROWS = [row("fact/0", 1.0, 0.5, 0.02), row("fact/1", 1.0, 1.0, 0.04), row("continuation/0", None, None, 0.06)]
BUDGETS = {"epic": 0.1, "dhd": 0.1, "epic@0.25": 0.25, "dhd@0.25": 0.25, "default": None}
SETTINGS = {
    "model": "m", "cases": 3, "tasks": ["fact", "continuation"], "donors": 4, "answer_tokens": 24, "seed": 1,
    "server_settings": "mode=on",
    "methods": {n: {"family": n.split("@")[0], "budget": b, "reuse": True} for n, b in BUDGETS.items()},
}  # fmt: skip


def test_figures_of_the_summary():
    summary = figures.summarise(ROWS)
    own = summary["default"]
    assert own["kl_mean"] == pytest.approx(0.04) and own["kl_median"] == pytest.approx(0.04)
    assert own["kl_p90"] == pytest.approx(0.056) and own["kl_first_mean"] == pytest.approx(0.02)
    assert own["task_score"] == pytest.approx(0.75), "cases without a right answer do not count"
    assert own["task_score_gap"] == pytest.approx(0.25)
    assert (own["task_score_gap_low"], own["task_score_gap_high"]) == (0, 0.5)
    assert own["gap_recovered"] == pytest.approx(0.75)
    assert own["swaps"] == 3 and own["cases"] == 3 and own["reused_cases"] == 3
    assert own["ttft_ratio"] == 4 and own["ttft_s"] == 0.5 and own["tpot_s"] is None
    assert summary["full"]["kl_mean"] == 0 and summary["full"]["task_score_gap_high"] == 0
    assert summary["noise_floor"]["ttft_s"] is None and summary["no_context"]["cases"] == 2
    for name in ("full", "noise_floor", "epic", "dhd", "default"):
        assert summary[name].keys() >= PROMISED


def test_ours_is_compared_with_every_published_rule():
    found = {(c["method"], c["against"]): c for c in figures.assemble(SETTINGS, ROWS)["comparison"]}
    assert found.keys() == {("default", a) for a in ("epic", "dhd", "epic@0.25", "dhd@0.25")}
    epic, kvshare = found["default", "epic"], found["default", "dhd"]
    assert epic["kl_ratio"] == epic["kl_ratio_typical"] == epic["kl_ratio_high"] == pytest.approx(1 / 2)
    assert epic["no_more_cells"] and epic["time_ratio"] == 1 and epic["cell_difference"] == pytest.approx(0.005)
    assert kvshare["kl_ratio"] == 1 and kvshare["no_more_cells"]
    assert found["default", "dhd@0.25"]["no_more_cells"], "far fewer is no more, too"
    dear = [{**r, "methods": {**r["methods"], "default": measured(0.01, 1.0, cells=0.4, ttft=1.0)}} for r in ROWS]
    compared = figures.compare(dear, SETTINGS, figures.summarise(dear))[0]
    assert not compared["no_more_cells"] and compared["time_ratio"] == 2


def test_all_three_files(tmp_path):
    said = report.write_all(tmp_path, SETTINGS, ROWS)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data.keys() == {"settings", "summary", "comparison", "by_task", "by_donor_kind", "cases"}
    assert data["by_task"]["fact"]["full"]["cases"] == 2 and len(data["cases"]) == 3
    text = (tmp_path / "report.md").read_text()
    assert "| dhd@0.25 " in text and " yes |" in text and "default" in said
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob("*.part"))


def test_a_report_without_task_scores_is_still_a_report():
    summary = figures.summarise(ROWS[2:])
    assert summary["default"]["task_score"] is None and summary["default"]["task_score_gap_high"] is None
    assert summary["no_context"]["cases"] == 0 and "-" in report.progress(ROWS[2])


class Breaking:
    """A bench whose second case fails."""

    def __init__(self):
        self.rows = iter(ROWS[:1])

    def run(self, case, methods):
        return next(self.rows)


def test_an_interruption_loses_one_case_only(tmp_path):
    with pytest.raises(StopIteration):
        run._measure(Breaking(), [None, None, None], [], tmp_path, SETTINGS)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["settings"]["cases"] == 1 and data["summary"]["default"]["cases"] == 1
    assert (tmp_path / "report.md").exists()
