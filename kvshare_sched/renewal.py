"""When to stop borrowing: what is computed again and again behind borrowed text is computed exactly, once.

KV behind the first approximate token enters no tree. So nobody can borrow it, and whoever comes with the same beginning
finds no exact prefix there, as stock SGLang would: every request computes it anew. That is rent. Computing a prompt
exactly up to a point is the price that ends it. Renting until what was paid comes to the price, then buying, costs at
most about twice what the best choice in hindsight does (ski rental: Karlin, Manasse, Rudolph, Sleator 1988,
"Competitive snoopy caching"). A conversation is no riddle: who sends an answer of ours back will send the next one, so
its second turn buys what the first one borrowed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvshare_sched.types import Namespace, RequestView, ReusePlan
from radix_ext.hashing import beginning_hashes, window_hashes, winnow

ANSWER = 8  # tokens of an answer by which its conversation is known; clients may send the end of it changed
_PAID, _ANSWERS = 65_536, 16_384  # remembered, the latest; some 120 bytes each


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a prompt behind its first approximate token; costs in tokens of ordinary prefill."""

    end: int
    price: float  # what computing it exactly costs more than the plan does
    rent: float  # what every such request pays as long as nobody has computed it exactly
    keys: tuple[int, ...]  # by which it is known again


@dataclass(frozen=True, slots=True)
class Bill:
    """One request's part."""

    pieces: tuple[Piece, ...]  # in prompt order
    exact_until: int  # the prompt had better be computed exactly up to here; 0: nowhere


class Ledger:
    """Rent paid so far and conversations that may go on, each in its own namespace. Bounded."""

    def __init__(self, window: int, min_run: int):
        self._window, self._min_run = window, min_run
        self._paid: OrderedDict[int, float] = OrderedDict()  # tokens of ordinary prefill
        self._answers: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._paid) + len(self._answers)

    def bill(self, view: RequestView, plan: ReusePlan, ratio: float) -> Bill:
        """What a request had better compute exactly, and what it pays for the rest. `ratio`: recomputed of borrowed."""
        beginnings = beginning_hashes(view.token_ids) ^ _mark(view.namespace)
        found = tuple(self._pieces(view, plan, ratio, beginnings))
        gain, best, until = 0.0, 0.0, self._continues(beginnings, plan.approximate_from)
        for piece in found:
            gain += sum(self._paid.get(key, 0.0) for key in piece.keys) - piece.price
            if gain > best:
                best, until = gain, max(until, piece.end)
        return Bill(found, until)

    def _continues(self, beginnings: np.ndarray, start: int) -> int:
        """Length of the longest beginning, beyond `start`, that ends with an answer; 0: there is none."""
        later = beginnings[start + 1 :].tolist()
        if self._answers.keys().isdisjoint(later):
            return 0
        return start + 1 + max(i for i, hashed in enumerate(later) if hashed in self._answers)

    def _pieces(self, view: RequestView, plan: ReusePlan, ratio: float, beginnings: np.ndarray) -> Iterator[Piece]:
        """Borrowed text costs its recomputed part, again for whoever comes with the same beginning. Fresh text, of
        `min_run` tokens at least, costs everybody who has it anywhere what borrowing it would save."""
        for start, end, borrowed in _stretches(view, plan):
            length = end - start
            if borrowed:
                rent = ratio * plan.doubtful_len(start, end)
                yield Piece(end, length - rent, rent, (int(beginnings[end]),))
            elif length >= self._min_run:
                hashes = window_hashes(view.token_ids[start:end], self._window) ^ _mark(view.namespace)
                kept = hashes[winnow(hashes, self._min_run - self._window + 1)]
                yield Piece(end, 0.0, (1 - ratio) * length, tuple(kept.tolist()))

    def pay(self, bill: Bill) -> None:
        """The request runs."""
        for piece in bill.pieces:
            for key in piece.keys:
                paid = self._paid.pop(key, 0.0)
                if piece.end > bill.exact_until:
                    self._paid[key] = paid + piece.rent / len(piece.keys)
        while len(self._paid) > _PAID:
            self._paid.popitem(last=False)

    def answered(self, namespace: Namespace, said: np.ndarray) -> None:
        """A request that borrowed has ended; `said`: prompt and at most ANSWER tokens of its answer, int64."""
        key = int(beginning_hashes(said)[-1] ^ _mark(namespace))
        self._answers.pop(key, None)
        self._answers[key] = None
        if len(self._answers) > _ANSWERS:
            self._answers.popitem(last=False)

    def clear(self) -> None:
        """The tree was emptied, and what was computed exactly is gone."""
        self._paid.clear()
        self._answers.clear()


def _stretches(view: RequestView, plan: ReusePlan) -> Iterator[tuple[int, int, bool]]:
    """(start, end, borrowed) of everything that may be borrowed, from the first borrowed token on."""
    edge = plan.approximate_from
    for segment in plan.segments:
        if segment.start > edge:
            yield edge, segment.start, False
        yield segment.start, segment.end, True
        edge = segment.end
    if (end := min(view.fresh_from, view.prompt_len - 1)) > edge:
        yield edge, end, False


def _mark(namespace: Namespace) -> np.uint64:
    """Keeps the keys of namespaces apart; the same on every rank."""
    return np.uint64(int.from_bytes(hashlib.blake2b(repr(namespace).encode(), digest_size=8).digest()))
