"""The runner and the comparison against a server that only counts: what is sent, when, and what is kept."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from kvshare_sched.errors import ConfigError, SetupError
from kvshare_sched.loadtest import compare, counts, report, run, runner
from kvshare_sched.loadtest.runner import Player, read_rows
from kvshare_sched.loadtest.statistics import Slo
from kvshare_sched.loadtest.traces import Request, Trace

LONGEST = 2500  # tokens the server takes
SLO = Slo(5.0, 0.5)


class Fake(ThreadingHTTPServer):
    """Speaks as much of SGLang as the load test needs; a word is a token, its id the word's length."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[dict] = []
        self.flushed = 0
        self.running = self.most = 0
        self.lock = threading.Lock()
        self.heard = lambda path: None
        self.miscounted = 0  # tokens of a request that /metrics has too many
        self.together: threading.Barrier | None = None  # answers nobody before that many are there


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _json(self, value, status=200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.server.heard(self.path)
        if self.path == "/metrics":
            return self._metrics()
        models = {"data": [{"id": "fake"}]}
        self._json(models if self.path == "/v1/models" else {"loads": [{"num_running_reqs": 0, "num_waiting_reqs": 0}]})

    def _metrics(self):
        """kvshare's counts: three exact tokens a request, the rest fresh."""
        asked = [len(body["input_ids"]) for body in self.server.asked if len(body["input_ids"]) <= LONGEST]
        found = {"exact": 3 * len(asked), "reused": 0, "fresh": sum(asked) - (3 - self.server.miscounted) * len(asked)}
        lines = [f'kvshare_prompt_tokens_total{{origin="{o}"}} {float(n)}' for o, n in found.items()]
        body = ("# TYPE kvshare_prompt_tokens counter\n" + "\n".join(lines) + "\n").encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.server.heard(self.path)
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])) or "{}")
        if self.path == "/tokenize":
            return self._json({"tokens": [[len(word) for word in text.split()] for text in body["prompt"]]})
        if self.path == "/flush_cache":
            self.server.flushed += 1
            return self._json({})
        with self.server.lock:
            self.server.asked.append(body)
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            if len(body["input_ids"]) > LONGEST:
                return self._json({"error": "too long"}, 400)
            if self.server.together is not None:
                self.server.together.wait(timeout=20)
            self._stream(body)
        finally:
            with self.server.lock:
                self.server.running -= 1

    def _stream(self, body):
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = body["sampling_params"]["max_new_tokens"]
        for done in range(1, count + 1):
            meta = {
                "prompt_tokens": len(body["input_ids"]),
                "cached_tokens": 3,
                "finish_reason": {"type": "length"} if done == count else None,
            }
            self._chunk(
                "data: " + json.dumps({"output_ids": [1000 + i for i in range(done)], "meta_info": meta}) + "\n\n"
            )
            time.sleep(0.002)
        self._chunk("data: [DONE]\n\n")
        self._chunk("")

    def _chunk(self, text):
        self.wfile.write(f"{len(text):x}\r\n{text}\r\n".encode())


@pytest.fixture
def fake():
    server = Fake()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def request(number: int, at_s: float = 0.0, step: int = 0, blocks=(("prose/0", 30),), new_tokens: int = 3) -> Request:
    return Request(at_s, "team", str(number), step, tuple(blocks), new_tokens)


