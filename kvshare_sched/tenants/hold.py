"""Answers of tenants to whom reuse is hidden: they leave when a server without any cache would send them, and carry no
number that tells more. In the process that talks HTTP, after the engine and before every endpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import NamedTuple

HOLD_KEY = "hold"  # in what the scheduler sends instead of a report
DELAY = "kvshare_delay"  # attribute of SGLang's state of a request, seconds
_TELLING = ("_ts", "_time", "_latency", "_wait", "_throughput", "_details")  # ends of names in SGLang's meta_info


class Hold(NamedTuple):
    """What the scheduler knows of a hidden request, in seconds."""

    started_s: float  # its prefill, by `time.perf_counter`, which is one clock for the processes of a machine
    due_s: float  # estimated from there to its first token, had nothing been cached
    saved_s: float  # estimated of what was


def delay_s(hold: Hold, first_s: float) -> float:
    """How long an answer is kept whose first token came at `first_s`.

    Until it is due: on an idle engine all answers to a prompt of this length take alike. A busy engine may have spent
    that time on other prompts; then as long as what was saved. Never longer than the whole estimate.
    """
    return min(hold.due_s, max(hold.saved_s, hold.started_s + hold.due_s - first_s, 0.0))


def without_traces(answer: Mapping) -> dict:
    """A copy of SGLang's answer that later outputs do not change, without times and without what was cached."""
    meta = {name: _copy(value) for name, value in answer["meta_info"].items() if not name.endswith(_TELLING)}
    if "cached_tokens" in meta:
        meta["cached_tokens"] = 0
    return {name: _copy(value) for name, value in answer.items()} | {"meta_info": meta}


def _copy(value):
    return list(value) if isinstance(value, list) else value


async def shifted(answers: AsyncIterator[dict], delay: Callable[[], float]) -> AsyncIterator[dict]:
    """The same answers, each `delay()` seconds after it came: a stream keeps its pace, nobody else waits.

    delay() is asked when an answer has come. What `answers` raises is raised here in its place.
    """
    line: asyncio.Queue = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def fill() -> None:
        problem = None
        try:
            async with contextlib.aclosing(answers):
                async for answer in answers:
                    line.put_nowait((loop.time() + delay(), without_traces(answer), None))
        except Exception as raised:
            problem = raised
        line.put_nowait((0.0, None, problem))

    filling = asyncio.create_task(fill())
    try:
        while True:
            due, answer, problem = await line.get()
            if problem is not None:
                raise problem
            if answer is None:
                return
            await asyncio.sleep(max(0.0, due - loop.time()))
            yield answer
    finally:
        filling.cancel()
        await asyncio.gather(filling, return_exceptions=True)
