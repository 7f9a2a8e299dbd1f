"""What is computed again and again behind borrowed text is computed exactly once."""

import numpy as np
import pytest

from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import RequestView
from kvshare_sched.reuse import promotion
from kvshare_sched.reuse.promotion import Bill, Ledger
from radix_ext.records import Namespace, Segment

HERE, THERE, RATIO = Namespace("here"), Namespace("there"), 0.25
Borrowed = tuple[np.ndarray]


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, length)


HEAD, LENT, NEW, END = text(1, 50), text(2, 400), text(3, 100), text(4, 10)


class World:
    def __init__(self):
        self.ledger = Ledger(16, 32)

    def bill(
        self, *parts: np.ndarray | Borrowed, namespace=HERE, exact: int = 0, fresh_from: int | None = None
    ) -> Bill:
        """Of a prompt whose parts in tuples are borrowed, from a context that has nothing in common."""
        segments, at = [], 0
        for part in parts:
            if isinstance(part, tuple) and at + len(part[0]) > exact:
                segments.append(Segment(1, 0, at, len(part[0])).clip(exact, at + len(part[0])))
            at += len(part[0] if isinstance(part, tuple) else part)
        self.prompt = np.concatenate([part[0] if isinstance(part, tuple) else part for part in parts])
        view = RequestView("r", namespace, self.prompt, exact, at if fresh_from is None else fresh_from)
        plan = ReusePlan(at, exact, tuple(segments))
        return self.ledger.bill(view, plan, lambda start, end: RATIO * (end - start), RATIO)

    def run(self, *parts, **more) -> int:
        """Up to where it is computed exactly."""
        bill = self.bill(*parts, **more)
        self.ledger.pay(bill)
        return bill.exact_until


@pytest.fixture
def world():
    return World()


def test_what_a_plan_computes_that_others_may_compute_again(world):
    borrowed, fresh = world.bill(HEAD, (LENT,), NEW, END).pieces
    assert (borrowed.end, borrowed.price, borrowed.rent) == (450, 300, 100)
    assert (fresh.end, fresh.price, fresh.rent) == (559, 0, 0.75 * 109)  # the last token is always computed


def test_fresh_text_is_known_again_behind_anything_and_borrowed_text_behind_the_same_only(world):
    first = world.bill(HEAD, (LENT,), NEW, END).pieces
    elsewhere = world.bill(text(5, 90), (text(6, 70),), NEW, (text(7, 60),), END).pieces
    assert set(first[1].keys) & set(elsewhere[1].keys)
    assert first[0].keys == world.bill(HEAD, (LENT,), text(8, 80)).pieces[0].keys
    assert first[0].keys != world.bill(text(5, 50), (LENT,), NEW).pieces[0].keys


def test_short_fresh_text_and_what_the_client_wants_scored_are_left_out(world):
    assert len(world.bill(HEAD, (LENT,), text(9, 31), (text(7, 60),), END).pieces) == 2
    assert [piece.end for piece in world.bill(HEAD, (LENT,), NEW, END, fresh_from=500).pieces] == [450, 500]


def test_it_is_bought_when_the_rent_paid_exceeds_the_price(world):
    """A text of 100 tokens behind 400 borrowed ones: 82 + 100 are paid each time, the price is 300."""
    assert [world.run(HEAD, (LENT,), NEW, END) for _ in range(4)] == [0, 0, 559, 0]


def test_a_new_text_is_bought_alone_when_it_stands_early(world):
    """It comes back behind other borrowed text: only what stands before it is paid for."""
    found = [world.run(HEAD, (text(seed, 40),), NEW, (LENT,), END) for seed in (10, 11, 12)]
    assert found == [0, 190, 0]


