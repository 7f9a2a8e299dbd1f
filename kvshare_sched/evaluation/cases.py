"""What one case is, which earlier prompts leave its donors behind, and how an answer to it is scored. Pure."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

SEED = 20260730
KINDS = ("foreign", "standalone")  # donors cut out of other prompts; documents prefilled on their own
_OTHER_SYSTEMS = (
    "You are a terse reviewer who names the text that decides.",
    "You write training material in plain words, with one short example.",
    "You are the archive assistant of another department and you sort incoming texts.",
    "You translate for the legal team; keep every term as it is.",
    "You prepare the minutes of a meeting out of the texts below.",
)
_OTHER_QUESTIONS = (
    "Which of these texts is the longest?",
    "What do these texts have in common?",
    "Give each text a title.",
    "Which text should a beginner read first?",
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat prompt in parts; the documents are what may come back elsewhere."""

    system: str
    documents: tuple[str, ...]
    question: str
    before: str = ""  # instruction ahead of the documents
    answer_start: str = ""  # first words of the assistant's turn, given to the model

    @property
    def user(self) -> str:
        """The text of the user's turn."""
        return "\n\n".join(part for part in (self.before, *self.documents, self.question) if part)


@dataclass(frozen=True, slots=True)
class Case:
    """Earlier prompts (exact, they become the donors), then the prompt under test."""

    name: str
    task: str
    donor_kind: str
    donors: tuple[Prompt, ...]
    target: Prompt
    expected: tuple[str, ...]  # what a right answer contains; empty: closeness to full prefill only
    donor_only: tuple[str, ...] = ()  # entities that stand in a donor and not in the target
    scoring: str = "parts"  # "parts": every expected string counts; "f1": token F1 with the best of them

    @property
    def without_context(self) -> Prompt:
        """The same question without any document."""
        return replace(self.target, documents=())

    def score(self, answer: str) -> float | None:
        """0..1, or None when the case has no right answer.

        "parts": mean over the expected strings, half for one in another letter case. "f1": as LongBench's
        question answering, the best token F1 over the alternatives.
        """
        if not self.expected:
            return None
        if self.scoring == "f1":
            return max(_f1(answer, right) for right in self.expected)
        credits = (1.0 if contains(answer, e) else 0.5 * contains(answer.lower(), e.lower()) for e in self.expected)
        return sum(credits) / len(self.expected)

    def swapped(self, answer: str) -> bool:
        """The answer names an entity that only a donor has: foreign context leaked through reused KV."""
        return any(contains(answer, entity) for entity in self.donor_only)


def contains(text: str, value: str) -> bool:
    """`value` stands in `text` as whole words."""
    return re.search(rf"(?<!\w){re.escape(value)}(?!\w)", text) is not None


def _f1(answer: str, right: str) -> float:
    given, wanted = (Counter(re.findall(r"\w+", t.lower())) for t in (answer, right))
    common = sum((given & wanted).values())
    return 2 * common / (given.total() + wanted.total()) if common else 0.0


def earlier_prompts(
    documents: Sequence[str], fillers: Sequence[str], kind: str, count: int, rng: random.Random
) -> tuple[Prompt, ...]:
    """Prompts after which every document has been seen in `count` different contexts.

    documents: as the donors shall hold them, in the order of the target. "foreign": all of them in one prompt,
    behind one of `fillers` and another system prompt, in an order that keeps no two of the target's neighbours
    together. "standalone": each alone behind a short header.
    """
    prompts = []
    for turn in range(count):
        system, question = _OTHER_SYSTEMS[turn % len(_OTHER_SYSTEMS)], _OTHER_QUESTIONS[turn % len(_OTHER_QUESTIONS)]
        if turn >= len(_OTHER_SYSTEMS):
            system = f"Round {turn}. {system}"
        if kind == "standalone":
            prompts += [Prompt(system, (d,), "") for d in documents]
        else:
            order = _apart(len(documents), rng)
            prompts.append(Prompt(system, (fillers[turn % len(fillers)], *(documents[i] for i in order)), question))
    return tuple(prompts)


def _apart(count: int, rng: random.Random) -> list[int]:
    """A permutation of range(count) in which no i is followed by i + 1."""
    order = list(range(count))
    while any(b == a + 1 for a, b in zip(order, order[1:], strict=False)):
        rng.shuffle(order)
    return order
