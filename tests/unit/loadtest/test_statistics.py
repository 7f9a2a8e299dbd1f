"""Figures of known rows, and the report that is made of them."""

from __future__ import annotations

import json

import pytest

from kvshare_sched.errors import ConfigError, SetupError
from kvshare_sched.loadtest import report, statistics
from kvshare_sched.loadtest.runner import read_rows, write_rows
from kvshare_sched.loadtest.statistics import Slo

SLO = Slo(ttft_s=2.0, tpot_s=0.2)


def row(number: int, due: float, *tokens: float, tenant: str = "a", reused: int = 0, ids=(1, 2, 3)) -> dict:
    return {
        "tenant": tenant,
        "session": str(number),
        "step": 0,
        "due_s": due,
        "token_s": list(tokens),
        "prompt_tokens": 100,
        "prompt": str(number),
        "output_ids": list(ids),
        "exact": 10,
        "reused": reused,
        "recomputed": reused // 10,
        "fresh": 90 - reused,
    }


ROWS = [
    row(0, 0.0, 1.0, 1.1, 1.2),
    row(1, 1.0, 4.0, 4.1, 4.2),
    row(2, 2.0, 3.0, 3.5, 4.0, tenant="b"),
    {"tenant": "b", "session": "3", "step": 0, "due_s": 3.0, "error": "gone"},
]


def test_figures_of_known_rows():
    found = statistics.figures(ROWS, SLO)
    assert (found["requests"], found["answered"], found["errors"]) == (4, 3, ["gone"])
    assert found["ttft_s"] == {"mean": 1.6667, "p50": 1.0, "p95": 2.8, "p99": 2.96, "max": 3.0}
    assert found["tpot_s"]["mean"] == pytest.approx((0.1 + 0.1 + 0.5) / 3, abs=1e-4)
    assert found["end_to_end_s"]["max"] == 3.2
    assert found["makespan_s"] == 4.2 and found["throughput_rps"] == pytest.approx(3 / 4.2, abs=1e-4)
    assert found["offered_rps"] == 1.0
    # Row 1 waited too long for its first token, row 2 for the later ones; a failed request meets nothing.
    assert found["slo"]["met"] == 0.25 and found["goodput_rps"] == pytest.approx(1 / 4.2, abs=1e-4)
    assert found["tenants"]["b"]["requests"] == 1 and found["output_tokens"] == 9
    with pytest.raises(SetupError, match="gone"):
        statistics.figures(ROWS[3:], SLO)


def test_one_token_has_no_time_between_tokens():
    assert statistics.tpot(row(0, 0.0, 1.0)) is None
    assert statistics.figures([row(0, 0.0, 1.0)], SLO)["tpot_s"] is None


def test_jain():
    assert statistics.jain([3, 3, 3]) == pytest.approx(1)
    assert statistics.jain([1, 0, 0, 0]) == pytest.approx(0.25)
    assert statistics.jain([1, 2]) == pytest.approx(0.9)
    assert statistics.jain([0, 0]) == 1


def test_service_rate_is_per_second_in_the_system():
    assert statistics.service_rate([row(0, 0.0, 1.0, 2.0), row(1, 0.0, 1.0, 2.0)]) == pytest.approx(102 / 2)


def test_origins_add_up():
    found = statistics.origins([row(0, 0, 1, reused=80), row(1, 0, 1)])
    assert found["exact"] + found["reused"] + found["fresh"] == 200
    assert (found["reused_share"], found["exact_share"]) == (0.4, 0.1)


def test_ratios_of_paired_runs():
    slow = [row(i, float(i), i + 2.0, i + 2.5) for i in range(40)]
    fast = [row(i, float(i), i + 0.5, i + 0.6) for i in range(40)]
    assert statistics.ttft_ratio(slow, fast) == {"value": 4.0, "low": 4.0, "high": 4.0}
    twice = [row(i, 0.0, i / 2 + 0.5) for i in range(40)]
    once = [row(i, 0.0, i + 1.0) for i in range(40)]
    assert statistics.throughput_ratio(once, twice) == 2.0
    # A request that one run lost is compared with nothing.
    assert statistics.ttft_ratio(slow, fast[1:])["value"] == 4.0


