"""The index verb by verb: add, grow, truncate, remove, clear, touch, hits."""

import numpy as np
import pytest

from radix_ext import index as index_module
from radix_ext.index import OCCURRENCES, SegmentIndex, common_prefix
from radix_ext.limits import DonorLimits
from radix_ext.records import Donor, Namespace

HERE, THERE = Namespace("here"), Namespace("there")
WINDOW, MIN_RUN = 4, 8


def text(seed: int, length: int = 60) -> np.ndarray:
    """Ids of one seed never meet those of another."""
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


def join(*parts) -> np.ndarray:
    return np.concatenate(parts)


def make(capacity=10_000, limits=None) -> SegmentIndex:
    return SegmentIndex(window=WINDOW, min_run=MIN_RUN, capacity=capacity, limits=limits)


@pytest.fixture
def index():
    made = make()
    yield made
    made._check()


def places(index, tokens, namespace=HERE, start=0):
    return {(donor, at - position) for donor, at, position in index.hits(namespace, tokens, start)}


def test_text_is_found_at_any_offset(index):
    donor = index.add(HERE, join(text(1), text(2), text(3)))
    assert places(index, join(text(9, 7), text(2))) == {(donor, 60 - 7)}
    assert places(index, text(9)) == set()


def test_every_run_of_min_run_tokens_is_found(index):
    donor = index.add(HERE, text(1))
    for start in range(60 - MIN_RUN + 1):
        asked = join(text(8, 5), text(1)[start : start + MIN_RUN], text(9, 5))
        assert (donor, start - 5) in places(index, asked), start


def test_hits_count_positions_from_the_prompt_start(index):
    donor = index.add(HERE, text(1))
    prompt = join(text(2, 30), text(1))
    assert places(index, prompt, start=25) == places(index, prompt) == {(donor, -30)}
    assert all(position >= 40 for _, _, position in index.hits(HERE, prompt, 40))
    assert index.hits(HERE, prompt, len(prompt)) == []


def test_namespaces_never_meet(index):
    index.add(HERE, text(1))
    assert places(index, text(1), THERE) == set() == places(index, text(1), Namespace())
    mine = index.add(THERE, text(1))
    assert places(index, text(1), THERE) == {(mine, 0)}
    index.remove(mine)
    assert places(index, text(1), THERE) == set() and places(index, text(1))


def test_every_part_of_the_namespace_counts(index):
    index.add(Namespace("a", "b", "c"), text(1))
    for other in (
        Namespace("a", "b"),
        Namespace("a", None, "c"),
        Namespace(None, "b", "c"),
        Namespace("ab", None, "c"),
    ):
        assert index.hits(other, text(1)) == []


def test_shorter_than_a_window_leaves_no_trace(index):
    assert index.add(HERE, text(1, WINDOW - 1)) is None
    assert (len(index), index.tokens, index.entries) == (0, 0, 0)
    assert index.hits(HERE, text(1, WINDOW - 1)) == []


def test_growing_equals_adding_at_once(index):
    whole = join(text(1), text(2), text(3))
    donor = None
    for end in (5, 6, 20, 21, 90, 100, 180):
        donor = index.add(HERE, whole[:end], donor)
        index._check()
    once = make()
    once.add(HERE, whole)
    assert len(index) == 1 and index.tokens == 180
    for start in range(180 - MIN_RUN + 1):
        asked = whole[start : start + MIN_RUN]
        assert places(once, asked) <= places(index, asked) == {(donor, start)}


def test_growing_twice_by_the_same_text_adds_nothing(index):
    donor = index.add(HERE, text(1))
    entries = index.entries
    assert index.add(HERE, text(1), donor) == donor
    assert (index.entries, index.tokens, len(index)) == (entries, 60, 1)


def test_growing_a_donor_that_left_makes_a_new_one(index):
    old = index.add(HERE, text(1))
    index.remove(old)
    new = index.add(HERE, join(text(1), text(2)), old)
    assert new != old and places(index, text(1)) == {(new, 0)}


def test_the_index_keeps_its_own_copy(index):
    tokens = text(1)
    index.add(HERE, tokens)
    tokens[:] = 0
    assert places(index, text(1)) and not places(index, tokens)


