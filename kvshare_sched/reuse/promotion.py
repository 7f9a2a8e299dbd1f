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
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kvshare_sched.records.plan import ReusePlan
from kvshare_sched.records.request import RequestView
from radix_ext.hashing import beginning_hashes, window_hashes, winnow
from radix_ext.records import Namespace

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

    namespace: Hashable
    pieces: tuple[Piece, ...]  # in prompt order
    exact_until: int  # the prompt had better be computed exactly up to here; 0: nowhere


class Rents:
    """Rent paid so far, and conversations that may go on, in whatever keys a caller knows prompts by."""

    def __init__(self):
        self.clear()

    def __len__(self) -> int:
        return len(self._paid) + len(self._answers)

    def clear(self) -> None:
        """The tree was emptied, and what was computed exactly is gone."""
        self._paid, self._answers = _Memory(_PAID), _Memory(_ANSWERS)

    def due(
        self, namespace: Hashable, pieces: tuple[Piece, ...], lengths: Sequence[int], beginnings: Sequence[int]
    ) -> Bill:
        """What a prompt had better compute exactly, and what it pays for the rest.

        beginnings: keys of those that end behind the first approximate token; lengths: theirs, in tokens, ascending.
        """
        until = self._continues(namespace, lengths, beginnings)
        paid, gain, best = self._paid.of(namespace), 0.0, 0.0
        for piece in pieces:
            gain += sum(paid.get(key, 0.0) for key in piece.keys) - piece.price
            if gain > best:
                best, until = gain, max(until, piece.end)
        return Bill(namespace, pieces, until)

    def _continues(self, namespace: Hashable, lengths: Sequence[int], beginnings: Sequence[int]) -> int:
        """Length of the longest beginning that ends with an answer; 0: there is none."""
        answers = self._answers.of(namespace)
        if answers.keys().isdisjoint(beginnings):
            return 0
        return max(length for length, key in zip(lengths, beginnings, strict=True) if key in answers)

    def pay(self, bill: Bill) -> None:
        """The request runs."""
        for piece in bill.pieces:
            for key in piece.keys:
                paid = self._paid.pop(bill.namespace, key)
                if piece.end > bill.exact_until:
                    self._paid.put(bill.namespace, key, paid + piece.rent / len(piece.keys))

    def answered(self, namespace: Hashable, key: int) -> None:
        """A request that borrowed has ended; `key`: of its prompt with its answer."""
        self._answers.put(namespace, key, 0.0)


class Ledger(Rents):
    """Prompts in tokens: what they have in common is found by hashes."""

    def __init__(self, window: int, min_run: int):
        super().__init__()
        self._window, self._min_run = window, min_run
        self._drawn: tuple = (None, None, None)  # key, hashes of the beginnings, pieces: who is refused asks again

    def bill(self, view: RequestView, plan: ReusePlan, charge: Callable[[int, int], float], ratio: float) -> Bill:
        """What a request had better compute exactly, and what it pays for the rest.

        charge(start, end): what the plan computes there, tokens of ordinary prefill; ratio: the share of borrowed text
        that is recomputed, for text that is fresh now.
        """
        key = (view.namespace, hash(view.token_ids.tobytes()), view.fresh_from, plan)
        if self._drawn[0] != key:
            beginnings = beginning_hashes(view.token_ids)
            self._drawn = key, beginnings, tuple(self._pieces(view, plan, charge, ratio, beginnings))
        _, beginnings, pieces = self._drawn
        first = plan.approximate_from + 1
        later = beginnings[first:].tolist() if self._answers.of(view.namespace) else ()
        return self.due(view.namespace, pieces, range(first, first + len(later)), later)

    def said(self, namespace: Namespace, text: np.ndarray) -> None:
        """A request that borrowed has ended; `text`: prompt and at most ANSWER tokens of its answer, int64."""
        self.answered(namespace, int(beginning_hashes(text)[-1]))

    def _pieces(self, view, plan: ReusePlan, charge, ratio: float, beginnings: np.ndarray) -> Iterator[Piece]:
        """Borrowed text costs its recomputed part, again for whoever comes with the same beginning. Fresh text, of
        `min_run` tokens at least, costs everybody who has it anywhere what borrowing it would save."""
        last = min(view.fresh_from, view.prompt_len - 1)  # nobody is spared what lies behind
        for start, end, segment in plan.runs():
            if start < plan.approximate_from:
                continue
            if segment is not None:
                rent = charge(start, end)
                yield Piece(end, end - start - rent, rent, (int(beginnings[end]),))
            elif (length := (end := min(end, last)) - start) >= self._min_run:
                hashes = window_hashes(view.token_ids[start:end], self._window)
                kept = hashes[winnow(hashes, self._min_run - self._window + 1)]
                yield Piece(end, 0.0, (1 - ratio) * length, tuple(dict.fromkeys(kept.tolist())))


class _Memory:
    """Numbers by namespace and key, `limit` at most: the namespace used longest ago loses its oldest first."""

    def __init__(self, limit: int):
        self._limit, self._size = limit, 0
        self._tables: OrderedDict[Hashable, OrderedDict[int, float]] = OrderedDict()

    def __len__(self) -> int:
        return self._size

    def of(self, namespace: Hashable) -> Mapping[int, float]:
        return self._tables.get(namespace, {})

    def pop(self, namespace: Hashable, key: int) -> float:
        """Takes a number out; 0 when there is none."""
        table = self._tables.get(namespace, {})
        if key not in table:
            return 0.0
        self._size -= 1
        found = table.pop(key)
        if not table:
            del self._tables[namespace]
        return found

    def put(self, namespace: Hashable, key: int, number: float) -> None:
        self.pop(namespace, key)
        self._tables.setdefault(namespace, OrderedDict())[key] = number
        self._tables.move_to_end(namespace)
        self._size += 1
        if self._size > self._limit:
            oldest = next(iter(self._tables))
            self.pop(oldest, next(iter(self._tables[oldest])))
