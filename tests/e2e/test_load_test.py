"""The load test against a real server: every request answered, counted and reported."""

from __future__ import annotations

import json

from kvshare_sched.cli import main
from kvshare_sched.loadtest import blocks, compare, report, traces
from kvshare_sched.loadtest.runner import Player, read_rows
from kvshare_sched.loadtest.statistics import Slo
from kvshare_sched.loadtest.traces import Request, Trace

TEXTS = [(f"prose/{i}", 100) for i in range(3)]


def small_trace(sessions: int) -> Trace:
    """Sessions of two steps over the same three texts; the second step holds the first one's answer."""
    found = []
    for number in range(sessions):
        order = TEXTS[number % 3 :] + TEXTS[: number % 3]
        first = (("system/1", 0), *order, (f"words/{number}", 10))
        second = (("system/2", 0), *reversed(order), ("answer/0", 0), (f"words/{number}", 10))
        for step, prompt in enumerate((first, second)):
            found.append(Request(number * 0.2, "team", str(number), step, prompt, 6 - step))
    return Trace("small", tuple(found), warm_up=1)


def test_a_running_server_by_url(server, tmp_path):
    trace = small_trace(4)
    lost = Request(0.1, "team", "lost", 0, (("words/1", 9_000),), 4)  # longer than the model's context
    after = Request(0.1, "team", "lost", 1, (("answer/0", 0), *TEXTS), 4)
    traces.write(tmp_path / "small.jsonl", Trace("small", (*trace.requests, lost, after)))
    out = tmp_path / "out"
    asked = ["--url", server.url, "--traces", str(tmp_path / "small.jsonl"), "--rate", "3", "--sockets", "2"]
    assert main(["bench", *asked, "--out", str(out)]) == 0

    about, rows = read_rows(out / "raw" / "server-small.jsonl")
    assert about == {"setup": "server", "workload": "small", "load": None, "repeat": 0}
    failed = [r for r in rows if "error" in r]
    assert [(r["session"], r["step"]) for r in failed] == [("lost", 0), ("lost", 1)]
    assert "answer of step 0" in failed[1]["error"], "who needs a lost answer is not sent"
    answered = [r for r in rows if "error" not in r]
    assert len(answered) == 8
    role = {step: len(server.tokenize(blocks.text_of(f"system/{step + 1}"))) for step in (0, 1)}
    for row in answered:
        # Role, three texts of 100, ten words, and in the second step the six tokens of the first answer.
        assert row["prompt_tokens"] == role[row["step"]] + 310 + 6 * row["step"]
        assert len(row["token_s"]) == len(row["output_ids"]) == 6 - row["step"]
        assert row["token_s"] == sorted(row["token_s"]) and row["token_s"][0] > row["due_s"]
        assert row["exact"] + row["reused"] + row["fresh"] == row["prompt_tokens"]
    by_step = {(r["session"], r["step"]): r for r in answered}
    for number in range(4):
        first, second = by_step[str(number), 0], by_step[str(number), 1]
        assert second["due_s"] >= first["token_s"][-1], "the second step waits for the answer it holds"
    assert sum(r["reused"] for r in answered) > 4 * 200

    result = json.loads((out / "report.json").read_text())
    assert [(r["setup"], r["answered"], r["requests"]) for r in result["runs"]] == [("server", 8, 10)]
    assert result["summary"] == {} and (out / "small.png").exists()
    assert "## Errors" in (out / "report.md").read_text()


def test_the_points_of_a_comparison(server, tmp_path, monkeypatch):
    for name in ("_FEWEST", "_SINGLES", "_QUALITY_PROMPTS"):
        monkeypatch.setattr(compare, name, 2)
    settings = {
        "model": "m",
        "machine": "here",
        "loads": [1.0, 3.0],
        "seconds": 0.1,
        "setups": {"a": {"arguments": []}, "b": {"arguments": []}},
        "rough_capacity_rps": {},
        "capacity_rps": {},
        "quality": {},
    }
    compare._prepare(tmp_path, settings, 8, Slo(5.0, 0.5))
    trace = small_trace(5)
    for name, reuses in (("a", False), ("b", True)):
        compare._flush(server.url)
        player = Player(server.url, sockets=8)
        compare._points(player, compare.Setup(name, (), {}, reuses), trace, settings, 0, tmp_path)
        compare._save(tmp_path, settings)
    report.write_all(tmp_path)
    summary = json.loads((tmp_path / "report.json").read_text())["summary"]["small"]
    assert summary["reused_share"] > 0.3 and summary["base_capacity_rps"] > 0
    assert summary["ttft_mean_ratio"] > 0 and summary["throughput_ratio"] > 0
    quality = summary["quality"]
    assert quality["kl_prompts"] == 2 and 1e-6 < quality["kl_mean"] < 1
    assert quality["reused_prompts"] > 0 and quality["prompts"] > 0
