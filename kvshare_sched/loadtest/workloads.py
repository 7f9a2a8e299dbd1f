"""The kinds of traffic, each a seeded generator of a trace. Pure: equal arguments give equal traces.

A generator draws one session at a time; `build` lays the sessions along the arrival times. Donors for reuse stay
inside a tenant, as on the server, so tenants have libraries of their own.
"""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.loadtest import blocks
from kvshare_sched.loadtest.arrivals import ARRIVALS
from kvshare_sched.loadtest.blocks import Block
from kvshare_sched.loadtest.traces import Request, Trace, write

SEED = 20260730
REQUESTS = 160  # of a frozen trace
_TENANTS = ("north", "south")
_DOCUMENT = 320  # tokens
_SHORT = 8  # new tokens, so that prefill is what counts
_QUESTIONS = 12
_ZIPF = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One request of a session, before it has a time."""

    blocks: tuple[Block, ...]
    new_tokens: int = _SHORT
    after_s: float = 0.0  # the user's pause since the step before, at one request a second


Session = tuple[str, list[Step]]  # tenant, steps


def zipf(rng: random.Random, items: Sequence, picks: int) -> list:
    """`picks` different items; the one at place k (from 0) is drawn with weight 1 / (k + 1)."""
    left, chosen = list(items), []
    weights = [1 / (k + 1) ** _ZIPF for k in range(len(left))]
    for _ in range(picks):
        place = rng.choices(range(len(left)), weights)[0]
        chosen.append(left.pop(place))
        weights.pop(place)
    return chosen


def _library(tenant: int, documents: int, tokens: int = _DOCUMENT) -> list[Block]:
    """The documents of a tenant; nobody else has them."""
    return [(f"prose/{tenant * documents + i}", tokens) for i in range(documents)]


def _indexing(documents: int) -> Iterator[Session]:
    """A job that reads every tenant's library once, four documents a prompt: the state of a system that has run."""
    for tenant, name in enumerate(_TENANTS):
        library = _library(tenant, documents)
        for start in range(0, documents, 4):
            yield name, [Step((("system/7", 0), *library[start : start + 4]))]


def _question(rng: random.Random) -> Block:
    return (f"question/{rng.randrange(_QUESTIONS)}", 0)


def rag(rng: random.Random, new_tokens: int = _SHORT) -> Iterator[Session]:
    """A question over 3 to 5 documents of the tenant's library, some far more popular than others, in any order."""
    yield from _indexing(24)
    while True:
        tenant = rng.randrange(len(_TENANTS))
        found = zipf(rng, _library(tenant, 24), rng.randint(3, 5))
        rng.shuffle(found)
        yield _TENANTS[tenant], [Step((("system/0", 0), *found, _question(rng)), new_tokens)]


def long_outputs(rng: random.Random) -> Iterator[Session]:
    """The same with long answers: decoding takes most of the time."""
    return rag(rng, 128)


_WORKFLOW = (
    # Role, what stands first, whose answers it gets.
    ("system/1", "material", ()),
    ("system/2", "answers", (0,)),
    ("system/3", "material", (0, 1)),
    ("system/4", "answers", (1, 2)),
)


def agents(rng: random.Random) -> Iterator[Session]:
    """Four agents with roles of their own work on the same material and read what the others said."""
    yield from _indexing(16)
    while True:
        tenant = rng.randrange(len(_TENANTS))
        material = zipf(rng, _library(tenant, 16), 4)
        steps = []
        for role, first, reads in _WORKFLOW:
            rng.shuffle(material)
            answers = [(f"answer/{step}", 0) for step in reads]
            parts = [*material, *answers] if first == "material" else [*answers, *material]
            steps.append(Step(((role, 0), *parts, _question(rng)), 16))
        yield _TENANTS[tenant], steps


def chat(rng: random.Random) -> Iterator[Session]:
    """Four turns over a pasted text; every turn repeats the whole conversation, so exact prefixes do the work."""
    for number in count():
        tenant = rng.randrange(len(_TENANTS))
        said: list[Block] = [("system/5", 0), (f"prose/{rng.randrange(blocks.size('prose'))}", _DOCUMENT)]
        steps = []
        for turn in range(4):
            said.append((f"words/{number}", 20) if turn == 0 else _question(rng))
            steps.append(Step(tuple(said), 24, rng.expovariate(1 / 4) if turn else 0.0))
            said.append((f"answer/{turn}", 0))
        yield _TENANTS[tenant], steps