def test_the_second_turn_of_a_conversation_buys_what_the_first_borrowed(world):
    answer, question = text(20, 30), text(21, 40)
    assert world.run(HEAD, (LENT,), END) == 0
    first = world.prompt
    world.ledger.said(HERE, np.concatenate((first, answer[: promotion.ANSWER])))
    known = len(first) + promotion.ANSWER
    assert world.run(HEAD, (LENT,), END, answer, question, (text(22, 70),), END) == known, (
        "what comes after is borrowed"
    )
    assert world.run(HEAD, (LENT,), END, answer, question, exact=known) == 0, "it stands in the tree now"
    assert world.run(HEAD, (LENT,), END, text(23, 30), question) == 0, "another answer"
    assert world.run(HEAD, (LENT,), END, answer, namespace=THERE) == 0


def test_of_several_turns_the_last_counts(world):
    said = [np.concatenate((HEAD, LENT, text(30, 60)[:length])) for length in (10, 30, 50)]
    for beginning in said:
        world.ledger.said(HERE, beginning)
    assert world.run(HEAD, (LENT,), text(30, 60), END) == len(said[-1])


def test_other_namespaces_count_for_nothing(world):
    for _ in range(2):
        world.run(HEAD, (LENT,), NEW, END, namespace=THERE)
    assert world.bill(HEAD, (LENT,), NEW, END).exact_until == 0
    assert world.bill(HEAD, (LENT,), NEW, END, namespace=THERE).exact_until == 559


def test_the_memory_is_bounded_and_ends_with_the_cache(monkeypatch):
    monkeypatch.setattr(promotion, "_PAID", 50)
    monkeypatch.setattr(promotion, "_ANSWERS", 20)
    world = World()
    world.run(HEAD, (LENT,), NEW)
    for seed in range(100, 200):
        world.run(HEAD, (text(seed, 40),), text(1000 + seed, 60))
        world.ledger.said(HERE, world.prompt)
    assert len(world.ledger) == 70
    assert world.run(HEAD, (text(199, 40),), text(1199, 60), END) > 0, "the latest is known"
    assert world.run(HEAD, (text(100, 40),), text(1100, 60), END) == 0, "the oldest is not"
    world.ledger.clear()
    assert len(world.ledger) == 0


def test_text_that_repeats_inside_a_prompt_counts_once(world):
    """Strangers share a line of dots and nothing else."""
    dots = np.full(120, 7)
    found = [world.run(HEAD, (text(s, 4000),), np.concatenate((text(90 + s, 200), dots)), END) for s in range(10, 16)]
    assert found == [0] * 6


def test_namespaces_used_longest_ago_give_way_first():
    memory = promotion._Memory(3)
    for key, namespace in enumerate((HERE, THERE, HERE, THERE, THERE)):
        memory.put(namespace, key, 1.0)
    assert (dict(memory.of(HERE)), dict(memory.of(THERE)), len(memory)) == ({}, {1: 1.0, 3: 1.0, 4: 1.0}, 3)
    assert [memory.pop(THERE, key) for key in (1, 2, 3, 4)] == [1, 0, 1, 1] and len(memory) == 0


def test_who_is_refused_and_asks_again_is_not_hashed_again(world, monkeypatch):
    world.bill(HEAD, (LENT,), NEW, END)
    monkeypatch.setattr(promotion, "beginning_hashes", None)
    world.bill(HEAD, (LENT,), NEW, END)


@pytest.mark.parametrize("turns", [1, 2, 3, 5, 8, 13, 40])
@pytest.mark.parametrize(("lent", "new"), [(400, 40), (4000, 40), (100, 200), (1000, 33)])
def test_what_comes_back_costs_at_most_twice_what_the_best_choice_costs_and_a_turn(world, turns, lent, new):
    """The same text and the same new text behind it, over and over, with another short end each time."""
    rent = RATIO * lent + (1 - RATIO) * new
    spent, exact = 0.0, 0
    for number in range(turns):
        if exact:
            continue
        exact = world.run(HEAD, (text(1, lent),), text(2, new), text(100 + number, 1))
        spent += lent + (1 - RATIO) * new if exact else rent
    best = min(turns * rent, lent + (1 - RATIO) * new)
    assert spent <= 2 * best + rent