def test_rows_tell_what_was_sent_and_what_came_back(fake):
    blocks = (("text/one two", 0), ("text/three four", 5))
    (row,) = Player(fake.url).play([request(0, 0.05, blocks=blocks, new_tokens=4)], "t")
    (asked,) = fake.asked
    assert asked["input_ids"] == [3, 3, 5, 4, 5, 4, 5], "cut or repeated to the wanted length"
    assert asked["extra_key"] == "team" and asked["stream"] and "priority" not in asked
    assert asked["sampling_params"] == {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
    assert row["due_s"] == 0.05 < row["token_s"][0] and len(row["token_s"]) == 4
    assert row["output_ids"] == [1000, 1001, 1002, 1003]
    assert (row["prompt_tokens"], row["exact"], row["reused"], row["fresh"]) == (7, 3, 0, 4)


def test_nobody_waits_for_another_answer(fake):
    fake.together = threading.Barrier(12)  # a closed loop of fewer would never be answered
    rows = Player(fake.url).play([request(i, i * 0.01) for i in range(12)], "t")
    assert all("error" not in r for r in rows)
    assert [r["due_s"] for r in rows] == pytest.approx([i * 0.01 for i in range(12)])


def test_sockets_are_bounded_and_waiting_for_one_counts(fake):
    rows = Player(fake.url, sockets=2).play([request(i) for i in range(10)], "t")
    assert fake.most <= 2 and len(fake.asked) == 10
    assert all(r["due_s"] == 0 for r in rows), "counted from when it was due, not from when a socket was free"


def test_a_step_waits_for_the_answer_it_holds(fake):
    second = request(0, step=1, blocks=(("answer/0", 0), ("text/and now", 0)))
    first = request(0, new_tokens=5)
    rows = Player(fake.url).play([second, first], "t")
    assert fake.asked[1]["input_ids"] == [1000, 1001, 1002, 1003, 1004, 3, 3]
    assert rows[0]["due_s"] >= rows[1]["token_s"][-1], "due when the answer is there"


class Awake:
    """Servers that may only be spoken to in turn; behind all of them is one."""

    def __init__(self, fake):
        self.turns: Counter = Counter()
        self.who = None
        self.halted: list = []
        self.disturbed: list[str] = []  # paths asked for while all of them were halted
        self.asked = 0
        fake.heard = self.heard

    def heard(self, path: str) -> None:
        if self.who is None and path != "/generate":  # a socket may still hold one of those at the end of a turn
            self.disturbed.append(path)

    @contextlib.contextmanager
    def block(self, name):
        assert self.who is None, f"{name} is woken beside {self.who}"
        self.who = name
        self.turns[name] += 1
        try:
            yield
        finally:
            self.who = None

    def server(self, url: str):
        name, self.asked = self.asked, self.asked + 1
        halt = functools.partial(self.halted.append, name)
        return SimpleNamespace(url=url, halt=halt, awake=functools.partial(self.block, name))


def test_a_clock_stands_still_while_its_server_is_halted():
    async def scenario():
        clock = runner.Clock()
        await asyncio.sleep(0.02)
        assert clock.now() == 0, "nothing has run yet"
        waits = asyncio.create_task(clock.until(0.3))
        clock.start()
        await asyncio.sleep(0.01)
        clock.stop()
        stood = clock.now()
        await asyncio.sleep(0.4)  # a timer made before the halt ends in it
        assert clock.now() == stood and 0.01 <= stood < 0.3 and not waits.done()
        clock.start()
        await waits
        assert clock.now() >= 0.3
        await clock.until(0.01)

    asyncio.run(scenario())


def test_two_players_in_turns_see_one_machine_each(fake):
    """Sent at the same seconds of their own clocks, of which only one goes at a time."""
    awake = Awake(fake)
    turns = [runner.Turn(Player(fake.url), name, functools.partial(awake.block, name)) for name in "ab"]
    asked = [request(i, 0.05 * i) for i in range(8)]
    started = time.perf_counter()
    one, other = runner.play_in_turn(turns, asked, 0.03)
    assert time.perf_counter() - started >= 2 * asked[-1].at_s, "two clocks that never go together"
    assert [r["due_s"] for r in one] == [r["due_s"] for r in other] == [r.at_s for r in asked]
    for rows in (one, other):
        assert all(row["token_s"][0] >= row["due_s"] - 0.001 for row in rows), "nothing comes before its time"
    assert awake.turns["a"] > 3 < awake.turns["b"] and not awake.disturbed
    assert [r["prompt"] for r in one] == [r["prompt"] for r in other]


def test_answers_are_known_in_a_later_part(fake):
    player = Player(fake.url)
    player.play([request(0)], "t")
    (row,) = player.play([request(0, step=1, blocks=(("answer/0", 0),))], "t")
    assert row["prompt_tokens"] == 3


def test_a_refused_request_is_a_row_and_hurts_nobody_else(fake):
    long = request(0, blocks=(("words/1", LONGEST + 1),))
    after = request(0, step=1, blocks=(("answer/0", 0),))
    rows = Player(fake.url).play([long, after, request(1)], "t")
    assert "400" in rows[0]["error"] and "too long" in rows[0]["error"]
    assert "step 0" in rows[1]["error"] and "error" not in rows[2]
    assert len(fake.asked) == 2


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_points_of_a_comparison(fake, tmp_path, monkeypatch, interleaved):
    monkeypatch.setattr(compare, "_QUIET_S", 0.0)
    trace = Trace("small", tuple(request(i, float(i)) for i in range(40)), warm_up=3)
    settings = {"model": "m", "machine": "here", "rate": None, "loads": [1.0, 4.0], "seconds": 0.01}
    settings |= {"setups": {"a": {"arguments": []}, "b": {"arguments": []}}}
    settings |= {"rough_capacity_rps": {}, "capacity_rps": {}, "quality": {}}
    compare._prepare(tmp_path, settings, 8, SLO)
    settings["interleave_s"] = 0.05 if interleaved else None
    awake, sides, played = Awake(fake), [], []

    def play(turns, requests, slice_s):
        played.append(([turn.title for turn in turns], slice_s))
        return runner.play_in_turn(turns, requests, slice_s)

    monkeypatch.setattr(compare, "play_in_turn", play)
    for name in ("a", "b"):
        block = functools.partial(awake.block, name) if interleaved else contextlib.nullcontext
        sides.append(compare._Side(compare.Setup(name, (), {}, False), Player(fake.url), block))
    for group in [sides] if interleaved else [[side] for side in sides]:
        compare._points(group, trace, settings, 0, tmp_path)
        compare._save(tmp_path, settings)
    assert fake.flushed == 2
    if interleaved:
        assert played == [(["a small load 4", "b small load 4"], 0.05), (["a small load 1", "b small load 1"], 0.05)]
        assert not awake.disturbed
    runs = {path.stem: read_rows(path) for path in (tmp_path / "raw").glob("*.jsonl")}
    assert set(runs) == {"a-small-1-0", "a-small-4-0", "b-small-1-0", "b-small-4-0"}
    measured = [{r["session"] for r in rows} for _, rows in runs.values()]
    assert all(len(sessions) == 8 for sessions in measured)
    assert not {"0", "1", "2"} & set.union(*measured), "the warm-up does not count"
    for load in ("1", "4"):
        due = [[r["due_s"] for r in runs[f"{n}-small-{load}-0"][1]] for n in ("a", "b")]
        assert due[0] == due[1], "both are offered the same"
    span = {n: max(r["due_s"] for r in runs[n][1]) for n in runs}
    capacity, rough = settings["capacity_rps"]["small"], settings["rough_capacity_rps"]["small"]
    assert span["a-small-1-0"] == pytest.approx(7 / capacity) and span["a-small-4-0"] == pytest.approx(7 / rough / 4)
    report.write_all(tmp_path)
    assert json.loads((tmp_path / "report.json").read_text())["summary"]["small"]["reused_share"] == 0


@pytest.mark.parametrize("interleave_s", [None, 1.0])
def test_a_comparison_at_a_rate_that_is_given(fake, tmp_path, monkeypatch, interleave_s):
    monkeypatch.setattr(compare, "_QUIET_S", 0.0)
    awake = Awake(fake)
    monkeypatch.setattr(compare.launch, "launched", lambda *_, **__: contextlib.nullcontext(awake.server(fake.url)))
    monkeypatch.setattr(compare, "_points", functools.partial(_without_quality, compare._points))
    trace = Trace("small", tuple(request(i, float(i)) for i in range(40)), warm_up=3)
    monkeypatch.setattr(run, "load_trace", lambda *_: trace)
    asked = {"url": None, "out": str(tmp_path), "server_arguments": [], "interleave_s": interleave_s}
    assert run.run(**ASKED | asked | {"setups": ["stock", "kvshare"], "model_path": "m", "seconds": 0.05}) == 0
    if interleave_s is None:
        assert not awake.halted and not awake.turns
    else:
        assert awake.halted == [0, 1] and awake.turns.keys() == {0, 1} and not awake.disturbed
    runs = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert [r["requests"] for r in runs] == [20, 20] and {r["load"] for r in runs} == {1.0}
    assert [r["offered_rps"] for r in runs] == pytest.approx([400.0, 400.0])
    assert "All are offered 400 requests a second" in (tmp_path / "report.md").read_text()


def _without_quality(points, sides, *rest):
    points([replace(side, setup=replace(side.setup, reuses=False)) for side in sides], *rest)


@pytest.mark.parametrize("wrong", [{"interleave_s": 0.5}, {"setups": ["stock"]}, {"url": "u"}])
def test_turns_need_two_servers_of_ours_and_a_length(wrong, tmp_path):
    asked = {"url": None, "setups": ["stock", "kvshare"], "interleave_s": 5.0, "out": str(tmp_path)}
    with pytest.raises(ConfigError, match="1 second or longer"):
        run.run(**ASKED | asked | wrong, server_arguments=[])


def test_a_set_up_that_answers_nothing_ends_the_comparison_with_all_rows_written(fake, tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "_QUIET_S", 0.0)
    done = [{"token_s": [1.0], "due_s": 0.0, "output_ids": [1]}]
    monkeypatch.setattr(compare, "play_in_turn", lambda *_: [done, [{"due_s": 0.0, "error": "gone"}]])
    sides = [
        compare._Side(compare.Setup(name, (), {}, False), Player(fake.url), contextlib.nullcontext) for name in "ab"
    ]
    settings = {"interleave_s": 1.0, "capacity_rps": {}}
    with pytest.raises(SetupError, match="gone"):
        compare._point(sides, "small", 1.0, [], settings, 0, tmp_path)
    assert len(list((tmp_path / "raw").glob("*.jsonl"))) == 2


def test_a_set_up_is_compared_once(tmp_path):
    with pytest.raises(ConfigError, match="the same name twice"):
        run.run(**ASKED | {"setups": ["kvshare", "kvshare"]}, url=None, out=str(tmp_path), server_arguments=[])


ASKED = {"setups": [], "names": ["rag"], "requests": 20, "arrivals": "bursty", "rate": 400.0, "loads": [], "seconds": 1}
ASKED |= {"interleave_s": None, "repeats": 1, "sockets": 4, "slo": SLO, "model_path": None, "check_counts": False}


def test_a_server_by_url(fake, tmp_path):
    assert run.run(url=fake.url + "/", out=str(tmp_path), server_arguments=[], **ASKED) == 0
    (found,) = json.loads((tmp_path / "report.json").read_text())["runs"]
    assert (
        found["requests"] == 20 and found["setup"] == "server" and found["offered_rps"] == pytest.approx(400, rel=0.1)
    )


def test_three_sources_of_one_count(fake, tmp_path, capsys):
    checked = {"url": fake.url, "out": str(tmp_path), "server_arguments": []} | ASKED | {"check_counts": True}
    assert run.run(**checked) == 0
    (found,) = json.loads((tmp_path / "raw" / "settings.json").read_text())["prompt_tokens"].values()
    assert found["answers"] == found["metrics"] and found["answers"]["exact"] == 60
    assert found["sent"] == sum(found["answers"].values()) and "they agree" in capsys.readouterr().out
    fake.asked.clear()
    fake.miscounted = 1
    assert run.run(**checked) == 1 and "THEY DIFFER" in capsys.readouterr().out
    assert run.run(**checked | {"check_counts": False}) == 0


def test_counts_of_a_server_without_our_series_agree_with_nothing(tmp_path, capsys):
    rows = [{"sent_tokens": 5, "exact": 2, "reused": 0, "fresh": 3}, {"error": "lost"}]
    found = counts.sources(rows, {}, {})
    assert found == {"failed": 1, "sent": 5, "answers": {"exact": 2, "reused": 0, "fresh": 3}, "metrics": None}
    assert not counts.agree(found) and "1 requests failed" in counts.line("t", found)
    with pytest.raises(ConfigError, match="needs --url"):
        run.run(url=None, out=str(tmp_path), server_arguments=[], **ASKED | {"check_counts": True})


def test_longest_waits_are_those_of_this_run_and_end_at_a_bucket():
    def scrape(**buckets) -> dict:
        edges = ("512.0", "4096.0", "+Inf")
        found = [
            ({"tenant": t, "le": e}, n) for t, counted in buckets.items() for e, n in zip(edges, counted, strict=True)
        ]
        return {"kvshare_tenant_wait_tokens_bucket": found}

    before = scrape(cold=(0, 2, 2), hot=(5, 5, 9), gone=(1, 1, 1))
    after = scrape(cold=(7, 9, 9), hot=(5, 6, 10), gone=(1, 1, 1), new=(0, 0, 3))
    assert counts.longest_waits(before, after) == {"cold": 512, "hot": 4096, "new": None}
    assert counts.longest_waits({}, {}) == {}


def test_no_server_is_one_readable_line(tmp_path):
    with pytest.raises(SetupError, match="no SGLang server answers"):
        run.run(url="http://127.0.0.1:9", out=str(tmp_path), server_arguments=[], **ASKED)


def test_setups_differ_where_they_should():
    common = ["--model-path", "m", "--max-total-tokens", "1"]
    stock, ours, other = (compare.setup(n, common) for n in ("stock", "kvshare", "kvshare+fcfs"))
    assert "--radix-cache-backend" not in stock.arguments and stock.arguments[-2:] == ("--schedule-policy", "lpm")
    assert stock.environment["SGLANG_PLUGINS"] in ("kvshare_cpu", "__none__") and not ours.environment
    assert "--schedule-policy" not in ours.arguments and other.arguments[-2:] == ("--schedule-policy", "fcfs")
    assert set(stock.arguments) - {"--schedule-policy", "lpm"} == set(ours.arguments) - {
        "--radix-cache-backend",
        "kvshare",
    }


def test_every_repeat_begins_with_another_set_up():
    setups = [compare.Setup(name, (), {}, False) for name in "abc"]
    turns = ["".join(s.name for s in compare.rotated(setups, repeat)) for repeat in range(4)]
    assert turns == ["abc", "bca", "cab", "abc"]