def rag_chat(rng: random.Random) -> Iterator[Session]:
    """Six turns about two documents of the tenant's library: everything said stands behind text that others have."""
    yield from _indexing(24)
    while True:
        tenant = rng.randrange(len(_TENANTS))
        said: list[Block] = [("system/5", 0), *zipf(rng, _library(tenant, 24), 2)]
        steps = []
        for turn in range(6):
            said.append(_question(rng))
            steps.append(Step(tuple(said), 24, rng.expovariate(1 / 4) if turn else 0.0))
            said.append((f"answer/{turn}", 0))
        yield _TENANTS[tenant], steps


def few_shot(rng: random.Random) -> Iterator[Session]:
    """Eight of a tenant's twelve worked examples in any order, then a new text to label."""
    for number in count():
        tenant = rng.randrange(len(_TENANTS))
        examples = rng.sample(_library(tenant, 12, 120), 8)
        query = (f"code/{number % blocks.size('code')}", 60)
        yield _TENANTS[tenant], [Step((("system/8", 0), *examples, query), 4)]


def code_edit(rng: random.Random) -> Iterator[Session]:
    """A file is sent again after every edit: one stretch in the middle is other code, what follows it moves."""
    for number in count():
        start = 6 * number % (blocks.size("code") - 6)
        file = [(f"code/{start + i}", 280) for i in range(5)]
        steps = []
        for turn in range(4):
            if turn:
                file[rng.randrange(1, 4)] = (f"code/{start + 5}", 200 + 30 * turn)
            pause = rng.expovariate(1 / 4) if turn else 0.0
            steps.append(Step((("system/6", 0), *file, _question(rng)), _SHORT, pause))
        yield _TENANTS[number % len(_TENANTS)], steps


def prefix_only(rng: random.Random) -> Iterator[Session]:
    """Long instructions that never move, then something new: all that can be reused is an exact prefix."""
    for number in count():
        tenant = rng.randrange(len(_TENANTS))
        query = (f"code/{number % blocks.size('code')}", 120)
        yield _TENANTS[tenant], [Step((("system/0", 0), *_library(tenant, 3), query))]


def no_repeat(rng: random.Random) -> Iterator[Session]:
    """Nothing comes twice: what reuse costs where it gives nothing."""
    for number in count():
        texts = tuple((f"words/{4 * number + i}", 280) for i in range(4))
        yield _TENANTS[rng.randrange(len(_TENANTS))], [Step(texts)]


def hot_cold(rng: random.Random) -> Iterator[Session]:
    """Nine requests in ten come from one tenant with five well known documents, the tenth is new to the server."""
    for number in count():
        if number % 10 == 9:
            texts = [(f"words/{4 * number + i}", 280) for i in range(4)]
            yield "cold", [Step((*texts, _question(rng)))]
        else:
            texts = rng.sample(_library(0, 5), 4)
            yield "hot", [Step((("system/0", 0), *texts, _question(rng)))]


WORKLOADS: dict[str, Callable[[random.Random], Iterator[Session]]] = {
    f.__name__.replace("_", "-"): f
    for f in (rag, agents, chat, rag_chat, few_shot, code_edit, prefix_only, no_repeat, hot_cold, long_outputs)
}
_WARM_UP_REQUESTS = 12  # not measured


def build(name: str, requests: int, *, arrivals: str = "poisson", seed: int = SEED) -> Trace:
    """A trace of at least `requests` requests in whole sessions, at about one request a second."""
    if name not in WORKLOADS:
        raise ConfigError(f"workload {name!r} is not known; accepted: {', '.join(WORKLOADS)}, or a trace file.")
    rng = random.Random(f"{seed}/{name}")
    sessions: list[Session] = []
    for tenant, steps in WORKLOADS[name](rng):
        sessions.append((tenant, steps))
        if sum(len(s) for _, s in sessions) >= requests:
            break
    sizes = itertools.accumulate(len(s) for _, s in sessions)
    warm_up = sum(size < _WARM_UP_REQUESTS for size in sizes) + 1  # sessions, the last of them whole
    pace = sum(len(s) for _, s in sessions) / len(sessions)
    times = [t * pace for t in ARRIVALS[arrivals](len(sessions), rng)]
    found = []
    for number, ((tenant, steps), at_s) in enumerate(zip(sessions, times, strict=True)):
        for place, step in enumerate(steps):
            at_s += step.after_s
            found.append(Request(round(at_s, 3), tenant, str(number), place, step.blocks, step.new_tokens))
    found.sort(key=lambda r: (r.at_s, int(r.session), r.step))
    about = {"seed": seed, "arrivals": arrivals, "texts": blocks.digest()}
    return Trace(name, tuple(found), warm_up, about)


def freeze(folder: Path) -> None:
    """Write every workload's trace file."""
    for name in WORKLOADS:
        write(folder / f"{name}.jsonl", build(name, REQUESTS))


if __name__ == "__main__":
    freeze(Path(sys.argv[1]))
