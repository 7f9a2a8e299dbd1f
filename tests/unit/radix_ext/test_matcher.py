"""Which donor stands in for which part of a prompt: equal ids, left context, ties, gaps, collisions."""

import numpy as np
import pytest

from radix_ext import index, matcher
from radix_ext.index import SegmentIndex
from radix_ext.matcher import find_segments
from radix_ext.records import Namespace, Segment

HERE = Namespace("here")
WINDOW, MIN_RUN = 4, 8


def text(seed: int, length: int = 30) -> np.ndarray:
    """Ids of one seed never meet those of another."""
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


def join(*parts) -> np.ndarray:
    return np.concatenate(parts)


class Library:
    """A few donors and the question of every test."""

    def __init__(self, *donors, window=WINDOW, min_run=MIN_RUN):
        self.min_run = min_run
        self.index = SegmentIndex(window=window, min_run=min_run, capacity=1 << 20)
        self.ids = [self.index.add(HERE, tokens) for tokens in donors]

    def tokens(self, donor_id: int) -> np.ndarray:
        return self.index.donors[donor_id].tokens

    def segments(self, prompt, start=0, end=None):
        end = len(prompt) if end is None else end
        hits = self.index.hits(HERE, prompt, start)
        found = find_segments(prompt, hits, self.tokens, start=start, end=end, min_run=self.min_run)
        edge = start
        for s in found:
            assert s.start >= edge and s.end <= end and s.length >= self.min_run
            assert prompt[s.start : s.end].tolist() == self.tokens(s.donor_id)[s.donor_start : s.donor_end].tolist()
            edge = s.end
        return found

    def found(self, prompt, **bounds):
        """(number of the donor, its start, prompt start, length) of every segment."""
        return [(self.ids.index(s.donor_id), s.donor_start, s.start, s.length) for s in self.segments(prompt, **bounds)]


def test_nothing_shared():
    assert Library(text(1)).found(text(2)) == []
    assert Library().found(text(2)) == []
    assert Library(text(1)).found(text(1)[:0]) == []


def test_whole_run_is_found_at_another_offset():
    assert Library(join(text(1), text(2), text(3))).found(join(text(8, 5), text(2), text(9))) == [(0, 30, 5, 30)]


def test_runs_reach_to_the_first_different_token_on_both_sides():
    donor = join(text(1), text(2))
    prompt = donor.copy()
    prompt[[10, 40]] = 1
    assert Library(donor).found(prompt) == [(0, 0, 0, 10), (0, 11, 11, 29), (0, 41, 41, 19)]


@pytest.mark.parametrize(("length", "wanted"), [(MIN_RUN - 1, []), (MIN_RUN, [(0, 0, 6, MIN_RUN)])])
def test_min_run_is_the_shortest_segment(length, wanted):
    assert Library(text(1)).found(join(text(8, 6), text(1)[:length], text(9, 6))) == wanted


def test_bounds_cut_segments():
    library, prompt = Library(text(1)), join(text(8, 10), text(1))
    assert library.found(prompt, start=15, end=32) == [(0, 5, 15, 17)]
    assert library.found(prompt, start=15, end=15 + MIN_RUN - 1) == []
    assert library.found(prompt, start=40) == library.found(prompt, end=0) == []


def test_several_donors_several_runs_and_gaps():
    library = Library(join(text(1), text(2)), join(text(3), text(4)), text(5))
    prompt = join(text(9, 7), text(4), text(1), text(8, 3), text(5), text(9, 11)[7:])
    assert library.found(prompt) == [(1, 30, 7, 30), (0, 0, 37, 30), (2, 0, 70, 30)]


def test_donor_may_be_longer_or_shorter_than_the_prompt():
    long = join(*(text(i) for i in range(1, 20)))
    assert Library(long).found(text(7)[5:20]) == [(0, 185, 0, 15)]
    assert Library(text(7, 10)).found(long) == [(0, 0, 180, 10)]


def test_text_repeated_in_the_prompt_is_reused_every_time():
    prompt = join(text(1), text(9, 3), text(1), text(8, 3), text(1))
    assert Library(text(1)).found(prompt) == [(0, 0, 0, 30), (0, 0, 33, 30), (0, 0, 66, 30)]


