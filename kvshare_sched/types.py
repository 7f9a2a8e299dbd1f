"""The frozen records that flow through the system; read this first.

    RequestView -> (radix_ext.matcher) Segments -> (planner) ReusePlan -> (executor) ShareReport

Lengths are in tokens, times in seconds, slots are pool indices, positions count from the start of the
prompt. *Donor* and *target* name the two sides of every copy. Each record checks itself when it is made.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from kvshare_sched.errors import PlanError


@dataclass(frozen=True, slots=True)
class Namespace:
    """The isolation boundary: KV never crosses it. Parts are framed, never concatenated; empty means absent."""

    extra_key: str | None = None
    cache_salt: str | None = None
    lora_id: str | None = None

    def __post_init__(self):
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
            raise PlanError(f"{self} must have length > 0 and starts >= 0")
        if any(o.start < self.start or o.end > self.end or o.others for o in self.others):
            raise PlanError(f"{self}: other donors must lie inside the run")

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


@dataclass(frozen=True, slots=True)
class RequestView:
    """What the planner may know of a request."""

    rid: str
    namespace: Namespace
    token_ids: np.ndarray  # int64 [prompt_len]
    exact_len: int  # tokens whose KV the exact tree gives
    fresh_from: int  # rows from here on are wanted by the client (logits, log-probabilities): never reused
    wishes: Mapping[str, object] = field(default_factory=dict)  # settings the request asks for, by name
    lenders: tuple[Namespace, ...] = ()  # other namespaces that policy lets it borrow from

    @property
    def prompt_len(self) -> int:
        return len(self.token_ids)

    def __post_init__(self):
        if not (0 <= self.exact_len <= self.prompt_len and 0 <= self.fresh_from <= self.prompt_len):
            raise PlanError(
                f"request {self.rid}: exact_len={self.exact_len} and fresh_from={self.fresh_from} "
                f"must lie inside prompt_len={len(self.token_ids)}"
            )


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


class Outcome(StrEnum):
    """What became of a request's chance to reuse; fixed values, they are metric labels."""

    REUSED = "reused"  # approximate KV stood in for part of the prompt
    DISCOVERED = "discovered"  # mode `discover`: would have been reused
    ORDINARY = "ordinary"  # ran as stock SGLang runs it; `reason` says why


class Reason(StrEnum):
    """Why a request ran as ordinary prefill; fixed values, they are metric labels."""

    NONE = "none"  # outcome reused or discovered
    MODE_OFF = "mode_off"
    OPTED_OUT = "opted_out"
    BAD_SETTING = "bad_setting"  # the request asks for a setting that does not exist or may not be set
    SHORT = "short"  # too few tokens outside the exact prefix to be worth a lookup
    NO_MATCH = "no_match"
    NOT_WORTH = "not_worth"  # the cost model predicts no gain
    PROMPT_LOGPROBS = "prompt_logprobs"  # rows the client asks for cover everything that could be reused
    UNSUPPORTED_INPUT = "unsupported_input"  # embeddings, images, hidden states, sessions, beams
    QUALITY = "quality"  # reuse is off for this tenant until it holds its target
    RETRACTED = "retracted"  # re-admitted after a retraction
    NO_MEMORY = "no_memory"  # with its donors pinned the request does not fit
    RENEWED = "renewed"  # computed exactly because it has been computed again and again behind borrowed text
    DONOR_LOST = "donor_lost"  # the donors left the tree between matching and leasing
    MIXED_INPUT = "mixed_input"  # another request of its batch brought embeddings for its tokens
    ERROR = "error"  # anything unexpected in our code


@dataclass(frozen=True, slots=True)
class ShareReport:
    """What happened to one request: goes to the client, to the metrics and to the evaluation alike.

    `exact + reused + fresh` is the number of prompt tokens; `recomputed` is a part of `reused`: tokens that
    ran through all remaining layers after selection. `computed_cells` counts (layer x token) cells computed,
    check layers and fresh rows included.
    """

    exact: int
    reused: int
    recomputed: int
    fresh: int
    outcome: Outcome
    reason: Reason
    donors: int = 0
    discovered: int = 0  # tokens that could have been reused (mode `discover`)
    strategy: str = ""
    computed_cells: int = 0
    layers: int = 0
    expected_cells: int = 0  # what the plan was chosen for
    expected_s: float = 0.0  # prefill seconds it was expected to save
    saved_s: float = 0.0  # the same of the cells computed, by the cost model; negative when reuse cost more
    match_s: float = field(default=0.0)
    copy_s: float = field(default=0.0)
    recompute_s: float = field(default=0.0)
    renewed: int = 0  # fresh tokens that could have been reused, see `renewal`

    def __post_init__(self):
        if min(self.exact, self.reused, self.recomputed, self.fresh) < 0 or self.recomputed > self.reused:
            raise PlanError(f"contradictory report: {self}")

    @property
    def prompt_len(self) -> int:
        return self.exact + self.reused + self.fresh

    def to_json(self) -> dict:
        """Plain JSON types, for `meta_info["kvshare"]`; times are rounded to microseconds."""
        data = asdict(self) | {"outcome": self.outcome.value, "reason": self.reason.value}
        return {k: round(v, 6) if isinstance(v, float) else v for k, v in data.items()}
