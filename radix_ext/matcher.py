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

import numpy as np

from kvshare_sched.types import Segment
from radix_ext.segment_index import common_prefix

_MAX_DIAGONALS = 64  # (donor, offset) pairs examined in full: keeps a lookup linear in the prompt
_MAX_GAP = 64  # tokens between two runs of a donor that still count as one left context
_CONTEXT_RUN = 16  # shorter agreements before `start` (exact KV) are chance, not left context


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
        edges = np.flatnonzero(np.diff(taken[low - start : run.end - start], prepend=True, append=True))
        for a, b in zip((edges[::2] + low).tolist(), (edges[1::2] + low).tolist(), strict=True):
            if b - a >= min_run:
                taken[a - start : b - start] = True
                segments.append(replace(run, context=context[run]).clip(a, b))
    if donors > 1:
        others = _others(segments, order, context, donor_tokens, min_run)
        segments = [replace(s, others=found[: donors - 1]) for s, found in zip(segments, others, strict=True)]
    return tuple(sorted(segments, key=lambda s: s.start))


def _others(segments, order, context, donor_tokens, min_run: int) -> Iterator[tuple[Segment, ...]]:
    """For each segment the other donors of its text, each for at least `min_run` of its tokens; the widest first, then
    by context.

    A donor that is another name for the same path of the tree (the next turn of a conversation) is none.
    """
    starts, ends = np.array([run.start for run in order]), np.array([run.end for run in order])

    @functools.cache
    def same_path(one: int, other: int) -> int:
        return common_prefix(donor_tokens(one), donor_tokens(other))

    for segment in segments:
        found: dict[int, Segment] = {}
        common = np.minimum(ends, segment.end) - np.maximum(starts, segment.start)
        for run in (order[i] for i in np.flatnonzero(common >= min_run).tolist()):
            if run.donor_id == segment.donor_id or run.donor_id in found:
                continue
            part = replace(run, context=context[run]).clip(segment.start, segment.end)
            if part.shift != segment.shift or same_path(segment.donor_id, run.donor_id) < part.donor_end:
                found[run.donor_id] = part
        yield tuple(sorted(found.values(), key=lambda part: -part.length))


def _maximal_runs(tokens, hits, donor_tokens, start, end) -> list[Segment]:
    by_diagonal: dict[tuple[int, int], list[int]] = defaultdict(list)
    for donor_id, donor_position, position in hits:
        by_diagonal[donor_id, donor_position - position].append(position)
    # The fullest diagonals first; newer donors first among equals.
    chosen = sorted(by_diagonal, key=lambda d: (-len(by_diagonal[d]), -d[0], d[1]))[:_MAX_DIAGONALS]
    runs = []
    for donor_id, offset in chosen:
        donor = donor_tokens(donor_id)
        low, high = max(0, -offset), min(end, len(donor) - offset)
        if low >= high:
            continue
        equal = tokens[low:high] == donor[low + offset : high + offset]
        edges = np.flatnonzero(np.diff(np.concatenate(([0], equal.view(np.int8), [0]))))
        starts, stops = edges[::2] + low, edges[1::2] + low
        # Keep the runs that a hit points into; the equality above is what makes them true.
        hit = np.array(by_diagonal[donor_id, offset])
        which = np.searchsorted(starts, hit, side="right") - 1
        hit, which = hit[which >= 0], which[which >= 0]
        for i in np.unique(which[hit < stops[which]]).tolist():
            a, b = int(starts[i]), int(stops[i])
            if b > start:
                runs.append(Segment(donor_id, a + offset, a, b - a))
        # What agrees before `start` lends nothing, but it is left context.
        before = np.flatnonzero((stops <= start) & (stops - starts >= _CONTEXT_RUN))
        for a, b in zip(starts[before].tolist(), stops[before].tolist(), strict=True):
            runs.append(Segment(donor_id, a + offset, a, b - a))
    return runs


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
