"""State machines: the index against a dictionary of lists, with true hashes and with forced collisions."""

from collections import OrderedDict, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from radix_ext import index, matcher
from radix_ext.index import SegmentIndex
from radix_ext.limits import DonorLimits, to_hold
from radix_ext.records import Namespace

WINDOW, MIN_RUN, CAPACITY = 3, 6, 400
NAMESPACES = [Namespace("a"), Namespace("b"), Namespace("a", "salt")]
# Passages many donors share, and two that repeat themselves.
PASSAGES = [list(range(100 * i, 100 * i + 5 + 4 * i)) for i in range(1, 4)] + [[1] * 9, [2, 3] * 5]
TRUE_HASHES = index.window_hashes

# A text is a list of pieces: a shared passage, ids never used before, or a stretch of some donor's text.
shared = st.sampled_from(PASSAGES)
fresh = st.integers(1, 20)
stretch = st.tuples(st.integers(0, 1000), st.integers(0, 30), st.integers(MIN_RUN, 25))
beginning = st.tuples(st.integers(0, 1000), st.just(0), st.integers(1, 40))
texts = st.lists(fresh | shared, max_size=4)
started_texts = st.tuples(beginning, texts).map(lambda t: [t[0], *t[1]])
prompts = st.lists(stretch | stretch | fresh | shared, min_size=1, max_size=4)
namespaces = st.sampled_from(NAMESPACES)
numbers = st.integers(0, 1000)


def shared_runs(prompt, donor, start):
    """(donor start, prompt start, length) of every maximal run of equal ids, by brute force."""
    prompt, donor = np.array(prompt, int), np.array(donor, int)
    for offset in range(-len(prompt) + 1, len(donor)):
        low, high = max(start, -offset), min(len(prompt), len(donor) - offset)
        if low < high:
            equal = np.concatenate(([0], prompt[low:high] == donor[low + offset : high + offset], [0]))
            edges = np.flatnonzero(np.diff(equal)) + low
            for a, b in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
                yield a + offset, a, b - a


