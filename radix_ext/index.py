"""Which donors hold which text, at any offset.

A donor is a token sequence whose exact KV lies on one path of the radix tree. The index keeps a thinned set
of window hashes (`hashing.winnow`) per namespace, each with the few places where that window occurs. It
holds token ids and places only, never slots: slots are read from the live tree when a donor is leased.

Memory: 35 bytes an indexed token at the default window 16 and runs of 32 (measured with tracemalloc on random
ids: 4 bytes of token id and 0.11 fingerprints). Text chosen for it can have a fingerprint for every token.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from radix_ext.hashing import window_hashes, winnow
from radix_ext.limits import DonorLimits, to_hold
from radix_ext.records import Donor, Namespace

OCCURRENCES = 4  # places kept per fingerprint; the oldest gives way
_TOKEN_BYTES, _PLACE_BYTES = 4, 280  # measured as above, for `nbytes`


class _Table:
    """What one namespace has: up to OCCURRENCES places of each fingerprint, packed as donor id << 32 | position."""

    __slots__ = ("places", "donors")

    def __init__(self):
        self.donors = 0  # the last one takes the table along
        self.places: dict[int, list[int]] = {}  # none of the lists is empty

    def remove(self, fingerprint: int, place: int) -> int:
        """Forget a place; returns how many there were (0 when newer ones had pushed it out)."""
        places = self.places.get(fingerprint, ())
        if place not in places:
            return 0
        places.remove(place)
        if not places:
            del self.places[fingerprint]
        return 1


@dataclass(slots=True)
class _Cover:
    """Which of an owner's donors its guarantee covers: worked out once, until one of them changes."""

    guaranteed: int  # tokens
    held: dict[int, int]  # donor id -> tokens, most recently used first
    stale: bool = False