def test_earliest_started_run_wins_where_two_overlap():
    newer = Library(join(text(1), text(2)), join(text(7), text(2), text(3)))
    prompt = join(text(1), text(2), text(3))
    assert newer.found(prompt) == [(0, 0, 0, 60), (1, 60, 60, 30)]
    older = Library(join(text(7), text(2), text(3)), join(text(1), text(2)))
    assert older.found(prompt) == [(1, 0, 0, 60), (0, 60, 60, 30)]


def test_left_context_is_carried_over_a_short_gap():
    same_order = join(text(1), text(6, 5), text(2))
    passage_only = join(text(7), text(2))
    prompt = join(text(1), text(8, 3), text(2))
    for donors in ([same_order, passage_only], [passage_only, same_order]):
        donor = 0 if donors[0] is same_order else 1
        assert Library(*donors).found(prompt) == [(donor, 0, 0, 30), (donor, 35, 33, 30)]


@pytest.mark.parametrize(("in_donor", "in_prompt"), [(100, 100), (100, 3), (3, 100)])
def test_left_context_is_not_carried_over_a_long_gap(in_donor, in_prompt):
    far = join(text(1), text(6, in_donor), text(2))
    near = join(text(7), text(1)[-3:], text(2))
    prompt = join(text(1), text(8, in_prompt), text(1)[-3:], text(2))
    for donors in ([far, near], [near, far]):
        library = Library(*donors)
        assert library.segments(prompt)[-1].donor_id == library.ids[0 if donors[0] is near else 1]


def test_left_context_before_the_exact_prefix_ends_counts_too():
    same_context = join(text(7, 9), text(1), text(2))
    passage_only = join(text(8, 9), text(2))
    prompt = join(text(1), text(2))
    for donors in ([same_context, passage_only], [passage_only, same_context]):
        donor = 0 if donors[0] is same_context else 1
        assert Library(*donors).found(prompt, start=30) == [(donor, 39, 30, 30)]


def test_runs_too_short_to_be_used_take_nothing_from_others():
    short = join(text(7), text(1)[20:], text(2)[:5])  # shares 7 tokens that start earlier
    useful = join(text(8), text(2))
    prompt = join(text(9), text(1)[28:], text(2))
    library = Library(short, useful)
    hits = [(library.ids[0], 38, 30), *library.index.hits(HERE, prompt)]
    found = find_segments(prompt, hits, library.tokens, start=0, end=len(prompt), min_run=MIN_RUN)
    assert [(s.donor_id, s.donor_start, s.start, s.length) for s in found] == [(library.ids[1], 30, 32, 30)]


def test_pieces_too_short_to_be_used_are_left_to_others():
    one, two, three = text(1)[:20], text(1)[8:26], text(1)[18:]
    prompt = join(text(9, 5), text(1), text(8, 5))
    library = Library(join(text(5), one, text(5)), join(text(6), two, text(6)), join(text(7), three, text(7)))
    # `two` has but 6 tokens beside `one`; `three` must not lose them.
    assert library.found(prompt) == [(0, 30, 5, 20), (2, 32, 25, 10)]


def test_ties_go_to_the_longer_run_then_to_the_newer_donor():
    long, short = join(text(7), text(1)), join(text(8), text(1, 20), text(6))
    assert Library(long, short).found(text(1)) == [(0, 30, 0, 30)]
    assert Library(short, long).found(text(1)) == [(1, 30, 0, 30)]
    assert Library(join(text(7), text(1)), join(text(8), text(1))).found(text(1)) == [(1, 30, 0, 30)]


def test_answer_does_not_depend_on_the_order_of_the_hits():
    library = Library(join(text(1), text(2)), join(text(7), text(2), text(3)), join(text(8), text(3), text(1)))
    prompt = join(text(3), text(1), text(2), text(9, 5), text(1)[3:20])
    hits = library.index.hits(HERE, prompt)
    wanted = library.segments(prompt)
    for seed in range(10):
        shuffled = [hits[i] for i in np.random.default_rng(seed).permutation(len(hits))]
        assert find_segments(prompt, shuffled, library.tokens, start=0, end=len(prompt), min_run=MIN_RUN) == wanted


