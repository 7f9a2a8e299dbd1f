"""Requests as data: frozen trace files, other people's formats, and changes of pace. Pure but for reading files.

A trace file is JSON lines: a header, then one request a line. Blocks are names and lengths (`blocks`), so a
trace of hundreds of prompts stays small, and everybody who reads it asks the same questions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.loadtest.blocks import Block, answer_step

_MOONCAKE_BLOCK = 512  # tokens behind one of its hash ids


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, due `at_s` seconds after the start and not before the answers it holds are known."""

    at_s: float
    tenant: str
    session: str
    step: int  # place in its session, from 0; an `answer/<step>` block names it
    blocks: tuple[Block, ...]
    new_tokens: int
    priority: int = 0

    @property
    def needs(self) -> tuple[int, ...]:
        """Steps of the session whose answers stand in this prompt."""
        return tuple(s for name, _ in self.blocks if (s := answer_step(name)) is not None)


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of `at_s`; the first `warm_up` sessions are not measured."""

    name: str
    requests: tuple[Request, ...]
    warm_up: int = 0
    about: dict = field(default_factory=dict)  # seed and the like, for the reader


def write(path: Path, trace: Trace) -> None:
    """Freeze a trace."""
    header = {"trace": trace.name, "warm_up": trace.warm_up, **trace.about}
    rows = ({k: v for k, v in asdict(r).items() if k != "priority" or v} for r in trace.requests)
    lines = (json.dumps(row, separators=(",", ":")) for row in (header, *rows))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def read(path: str | Path, limit: int | None = None) -> Trace:
    """A trace file of ours, a Mooncake trace (JSON lines) or ShareGPT-style JSON; `limit`: first requests only.

    Raises ConfigError for anything else, with the line number.
    """
    path = Path(path)
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as problem:
        raise ConfigError(f"trace {path} cannot be read: {problem}") from None
    try:
        if content.lstrip().startswith("["):
            return Trace(path.stem, _head(sharegpt(_json(path, 1, content)), limit))
        lines = [line for line in content.splitlines() if line.strip()]
        rows = [_json(path, number, line) for number, line in enumerate(lines, 1)]
        if rows and "trace" in rows[0]:
            header, *rows = rows
            about = {k: v for k, v in header.items() if k not in ("trace", "warm_up")}
            return Trace(header["trace"], _head(map(_request, rows), limit), header["warm_up"], about)
        return Trace(path.stem, _head(mooncake(rows), limit))
    except (KeyError, TypeError, ValueError, AttributeError) as problem:
        raise ConfigError(
            f"trace {path} cannot be read ({type(problem).__name__}: {problem}); expected a trace of `kvshare bench`, "
            "Mooncake lines (timestamp, input_length, output_length, hash_ids) or ShareGPT-style JSON."
        ) from None


def _json(path: Path, number: int, line: str):
    try:
        return json.loads(line)
    except ValueError as problem:
        raise ConfigError(f"trace {path}: line {number} is no JSON ({problem}).") from None


def _head(requests, limit: int | None) -> tuple[Request, ...]:
    return tuple(islice(sorted(requests, key=lambda r: r.at_s), limit))


def _request(row: dict) -> Request:
    blocks = tuple((str(name), int(tokens)) for name, tokens in row["blocks"])
    return Request(**(row | {"blocks": blocks}))


def mooncake(rows: Sequence[dict]) -> Iterator[Request]:
    """Mooncake's public traces: `timestamp` in ms, and a hash id for every 512 tokens of the prompt.

    Equal ids become equal text; a request is a session of its own.
    """
    for number, row in enumerate(rows):
        left, blocks = int(row["input_length"]), []
        for key in row["hash_ids"]:
            blocks.append((f"words/{int(key)}", min(_MOONCAKE_BLOCK, left)))
            left -= _MOONCAKE_BLOCK
            if left <= 0:
                break
        yield Request(row["timestamp"] / 1000, "mooncake", str(number), 0, tuple(blocks), int(row["output_length"]))


def sharegpt(conversations: Sequence[dict], new_tokens: int = 64) -> Iterator[Request]:
    """ShareGPT-style conversations: every human turn is a request behind all turns before it, as they were said.

    One conversation a second, a session of its own whatever id it has: public files repeat ids. A turn is due once the
    answer before it has come.
    """
    for number, entry in enumerate(conversations):
        turns = [(t.get("from") or t.get("role"), t.get("value") or t.get("content") or "") for t in _turns(entry)]
        said: list[Block] = []
        step = 0
        for who, text in turns:
            if who in ("human", "user"):
                said.append((f"text/{text}", 0))
                yield Request(float(number), "sharegpt", str(number), step, tuple(said), new_tokens)
                said.append((f"answer/{step}", 0))
                step += 1
            elif who == "system":
                said.append((f"text/{text}", 0))


def _turns(entry: dict) -> list[dict]:
    return entry["conversations"] if "conversations" in entry else entry["messages"]


# ---- pace and parts ----


def sessions_of(requests: Sequence[Request]) -> dict[str, list[Request]]:
    """Session -> its requests, in order of first appearance."""
    found: dict[str, list[Request]] = {}
    for request in requests:
        found.setdefault(request.session, []).append(request)
    return found


def parts(trace: Trace, counts: Sequence[int]) -> list[tuple[Request, ...]]:
    """The warm-up, then for each count that many requests of the sessions that follow; no session is torn.

    Raises ConfigError when the trace is too short.
    """
    groups = iter(sessions_of(trace.requests).values())
    found = [tuple(r for group in islice(groups, trace.warm_up) for r in group)]
    for count in counts:
        part: list[Request] = []
        while len(part) < count:
            group = next(groups, None)
            if group is None:
                raise ConfigError(
                    f"trace {trace.name!r} has {len(trace.requests)} requests, too few for a warm-up and "
                    f"{list(counts)}; ask for fewer seconds or give a longer trace."
                )
            part += group
        found.append(tuple(sorted(part, key=lambda r: r.at_s)))
    return found


def retimed(requests: Sequence[Request], rate: float | None) -> tuple[Request, ...]:
    """The same order and the same rhythm with `rate` requests a second; the first is due at 0.

    None keeps the trace's own pace. A session keeps its form: the gaps inside it shrink as those between sessions.
    """
    first = min(r.at_s for r in requests)
    scale = 1.0
    if rate is not None:
        starts = [group[0].at_s for group in sessions_of(requests).values()]
        wanted = (len(starts) - 1) * len(requests) / len(starts) / rate
        span = max(starts) - min(starts)
        scale = wanted / span if span else 0.0
    return tuple(replace(r, at_s=(r.at_s - first) * scale) for r in requests)
