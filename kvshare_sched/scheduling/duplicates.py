"""Several requests over one uncached text: the first computes it, the others wait and then reuse it. No side effects
outside this object.

A text is anything hashable that stands for some tokens of one namespace: a marked fingerprint in the server, a block's
name in the simulator.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_LEAST = 64  # shared tokens below which waiting gains nothing
_SHARE = 0.5  # of its work that a request must expect to save by waiting


@dataclass(frozen=True, slots=True)
class Texts:
    """What a request would have to compute, in prompt order, as (text, tokens).

    The first `gives` of them enter the exact tree when it has run, so others can use them; what comes after its
    first approximate token does not. `takes`: it may use what others have computed.
    """

    lacks: tuple[tuple[Hashable, int], ...] = ()
    gives: int = 0
    takes: bool = True

    @property
    def given(self) -> list[Hashable]:
        """The texts that others may wait for."""
        return [text for text, _ in self.lacks[: self.gives]]


class Duplicates:
    """Who waits for whose text. `bound`: passes a request waits at most for one that is running; 0 holds nobody."""

    def __init__(self, bound: int):
        self.bound = bound
        self._running: dict[str, tuple[Hashable, ...]] = {}
        self._count: Counter[Hashable] = Counter()  # texts that running requests are computing
        self._ahead: set[Hashable] = set()  # texts of requests further ahead in this pass
        self._passes: dict[str, int] = {}
        self.counting = False  # somebody waits for a running request, so the next pass counts

    def begin_pass(self) -> None:
        """Forget who was ahead."""
        self._ahead.clear()
        self.counting = False

    def holds(self, rid: str, texts: Texts, work: float) -> bool:
        """Whether a request had better wait, asked once a pass in the order of the queue.

        It waits for a request ahead of it as long as that one waits, for a running one `bound` passes at most.
        """
        if not self.bound:
            return False
        wanted = max(_LEAST, _SHARE * work)
        running = ahead = 0
        for text, tokens in texts.lacks:
            if text in self._count:
                running += tokens
            elif text in self._ahead:
                ahead += tokens
        if texts.takes and running + ahead >= wanted:
            if running < wanted:
                return True
            passes = self._passes[rid] = self._passes.get(rid, 0) + 1
            if passes <= self.bound:
                self.counting = True
                return True
        self._ahead.update(texts.given)
        return False

    def computing(self, rid: str, texts: Iterable[Hashable]) -> None:
        """A request runs, and these texts of it are not in the tree yet."""
        self.done(rid)
        kept = tuple(texts)
        if kept and self.bound:
            self._running[rid] = kept
            self._count.update(kept)

    def done(self, rid: str) -> None:
        """A request has computed everything, or is gone."""
        for text in self._running.pop(rid, ()):
            self._count[text] -= 1
            if not self._count[text]:
                del self._count[text]

    def gone(self, rid: str) -> None:
        """A request waits no longer."""
        self._passes.pop(rid, None)


class Wanted:
    """How many waiting requests lack a text. Its price is divided among them."""

    def __init__(self):
        self._count: Counter[Hashable] = Counter()

    def add(self, texts: Texts) -> None:
        """A request that lacks these waits."""
        self._count.update(text for text, _ in texts.lacks)

    def remove(self, texts: Texts) -> None:
        """It waits no longer, or lacks something else."""
        for text, _ in texts.lacks:
            self._count[text] -= 1
            if not self._count[text]:
                del self._count[text]

    def shared(self, texts: Texts) -> float:
        """Tokens of a waiting request's work that the others' parts come to; only of what it gives."""
        return sum(tokens * (1 - 1 / self._count[text]) for text, tokens in texts.lacks[: texts.gives])