def test_wrong_nominations_are_harmless():
    library, prompt = Library(text(1)), join(text(1)[:15], text(2))
    hits = library.index.hits(HERE, prompt)
    wrong = [
        (library.ids[0], 3, 20),
        (library.ids[0], 29, 44),
        (library.ids[0], 20, 0),
        (library.ids[0], 0, 40),
    ]
    found = find_segments(prompt, hits + wrong, library.tokens, start=0, end=len(prompt), min_run=MIN_RUN)
    assert found == library.segments(prompt) != ()


def test_nominations_before_the_start_give_nothing():
    library, prompt = Library(text(1)), join(text(1)[:15], text(2), text(1)[15:])
    hits = library.index.hits(HERE, prompt)
    found = find_segments(prompt, hits, library.tokens, start=20, end=len(prompt), min_run=MIN_RUN)
    assert [(s.donor_start, s.start, s.length) for s in found] == [(15, 45, 15)]


def test_permuting_sentences_keeps_the_hit_rate_up_to_the_seams():
    sentences = [text(i, 12 + i) for i in range(1, 21)]
    library = Library(join(*sentences))
    total = sum(map(len, sentences))
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(20)
        prompt = join(*(sentences[i] for i in order))
        assert sum(s.length for s in library.segments(prompt)) == total


def test_sentences_from_many_donors_are_found_whatever_their_order():
    sentences = [text(i, 12 + i) for i in range(1, 21)]
    library = Library(*(join(text(50 + i, 9), s) for i, s in enumerate(sentences)))
    order = np.random.default_rng(3).permutation(20)
    prompt = join(*(sentences[i] for i in order))
    assert [s.donor_id for s in library.segments(prompt)] == [library.ids[i] for i in order]
    assert sum(s.length for s in library.segments(prompt)) == len(prompt)


def test_smaller_windows_find_no_less():
    rng = np.random.default_rng(0)
    donor = join(*(text(i) for i in range(1, 9)))
    prompt = donor.copy()
    prompt[rng.choice(len(prompt), 24, replace=False)] = 1
    reused = [sum(s.length for s in Library(donor, window=w, min_run=8).segments(prompt)) for w in (2, 4, 8)]
    reused += [sum(s.length for s in Library(donor, window=w, min_run=w).segments(prompt)) for w in (12, 16, 24)]
    assert reused == sorted(reused, reverse=True) and reused[0] > reused[-1]


@pytest.mark.parametrize("modulus", [1, 2, 7, 61])
def test_forced_hash_collisions_never_make_a_wrong_segment(monkeypatch, modulus):
    donors = [join(text(1), text(2)), join(text(7), text(2), text(3)), text(4)]
    prompt = join(text(9, 5), text(3), text(1), text(8, 9), text(4), text(2))
    clean = Library(*donors).segments(prompt)
    true_hashes = index.window_hashes
    monkeypatch.setattr(index, "window_hashes", lambda t, w: true_hashes(t, w) % np.uint64(modulus))
    library = Library(*donors)  # `segments` compares every id
    covered = {p for s in clean for p in range(s.start, s.end)}
    assert {p for s in library.segments(prompt) for p in range(s.start, s.end)} <= covered


@pytest.mark.parametrize("modulus", [1, 5, 50])
def test_collisions_that_lose_no_place_change_nothing(monkeypatch, modulus):
    donors = [join(text(1), text(2)), join(text(7), text(2), text(3))]
    prompt = join(text(9, 5), text(3), text(8, 9), text(1), text(2))
    library = Library(*donors)
    # Every window of the prompt nominates every place of the index whose hash agrees modulo a tiny number.
    rows = [(index.window_hashes(library.tokens(i), WINDOW) % np.uint64(modulus), i) for i in library.ids]
    asked = index.window_hashes(prompt, WINDOW) % np.uint64(modulus)
    collided = [
        (i, int(at), position)
        for position, value in enumerate(asked)
        for hashes, i in rows
        for at in np.flatnonzero(hashes == value)
    ]
    monkeypatch.setattr("radix_ext.matcher._MAX_DIAGONALS", 10**6)
    found = find_segments(prompt, collided, library.tokens, start=0, end=len(prompt), min_run=MIN_RUN)
    assert found == library.segments(prompt) != ()


