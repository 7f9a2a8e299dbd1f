"""When to stop borrowing: what is computed again and again behind borrowed text is computed exactly, once.

KV behind the first approximate token enters no tree. So nobody can borrow it, and whoever comes with the same beginning
finds no exact prefix there, as stock SGLang would: every request computes it anew. That is rent. Computing a prompt
exactly up to a point is the price that ends it. Renting until what was paid comes to the price, then buying, costs at
most about twice what the best choice in hindsight does (ski rental: Karlin, Manasse, Rudolph, Sleator 1988,
"Competitive snoopy caching"). A conversation is no riddle: who sends an answer of ours back will send the next one, so
its second turn buys what the first one borrowed.

Prompts are compared by 64-bit hashes alone, each namespace for itself: a collision buys too early or too late, no more.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
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

    namespace: Namespace
    pieces: tuple[Piece, ...]  # in prompt order
    exact_until: int  # the prompt had better be computed exactly up to here; 0: nowhere


class Ledger:
    """Rent paid so far, and conversations that may go on."""

    def __init__(self, window: int, min_run: int):
        self._window, self._min_run = window, min_run
        self._paid, self._answers = _Memory(_PAID), _Memory(_ANSWERS)
        self._drawn: tuple = (None, None, None)  # key, hashes of the beginnings, pieces: who is refused asks again

    def __len__(self) -> int:
        return len(self._paid) + len(self._answers)

    def bill(self, view: RequestView, plan: ReusePlan, charge: Callable[[int, int], float], ratio: float) -> Bill:
        """What a request had better compute exactly, and what it pays for the rest.

        charge(start, end): what the plan computes there, tokens of ordinary prefill; ratio: the share of borrowed text
        that is recomputed, for text that is fresh now.
        """
        key = (view.namespace, hash(view.token_ids.tobytes()), view.fresh_from, plan)
        if self._drawn[0] != key:
            beginnings = beginning_hashes(view.token_ids)
            self._drawn = key, beginnings, tuple(self._pieces(view, plan, charge, ratio, beginnings))
        _, beginnings, found = self._drawn
        paid, gain, best = self._paid.of(view.namespace), 0.0, 0.0
        until = self._continues(view.namespace, beginnings, plan.approximate_from)
        for piece in found:
            gain += sum(paid.get(key, 0.0) for key in piece.keys) - piece.price
            if gain > best:
                best, until = gain, max(until, piece.end)
        return Bill(view.namespace, found, until)

    def _continues(self, namespace: Namespace, beginnings: np.ndarray, start: int) -> int:
        """Length of the longest beginning, beyond `start`, that ends with an answer; 0: there is none."""
        if not (answers := self._answers.of(namespace)):
            return 0
        later = beginnings[start + 1 :].tolist()
        if answers.keys().isdisjoint(later):
            return 0
        return start + 1 + max(i for i, hashed in enumerate(later) if hashed in answers)

    def _pieces(self, view, plan: ReusePlan, charge, ratio: float, beginnings: np.ndarray) -> Iterator[Piece]:
        """Borrowed text costs its recomputed part, again for whoever comes with the same beginning. Fresh text, of
        `min_run` tokens at least, costs everybody who has it anywhere what borrowing it would save."""
        for start, end, borrowed in _stretches(view, plan):
            length = end - start
            if borrowed:
                rent = charge(start, end)
                yield Piece(end, length - rent, rent, (int(beginnings[end]),))
            elif length >= self._min_run:
                hashes = window_hashes(view.token_ids[start:end], self._window)
                kept = hashes[winnow(hashes, self._min_run - self._window + 1)]
                yield Piece(end, 0.0, (1 - ratio) * length, tuple(dict.fromkeys(kept.tolist())))

    def pay(self, bill: Bill) -> None:
        """The request runs."""
        for piece in bill.pieces:
            for key in piece.keys:
                paid = self._paid.pop(bill.namespace, key)
                if piece.end > bill.exact_until:
                    self._paid.put(bill.namespace, key, paid + piece.rent / len(piece.keys))

    def answered(self, namespace: Namespace, said: np.ndarray) -> None:
        """A request that borrowed has ended; `said`: prompt and at most ANSWER tokens of its answer, int64."""
        self._answers.put(namespace, int(beginning_hashes(said)[-1]), 0.0)

    def clear(self) -> None:
        """The tree was emptied, and what was computed exactly is gone."""
        self._paid, self._answers = _Memory(_PAID), _Memory(_ANSWERS)


class _Memory:
    """Numbers by namespace and key, `limit` at most: the namespace used longest ago loses its oldest first."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._tables: OrderedDict[Namespace, OrderedDict[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def of(self, namespace: Namespace) -> Mapping[int, float]:
        return self._tables.get(namespace, {})

    def pop(self, namespace: Namespace, key: int) -> float:
        """Takes a number out; 0 when there is none."""
        table = self._tables.get(namespace, {})
        if key not in table:
            return 0.0
        self._size -= 1
        found = table.pop(key)
        if not table:
            del self._tables[namespace]
        return found

    def put(self, namespace: Namespace, key: int, number: float) -> None:
        self.pop(namespace, key)
        self._tables.setdefault(namespace, OrderedDict())[key] = number
        self._tables.move_to_end(namespace)
        self._size += 1
        if self._size > self._limit:
            oldest = next(iter(self._tables))
            self.pop(oldest, next(iter(self._tables[oldest])))


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