class SegmentIndex:
    """Insert, extend, truncate and remove donors; look up the windows of a prompt.

    | verb      | inputs               | mutates | complexity                                                   |
    |-----------|----------------------|---------|--------------------------------------------------------------|
    | add       | namespace, tokens    | yes     | O(new tokens), and O(its fingerprints) for each that leaves  |
    | truncate  | donor id, length     | yes     | O(dropped fingerprints)                                      |
    | remove    | donor id             | yes     | O(its fingerprints)                                          |
    | covered   | owner                | no      | O(1) until a donor of the owner changes, then O(its donors)  |
    | hits      | namespace, tokens    | no      | O(prompt)                                                    |
    | known     | namespace, hashes    | no      | O(hashes)                                                    |

    A full index is the usual one: donors whose KV has left the tree stay until a plan finds out. So nothing walks over
    all donors to find those that leave. They come from a heap, amortised O(log donors) each.
    """

    def __init__(self, *, window: int, min_run: int, capacity: int, limits: Mapping[str, DonorLimits] | None = None):
        """limits: what owners may keep, read whenever something must leave; owners without an entry have none."""
        self.window = window
        self.span = min_run - window + 1  # every shared run of min_run tokens is found
        self.capacity = capacity  # tokens
        self.generation = 0  # changes whenever a lookup might answer differently
        self.donors: OrderedDict[int, Donor] = OrderedDict()  # least recently used first
        self._of: dict[str, OrderedDict[int, Donor]] = {}  # the same by owner
        self._uses = 0
        # Who may leave, as (use, donor id): each donor once at least, with a use that may have been its last. Those
        # that a guarantee was found to cover are left out until it covers them no more.
        self._leaving: list[tuple[int, int]] = []
        self._covers: dict[str, _Cover] = {}  # owners with a guarantee, as far as anybody has asked
        self._tables: dict[Namespace, _Table] = {}
        self._next_id = 0
        self.limits = {} if limits is None else limits
        self.tokens = 0  # indexed, all namespaces
        self.owned: Counter[str] = Counter()  # the same by owner
        self.entries = 0  # places kept, all namespaces
        self.entered: Counter[str] = Counter()  # the same by owner
        self.left: Counter[str] = Counter()  # donors gone, by reason

    # ---- changes ----

    def add(self, namespace: Namespace, tokens: np.ndarray, donor_id: int | None = None) -> int | None:
        """Index a donor's tokens (int [n]); returns its id, or None when other donors already stand for all
        of it (the same path of the tree), it is shorter than a window, or its owner may not keep it.

        With the id of an earlier call the donor grows: `tokens` must begin with what it already holds.
        Least recently used donors leave when the index would exceed its capacity, or their owner its limit.
        """
        donor = self.donors.get(donor_id) if donor_id is not None else None
        new = donor is None
        if new:
            donor = self._new(namespace)
        self._count(donor, len(tokens) - len(donor.tokens))
        donor.tokens = np.asarray(tokens, dtype=np.int32).copy()
        self._fingerprint(donor)
        self.generation += 1
        if not donor.places:
            self.remove(donor.id)
            return None
        self.touch(donor.id)
        if new:
            self._may_leave(donor)
        self._make_room(donor.owner)
        return donor.id if donor.id in self.donors else None

    def _new(self, namespace: Namespace) -> Donor:
        donor = Donor(self._next_id, namespace, np.empty(0, np.int32))
        self._next_id += 1
        self.donors[donor.id] = self._of.setdefault(donor.owner, OrderedDict())[donor.id] = donor
        self._tables.setdefault(namespace, _Table()).donors += 1
        return donor

    def _make_room(self, owner: str) -> None:
        """Donors leave as long as the owner or everybody together has too much.

        First those that no guarantee covers, then, when more was promised than there is, the others; each time the
        least recently used first. Who has too much itself loses its least recently used, covered or not.
        """
        limit = self.limits.get(owner)
        while limit is not None and owner in self._of and limit.exceeded(self.owned[owner], self.entered[owner]):
            self._leave(next(iter(self._of[owner])), "quota")
        if self.tokens <= self.capacity:
            return
        for promised in list(self._covers):  # whom they cover no more may leave before others
            self.covered(promised)
        while self.tokens > self.capacity and len(self.donors) > 1:
            self._leave(self._next(), "limit")

    def _leave(self, donor_id: int, reason: str) -> None:
        self.remove(donor_id)
        self.left[reason] += 1

    def _may_leave(self, donor: Donor) -> None:
        heapq.heappush(self._leaving, (donor.used, donor.id))
        if len(self._leaving) > 2 * len(self.donors) + 64:  # most are gone, or there twice
            self._leaving = [(donor.used, donor.id) for donor in self.donors.values()]  # ascending, so a heap

    def _next(self) -> int:
        """Who leaves first; not in the heap any more."""
        while self._leaving:
            used, donor_id = heapq.heappop(self._leaving)
            donor = self.donors.get(donor_id)
            if donor is None:
                continue  # it has left already
            if used < donor.used:
                heapq.heappush(self._leaving, (donor.used, donor_id))
            elif donor_id not in self.covered(donor.owner):
                return donor_id
        return next(iter(self.donors))

    def _count(self, donor: Donor, tokens: int = 0, entries: int = 0) -> None:
        self.tokens += tokens
        self.entries += entries
        for count, change in ((self.owned, tokens), (self.entered, entries)):
            count[donor.owner] += change
            if not count[donor.owner]:
                del count[donor.owner]

    def _fingerprint(self, donor: Donor) -> None:
        # Winnowing is local: starting `span` windows back makes the same choices as one scan of everything, and keeps
        # an end more of a stretch of equal ones at most.
        start = max(0, donor.scanned - self.span + 1)
        found = window_hashes(donor.tokens[start:], self.window)
        if start + len(found) <= donor.scanned:
            return  # no new window
        kept = winnow(found, self.span)
        table = self._tables[donor.namespace].places
        first = bisect_left(donor.places, start, key=itemgetter(1))
        late = donor.places[first:]
        seen = {position for _, position in late}
        shared: dict[int, int] = {}  # other donor -> length of the common beginning
        before, displaced = len(late), 0
        for fingerprint, position in zip(found[kept].tolist(), (kept + start).tolist(), strict=True):
            if position in seen:
                continue
            place, places = donor.id << 32 | position, table.get(fingerprint)
            if places is None:
                table[fingerprint] = [place]
            elif self._stands(donor, places, position, shared):
                continue
            else:
                places.append(place)
                if len(places) > OCCURRENCES:
                    del places[0]
                    displaced += 1
            late.append((fingerprint, position))
        self._count(donor, entries=len(late) - before - displaced)
        # A place passed over for another donor that has left since may come in late.
        donor.places[first:] = sorted(late, key=itemgetter(1))
        donor.scanned = max(donor.scanned, len(donor.tokens) - self.window + 1)

    def _stands(self, donor: Donor, places: list[int], position: int, shared: dict[int, int]) -> bool:
        """Whether a window needs no place: the donor has one (the first is enough), or another donor stands for this
        very node of the tree."""
        return any(place >> 32 == donor.id or self._same_path(donor, place, position, shared) for place in places)

    def _same_path(self, donor: Donor, place: int, position: int, shared: dict[int, int]) -> bool:
        other_id, other_position = place >> 32, place & 0xFFFFFFFF
        if other_position != position:
            return False
        if other_id not in shared:
            other = self.donors[other_id].tokens if other_id in self.donors else np.empty(0, np.int32)
            shared[other_id] = common_prefix(donor.tokens, other)
        return shared[other_id] >= position + self.window

    def truncate(self, donor_id: int, length: int) -> None:
        """Forget a donor's tokens from `length` on (the tree evicted them); below one window it leaves."""
        donor = self.donors.get(donor_id)
        if donor is None or length >= len(donor.tokens):
            return
        if length < self.window:
            self.remove(donor_id)
            self.left["evicted"] += 1
            return
        first = bisect_left(donor.places, length - self.window + 1, key=itemgetter(1))
        self._forget(donor, first)
        self._count(donor, length - len(donor.tokens))
        donor.tokens = donor.tokens[:length].copy()
        donor.scanned = min(donor.scanned, length - self.window + 1)
        self._changed(donor)
        self.generation += 1

    def remove(self, donor_id: int) -> None:
        """Forget a donor; unknown ids are ignored."""
        donor = self.donors.pop(donor_id, None)
        if donor is None:
            return
        self._forget(donor, 0)
        table, others = self._tables[donor.namespace], self._of[donor.owner]
        table.donors -= 1
        if not table.donors:
            del self._tables[donor.namespace]
        del others[donor_id]
        if not others:
            del self._of[donor.owner]
        self._count(donor, tokens=-len(donor.tokens))
        cover = self._covers.get(donor.owner)
        if cover is not None and donor_id in cover.held:  # whoever is not covered takes no room from the others
            cover.stale = True
        self.generation += 1

    def _forget(self, donor: Donor, first: int) -> None:
        """Forget a donor's places from number `first` on."""
        table = self._tables[donor.namespace]
        gone = sum(table.remove(fingerprint, donor.id << 32 | at) for fingerprint, at in donor.places[first:])
        del donor.places[first:]
        self._count(donor, entries=-gone)

    def clear(self) -> None:
        """Forget everything (the tree was flushed)."""
        self.left["flushed"] += len(self.donors)
        self.donors.clear()
        self._of.clear()
        self._leaving.clear()
        self._covers.clear()
        self._tables.clear()
        self.owned.clear()
        self.entered.clear()
        self.tokens = self.entries = 0
        self.generation += 1

    def touch(self, donor_id: int) -> None:
        """Mark a donor as used just now."""
        donor = self.donors.get(donor_id)
        if donor is None:
            return
        self._uses += 1
        donor.used = self._uses
        self.donors.move_to_end(donor_id)
        self._of[donor.owner].move_to_end(donor_id)
        self._changed(donor)

    def _changed(self, donor: Donor) -> None:
        if (cover := self._covers.get(donor.owner)) is not None:
            cover.stale = True

    # ---- questions ----

    def covered(self, owner: str) -> dict[int, int]:
        """Donors that the owner's guarantee covers, by id: their tokens. Most recently used first."""
        limit, cover = self.limits.get(owner), self._covers.get(owner)
        guaranteed = limit.guaranteed if limit is not None else 0
        if cover is None and not guaranteed:
            return {}
        if cover is None or cover.stale or cover.guaranteed != guaranteed:
            cover = self._cover(owner, guaranteed)
        return cover.held

    def _cover(self, owner: str, guaranteed: int) -> _Cover:
        """Work it out anew. Whom it covers no more may leave again."""
        newest = ((donor.id, len(donor.tokens)) for donor in reversed(self._of.get(owner, {}).values()))
        before, now = self._covers.pop(owner, None), _Cover(guaranteed, to_hold(newest, guaranteed, least=self.window))
        for donor_id in before.held.keys() - now.held.keys() if before is not None else ():
            if donor_id in self.donors:
                self._may_leave(self.donors[donor_id])
        if guaranteed:
            self._covers[owner] = now
        return now

    def hits(
        self, namespace: Namespace, tokens: np.ndarray, start: int = 0, lenders: Sequence[Namespace] = ()
    ) -> list[tuple[int, int, int]]:
        """(donor id, donor position, target position) of every window of tokens[start:] some donor holds.

        Asked are the namespace itself and, in order, the `lenders` that policy allows; no other is looked at.
        Nominations by hash: the caller compares ids. No side effects.
        """
        tables = [self._tables[asked] for asked in (namespace, *lenders) if asked in self._tables]
        if not tables:
            return []
        hashes = window_hashes(tokens[start:], self.window)
        kept = winnow(hashes, self.span)
        found = list(zip(hashes[kept].tolist(), (kept + start).tolist(), strict=True))
        return [
            (place >> 32, place & 0xFFFFFFFF, position)
            for table in tables
            for fingerprint, position in found
            for place in table.places.get(fingerprint, ())
        ]

    def fingerprints(self, tokens: np.ndarray, thinning: int) -> tuple[list[int], list[int]]:
        """(hash, position) lists of one in `thinning` of the windows that `hits` looks up, ascending positions.

        The hash decides which, so equal text gives equal fingerprints wherever it stands.
        """
        hashes = window_hashes(tokens, self.window)
        kept = winnow(hashes, self.span)
        kept = kept[hashes[kept] % np.uint64(thinning) == 0]
        return hashes[kept].tolist(), kept.tolist()

    def known(self, namespace: Namespace, hashes: list[int]) -> list[bool]:
        """Which of these window hashes some donor of the namespace has. Donors may have left the tree since."""
        table = self._tables.get(namespace)
        return [False] * len(hashes) if table is None else [h in table.places for h in hashes]

    @property
    def nbytes(self) -> int:
        """Memory, estimated."""
        return _TOKEN_BYTES * self.tokens + _PLACE_BYTES * self.entries

    def __len__(self) -> int:
        return len(self.donors)

    def _check(self) -> None:
        """Every structural truth, for tests."""
        assert self.tokens == sum(len(d.tokens) for d in self.donors.values())
        assert self.tokens == sum(self.owned.values()) and all(self.owned.values())
        assert self.tokens <= self.capacity or len(self.donors) <= 1
        assert self.entries == sum(len(p) for t in self._tables.values() for p in t.places.values())
        assert self.entries == sum(self.entered.values()) and all(n > 0 for n in self.entered.values())
        for donor in self.donors.values():
            positions = [position for _, position in donor.places]
            assert positions == sorted(set(positions))
            assert not positions or positions[-1] + self.window <= len(donor.tokens)
            assert donor.owner == donor.namespace.owner
        uses = [donor.used for donor in self.donors.values()]
        assert uses == sorted(set(uses))
        for owner, theirs in self._of.items():
            assert list(theirs) == [donor.id for donor in self.donors.values() if donor.owner == owner] != []
        assert sum(map(len, self._of.values())) == len(self.donors)
        may_leave = {i for used, i in self._leaving if i in self.donors and used <= self.donors[i].used}
        assert self.donors.keys() <= may_leave.union(*(cover.held for cover in self._covers.values()))
        assert all(self._leaving[(i - 1) // 2] <= self._leaving[i] for i in range(1, len(self._leaving)))
        assert self._tables.keys() == {d.namespace for d in self.donors.values()}
        for namespace, table in self._tables.items():
            assert table.donors == sum(donor.namespace == namespace for donor in self.donors.values())
            for fingerprint, places in table.places.items():
                assert 0 < len(places) <= OCCURRENCES
                for place in places:
                    donor = self.donors[place >> 32]  # no place of a donor that left
                    position = place & 0xFFFFFFFF
                    assert donor.namespace == namespace
                    text = donor.tokens[position : position + self.window]
                    assert window_hashes(text, self.window).tolist() == [fingerprint]
                    assert (fingerprint, position) in donor.places


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two id arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
