"""Requests for the simulator: a trace of `kvshare bench`, or made up. Prompts are lists of named blocks of text."""

from __future__ import annotations

import bisect
import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvshare_sched.errors import ConfigError

Block = tuple[str, int]  # name, tokens
_WORD_TOKENS = 1.4  # of English, for blocks that are given as text
_SHORT = 20  # tokens of a block whose text the trace only names: an instruction or a question


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt, due `at_s` and not before the steps of its session that it quotes are answered."""

    at_s: float
    tenant: str
    session: str
    step: int
    blocks: tuple[Block, ...]
    new_tokens: int
    priority: int = 0
    needs: tuple[int, ...] = ()

    @property
    def prompt(self) -> int:
        """Tokens."""
        return sum(tokens for _, tokens in self.blocks)


def read(path: str | Path, rate: float = 1.0) -> Iterator[Request]:
    """Requests of a trace in order of time, `rate` times as fast. Raises ConfigError for what is no trace."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        yield from of_trace([row for line in lines if line.strip() and "blocks" in (row := json.loads(line))], rate)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as problem:
        raise ConfigError(
            f"trace {path} cannot be read ({type(problem).__name__}: {problem}); expected a trace of `kvshare bench`."
        ) from None


def of_trace(rows: Sequence[Mapping], rate: float = 1.0) -> Iterator[Request]:
    """Rows of a trace by the names of their fields, `rate` times as fast.

    `answer/<step>` stands for the answer of an earlier step of the session; 0 tokens for all of a block's text.
    """
    made = {(row["session"], row["step"]): int(row["new_tokens"]) for row in rows}
    for row in sorted(rows, key=lambda row: row["at_s"]):
        session, steps = str(row["session"]), []
        blocks = []
        for name, tokens in row["blocks"]:
            kind, _, rest = name.partition("/")
            if kind == "answer":
                steps.append(int(rest))
                name, tokens = f"{session}:{name}", tokens or made[row["session"], int(rest)]
            size = max(1, round(_WORD_TOKENS * len(rest.split()))) if kind == "text" else _SHORT
            blocks.append((name, int(tokens) or size))
        yield Request(
            *(row["at_s"] / rate, str(row["tenant"]), session, int(row["step"]), tuple(blocks)),
            *(int(row["new_tokens"]), int(row.get("priority", 0)), tuple(steps)),
        )


def library(
    requests: int, tenants: int, rate: float, *, seed: int = 0, documents: int = 200, tokens: int = 400, new: int = 16
) -> Iterator[Request]:
    """Questions about shuffled documents of each tenant's own library: Zipf over tenants and over documents.

    rate: requests a second, Poisson. tokens: of a document.
    """
    rng = random.Random(seed)
    by_tenant = list(itertools.accumulate(1 / (n + 1) for n in range(tenants)))
    by_document = list(itertools.accumulate(1 / (n + 1) for n in range(documents)))
    now = 0.0
    for number in range(requests):
        now += rng.expovariate(rate)
        tenant = bisect.bisect(by_tenant, rng.random() * by_tenant[-1])
        picked = {bisect.bisect(by_document, rng.random() * by_document[-1]) for _ in range(rng.randint(1, 6))}
        order = sorted(picked, key=lambda _: rng.random())
        blocks = (("system", 40), *((f"doc-{d}", tokens) for d in order), (f"ask-{number}", 20))
        yield Request(now, f"t{tenant}", str(number), 0, blocks, rng.randint(1, 2 * new - 1))
