"""The load test against a real server: every request answered, counted, reported. Comparing: see the unit tests."""

from __future__ import annotations

import json

from kvshare_sched.loadtest import blocks, quality, traces
from kvshare_sched.loadtest.runner import Player, read_rows
from kvshare_sched.loadtest.traces import Request, Trace
from kvshare_sched.tools.cli import main

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
    return Trace("small", tuple(found))


def test_a_running_server_by_url(server, tmp_path):
    trace = small_trace(4)
    lost = Request(0.1, "team", "lost", 0, (("words/1", 9_000),), 4)  # longer than the model's context
    after = Request(0.1, "team", "lost", 1, (("answer/0", 0), *TEXTS), 4)
    traces.write(tmp_path / "small.jsonl", Trace("small", (*trace.requests, lost, after)))
    out = tmp_path / "out"
    asked = ["--url", server.url, "--traces", str(tmp_path / "small.jsonl"), "--rate", "3", "--sockets", "2"]
    assert main(["bench", *asked, "--check-counts", "--out", str(out)]) == 0, "answers, /metrics and client count alike"

    about, rows = read_rows(out / "raw" / "server-small.jsonl")
    waits = about.pop("waits")  # the one tenant's, which may be shown among the others, and perhaps those of audits
    assert waits and None not in waits.values(), "nobody waits for 65,536 tokens of service here"
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
    told = json.loads((out / "raw" / "settings.json").read_text())["prompt_tokens"]["small"]
    assert told["metrics"]["reused"] == sum(r["reused"] for r in answered) and told["failed"] == 2

    result = json.loads((out / "report.json").read_text())
    assert [(r["setup"], r["answered"], r["requests"]) for r in result["runs"]] == [("server", 8, 10)]
    assert result["summary"] == {} and (out / "small.png").exists()
    assert "## Errors" in (out / "report.md").read_text()


def test_quality_is_measured_on_prompts_of_the_trace(server):
    requests = small_trace(2).requests
    player = Player(server.url)
    player.play(requests, "small")
    found = quality.divergence(player, [requests[1], requests[3]])  # the steps that hold an answer
    assert found["prompts"] == 2 and found["reused_prompts"] > 0
    assert 1e-6 < found["kl_mean"] <= found["kl_max"] < 1
