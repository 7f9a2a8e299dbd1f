"""The text behind a block name. Traces hold names and lengths, never text; equal names give equal text.

prose/7     three passages of prose in a row (`evaluation.texts`), some 400 tokens
code/7      a stretch of Python's own library, some 600 tokens
system/7    an instruction for a model;  question/7  what a user asks of the texts above it
words/7     English words in an order that no other number has, as many as wanted
text/...    the text itself (traces read from files of others)
answer/2    what the server said in step 2 of the same session: known when it runs, see `runner`
"""

from __future__ import annotations

import hashlib
import random
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation import texts

Block = tuple[str, int]  # name, tokens; 0 tokens: all of its text
ANSWER = "answer"

_PASSAGES = 3  # in one block of prose
_CODE_CHARACTERS = 2_400
_VOCABULARY_WORDS = 600  # of one `words` block before it repeats itself
_ROLES = (
    "You are the documentation assistant of this team. Answer from the sections below and name the one you use.",
    "You plan the work. Read the material, then list the steps that the others will take, one line each.",
    "You carry out the plan. Say what you changed and why, in plain words, and leave nothing out.",
    "You test what the others did. Report what fails first, then what you did not try.",
    "You review the work of the team. Be terse, quote the passage that decides, and end with a verdict.",
    "You help the support desk. Be brief, be kind, and quote the section you use.",
    "You are a programming assistant. The file below is open in the user's editor.",
    "You index documents. Write a title and three keywords for each section.",
    "You label texts. Follow the examples below exactly and answer with one word.",
)
_QUESTIONS = (
    "What do these sections have in common?",
    "Explain the first section in one sentence.",
    "Summarise the last section for a beginner.",
    "Which of these sections is about names, and what does it say?",
    "What would you change in these texts, and why?",
    "Write down the three most important statements.",
    "Which statement here contradicts another one?",
    "What should a reader try first?",
    "Give a short example for the second section.",
    "Who is this written for?",
    "What is left open?",
    "Write the next step in one line.",
)


def text_of(name: str) -> str:
    """The text of a block, ending with an empty line. Raises ConfigError for a name nobody knows."""
    kind, _, rest = name.partition("/")
    if kind == "text":
        return rest + "\n\n"
    if kind not in _KINDS or not rest.isdigit():
        known = ", ".join(f"{k}/<number>" for k in _KINDS)
        raise ConfigError(f"block {name!r} is not known; accepted: {known}, text/<text>, {ANSWER}/<step>.")
    return _KINDS[kind](int(rest)) + "\n\n"


def answer_step(name: str) -> int | None:
    """The step whose answer the block stands for; None for a block with a text of its own."""
    kind, _, rest = name.partition("/")
    return int(rest) if kind == ANSWER else None


def size(kind: str) -> int:
    """How many different blocks of "prose" or "code" there are."""
    return len(_prose_blocks() if kind == "prose" else _code_blocks())


def digest() -> str:
    """A short name of these very texts: equal digests mean equal prompts for equal traces."""
    return hashlib.sha256(repr((_prose_blocks(), _code_blocks(), _ROLES, _QUESTIONS)).encode()).hexdigest()[:16]


@cache
def _prose_blocks() -> tuple[str, ...]:
    passages = [" ".join(p) for p in texts.library()]
    return tuple("\n".join(passages[i : i + _PASSAGES]) for i in range(0, len(passages) - _PASSAGES + 1, _PASSAGES))


@cache
def _code_blocks() -> tuple[str, ...]:
    """Whole lines of the modules of the standard library, in the order of their names."""
    found: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        taken = ""
        for line in path.read_text(errors="replace").splitlines(keepends=True):
            taken += line
            if len(taken) >= _CODE_CHARACTERS:
                found.append(taken)
                taken = ""
    return tuple(dict.fromkeys(found))


@cache
def _vocabulary() -> tuple[str, ...]:
    return tuple(sorted({word for block in _prose_blocks() for word in block.split()}))


def _words(number: int) -> str:
    return " ".join(random.Random(number).choices(_vocabulary(), k=_VOCABULARY_WORDS))


def _of(blocks: Callable[[], Sequence[str]]) -> Callable[[int], str]:
    def pick(number: int) -> str:
        found = blocks()
        if number >= len(found):
            raise ConfigError(f"block number {number} does not exist; there are {len(found)} of its kind.")
        return found[number]

    return pick


_KINDS: dict[str, Callable[[int], str]] = {
    "prose": _of(_prose_blocks),
    "code": _of(_code_blocks),
    "system": _of(lambda: _ROLES),
    "question": _of(lambda: _QUESTIONS),
    "words": _words,
}