def test_truncate_forgets_the_tail_only(index):
    donor = index.add(HERE, join(text(1), text(2)))
    index.truncate(donor, 60)
    assert places(index, text(1)) == {(donor, 0)} and places(index, text(2)) == set()
    assert index.tokens == 60 == len(index.donors[donor].tokens)
    index.truncate(donor, 60)
    index.truncate(donor, 99)  # longer than it is: nothing to forget
    assert index.tokens == 60


def test_truncated_donor_may_grow_differently(index):
    donor = index.add(HERE, join(text(1), text(2)))
    index.truncate(donor, 70)
    assert index.add(HERE, join(text(1), text(2)[:10], text(3)), donor) == donor
    assert places(index, text(3)) == {(donor, 70)} and places(index, text(2)[12:]) == set()
    assert (donor, 70 - 4) in places(index, join(text(2)[6:10], text(3)[:6]))  # over the seam


@pytest.mark.parametrize("length", [WINDOW - 1, 1, 0])
def test_truncated_below_a_window_leaves(index, length):
    donor = index.add(HERE, text(1))
    index.truncate(donor, length)
    assert (len(index), index.tokens, index.entries) == (0, 0, 0)


@pytest.mark.parametrize("length", range(WINDOW, MIN_RUN + 1))
def test_truncated_to_almost_nothing_stays_sound(index, length):
    donor = index.add(HERE, text(1))
    index.truncate(donor, length)
    index._check()
    assert places(index, text(1)[:length]) <= {(donor, 0)}


def test_remove_and_clear(index):
    first, second = index.add(HERE, text(1)), index.add(THERE, text(2))
    index.remove(first)
    index.remove(first)
    index.remove(12345)
    index.truncate(12345, 3)
    index.touch(12345)
    assert places(index, text(1)) == set() and places(index, text(2), THERE) == {(second, 0)}
    index.clear()
    assert (len(index), index.tokens, index.entries) == (0, 0, 0)
    assert index.hits(THERE, text(2)) == []


def test_ids_are_never_used_again(index):
    first = index.add(HERE, text(1))
    index.clear()
    assert index.add(HERE, text(1)) > first


def test_least_recently_used_donor_gives_way():
    index = make(capacity=200)
    first, second, third = (index.add(HERE, text(i)) for i in (1, 2, 3))
    index.touch(first)
    fourth = index.add(HERE, text(4))
    index._check()
    assert list(index.donors) == [third, first, fourth] and index.tokens == 180
    assert places(index, text(2)) == set() and second not in index.donors


def test_why_donors_left_is_counted():
    index = make(capacity=200)
    for seed in range(3):
        last = index.add(HERE, np.arange(100) + 1000 * seed)
    assert index.left == {"limit": 1}
    index.truncate(last, WINDOW - 1)
    index.remove(-1)
    assert index.left == {"limit": 1, "evicted": 1} and index.nbytes > 4 * index.tokens > 0
    index.clear()
    assert index.left == {"limit": 1, "evicted": 1, "flushed": 1} and index.nbytes == 0


def test_donors_beyond_their_tenants_quota_are_counted_apart():
    index = make(limits={"blue": DonorLimits(most=150)})
    for seed in range(3):
        index.add(Namespace("blue"), np.arange(100) + 1000 * seed)
    index.add(HERE, np.arange(100))
    assert index.left == {"quota": 2} and len(index) == 2


class Looks:
    """Which donors anybody reads anything of."""

    def __init__(self, monkeypatch):
        self.ids = set()

        def look(donor, name):
            self.ids.add(object.__getattribute__(donor, "id"))
            return object.__getattribute__(donor, name)

        monkeypatch.setattr(Donor, "__getattribute__", look)

    def of(self, work) -> int:
        self.ids.clear()
        work()
        return len(self.ids)


def of(owner: str) -> Namespace:
    return Namespace(owner)


def numbered(number: int) -> np.ndarray:
    return np.arange(20) + 100 * number


@pytest.mark.parametrize("promised", [0, 200])
def test_a_publish_at_a_full_index_looks_at_those_that_leave(monkeypatch, promised):
    """A full index is the usual one, and the scheduler waits for every publish. Among its oldest donors are those of a
    tenant with a guarantee who is away."""
    index = make(capacity=20 * 500, limits={"away": DonorLimits(guaranteed=20 * promised)})
    for number in range(500):
        index.add(of("away" if number < promised else "busy"), numbered(number))
    index.add(of("busy"), numbered(500))  # finds out once whom the guarantee covers
    looks = Looks(monkeypatch)
    for number in range(501, 800):
        assert looks.of(lambda: index.add(of("busy"), numbered(number))) <= 3  # noqa: B023
    assert index.owned["away"] == 20 * promised and index.left == {"limit": 300}