def test_many_diagonals_keep_the_fullest(monkeypatch):
    monkeypatch.setattr("radix_ext.matcher._MAX_DIAGONALS", 2)
    library = Library(*(join(text(20 + i, 9), text(1)[i : i + 9 + 3 * i]) for i in range(5)))
    prompt = join(text(9, 5), text(1), text(8, 5))
    assert {s.donor_id for s in library.segments(prompt)} <= set(library.ids[3:])


@pytest.mark.parametrize("period", [1, 2, 3, 7, 20])
@pytest.mark.parametrize(("held", "asked"), [(900, 900), (600, 900), (900, 600)])
def test_repeated_text_that_a_donor_holds_is_found(period, held, asked):
    """However often the prompt repeats it: one donor's stretch stands in for as much as there is of it."""
    repeated = np.resize(text(2, period), 900)
    library = Library(text(5), join(text(1), repeated[:held], text(3)), text(6))
    prompt = join(text(8, 7), repeated[:asked], text(9))
    found = library.segments(prompt)
    assert {s.donor_id for s in found} == {library.ids[1]}
    assert sum(s.length for s in found) >= min(held, asked) and found[0].start == 7


def test_what_follows_and_precedes_repeated_text_is_found_with_it():
    passage = join(text(1), np.full(500, 7), text(2))
    library = Library(text(5), join(text(6), passage, text(4)))
    assert library.found(join(text(8, 9), passage, text(9))) == [(1, 30, 9, 560)]
    shorter = join(text(8, 9), text(1), np.full(300, 7), text(2), text(9))
    assert library.found(shorter) == [(1, 30, 9, 330), (1, 560, 339, 30)]


def test_many_agreements_before_the_prompt_begins_are_looked_at_up_to_a_number(monkeypatch):
    """A table whose rows are alike agrees with itself at every row; the exact prefix may hold thousands of them."""
    made, check = [], Segment.__post_init__
    monkeypatch.setattr(Segment, "__post_init__", lambda segment: made.append(1) or check(segment))
    monkeypatch.setattr(matcher, "_CONTEXT_RUNS", 40)

    def work(rows: int) -> int:
        table = lambda name: np.column_stack((np.full((rows, 16), 7), 10**6 * name + np.arange(rows))).ravel()  # noqa: E731
        donors = [table(1), table(2)]
        prompt = join(table(3), table(4)[: 17 * 3])
        hits = [(donor, 17 * row, 17 * rows) for donor in (0, 1) for row in range(20)]
        made.clear()
        find_segments(prompt, hits, donors.__getitem__, start=17 * rows, end=len(prompt), min_run=8)
        return len(made)

    assert 40 < work(400) == work(100) < 40 * 5


def test_the_nearest_agreement_before_the_prompt_begins_is_still_context(monkeypatch):
    monkeypatch.setattr(matcher, "_CONTEXT_RUNS", 2)
    rows = [join(text(i, 20), np.array([10**6 + i])) for i in range(1, 9)]
    library = Library(join(*rows, text(20)))
    prompt = join(*(join(row[:-1], np.array([2 * 10**6])) for row in rows), text(20))
    (found,) = library.segments(prompt, start=len(prompt) - 30)
    assert (found.start, found.context) == (168, 40)


def test_inputs_stay_as_they_were():
    library, prompt = Library(text(1)), join(text(1)[:15], text(2))
    before, hits = prompt.copy(), library.index.hits(HERE, prompt)
    kept = list(hits)
    find_segments(prompt, hits, library.tokens, start=0, end=len(prompt), min_run=MIN_RUN)
    assert (prompt == before).all() and hits == kept


def test_other_donors_of_a_text_are_named_best_context_first():
    same = join(text(5), text(1), text(6))
    library = Library(join(text(2), text(1)), same, join(text(3), text(1)[:20]), text(1))
    prompt = join(text(5), text(1), text(9))
    hits = library.index.hits(HERE, prompt)
    bounds = {"start": 0, "end": len(prompt), "min_run": MIN_RUN}
    (alone,) = find_segments(prompt, hits, library.tokens, **bounds)
    (found,) = find_segments(prompt, hits, library.tokens, donors=4, **bounds)
    assert alone.others == () and (found.donor_id, found.start, found.length) == (library.ids[1], 0, 60)
    assert {library.ids.index(o.donor_id) for o in found.others} == {0, 2, 3}
    for other in found.others:
        assert (
            prompt[other.start : other.end] == library.tokens(other.donor_id)[other.donor_start :][: other.length]
        ).all()
    (two,) = find_segments(prompt, hits, library.tokens, donors=2, **bounds)
    assert two.others == found.others[:1]


