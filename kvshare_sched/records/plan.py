"""Which donor stands in for which tokens of a prompt."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from kvshare_sched.errors import PlanError
from kvshare_sched.methods.base import Schedule
from radix_ext.records import Segment


class Counts(NamedTuple):
    """What a plan does with a stretch of the prompt, in tokens."""

    reused: int
    forced: int  # of those, recomputed whatever the score says
    copied: int  # read from donors; more than reused where several donors stand in together
    doubtful: float  # reused, each counted by how much of its left context is foreign
    lone: int  # reused of texts whose donors tell nothing, less those of all other texts


_WHOLE = 1 << 64  # a doubtful token that counts whole: sums of integers are the same wherever one begins


@dataclass(frozen=True, slots=True)
class ReusePlan:
    """Whose KV stands in for which tokens; every prompt token has one origin: exact, reused or fresh.

    Questions about a stretch [start, end) look at the segments in it alone; `counts` looks at the two it cuts, and
    knows the sums over all others: O(log segments), because the scheduler asks some twenty times a pass.
    """

    prompt_len: int
    exact_len: int
    segments: tuple[Segment, ...]  # disjoint, ascending, inside [exact_len, prompt_len - 1)
    forced_head: int = 0  # first tokens of every segment, always recomputed (attention sinks of the donor)
    schedule: Schedule | None = None  # which rows run at which layer; None: not decided
    _starts: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _ends: tuple[int, ...] = field(init=False, repr=False, compare=False)
    # Column by column as in `Counts`, doubtful tokens in parts of _WHOLE: of the first n segments together, n from 0.
    _sums: tuple[tuple[int, ...], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        edge = self.exact_len
        for segment in self.segments:
            if segment.start < edge:
                raise PlanError(f"{segment} starts before {edge}: segments must be disjoint and ascending")
            edge = segment.end
        if self.segments and edge > self.prompt_len - 1:
            raise PlanError(f"{self.segments[-1]} covers the last prompt token ({self.prompt_len - 1})")
        columns = zip((0,) * len(Counts._fields), *(self._count(s, s.start) for s in self.segments), strict=True)
        object.__setattr__(self, "_starts", tuple(s.start for s in self.segments))
        object.__setattr__(self, "_ends", tuple(s.end for s in self.segments))
        object.__setattr__(self, "_sums", tuple(tuple(accumulate(column)) for column in columns))

    def _count(self, part: Segment, start: int) -> tuple[int, ...]:
        """One segment's part in `_sums`, or that of a part of it; start: of the whole segment."""
        forced = max(0, min(part.end, start + self.forced_head) - part.start)
        doubtful = part.length * int(part.foreign**0.5 * _WHOLE)
        lone = part.length if part.lone else -part.length
        return part.length, forced, sum(place.length for place in part.places), doubtful, lone

    def counts(self, start: int, end: int) -> Counts:
        """What becomes of [start, end).

        Of the foreign share of a left context the root counts, because a little foreign text does more harm than its
        share: with a sixteenth of the context foreign, a quarter of the tokens are in doubt. A bare donor's tokens are
        no more, only chosen first.
        """
        low, high = self._reach(start, end)
        cut = []
        if low < high and self._starts[low] < start:
            cut.append(self._count(self.segments[low].clip(start, end), self._starts[low]))
            low += 1
        if low < high and end < self._ends[high - 1]:
            high -= 1
            cut.append(self._count(self.segments[high].clip(start, end), self._starts[high]))
        whole = [column[high] - column[low] for column in self._sums]
        reused, forced, copied, doubtful, lone = map(sum, zip(whole, *cut, strict=True))
        return Counts(reused, forced, copied, doubtful / _WHOLE, lone)

    def rows(self, start: int, end: int) -> list[int]:
        """Rows expected at each layer for the chunk [start, end) of the prompt; O(layers + log segments)."""
        return self.schedule.rows(end - start, self.counts(start, end))

    @property
    def expected_cells(self) -> int:
        """(Layer x token) cells that the whole prompt will compute, before the scores are known."""
        return sum(self.rows(self.exact_len, self.prompt_len))

    def _reach(self, start: int, end: int) -> tuple[int, int]:
        """The segments with tokens in [start, end): the number of the first, and that behind the last."""
        low = bisect_right(self._ends, start)
        return low, bisect_left(self._starts, end) if start < end else low

    @property
    def reused_len(self) -> int:
        return self._sums[0][-1]

    @property
    def fresh_len(self) -> int:
        return self.prompt_len - self.exact_len - self.reused_len

    @property
    def copied_len(self) -> int:
        """Tokens read from donors; more than reused where several donors stand in together."""
        return self._sums[2][-1]

    @property
    def donor_ids(self) -> set[int]:
        """Whose KV is read."""
        return {place.donor_id for s in self.segments for place in s.places}

    def doubtful_len(self, start: int, end: int) -> float:
        """Reused tokens inside [start, end), each counted by how much of its left context is foreign, see `counts`."""
        return self.counts(start, end).doubtful

    def mostly_lone(self, start: int, end: int) -> bool:
        """More than half of the tokens reused inside [start, end) belong to texts whose donors tell nothing."""
        return self.counts(start, end).lone > 0

    @property
    def approximate_from(self) -> int:
        """First position whose KV depends on another context; everything before it is exact KV."""
        return self.segments[0].start if self.segments else self.prompt_len

    def runs(self) -> Iterator[tuple[int, int, Segment | None]]:
        """(start, end, what stands in for it) of everything behind the exact tokens, in order; None: nothing does."""
        edge = self.exact_len
        for segment in self.segments:
            if segment.start > edge:
                yield edge, segment.start, None
            yield segment.start, segment.end, segment
            edge = segment.end
        if edge < self.prompt_len:
            yield edge, self.prompt_len, None

    def clip(self, start: int, end: int) -> Iterator[Segment]:
        """The segments' parts inside one chunk [start, end)."""
        low, high = self._reach(start, end)
        return (segment.clip(start, end) for segment in self.segments[low:high])

    def forced_positions(self, start: int, end: int) -> np.ndarray:
        """Reused positions inside [start, end) that are recomputed whatever the score says, int64 [n]."""
        low, high = self._reach(start, end)
        heads = [
            np.arange(max(start, s.start), min(end, s.end, s.start + self.forced_head)) for s in self.segments[low:high]
        ]
        return np.concatenate(heads).astype(np.int64) if heads else np.empty(0, np.int64)

    def reused_mask(self, start: int, end: int) -> np.ndarray:
        """Bool [end - start]: which positions of a chunk are reused."""
        mask = np.zeros(max(0, end - start), bool)
        low, high = self._reach(start, end)
        for s in self.segments[low:high]:
            mask[max(start, s.start) - start : s.end - start] = True
        return mask