def test_the_interval_holds_the_value_and_widens_with_noise():
    def noisy(spread):
        return [row(i, 0.0, 4.0 + (spread if i % 3 else -spread)) for i in range(60)]

    flat = [row(i, 0.0, 2.0) for i in range(60)]
    wide, narrow = (statistics.ttft_ratio(noisy(s), flat) for s in (2.0, 0.2))
    for found in (wide, narrow):
        assert found["low"] < found["value"] < found["high"]
    assert wide["high"] - wide["low"] > 5 * (narrow["high"] - narrow["low"])


def test_agreement_counts_equal_prompts_only():
    base = [row(i, 0.0, 1.0, 1.1, 1.2) for i in range(3)]
    other = [row(0, 0.0, 1.0), row(1, 0.0, 1.0, ids=(1, 9, 3)), row(2, 0.0, 1.0, ids=(9, 2, 3)) | {"prompt": "x"}]
    found = statistics.agreement([(base, other)])
    assert found["prompts"] == 2 and found["first_token_agreement"] == 1
    assert found["agreeing_head"] == pytest.approx((1 + 1 / 3) / 2, abs=1e-4)


# ---- report ----


def fill(folder, repeats=1):
    settings = {
        "model": "m",
        "machine": "here",
        "loads": [1.0, 2.5],
        "sockets": 4,
        "slo": {"ttft_s": 2.0, "tpot_s": 0.2},
        "setups": {"stock": {"arguments": ["--x"]}, "kvshare": {"arguments": ["--y"]}},
        "capacity_rps": {"rag": 0.5},
        "quality": {"rag": {"kvshare": {"prompts": 4, "reused_prompts": 4, "kl_mean": 0.02, "kl_max": 0.05}}},
    }
    (folder / "raw").mkdir(parents=True)
    (folder / "raw" / "settings.json").write_text(json.dumps(settings))
    for setup, speed, reused in (("stock", 1, 0), ("kvshare", 4, 80)):
        for load in (1.0, 2.5):
            for repeat in range(repeats):
                factor = speed * (1 + repeat)
                rows = [row(i, 0.0, (i + 1) / factor, (i + 1.1) / factor, reused=reused) for i in range(10)]
                about = {"setup": setup, "workload": "rag", "load": load, "repeat": repeat}
                write_rows(folder / "raw" / f"{setup}-{load}-{repeat}.jsonl", about, rows)


@pytest.mark.parametrize("repeats", [1, 2])
def test_the_report_is_made_of_the_raw_rows(tmp_path, repeats):
    fill(tmp_path, repeats)
    assert "rag" in report.write_all(tmp_path)
    result = json.loads((tmp_path / "report.json").read_text())
    summary = result["summary"]["rag"]
    assert summary["ttft_mean_ratio"] == pytest.approx(4) and summary["throughput_ratio"] == pytest.approx(4)
    assert (summary["reused_share"], summary["exact_share_of_base"]) == (0.8, 0.1)
    assert summary["quality"]["kl_mean"] == 0.02 and summary["quality"]["kl_prompts"] == 4
    assert summary["quality"]["prompts"] == 20 * repeats  # at two loads
    assert len(result["runs"]) == 4 * repeats
    text = (tmp_path / "report.md").read_text()
    assert "4.00 (4.00 to 4.00)" in text and "## Tenants" in text
    assert (tmp_path / "rag.png").stat().st_size > 10_000


def test_what_an_interruption_left_is_reported(tmp_path):
    fill(tmp_path)
    (tmp_path / "raw" / "kvshare-2.5-0.jsonl").unlink()
    report.write_all(tmp_path)
    result = json.loads((tmp_path / "report.json").read_text())
    assert result["summary"] == {} and len(result["runs"]) == 3


def test_rows_survive_writing(tmp_path):
    about = {"setup": "stock", "workload": "rag", "load": 1.0, "repeat": 0}
    write_rows(tmp_path / "x.jsonl", about, ROWS)
    assert read_rows(tmp_path / "x.jsonl") == (about, ROWS)


def test_a_folder_without_rows_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="kvshare bench"):
        report.write_all(tmp_path)