class IndexMachine(RuleBasedStateMachine):
    """`model` maps donor -> (namespace, ids), least recently used first."""

    def hashes(self, tokens, window):
        return TRUE_HASHES(tokens, window)

    @initialize()
    def begin(self):
        index.window_hashes = self.hashes
        self.index = SegmentIndex(window=WINDOW, min_run=MIN_RUN, capacity=CAPACITY)
        self.model: OrderedDict[int, tuple[Namespace, list[int]]] = OrderedDict()
        # Every (donor, position) that ever held a window: text held once only can neither be displaced nor
        # stand under another donor's name, so it must be found.
        self.ever = defaultdict(set)
        self.next_id = 1000

    def teardown(self):
        index.window_hashes = TRUE_HASHES

    def pick(self, number: int) -> int:
        return list(self.model)[number % len(self.model)]

    def write(self, pieces) -> list[int]:
        """The ids a list of pieces stands for."""
        tokens = []
        for piece in pieces:
            if isinstance(piece, int):
                tokens += range(self.next_id, self.next_id + piece)
                self.next_id += piece
            elif isinstance(piece, tuple):
                number, start, length = piece
                tokens += self.model[self.pick(number)][1][start : start + length] if self.model else []
            else:
                tokens += piece
        return tokens

    def _insert(self, namespace, tokens, donor_id=None):
        found = self.index.add(namespace, np.array(tokens), donor_id)
        if found is None:
            self.model.pop(donor_id, None)
            return
        assert donor_id is None or found == donor_id
        self.model[found] = (namespace, list(tokens))
        self.model.move_to_end(found)
        for position in range(len(tokens) - WINDOW + 1):
            self.ever[namespace, tuple(tokens[position : position + WINDOW])].add((found, position))
        while sum(len(t) for _, t in self.model.values()) > CAPACITY and len(self.model) > 1:
            self.model.popitem(last=False)

    @rule(namespace=namespaces, pieces=texts | started_texts)
    def add(self, namespace, pieces):
        self._insert(namespace, self.write(pieces))

    @precondition(lambda self: self.model)
    @rule(number=numbers, pieces=texts)
    def grow(self, number, pieces):
        donor = self.pick(number)
        namespace, held = self.model[donor]
        self._insert(namespace, held + self.write(pieces), donor)

    @precondition(lambda self: self.model)
    @rule(number=numbers, cut=st.integers(-2, 80))
    def truncate(self, number, cut):
        donor = self.pick(number)
        namespace, held = self.model[donor]
        length = max(0, len(held) - cut)
        self.index.truncate(donor, length)
        if length < WINDOW:
            del self.model[donor]
        else:
            self.model[donor] = (namespace, held[:length])

    @precondition(lambda self: self.model)
    @rule(number=numbers)
    def remove(self, number):
        donor = self.pick(number)
        self.index.remove(donor)
        del self.model[donor]

    @precondition(lambda self: self.model)
    @rule(number=numbers)
    def touch(self, number):
        donor = self.pick(number)
        self.index.touch(donor)
        self.model.move_to_end(donor)

    @precondition(lambda self: len(self.model) > 6)
    @rule()
    def clear(self):
        self.index.clear()
        self.model.clear()
        self.ever.clear()

    @precondition(lambda self: self.model)
    @rule(number=numbers, pieces=prompts, start=st.integers(0, 20))
    def look_up(self, number, pieces, start):
        namespace, prompt = self.model[self.pick(number)][0], self.write(pieces)
        tokens, generation = np.array(prompt, int), self.index.generation
        start = min(start, len(prompt))
        hits = self.index.hits(namespace, tokens, start)
        assert self.index.generation == generation
        for donor, at, position in hits:
            assert self.model[donor][0] == namespace and start <= position <= len(prompt) - WINDOW
            self.check_hit(self.model[donor][1], at, prompt, position)
        segments = matcher.find_segments(
            tokens, hits, lambda i: self.index.donors[i].tokens, start=start, end=len(prompt), min_run=MIN_RUN
        )
        covered = np.zeros(len(prompt), bool)
        for s in segments:
            assert self.model[s.donor_id][1][s.donor_start : s.donor_end] == prompt[s.start : s.end]
            assert s.start >= start and s.length >= MIN_RUN and not covered[s.start : s.end].any()
            covered[s.start : s.end] = True
        self.check_complete(namespace, prompt, start, hits, covered)

    def check_hit(self, donor_tokens, at, prompt, position):
        assert donor_tokens[at : at + WINDOW] == prompt[position : position + WINDOW]

    def check_complete(self, namespace, prompt, start, hits, covered):
        if len({(donor, at - position) for donor, at, position in hits}) > matcher._MAX_DIAGONALS:
            return
        for donor, (owner, held) in self.model.items():
            if owner != namespace:
                continue
            for at, position, length in shared_runs(prompt, held, start):
                windows = range(length - WINDOW + 1)
                if length >= MIN_RUN and all(
                    self.ever[namespace, tuple(held[at + i : at + i + WINDOW])] == {(donor, at + i)} for i in windows
                ):
                    missed = np.flatnonzero(np.diff(covered[position : position + length], prepend=True, append=True))
                    assert all(b - a < MIN_RUN for a, b in zip(missed[::2], missed[1::2], strict=True))

    @invariant()
    def same_as_the_model(self):
        if not hasattr(self, "index"):
            return
        self.index._check()
        held = {donor: (d.namespace, d.tokens.tolist()) for donor, d in self.index.donors.items()}
        assert held == self.model and list(held) == list(self.model)


class CollidingIndexMachine(IndexMachine):
    """Eleven different hashes for all windows: nominations go wrong, segments may not."""

    def hashes(self, tokens, window):
        return TRUE_HASHES(tokens, window) % np.uint64(11)

    def check_hit(self, donor_tokens, at, prompt, position):
        assert at + WINDOW <= len(donor_tokens)

    def check_complete(self, namespace, prompt, start, hits, covered):
        """Collisions displace places: fewer are found, none is wrong."""


TestIndex = IndexMachine.TestCase
TestIndex.settings = settings(max_examples=120, stateful_step_count=30)
TestCollidingIndex = CollidingIndexMachine.TestCase
TestCollidingIndex.settings = settings(max_examples=80, stateful_step_count=30)


@given(
    st.integers(2, 6),
    st.integers(0, 8),
    st.lists(st.integers(1, 25), min_size=1, max_size=6),
    st.integers(0, 2**32),
)
def test_text_grown_in_pieces_is_found_wherever_a_run_is_taken_from(window, more, pieces, seed):
    min_run = window + more
    text = np.random.default_rng(seed).permutation(10_000)[: sum(pieces)]
    index = SegmentIndex(window=window, min_run=min_run, capacity=10_000)
    donor = None
    for end in np.cumsum(pieces):
        donor = index.add(NAMESPACES[0], text[:end], donor)
        index._check()
    for start in range(len(text) - min_run + 1):
        prompt = np.concatenate(([10_001], text[start : start + min_run], [10_002]))
        hits = index.hits(NAMESPACES[0], prompt)
        found = matcher.find_segments(
            prompt, hits, lambda i: index.donors[i].tokens, start=0, end=len(prompt), min_run=min_run
        )
        assert [(s.donor_id, s.donor_start, s.start, s.length) for s in found] == [(donor, start, 1, min_run)]


