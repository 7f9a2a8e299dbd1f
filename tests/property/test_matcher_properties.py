"""Segments are true, disjoint, inside bounds and long enough, whatever is nominated."""

import unittest.mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from radix_ext import matcher
from radix_ext.matcher import find_segments

# Few different ids and repeated passages: many overlapping runs.
tokens = st.lists(
    st.integers(0, 3).map(lambda i: [i]) | st.sampled_from([[7, 8, 9, 10, 11], [12, 13] * 3, list(range(20, 40))]),
    max_size=12,
).map(lambda parts: np.array(sum(parts, []), np.int64))
donor_lists = st.lists(tokens, min_size=1, max_size=4)
bounds = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(sorted)


def all_hits(prompt, donors, start, window=2):
    """Every pair of equal windows, as an index without thinning or displacement would name them."""
    return [
        (i, at, position)
        for i, donor in enumerate(donors)
        for position in range(start, len(prompt) - window + 1)
        for at in range(len(donor) - window + 1)
        if (donor[at : at + window] == prompt[position : position + window]).all()
    ]


def clip_bounds(prompt, start_end):
    return min(start_end[0], len(prompt)), min(start_end[1], len(prompt))


def check(found, prompt, donors, start, end, min_run):
    edge = start
    for s in found:
        assert edge <= s.start and s.end <= end and s.length >= min_run
        assert s.donor_end <= len(donors[s.donor_id])
        assert (prompt[s.start : s.end] == donors[s.donor_id][s.donor_start : s.donor_end]).all()
        edge = s.end


garbage = st.tuples(st.integers(0, 3), st.integers(0, 80), st.integers(0, 80))


@given(tokens, donor_lists, bounds, st.integers(2, 8), st.lists(garbage, max_size=10))
def test_every_segment_is_true(prompt, donors, start_end, min_run, wrong):
    start, end = clip_bounds(prompt, start_end)
    hits = all_hits(prompt, donors, start) + [hit for hit in wrong if hit[0] < len(donors)]
    found = find_segments(prompt, hits, donors.__getitem__, start=start, end=end, min_run=min_run)
    check(found, prompt, donors, start, end, min_run)


@given(tokens, donor_lists, bounds, st.integers(2, 8), st.randoms(use_true_random=False))
def test_order_of_nominations_does_not_matter(prompt, donors, start_end, min_run, random):
    start, end = clip_bounds(prompt, start_end)
    hits = all_hits(prompt, donors, start)
    shuffled = random.sample(hits, len(hits))
    first, second = (
        find_segments(prompt, h, donors.__getitem__, start=start, end=end, min_run=min_run) for h in (hits, shuffled)
    )
    assert first == second


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 9)), max_size=40), st.integers(1, 8))
def test_the_fullest_diagonals_are_taken_newer_donors_first(hits, most):
    by_diagonal = {}
    for donor, at, position in hits:
        by_diagonal.setdefault((donor, at - position), []).append(position)
    wanted = sorted(by_diagonal, key=lambda d: (-len(by_diagonal[d]), -d[0], -d[1]))[:most]
    with unittest.mock.patch.object(matcher, "_MAX_DIAGONALS", most):
        found = [(donor, offset, positions.tolist()) for donor, offset, positions in matcher._fullest(hits)]
    assert found == [(*d, sorted(by_diagonal[d])) for d in wanted]


@given(tokens, donor_lists, bounds, st.integers(2, 8))
def test_nothing_long_enough_is_left_lying(prompt, donors, start_end, min_run):
    start, end = clip_bounds(prompt, start_end)
    hits = all_hits(prompt, donors, start)
    if len({(i, at - position) for i, at, position in hits}) > matcher._MAX_DIAGONALS:
        return
    found = find_segments(prompt, hits, donors.__getitem__, start=start, end=end, min_run=min_run)
    free = np.ones(len(prompt) + 1, bool)
    free[:start] = free[end:] = False
    for s in found:
        free[s.start : s.end] = False
    for low in range(start, end - min_run + 1):
        if free[low : low + min_run].all():
            wanted = prompt[low : low + min_run].tolist()
            for donor in donors:
                held = donor.tolist()
                assert all(held[at : at + min_run] != wanted for at in range(len(held) - min_run + 1))


@given(tokens, tokens, tokens, st.integers(2, 6))
def test_whole_donor_in_the_prompt_is_reused_whole(before, donor, after, min_run):
    inside = donor + 100  # ids that occur nowhere else
    prompt = np.concatenate((before, inside, after))
    found = find_segments(
        prompt, all_hits(prompt, [inside], 0), [inside].__getitem__, start=0, end=len(prompt), min_run=min_run
    )
    assert sum(s.length for s in found) == (len(inside) if len(inside) >= min_run else 0)


@given(tokens, tokens, tokens, tokens)
def test_longest_left_context_wins_between_two_donors(head, passage, other_head, tail):
    """Donor 0 has the passage after the prompt's own words, donor 1 after foreign ones."""
    head, passage, tail = head + 1000, passage + 2000, tail + 3000
    prompt = np.concatenate((head, passage, tail))
    donors = [np.concatenate((head, passage)), np.concatenate((other_head, passage, tail))]
    found = find_segments(prompt, all_hits(prompt, donors, 0), donors.__getitem__, start=0, end=len(prompt), min_run=2)
    owner = {p: s.donor_id for s in found for p in range(s.start, s.end)}
    if len(head) and len(passage) >= 2:
        assert {owner[p] for p in range(len(head) + len(passage))} == {0}