def test_a_publish_above_a_quota_looks_at_those_that_leave(monkeypatch):
    index = make(limits={"busy": DonorLimits(most=100), "many": DonorLimits(entries=40)})
    for number in range(300):
        index.add(of("other"), numbered(number))
    for number in range(300, 310):
        index.add(of("busy"), numbered(number))
        index.add(of("many"), numbered(number))
    looks = Looks(monkeypatch)
    for owner in ("busy", "many"):
        for number in range(310, 330):
            assert looks.of(lambda: index.add(of(owner), numbered(number))) <= 3  # noqa: B023
    assert index.owned["busy"] == 100 and 0 < index.entered["many"] <= 40 and index.owned["other"] == 6000


def test_a_guarantee_is_worked_out_from_the_owners_own_donors(monkeypatch):
    index = make(limits={"few": DonorLimits(guaranteed=40)})
    for number in range(300):
        index.add(of("other"), numbered(number))
    held = [index.add(of("few"), numbered(number)) for number in range(300, 303)]
    looks = Looks(monkeypatch)
    assert looks.of(lambda: index.covered("few")) <= 3
    assert list(index.covered("few")) == held[:0:-1], "as many as fit whole, the most recently used first"
    assert looks.of(lambda: index.covered("few")) == looks.of(lambda: index.covered("other")) == 0
    index.touch(held[0])
    assert looks.of(lambda: index.covered("few")) <= 3 and list(index.covered("few")) == [held[0], held[2]]


def test_what_must_leave_stays_known_however_donors_come_and_go(index):
    """They may leave by other ways than for want of room, and nobody then asks who is next."""
    for number in range(1000):
        index.remove(index.add(of("busy"), numbered(number)))
    kept = [index.add(of("busy"), numbered(number)) for number in range(10)]
    for donor in kept * 100:
        index.touch(donor)
    index._check()
    assert len(index._leaving) < 200


def test_growing_by_little_reads_none_of_the_places_before(index, monkeypatch):
    whole, seen = np.random.default_rng(0).permutation(100_000)[:8000], []
    donor = index.add(HERE, whole[:7900])
    sort = lambda places, key: seen.append(len(places)) or sorted(places, key=key)  # noqa: E731
    monkeypatch.setattr(index_module, "sorted", sort, raising=False)
    index.add(HERE, whole, donor)
    assert seen and max(seen) < 100 and index.entries > 2000


def test_growing_counts_as_use():
    index = make(capacity=190)
    first, second = index.add(HERE, text(1)), index.add(HERE, text(2))
    index.add(HERE, join(text(1), text(5, 20)), first)
    index.add(HERE, text(3))
    assert second not in index.donors and first in index.donors


def test_one_donor_above_the_capacity_stands_alone():
    index = make(capacity=50)
    index.add(HERE, text(1, 40))
    large = index.add(HERE, text(2, 60))
    index._check()
    assert list(index.donors) == [large]


def test_common_beginning_is_indexed_once(index):
    first = index.add(HERE, join(text(1), text(2)))
    entries = index.entries
    second = index.add(HERE, join(text(1), text(3)))
    assert places(index, text(1)) == {(first, 0)}
    assert places(index, text(3)) == {(second, 60)}
    assert index.entries - entries < 0.7 * entries


def test_donor_that_adds_nothing_is_not_kept(index):
    index.add(HERE, text(1))
    assert index.add(HERE, text(1)) is None and index.add(HERE, text(1)[:40]) is None
    assert len(index) == 1 and index.tokens == 60


def test_same_text_at_the_same_place_after_other_text_is_another_donor(index):
    first, second = index.add(HERE, join(text(1), text(3))), index.add(HERE, join(text(2), text(3)))
    assert places(index, text(3)) == {(first, 60), (second, 60)}


def test_places_of_one_text_are_bounded_and_the_newest_stay(index):
    donors = [index.add(HERE, join(text(10 + i, 5 + i), text(1))) for i in range(OCCURRENCES + 3)]
    assert {donor for donor, _ in places(index, text(1))} == set(donors[-OCCURRENCES:])


def test_text_repeated_inside_a_donor_keeps_its_first_place(index):
    donor = index.add(HERE, join(text(1), text(2), text(1)))
    assert places(index, text(1)) == {(donor, 0)}


