"""Texts and donors as records. Lengths are in tokens, positions count from the start of a prompt or of a donor."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


class RecordError(AssertionError):
    """A record that contradicts itself."""


@dataclass(frozen=True, slots=True)
class Namespace:
    """The isolation boundary: KV never crosses it. Parts are framed, never concatenated; empty means absent."""

    extra_key: str | None = None
    cache_salt: str | None = None
    lora_id: str | None = None
    owner: str | None = field(
        default=None, compare=False
    )  # whose it is, as read from the key; a plain key names itself

    def __post_init__(self):
        if not self.owner:
            object.__setattr__(self, "owner", self.extra_key or "")
        for name in ("extra_key", "cache_salt", "lora_id"):
            object.__setattr__(self, name, getattr(self, name) or None)

    @property
    def tree_key(self) -> str | None:
        """The extra_key of SGLang's tree, which has the adapter's id appended to the request's."""
        return (self.extra_key or "") + (self.lora_id or "") or None


_HEADER = 32  # tokens before a text that are no context worth the name


_BARE = (
    2.0  # KL of donors behind nothing but a header against donors in unrelated contexts: 2.1 with nothing recomputed
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of the prompt that a donor also has: target [start, end) <- donor [donor_start, ...)."""

    donor_id: int
    donor_start: int
    start: int
    length: int
    context: int = 0  # tokens before `start` that prompt and donor have in common, short gaps included
    others: tuple[Segment, ...] = ()  # other donors of parts of this run, inside it, without others of their own

    def __post_init__(self):
        if self.length <= 0 or self.start < 0 or self.donor_start < 0:
            raise RecordError(f"{self} must have length > 0 and starts >= 0")
        if any(o.start < self.start or o.end > self.end or o.others for o in self.others):
            raise RecordError(f"{self}: other donors must lie inside the run")

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def donor_end(self) -> int:
        return self.donor_start + self.length

    @property
    def shift(self) -> int:
        """How far the tokens moved; the keys are rotated by it."""
        return self.start - self.donor_start

    def clip(self, start: int, end: int) -> Segment | None:
        """The part inside [start, end), or None."""
        low, high = max(start, self.start), min(end, self.end)
        if low >= high:
            return None
        if (low, high) == (self.start, self.end):
            return self
        skipped = low - self.start
        others = (part for o in self.others if (part := o.clip(low, high)) is not None)
        return Segment(
            self.donor_id, self.donor_start + skipped, low, high - low, self.context + skipped, tuple(others)
        )

    @property
    def bare(self) -> bool:
        """The donor had at most a header before this run, where the prompt has text: a document on its own."""
        return self.shift > 3 * max(self.donor_start, _HEADER)

    @property
    def foreign(self) -> float:
        """Share of what stands before this run, in the prompt or in the donor, that the other does not have, 0 to 1."""
        before = max(self.start, self.donor_start)
        return max(0.0, 1 - self.context / before) if before else 0.0

    @property
    def doubt(self) -> float:
        """How far the donor's KV is taken to be off: its foreign share, twice that of a bare donor."""
        return self.foreign * (_BARE if self.bare else 1)

    @property
    def lone(self) -> bool:
        """Its donors tell nothing of how much its tokens depend on context: there is one, or none had any."""
        return not self.others or all(place.bare for place in self.places)

    @property
    def places(self) -> tuple[Segment, ...]:
        """The run itself and its other donors."""
        return (self, *self.others)


@dataclass(slots=True)
class Donor:
    """Tokens of one tree path. Mutable only inside the index."""

    id: int
    namespace: Namespace
    tokens: np.ndarray  # int32 [length]
    owner: str = field(init=False)  # of the namespace
    places: list[tuple[int, int]] = field(default_factory=list)  # (fingerprint, position), ascending position
    scanned: int = 0  # windows that start before this position have been fingerprinted
    used: int = 0  # when it was used last: the index counts uses
    rid: str = ""  # the request that computed it

    def __post_init__(self):
        self.owner = self.namespace.owner
