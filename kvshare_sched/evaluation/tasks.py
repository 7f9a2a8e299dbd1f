"""The tasks, each a function of a seed: real passages with planted facts, so that every right answer is known.

The questions are easy on purpose (few words, the answer begun): a small model must answer well above chance
with full prefill, or the task shows nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from kvshare_sched.evaluation.cases import KINDS, SEED, Case, Prompt, earlier_prompts


def _words(text: str) -> list[str]:
    return text.split()


Passage = tuple[str, ...]  # sentences
_SYSTEM = "You are a helpful assistant. Answer from the texts below."
_PLACES = _words("Harbour Garden Castle Bridge Market Station Library Museum Theatre Orchard Mill Tower Valley")
_FIRST = _words("Martin Helen Oscar Laura Victor Agnes Simon Clara Hugo Irene Peter Nora Felix Edith Bruno Alma")
_LAST = _words("Keller Brandt Moreau Silva Novak Larsen Weber Conti Farkas Olsen Dubois Marek Lindt Rossi Haas Petrov")
_MONTHS = _words("January February March April May June July August September October November December")
_COLOURS = _words("amber blue green violet silver white brown pink orange purple yellow grey")


@dataclass(slots=True)
class _Draw:
    """What a task draws from: everything without replacement, so that no value stands twice in one case."""

    rng: random.Random
    passages: list[Passage]
    turn: int  # which of a task's forms: each meets both kinds of donors
    kind: str
    donors: int

    def pick(self, values: Sequence[str], count: int) -> list[str]:
        return self.rng.sample(values, count)

    def numbers(self, count: int) -> list[str]:
        return [str(n) for n in self.rng.sample(range(1200, 9900), count)]

    def people(self, count: int) -> list[str]:
        firsts, lasts = self.pick(_FIRST, count), self.pick(_LAST, count)
        return [f"{a} {b}" for a, b in zip(firsts, lasts, strict=True)]

    def planted(self, *facts: str) -> str:
        """A passage with the facts between its sentences, in order; never its first words."""
        parts = list(self.passages.pop())
        slots = sorted(self.rng.choices(range(1, len(parts) + 1), k=len(facts)))
        for slot, fact in sorted(zip(slots, facts, strict=True), key=lambda s: s[0], reverse=True):
            parts.insert(slot, fact)
        return " ".join(parts)

    def plain(self) -> str:
        return " ".join(self.passages.pop())

    def case(self, task, documents, question, expected, *, lent=None, donor_only=(), **prompt) -> Case:
        """`lent`: the documents as the donors hold them, when not as the target does."""
        fillers = [self.plain() for _ in range(2)]
        target = Prompt(prompt.pop("system", _SYSTEM), tuple(documents), question, **prompt)
        donors = earlier_prompts(lent or documents, fillers, self.kind, self.donors, self.rng)
        return Case("", task, self.kind, donors, target, tuple(expected), tuple(donor_only))


def fact(draw: _Draw) -> Case:
    """Five passages, one fact of the same form in each; the question is about one of them."""
    places, codes = draw.pick(_PLACES, 5), draw.numbers(5)
    starts = [f"The access code of office {p} is" for p in places]
    documents = [draw.planted(f"{s} {c}.") for s, c in zip(starts, codes, strict=True)]
    asked = draw.rng.randrange(5)
    question = f"What is the access code of office {places[asked]}?"
    return draw.case("fact", documents, question, [codes[asked]], answer_start=starts[asked])


def two_hop(draw: _Draw) -> Case:
    """A's manager is B in one passage, B's badge number in another; three such pairs."""
    people, badges = draw.people(6), draw.numbers(3)
    pairs = list(zip(people[:3], people[3:], badges, strict=True))
    documents = [draw.planted(f"The manager of {a} is {b}.") for a, b, _ in pairs]
    documents += [draw.planted(f"The badge number of {b} is {n}.") for _, b, n in pairs]
    draw.rng.shuffle(documents)
    a, b, n = pairs[draw.rng.randrange(3)]
    question = f"Who is the manager of {a}, and what is the badge number of that manager? Two sentences."
    return draw.case("two_hop", documents, question, [b, n], answer_start=f"The manager of {a} is")


def twins(draw: _Draw) -> Case:
    """Two of five documents are near-twins of what the donors hold: other name, date and amount, all else equal."""
    places = draw.pick(_PLACES, 2)
    people, amounts = draw.people(4), draw.numbers(4)
    dates = [f"{draw.rng.randint(2, 28)} {month}" for month in draw.pick(_MONTHS, 4)]
    mine, theirs = [], []
    for i, place in enumerate(places):
        shape = (
            f"The survey of the {place} was led by {{}}.",
            f"The field work at the {place} ended on {{}}.",
            f"The survey of the {place} cost {{}} dollars.",
        )
        passage, state = draw.passages.pop(), draw.rng.getstate()
        for version, side in ((i, mine), (i + 2, theirs)):
            draw.passages.append(passage)
            draw.rng.setstate(state)  # the facts stand between the same sentences in both twins
            values = (people[version], dates[version], amounts[version])
            side.append(draw.planted(*(s.format(v) for s, v in zip(shape, values, strict=True))))
    others = [draw.plain() for _ in range(3)]
    asked = draw.rng.randrange(2)
    place = places[asked]
    questions = (
        (f"Who led the survey of the {place}?", f"The survey of the {place} was led by", people[asked]),
        (f"When did the field work at the {place} end?", f"The field work at the {place} ended on", dates[asked]),
        (f"What did the survey of the {place} cost?", f"The survey of the {place} cost", amounts[asked]),
    )
    question, start, value = questions[draw.turn % 3]
    documents, lent = ([others[0], side[0], others[1], side[1], others[2]] for side in (mine, theirs))
    donor_only = [*people[2:], *dates[2:], *amounts[2:]]
    return draw.case("twins", documents, question, [value], lent=lent, donor_only=donor_only, answer_start=start)


def instruction(draw: _Draw) -> Case:
    """The instruction stands before and after the documents: a letter case (half the credit), or a list in order."""
    places, colours = draw.pick(_PLACES, 3), draw.pick(_COLOURS, 3)
    doors = [f"The door of the {place} is painted" for place in places]
    planted = [draw.planted(f"{d} {c}.") for d, c in zip(doors, colours, strict=True)]
    documents = [planted[0], draw.plain(), planted[1], draw.plain(), planted[2]]
    if draw.turn % 2 == 0:
        asked = draw.rng.randrange(3)
        before = "Write your answer in upper case."
        question = f"What colour is the door of the {places[asked]}? Write your answer in upper case."
        start = doors[asked].upper()
        return draw.case(
            "instruction", documents, question, [colours[asked].upper()], before=before, answer_start=start
        )
    order = draw.rng.sample(range(3), 3)
    before = 'Answer with a numbered list of places and colours that begins with "1. Barn: black".'
    question = "Which colours are the doors of the {}, the {} and the {} painted? Answer with a numbered list.".format(
        *(places[i] for i in order)
    )
    start, expected = f"1. Barn: black\n2. {places[order[0]]}:", [colours[i] for i in order]
    return draw.case("instruction", documents, question, expected, before=before, answer_start=start)


def continuation(draw: _Draw) -> Case:
    """Documents and a text to go on with; no right answer, so only closeness to full prefill counts."""
    documents = [draw.plain() for _ in range(5)]
    return draw.case("continuation", documents, "Continue the last of these texts.", [])


def handover(draw: _Draw) -> Case:
    """One agent's long report stood in other agents' prompts, and is now handed to the next one."""
    forms = ("The level of tank {} was", "The pressure in boiler {} was", "The speed of pump {} was")
    starts = [form.format(place) for form, place in zip(forms, draw.pick(_PLACES, 3), strict=True)]
    readings = draw.numbers(3)
    parts = [draw.planted(f"{s} {n}.") for s, n in zip(starts, readings, strict=True)]
    report = "\n".join((parts[0], draw.plain(), parts[1], draw.plain(), parts[2]))
    asked = draw.rng.randrange(3)
    return draw.case(
        "handover",
        [f"Report of the inspection agent:\n{report}"],
        f"Complete this sentence from the report: {starts[asked]} ...",
        [readings[asked]],
        system="You are the planning agent. Use the report that the inspection agent handed to you.",
        answer_start=starts[asked],
    )


TASKS: dict[str, Callable[[_Draw], Case]] = {
    t.__name__: t for t in (fact, two_hop, twins, instruction, continuation, handover)
}


def build(task: str, number: int, *, donors: int, passages: Sequence[Passage]) -> Case:
    """Case `number` of a task; equal arguments give equal cases."""
    rng = random.Random(f"{SEED}/{task}/{number}")
    case = TASKS[task](_Draw(rng, rng.sample(passages, 12), number // 2, KINDS[number % 2], donors))
    return replace(case, name=f"{task}/{number}")