def test_donor_whose_places_were_all_displaced_can_still_change(index):
    old = index.add(HERE, text(1))
    newer = [index.add(HERE, join(text(10 + i, 5 + i), text(1))) for i in range(OCCURRENCES)]
    assert old not in {donor for donor, _ in places(index, text(1))}
    for donor in newer:
        index.remove(donor)
    index._check()
    index.add(HERE, text(2, 8))  # fewer places than the old donor remembers
    index.truncate(old, 30)
    index._check()
    index.remove(old)


def test_displaced_donor_of_an_emptied_namespace_can_be_truncated(index):
    old = index.add(HERE, text(1))
    for donor in [index.add(HERE, join(text(10 + i, 5 + i), text(1))) for i in range(OCCURRENCES)]:
        index.remove(donor)
    index.truncate(old, 30)
    assert places(index, text(1)[30:]) == set()


def test_generation_changes_with_every_answer_that_might(index):
    seen = [index.generation]

    def changed() -> bool:
        seen.append(index.generation)
        return seen[-1] != seen[-2]

    donor = index.add(HERE, text(1))
    assert changed()
    index.add(HERE, join(text(1), text(2)), donor)
    assert changed()
    index.truncate(donor, 80)
    assert changed()
    index.hits(HERE, text(1))
    index.touch(donor)
    index.truncate(donor, 80)
    index.remove(999)
    assert not changed()
    index.remove(donor)
    assert changed()
    index.clear()
    assert changed()


def test_looking_up_changes_nothing(index):
    index.add(HERE, text(1))
    order, entries = list(index.donors), index.entries
    asked = join(text(1), text(7))
    before = asked.copy()
    assert index.hits(HERE, asked) == index.hits(HERE, asked)
    assert list(index.donors) == order and index.entries == entries and (asked == before).all()


def test_a_prompt_that_repeats_a_token_hits_no_more_often_than_its_ends():
    """One hit a token and donor would keep the scheduler for seconds, whoever sends it."""
    index = make(capacity=200_000)
    repeated = np.full(32_000, 7)
    donors = [index.add(HERE, join(text(1 + i, 10 + i), repeated)) for i in range(OCCURRENCES)]
    hits = index.hits(HERE, join(text(9), repeated, text(8)))
    assert 0 < len(hits) <= 2 * OCCURRENCES and {donor for donor, _, _ in hits} == set(donors)
    assert index.entries <= 15 * OCCURRENCES, "nor is it kept more often"
    prints, positions = index.fingerprints(join(text(9, 5), repeated), 1)
    assert len(prints) == len(positions) <= 8


def test_colliding_hashes_keep_the_structure_sound(index, monkeypatch):
    true_hashes = index_module.window_hashes
    monkeypatch.setattr(index_module, "window_hashes", lambda t, w: true_hashes(t, w) % np.uint64(3))
    donors = [index.add(HERE, text(i)) for i in (1, 2, 3)]
    index._check()
    for donor in (d for d in donors if d is not None):
        index.truncate(donor, 20)
        index._check()
    index.clear()


def test_entries_per_token_are_as_documented():
    index = SegmentIndex(window=16, min_run=32, capacity=100_000)
    index.add(HERE, np.random.default_rng(0).integers(0, 50_000, 20_000))
    assert index.entries / index.tokens == pytest.approx(2 / 18, rel=0.1)


@pytest.mark.parametrize(("a", "b", "wanted"), [([], [], 0), ([1], [], 0), ([1, 2], [1, 2, 3], 2), ([1, 2], [1, 3], 1)])
def test_common_prefix(a, b, wanted):
    assert common_prefix(np.array(a, int), np.array(b, int)) == wanted


@pytest.mark.parametrize("seed", range(10, 40))
@pytest.mark.parametrize("cut", [61, 62, 63, 64])
def test_places_stay_in_order_when_the_donor_of_a_common_beginning_leaves(index, seed, cut):
    other = index.add(HERE, join(text(seed), text(2)))
    donor = index.add(HERE, join(text(seed), text(3)))
    index.remove(other)
    index.truncate(donor, cut)
    donor = index.add(HERE, join(text(seed), text(3)[: cut - 60], text(4)), donor)
    index._check()
    for length in range(70, 50, -1):
        index.truncate(donor, length)
        index._check()
