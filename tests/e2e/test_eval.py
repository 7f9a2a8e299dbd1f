"""`kvshare eval` on the real server: the report's controls must come out as what they are."""

from __future__ import annotations

import json

from kvshare_sched.evaluation import run
from kvshare_sched.evaluation.cases import KINDS

METHODS = ["naive", "dhd", "default"]


def test_controls_of_a_small_evaluation(tmp_path):
    asked = {"cases": 2, "task_names": ["fact", "twins"], "method_names": METHODS, "ratios": [0.1], "donors": 3}
    assert run.run(**asked, kinds=KINDS, model_path=None, out=str(tmp_path), server_arguments=[]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    summary = report["summary"]
    assert list(summary) == ["full", "noise_floor", *METHODS, "exact_prefix", "no_context"]
    assert report["settings"]["methods"]["dhd"]["reuse"] == {"strategy": "dhd", "ratio": 0.1}
    assert (tmp_path / "report.md").exists() and (tmp_path / "frontier.png").exists()

    assert summary["full"]["kl_mean"] == 0 and summary["full"]["greedy_agreement"] == 1
    assert summary["full"]["swaps"] == 0
    assert abs(summary["noise_floor"]["kl_mean"]) < 1e-6
    assert abs(summary["exact_prefix"]["kl_mean"]) < 1e-3
    for name in METHODS:
        figures = summary[name]
        assert figures["reused_cases"] == figures["cases"] == 2
        assert 1e-6 < figures["kl_mean"] < 1 and 1e-9 < figures["kl_first_mean"] < 1
    assert summary["naive"]["computed_cells"] == 0
    assert "strategy=consensus" in report["settings"]["server_settings"], "what `default` means"
    assert summary["default"]["kl_mean"] < 0.7 * summary["naive"]["kl_mean"]
    assert all(case["methods"]["default"]["donors"] > case["methods"]["naive"]["donors"] for case in report["cases"])
    for case in report["cases"]:
        found = case["methods"]
        assert len({found[name]["exact"] for name in ("full", *METHODS)}) == 1, "nobody finds more exact prefix"
        assert 0.12 < found["dhd"]["computed_cells"] < 0.25
        assert found["exact_prefix"]["exact"] == case["prompt_tokens"] - 48
        assert found["exact_prefix"]["reused"] == 0
