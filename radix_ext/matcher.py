"""From window hits to disjoint segments: whose KV should stand in for which part of a prompt.

The donor's left context decides quality more than any recompute does, so at every position the donor wins
whose *preceding* tokens agree longest with what precedes that position in the prompt. Inside one maximal run
the agreement grows by one a token, and it carries over a short gap to the donor's next run (a changed
heading between two passages that the donor holds in the same order).
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np

from radix_ext.index import common_prefix
from radix_ext.records import Segment

_MAX_DIAGONALS = 64  # (donor, offset) pairs examined in full: keeps a lookup linear in the prompt
_MAX_GAP = 64  # tokens between two runs of a donor that still count as one left context
_CONTEXT_RUN = 16  # shorter agreements before `start` (exact KV) are chance, not left context
_CONTEXT_RUNS = 4096  # longer ones that are looked at, the nearest of each diagonal: they lend nothing themselves


def find_segments(
    tokens: np.ndarray,
    hits: list[tuple[int, int, int]],
    donor_tokens: Callable[[int], np.ndarray],
    *,
    start: int,
    end: int,
    min_run: int,
    donors: int = 1,
) -> tuple[Segment, ...]:
    """Disjoint ascending segments inside tokens[start:end], each at least `min_run` long.

    With `donors` > 1 a segment names up to that many donors of its text: the one with the best left context, then
    those that hold most of it.

    tokens int [prompt_len]; hits as given by `SegmentIndex.hits`; donor_tokens(id) the donor's ids. Every
    segment's ids are equal to its donor's: hashes only nominate. Deterministic for equal inputs.
    """
    runs = _maximal_runs(tokens, hits, donor_tokens, start, end)
    context = _left_context(runs)
    # Two runs over one position keep their order of agreement along their whole overlap (both grow by one a
    # token), so the runs can simply be painted in that order. Ties: longer, then the newer donor. A stretch
    # too short to be used takes nothing from the runs after it.
    runs = [r for r in runs if r.end > start]
    order = sorted(runs, key=lambda r: (r.start - context[r], -r.length, -r.donor_id, r.donor_start))
    taken = np.zeros(max(0, end - start), bool)
    segments = []
    for run in order:
        low = max(run.start, start)
        free = _edges(~taken[low - start : run.end - start], low)
        for a, b in zip(*map(np.ndarray.tolist, free), strict=True):
            if b - a >= min_run:
                taken[a - start : b - start] = True
                segments.append(replace(run, context=context[run]).clip(a, b))
    segments.sort(key=lambda s: s.start)
    if donors > 1:
        others = _others(segments, order, context, donor_tokens, min_run)
        segments = [replace(s, others=found[: donors - 1]) for s, found in zip(segments, others, strict=True)]
    return tuple(segments)


def _others(segments, order, context, donor_tokens, min_run: int) -> Iterator[tuple[Segment, ...]]:
    """For each segment (ascending) the other donors of its text, each for at least `min_run` of its tokens; the widest
    first, then by context.

    A donor that is another name for the same path of the tree (the next turn of a conversation) is none.
    """

    @functools.cache
    def same_path(one: int, other: int) -> int:
        return common_prefix(donor_tokens(one), donor_tokens(other))

    for segment, runs in zip(segments, _beside(segments, order, min_run), strict=True):
        found: dict[int, Segment] = {}
        for run in runs:
            if run.donor_id == segment.donor_id or run.donor_id in found:
                continue
            part = replace(run, context=context[run]).clip(segment.start, segment.end)
            if part.shift != segment.shift or same_path(segment.donor_id, run.donor_id) < part.donor_end:
                found[run.donor_id] = part
        yield tuple(sorted(found.values(), key=lambda part: -part.length))


def _beside(segments: list[Segment], order: list[Segment], min_run: int) -> Iterator[list[Segment]]:
    """For each segment (ascending) the runs that have at least `min_run` tokens of it, in their given order.

    One sweep over the prompt: a run is looked at beside the segments it reaches and one more.
    """
    coming = [i for i, run in enumerate(order) if run.length >= min_run]
    coming.sort(key=lambda i: -order[i].start)  # the next one last
    reached: list[int] = []
    for segment in segments:
        while coming and order[coming[-1]].start <= segment.end - min_run:
            reached.append(coming.pop())
        reached = sorted(i for i in reached if order[i].end >= segment.start + min_run)
        yield [order[i] for i in reached]


def _fullest(hits: list[tuple[int, int, int]]) -> list[tuple[int, int, np.ndarray]]:
    """(donor, offset, hit positions of the prompt ascending) of the `_MAX_DIAGONALS` with most hits; among equals newer
    donors first, then where the prompt comes to the text first: in text that repeats, that one reaches furthest.
    """
    found = np.fromiter(chain.from_iterable(hits), np.int64, 3 * len(hits)).reshape(-1, 3)
    donors, positions = found[:, 0], found[:, 2]
    offsets = found[:, 1] - positions
    order = np.lexsort((positions, offsets, donors))
    donors, offsets, positions = donors[order], offsets[order], positions[order]
    first = np.flatnonzero((np.diff(donors, prepend=-1) != 0) | (np.diff(offsets, prepend=0) != 0))
    count = np.diff(first, append=len(order))
    chosen = np.lexsort((-offsets[first], -donors[first], -count))[:_MAX_DIAGONALS]
    stretches = zip(first[chosen].tolist(), count[chosen].tolist(), strict=True)
    return [(int(donors[at]), int(offsets[at]), positions[at : at + size]) for at, size in stretches]


def _maximal_runs(tokens, hits, donor_tokens, start, end) -> list[Segment]:
    runs, diagonals = [], _fullest(hits)
    near = _CONTEXT_RUNS // max(1, len(diagonals))
    for donor_id, offset, hit in diagonals:
        donor = donor_tokens(donor_id)
        low, high = max(0, -offset), min(end, len(donor) - offset)
        if low >= high:
            continue
        starts, stops = _edges(tokens[low:high] == donor[low + offset : high + offset], low)
        # Keep the runs that a hit points into; the equality above is what makes them true.
        which = np.searchsorted(starts, hit, side="right") - 1
        hit, which = hit[which >= 0], which[which >= 0]
        for i in np.unique(which[hit < stops[which]]).tolist():
            a, b = int(starts[i]), int(stops[i])
            if b > start:
                runs.append(Segment(donor_id, a + offset, a, b - a))
        # What agrees before `start` lends nothing, but it is left context.
        before = np.flatnonzero((stops <= start) & (stops - starts >= _CONTEXT_RUN))[-near:]
        for a, b in zip(starts[before].tolist(), stops[before].tolist(), strict=True):
            runs.append(Segment(donor_id, a + offset, a, b - a))
    return runs


def _edges(mask: np.ndarray, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the stretches of True begin and end, int64; `at`: the place of the mask's first element."""
    padded = np.concatenate(([False], mask, [False]))
    edges = np.flatnonzero(padded[1:] != padded[:-1]) + at
    return edges[::2], edges[1::2]


def _left_context(runs: list[Segment]) -> dict[Segment, int]:
    """Tokens of the same donor that precede each run in prompt and donor alike, over gaps up to _MAX_GAP."""
    context: dict[Segment, int] = {}
    by_donor: dict[int, list[Segment]] = defaultdict(list)
    for run in sorted(runs, key=lambda r: (r.start, r.donor_start)):
        before = [
            context[r] + r.length
            for r in by_donor[run.donor_id][-8:]
            if 0 <= run.start - r.end <= _MAX_GAP and 0 <= run.donor_start - r.donor_end <= _MAX_GAP
        ]
        context[run] = max(before, default=0)
        by_donor[run.donor_id].append(run)
    return context