def test_context_counts_what_precedes_in_prompt_and_donor_alike():
    library = Library(join(text(4), text(1), text(8, 5), text(2)), join(text(7), text(3)))
    prompt = join(text(6), text(1), text(9, 5), text(2), text(3))
    found = library.segments(prompt)
    assert [(s.start, s.context) for s in found] == [(30, 0), (65, 30), (95, 0)]
    assert [s.foreign for s in found] == [1.0, 1 - 30 / 65, 1.0]


def test_another_name_for_the_same_path_is_no_other_donor():
    first = join(text(5), text(1), text(2))
    library = Library(first, join(first, text(3)))  # the next turn of the same conversation
    prompt = join(text(9), text(1), text(2), text(3))
    (found,) = find_segments(
        prompt, library.index.hits(HERE, prompt), library.tokens, donors=4, start=0, end=len(prompt), min_run=MIN_RUN
    )
    assert (found.length, found.others) == (90, ())


def test_the_work_grows_with_the_prompt_and_not_with_its_square(monkeypatch):
    """A table with a changed cell in each row: many short runs, in four donors. The scheduler waits for the answer."""

    def work(rows: int) -> int:
        cells = np.arange(32 * rows).reshape(rows, 32)
        table = lambda name: np.column_stack((cells, 10**6 * name + np.arange(rows))).ravel()  # noqa: E731
        known = {donor: table(donor + 1) for donor in range(4)}
        at = range(0, 33 * rows, 33)
        hits = [(donor, p, p) for donor in known for p in at]
        looks.clear()
        found = find_segments(table(9), hits, known.__getitem__, start=0, end=33 * rows, min_run=32, donors=4)
        assert len(found) == rows and all(len(s.others) == 3 for s in found[1:])
        return len(looks)

    looks, clip = [], Segment.clip
    monkeypatch.setattr(Segment, "clip", lambda *args: looks.append(1) or clip(*args))
    assert work(80) <= 4 * work(20) + 8


def test_each_run_is_looked_at_beside_the_segments_it_reaches(monkeypatch):
    """Every segment beside every run would be the square of the prompt."""

    def work(rows: int) -> int:
        runs = [Segment(donor, at, at, 32) for donor in range(4) for at in range(0, 33 * rows, 33)]
        runs.append(Segment(5, 0, 0, 33 * rows))
        looks.clear()
        beside = list(matcher._beside(runs[:rows], runs, 32))
        assert [len(found) for found in beside] == [5] * rows and all(found[-1] is runs[-1] for found in beside)
        return len(looks)

    looks, end = [], Segment.end.fget
    monkeypatch.setattr(Segment, "end", property(lambda segment: looks.append(1) or end(segment)))
    assert work(200) <= 10 * work(20) + 100


def test_the_widest_other_donor_comes_first():
    library = Library(
        join(text(5), text(1), text(2)), join(text(6), text(1)[:10]), join(text(7), text(1), text(2)[:20])
    )
    prompt = join(text(9), text(1), text(2))
    (found,) = find_segments(
        prompt, library.index.hits(HERE, prompt), library.tokens, donors=2, start=0, end=len(prompt), min_run=MIN_RUN
    )
    chosen = library.ids.index(found.donor_id)
    assert [library.ids.index(o.donor_id) for o in found.others] == [2 - chosen] and found.others[0].length >= 50


def test_the_exact_prefix_is_left_context_over_a_short_gap():
    library = Library(join(text(5), text(8, 6), text(1)), join(text(6), text(8, 6), text(1)))
    prompt = join(text(5), text(9, 6), text(1))
    for start in (30, 33):  # the exact prefix ends before, or inside, the changed heading
        (found,) = library.segments(prompt, start=start)
        assert (library.ids.index(found.donor_id), found.start, found.context) == (0, 36, 30)
        assert found.foreign == 1 - 30 / 36
