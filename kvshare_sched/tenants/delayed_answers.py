"""Answers of tenants to whom reuse is hidden: they leave when a server without any cache would send them, and carry no
number that tells more. In the process that talks HTTP, after the engine and before every endpoint.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping
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


async def shifted(answers: AsyncGenerator[dict], delay: Callable[[], float]) -> AsyncGenerator[dict]:
    """The same answers, each `delay()` seconds after it came: a stream keeps its pace, nobody else waits.

    delay() is asked when an answer has come. What `answers` raises is raised here behind what came before it. While a
    client does not read, one more answer is taken at most: else there would soon be as many copies of it as tokens.
    """
    loop = asyncio.get_running_loop()

    async def take() -> tuple[float, dict] | None:
        answer = await anext(answers, None)
        return None if answer is None else (loop.time() + delay(), without_traces(answer))

    line: deque[tuple[float, dict]] = deque()
    coming, problem = asyncio.create_task(take()), None  # None: nothing comes any more
    try:
        while line or coming is not None:
            wait = line[0][0] - loop.time() if line else None
            if wait is not None and wait <= 0:
                yield line.popleft()[1]
            elif coming is None:
                await asyncio.sleep(wait)
            else:
                await asyncio.wait([coming], timeout=wait)
                if coming.done():
                    problem = coming.exception()
                    found = coming.result() if problem is None else None
                    coming = asyncio.create_task(take()) if found is not None else None
                    line.extend([] if found is None else [found])
        if problem is not None:
            raise problem
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        await answers.aclose()
