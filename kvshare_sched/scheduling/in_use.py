"""How much cached text the prompts of late were made of, each token of it once.

Only a sample of it is followed, chosen by content, so that what is counted does not depend on where a text stood or who
asked (spatially hashed sampling: Waldspurger et al. 2015, "Efficient MRC Construction with SHARDS").
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping

import numpy as np

from radix_ext.hashing import window_hashes

SAMPLE = 64  # tokens that one followed place stands for
_MOST = 65_536  # texts remembered, the latest


class InUse:
    """Cached texts by when they were last hit; the clock is prompt tokens."""

    def __init__(self):
        self._hits: OrderedDict[Hashable, tuple[float, float]] = OrderedDict()  # text -> (clock, tokens), oldest first
        self._clock = self._tokens = 0.0

    def hit(self, texts: Iterable[tuple[Hashable, float]], prompt: float) -> None:
        """A prompt of so many tokens starts, and finds these texts, (key, tokens)."""
        self._clock += prompt
        for key, tokens in texts:
            self._tokens += tokens - self._hits.pop(key, (0.0, 0.0))[1]
            self._hits[key] = (self._clock, tokens)
        while len(self._hits) > _MOST:
            self._drop()

    def tokens(self, window: float) -> float:
        """Of the texts that the latest `window` prompt tokens hit."""
        while self._hits and next(iter(self._hits.values()))[0] < self._clock - window:
            self._drop()
        return self._tokens

    def _drop(self) -> None:
        _, (_, tokens) = self._hits.popitem(last=False)
        self._tokens -= tokens


def places(tokens: np.ndarray, cached: Mapping[Hashable, np.ndarray], window: int) -> Iterator[tuple[Hashable, int]]:
    """(owner, hash) of the places of a prompt that are followed: one in SAMPLE of those whose window is cached.

    tokens: int64 [n]; cached: which of them each owner has, bool [n].
    """
    hashes = window_hashes(tokens, window)
    at = np.flatnonzero(hashes % np.uint64(SAMPLE) == 0)
    for owner, part in cached.items():
        whole = at[part[at] & part[at + window - 1]]
        yield from ((owner, place) for place in hashes[whole].tolist())