OWNERS = ["a", "b", "c"]
limits = st.dictionaries(
    st.sampled_from(OWNERS),
    st.builds(DonorLimits, st.none() | st.integers(0, 200), st.sampled_from([0, 30, 60, 150]), st.none()),
)


class LeavingMachine(RuleBasedStateMachine):
    """Who leaves a full index, against the definition: a walk over everybody, the least recently used first."""

    @initialize(limits=limits)
    def begin(self, limits):
        self.limits = limits
        self.index = SegmentIndex(window=WINDOW, min_run=MIN_RUN, capacity=CAPACITY, limits=self.limits)
        self.model: OrderedDict[int, tuple[str, int]] = OrderedDict()  # donor -> (owner, tokens)
        self.next_id = 0

    def pick(self, number: int) -> int:
        return list(self.model)[number % len(self.model)]

    def covered(self, owner: str) -> dict[int, int]:
        limit = self.limits.get(owner, DonorLimits())
        return to_hold(((i, n) for i, (whose, n) in reversed(self.model.items()) if whose == owner), limit.guaranteed)

    def tokens(self, owner: str | None = None) -> int:
        return sum(n for whose, n in self.model.values() if owner in (None, whose))

    def make_room(self, owner: str) -> None:
        limit = self.limits.get(owner, DonorLimits())
        for donor in [i for i, (whose, _) in self.model.items() if whose == owner]:
            if limit.exceeded(self.tokens(owner), 0):
                del self.model[donor]
        covered = {donor for whose in OWNERS for donor in self.covered(whose)}
        for donor in sorted(self.model, key=covered.__contains__):  # stable: the order of use among equals
            if self.tokens() > CAPACITY and len(self.model) > 1:
                del self.model[donor]

    def write(self, owner: str, length: int, donor: int | None = None) -> None:
        held = self.index.donors[donor].tokens.tolist() if donor is not None else []
        tokens = held + list(range(self.next_id, self.next_id + length))
        self.next_id += length
        found = self.index.add(Namespace(owner), np.array(tokens), donor)
        donor = self.index._next_id - 1 if donor is None else donor
        self.model[donor] = (owner, len(tokens))
        self.model.move_to_end(donor)
        self.make_room(owner)
        assert found == (donor if donor in self.model else None)

    @rule(owner=st.sampled_from(OWNERS), length=st.integers(WINDOW, 90))
    def add(self, owner, length):
        self.write(owner, length)

    @precondition(lambda self: self.model)
    @rule(number=numbers, length=st.integers(1, 30))
    def grow(self, number, length):
        donor = self.pick(number)
        self.write(self.model[donor][0], length, donor)

    @precondition(lambda self: self.model)
    @rule(number=numbers)
    def touch(self, number):
        donor = self.pick(number)
        self.index.touch(donor)
        self.model.move_to_end(donor)

    @precondition(lambda self: self.model)
    @rule(number=numbers, cut=st.integers(1, 30))
    def truncate(self, number, cut):
        donor = self.pick(number)
        owner, length = self.model[donor]
        self.index.truncate(donor, length - cut)
        if length - cut < WINDOW:
            del self.model[donor]
        else:
            self.model[donor] = (owner, length - cut)

    @precondition(lambda self: self.model)
    @rule(number=numbers)
    def remove(self, number):
        donor = self.pick(number)
        self.index.remove(donor)
        del self.model[donor]

    @rule(limits=limits)
    def promise(self, limits):
        self.limits.clear()
        self.limits.update(limits)

    @rule(owner=st.sampled_from(OWNERS))
    def ask(self, owner):
        assert list(self.index.covered(owner).items()) == list(self.covered(owner).items())

    @precondition(lambda self: len(self.model) > 8)
    @rule()
    def clear(self):
        self.index.clear()
        self.model.clear()

    @invariant()
    def same_as_the_model(self):
        if hasattr(self, "index"):
            self.index._check()
            assert [(i, (d.owner, len(d.tokens))) for i, d in self.index.donors.items()] == list(self.model.items())


TestLeaving = LeavingMachine.TestCase
TestLeaving.settings = settings(max_examples=80, stateful_step_count=30)
