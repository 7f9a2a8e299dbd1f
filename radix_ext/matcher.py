"""From window hits to disjoint segments: whose KV should stand in for which part of a prompt.

The donor's left context decides quality more than any recompute does, so at every position the donor wins
whose *preceding* tokens agree longest with what precedes that position in the prompt. Inside one maximal run
the agreement grows by one a token, and it carries over a short gap to the donor's next run (a changed
heading between two passages that the donor holds in the same order).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from kvshare_sched.types import Segment

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
    chosen = (
        replace(s, others=_others(s, order, context, donor_tokens, min_run)[: donors - 1]) if donors > 1 else s
        for s in segments
    )
    return tuple(sorted(chosen, key=lambda s: s.start))


def _others(segment: Segment, order, context, donor_tokens, min_run: int) -> tuple[Segment, ...]:
    """Other donors of a segment's text, each for at least `min_run` of its tokens; the widest first, then by context.

    A donor that is another name for the same path of the tree (the next turn of a conversation) is none.
    """
    found: dict[int, Segment] = {}
    for run in order:
        part = replace(run, context=context[run]).clip(segment.start, segment.end)
        if part is None or part.length < min_run or run.donor_id == segment.donor_id or run.donor_id in found:
            continue
        if part.shift == segment.shift:
            ours, theirs = donor_tokens(segment.donor_id), donor_tokens(run.donor_id)
            if np.array_equal(ours[: part.donor_end], theirs[: part.donor_end]):
                continue
        found[run.donor_id] = part
    return tuple(sorted(found.values(), key=lambda part: -part.length))


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
        which = np.searchsorted(starts, by_diagonal[donor_id, offset], side="right") - 1
        for i in np.unique(which[which >= 0]).tolist():
            a, b = int(starts[i]), int(stops[i])
            if b > start and any(a <= p < b for p in by_diagonal[donor_id, offset]):
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
