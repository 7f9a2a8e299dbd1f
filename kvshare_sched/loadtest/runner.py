"""Plays requests against a running SGLang, open loop: a request is sent when it is due, whoever is still waiting.

One task a request, sockets bounded. A request that found no free socket, or whose server is slow to accept, waits
on the client: its time to first token counts from when it was due, so nothing is hidden. Every token's time is kept.
`play_in_turn` plays to several servers on one machine, of which only one runs at any moment.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import aiohttp

from kvshare_sched.client.http import Client
from kvshare_sched.loadtest import blocks
from kvshare_sched.loadtest.blocks import Block
from kvshare_sched.loadtest.traces import Request

_TIMEOUT_S = 3600  # of a request, turns of other servers included
_KEEP_S = 2.0  # an idle socket: servers close theirs (uvicorn after 5 s), and a request sent at that moment is lost
_TOKENIZE_BATCH = 64
_ORIGINS = ("exact", "reused", "recomputed", "fresh", "outcome", "reason")


class Encoder:
    """Block -> token ids of the server's model. Blocks are tokenised apart, so a text has the same ids anywhere."""

    def __init__(self, client: Client):
        self._client = client
        self._ids: dict[str, list[int]] = {}

    def learn(self, requests: Sequence[Request]) -> None:
        """Ask the server for every text of these requests that is not known yet."""
        names = {name for r in requests for name, _ in r.blocks if blocks.answer_step(name) is None}
        new = sorted(names - self._ids.keys())
        for start in range(0, len(new), _TOKENIZE_BATCH):
            part = new[start : start + _TOKENIZE_BATCH]
            body = {"model": "any", "prompt": [blocks.text_of(n) for n in part], "add_special_tokens": False}
            found = self._client.post("/tokenize", body).json()["tokens"]
            self._ids.update(zip(part, found, strict=True))

    def ids(self, block: Block) -> list[int]:
        """Exactly the wanted number of ids: cut, or repeated from the start; 0 tokens: as many as the text has."""
        name, tokens = block
        known = self._ids[name]
        if not tokens:
            return known
        return (known * -(-tokens // len(known)))[:tokens]


class Clock:
    """Seconds since the run of a server began, without those in which it was halted."""

    def __init__(self):
        self._spent, self._since = 0.0, None  # before it was halted last; when it went on, None: it is halted
        self._goes = asyncio.Event()

    def start(self) -> None:
        self._since = time.perf_counter()
        self._goes.set()

    def stop(self) -> None:
        self._spent, self._since = self.now(), None
        self._goes.clear()

    def now(self) -> float:
        return self._spent + (0.0 if self._since is None else time.perf_counter() - self._since)

    async def until(self, second: float) -> None:
        """Return at that second, at once when it has passed."""
        while (left := second - self.now()) > 0:
            await self._goes.wait()
            await asyncio.sleep(left)


class Player:
    """One server during one run. Answers are remembered, so that parts of one trace may be played one by one."""

    def __init__(self, url: str, *, sockets: int = 256):
        self.client = Client(url)
        self.encoder = Encoder(self.client)
        self._sockets = sockets
        self._answers: dict[tuple[str, int], list[int] | None] = {}  # None: that request failed

    def play(self, requests: Sequence[Request], title: str) -> list[dict]:
        """Send them all at their times; returns one row a request, in the order given (`_ask`)."""
        (rows,) = play_in_turn([Turn(self, title, nullcontext)], requests)
        return rows

    async def run(self, requests: Sequence[Request], title: str, clock: Clock) -> list[dict]:
        """As `play`, by a clock that somebody else starts; the texts are known (`Encoder.learn`)."""
        progress = _Progress(title, len(requests), clock)
        self._done = {(r.session, r.step): asyncio.Event() for r in requests}
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=self._sockets, keepalive_timeout=_KEEP_S)
        # An answer carries its whole report and, on a long one, all its ids: lines are far longer than the default.
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=1 << 22) as http:
            tasks = [asyncio.create_task(self._one(http, clock, r, progress)) for r in requests]
            rows = await asyncio.gather(*tasks)
        progress.close()
        return rows

    async def _one(self, http, clock: Clock, request: Request, progress: _Progress) -> dict:
        key = (request.session, request.step)
        try:
            await clock.until(request.at_s)
            for step in request.needs:
                if (request.session, step) in self._done:
                    await self._done[request.session, step].wait()
            due = max(request.at_s, clock.now()) if request.needs else request.at_s
            row = {"tenant": request.tenant, "session": request.session, "step": request.step, "due_s": due}
            progress.sent()
            try:
                row |= await self._ask(http, clock, request)
                self._answers[key] = row["output_ids"]
            except Exception as problem:  # whatever it was, the other requests go on and the row says it
                self._answers[key] = None
                row |= {"error": f"{type(problem).__name__}: {problem}"[:500]}
            progress.answered()
            return row
        finally:
            self._done[key].set()

    async def _ask(self, http, clock: Clock, request: Request) -> dict:
        prompt = list(self._prompt(request))
        body = {
            "input_ids": prompt,
            "sampling_params": {"temperature": 0, "max_new_tokens": request.new_tokens, "ignore_eos": True},
            "extra_key": request.tenant,
            "stream": True,
        }
        if request.priority:
            body["priority"] = request.priority
        times: list[float] = []
        last: dict = {}
        async with http.post(self.client.url + "/generate", json=body) as response:
            if response.status != 200:
                raise RuntimeError(f"the server answered {response.status}: {(await response.text())[:300]}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = clock.now()
                    last = json.loads(line[6:])
                    if "error" in last:
                        raise RuntimeError(str(last["error"]))
                    times += [now] * (len(last["output_ids"]) - len(times))
        meta = last["meta_info"]
        if meta["finish_reason"]["type"] == "abort":
            raise RuntimeError(str(meta["finish_reason"].get("message", "aborted")))
        return {
            "token_s": [round(t, 4) for t in times],
            "prompt_tokens": meta["prompt_tokens"],
            "sent_tokens": len(prompt),
            "prompt": hashlib.sha256(repr(prompt).encode()).hexdigest()[:16],
            "output_ids": last["output_ids"],
            **_origins(meta),
        }

    def prompt(self, request: Request) -> list[int]:
        """Token ids of a request whose earlier answers are known."""
        return list(self._prompt(request))

    def _prompt(self, request: Request) -> Iterator[int]:
        for block in request.blocks:
            step = blocks.answer_step(block[0])
            if step is None:
                yield from self.encoder.ids(block)
                continue
            answer = self._answers.get((request.session, step))
            if answer is None:
                raise RuntimeError(f"the answer of step {step} that this prompt holds has failed")
            yield from answer


@dataclass(frozen=True, slots=True)
class Turn:
    """One of several servers that play the same requests."""

    player: Player
    title: str
    awake: Callable[[], AbstractContextManager]  # its server runs in this block, and perhaps only there


def play_in_turn(turns: Sequence[Turn], requests: Sequence[Request], slice_s: float | None = None) -> list[list[dict]]:
    """Each player's rows of the same requests, as of `Player.play`.

    They take turns of `slice_s` seconds (None: one turn, to the end). Nobody's clock runs while its server is halted.
    So each sees a machine of its own, and while all of them run the same one, however its speed drifts.
    """
    for turn in turns:
        with turn.awake():
            turn.player.encoder.learn(requests)
    return asyncio.run(_in_turn(turns, requests, slice_s))


async def _in_turn(turns: Sequence[Turn], requests: Sequence[Request], slice_s: float | None) -> list[list[dict]]:
    clocks = [Clock() for _ in turns]
    runs = [
        asyncio.create_task(turn.player.run(requests, turn.title, clock))
        for turn, clock in zip(turns, clocks, strict=True)
    ]
    while not all(run.done() for run in runs):
        for turn, clock, run in zip(turns, clocks, runs, strict=True):
            if run.done():
                continue
            with turn.awake():
                clock.start()
                await asyncio.wait([run], timeout=slice_s)
                clock.stop()
    return [run.result() for run in runs]


def _origins(meta: dict) -> dict:
    """Where the prompt's tokens came from: our report, or SGLang's own count of exact prefix hits."""
    report = meta.get("kvshare")
    if report is not None:
        return {k: report[k] for k in _ORIGINS}
    exact = meta.get("cached_tokens", 0)
    return {"exact": exact, "reused": 0, "recomputed": 0, "fresh": meta["prompt_tokens"] - exact}


class _Progress:
    """One line on a terminal; one line at the end elsewhere."""

    def __init__(self, title: str, total: int, clock: Clock):
        self._title, self._total, self._clock = title, total, clock
        self._sent = self._answered = 0
        self._shown = time.monotonic()

    def sent(self) -> None:
        self._sent += 1
        self._show()

    def answered(self) -> None:
        self._answered += 1
        self._show()

    def _show(self) -> None:
        if sys.stderr.isatty() and time.monotonic() - self._shown > 0.1:
            self._shown = time.monotonic()
            filled = 24 * self._answered // self._total
            print(f"\r{'#' * filled:.<24} {self._line()}\x1b[K", end="", file=sys.stderr, flush=True)

    def _line(self) -> str:
        waiting = self._sent - self._answered
        return f"{self._title}: {self._answered}/{self._total} answered, {waiting} waiting, {self._clock.now():.0f} s"

    def close(self) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[K", end="", file=sys.stderr)
        print(self._line(), file=sys.stderr, flush=True)


def write_rows(path: Path, about: dict, rows: Sequence[dict]) -> None:
    """Raw results: one line about the run, then one a request."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(row, separators=(",", ":")) for row in (about, *rows)) + "\n")


def read_rows(path: Path) -> tuple[dict, list[dict]]:
    """What `write_rows` wrote."""
    about, *rows = map(json.loads, path.read_text().splitlines())
    return about, rows
