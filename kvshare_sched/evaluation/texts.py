"""Passages of real English prose: Python's language reference, and the READMEs and licences of packages we need.

Nothing is downloaded. The READMEs belong to installed versions, so `digest` goes into every report: equal
digests mean equal documents.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import re
from collections.abc import Iterator
from functools import cache

_PACKAGES = ("transformers", "torch", "sglang", "numpy", "requests")  # of which every installation has one version
_LICENCES = re.compile(r"(^|/)licen[sc]es?/LICEN[SC]E(\.txt)?$|dist-info/LICEN[SC]E(\.txt)?$", re.I)
_SENTENCE_END = re.compile(r"(?<=[a-z)][.!?])\s+(?=[A-Z])")
_WORDS_LOW, _WORDS_HIGH = 105, 135  # of one passage: about 120 to 180 tokens of the embedded model
_PLAIN_SHARE = 0.88  # of the words of a sentence must be plain words, or it is a grammar rule, a table or code


def sentences(text: str) -> list[str]:
    """The prose sentences of a text, markup and code left out, in order."""
    found = []
    for paragraph in re.split(r"\n\s*\n", text):
        for sentence in _SENTENCE_END.split(" ".join(paragraph.split())):
            words = sentence.split()
            plain = sum(bool(re.fullmatch(r"[\"'(]*[A-Za-z][a-z'-]*[\"'),.;:!?]*", w)) for w in words)
            if 6 <= len(words) <= 60 and plain >= _PLAIN_SHARE * len(words) and sentence[-1] in ".!?":
                found.append(sentence)
    return found


def passages(text: str) -> Iterator[tuple[str, ...]]:
    """Consecutive prose sentences of a text, cut into passages of `_WORDS_LOW` to `_WORDS_HIGH` words."""
    taken: list[str] = []
    for sentence in sentences(text):
        if _words(taken) + len(sentence.split()) > _WORDS_HIGH:
            taken = []  # a long sentence: begin anew rather than cut inside one
        taken.append(sentence)
        if _words(taken) >= _WORDS_LOW:
            yield tuple(taken)
            taken = []


def _words(parts: list[str]) -> int:
    return sum(len(p.split()) for p in parts)


def _sources() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for name in _PACKAGES:
        package = importlib.metadata.distribution(name)
        yield str(package.metadata.get_payload() or "")
        files = sorted(str(f) for f in package.files or () if _LICENCES.search(str(f)))
        yield from (package.locate_file(f).read_text(errors="replace") for f in files[:1])


@cache
def library() -> tuple[tuple[str, ...], ...]:
    """All passages, each a tuple of sentences, in a fixed order and none twice."""
    return tuple(dict.fromkeys(p for text in _sources() for p in passages(text)))


def digest(parts: tuple[tuple[str, ...], ...]) -> str:
    """A short name of these very passages."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
