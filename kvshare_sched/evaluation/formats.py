"""Readers of published question sets, one JSON object a line: LongBench, and KVShareArena with its chunk lists."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation.cases import KINDS, SEED, Case, Prompt, earlier_prompts

_SYSTEM = "You answer questions from the texts below with a few words."
_CHUNK_LISTS = ("contexts", "chunks", "documents", "passages")
_CHUNK_TEXTS = ("text", "content", "context", "body")
_PASSAGE = re.compile(r"\n(?=Passage \d+:)")
_CHUNK_WORDS = 150


def read(path: str | Path, *, donors: int, fillers: Sequence[str]) -> Iterator[Case]:
    """Cases out of a JSONL file; every line says by its fields what it is.

    LongBench: `input`, `context` (one text), `answers`. Chunk lists: `question` (or `input`, `query`), one of
    `contexts`, `chunks`, `documents`, `passages` (strings, or objects with a text), `answers` (or `answer`).
    Scored with token F1. Raises ConfigError with the line number for anything else.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate((x for x in lines if x.strip()), 1):
        try:
            row = json.loads(line)
            question, documents, answers = _question(row), _documents(row), _answers(row)
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise ConfigError(
                f"{path}: question {number} cannot be read ({problem}); expected JSON with a question, "
                "a context or a list of contexts, and answers."
            ) from None
        rng = random.Random(f"{SEED}/{number}")
        kind = KINDS[number % 2]
        task = str(row.get("dataset") or Path(path).stem)
        target = Prompt(_SYSTEM, documents, f"Question: {question}", answer_start="Answer:")
        earlier = earlier_prompts(documents, fillers, kind, donors, rng)
        yield Case(str(row.get("_id") or f"{task}/{number}"), task, kind, earlier, target, answers, scoring="f1")


def _question(row: dict) -> str:
    for name in ("question", "input", "query"):
        if row.get(name):
            return str(row[name])
    raise KeyError("no question")


def _documents(row: dict) -> tuple[str, ...]:
    for name in _CHUNK_LISTS:
        if isinstance(row.get(name), list):
            return tuple(_text(chunk) for chunk in row[name])
    context = row["context"]
    if isinstance(context, list):
        return tuple(_text(chunk) for chunk in context)
    parts = [p.strip() for p in _PASSAGE.split(context) if p.strip()]
    return tuple(parts) if len(parts) > 1 else tuple(_cut(context))


def _text(chunk) -> str:
    if isinstance(chunk, str):
        return chunk
    for name in _CHUNK_TEXTS:
        if name in chunk:
            return str(chunk[name])
    raise KeyError(f"a chunk without {', '.join(_CHUNK_TEXTS)}")


def _cut(text: str) -> Iterator[str]:
    """Paragraphs gathered to about `_CHUNK_WORDS` words, none cut inside."""
    taken: list[str] = []
    for paragraph in (p.strip() for p in re.split(r"\n+", text)):
        taken += [paragraph] if paragraph else []
        if sum(len(p.split()) for p in taken) >= _CHUNK_WORDS:
            yield "\n".join(taken)
            taken = []
    if taken:
        yield "\n".join(taken)


def _answers(row: dict) -> tuple[str, ...]:
    answers = row["answers"] if "answers" in row else row["answer"]
    return (answers,) if isinstance(answers, str) else tuple(str(a) for a in answers)
