"""Which donors hold which text, at any offset.

A donor is a token sequence whose exact KV lies on one path of the radix tree. The index keeps a thinned set
of window hashes (`hashing.winnow`) per namespace, each with the few places where that window occurs. It
holds token ids and places only, never slots: slots are read from the live tree when a donor is leased.

Memory: 46 bytes an indexed token at the default window 16 and runs of 32 (measured with tracemalloc on random
ids: 4 bytes of token id and 0.11 fingerprints). Text chosen for it can have a fingerprint for every token.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from kvshare_sched.tenants.namespaces import owner_of
from kvshare_sched.tenants.quotas import DonorLimits, to_hold, victims
from kvshare_sched.types import Namespace
from radix_ext.hashing import window_hashes, winnow

OCCURRENCES = 4  # places kept per fingerprint; the oldest gives way
_TOKEN_BYTES, _PLACE_BYTES = 4, 380  # measured as above, for `nbytes`


@dataclass(slots=True)
class Donor:
    """Tokens of one tree path. Mutable only inside the index."""

    id: int
    namespace: Namespace
    tokens: np.ndarray  # int32 [length]
    places: list[tuple[int, int]] = field(default_factory=list)  # (table row, position), ascending position
    scanned: int = 0  # windows that start before this position have been fingerprinted
    rid: str = ""  # the request that computed it

    @property
    def owner(self) -> str:
        return owner_of(self.namespace.extra_key)


class _Table:
    """Fingerprint -> row of up to OCCURRENCES places, packed as donor id << 32 | position."""

    __slots__ = ("row_of", "places", "free", "hash_of", "donors")

    def __init__(self):
        self.donors = 0  # of the namespace; the last one takes the table along
        self.row_of: dict[int, int] = {}
        self.places: list[list[int]] = []
        self.hash_of: list[int] = []
        self.free: list[int] = []

    def row(self, fingerprint: int) -> int:
        row = self.row_of.get(fingerprint)
        if row is None:
            if self.free:
                row = self.free.pop()
                self.hash_of[row] = fingerprint
            else:
                row = len(self.places)
                self.places.append([])
                self.hash_of.append(fingerprint)
            self.row_of[fingerprint] = row
        return row

    def remove(self, row: int, place: int) -> int:
        """Forget a place; returns how many there were (0 when newer ones had pushed it out)."""
        places = self.places[row]
        if place not in places:
            return 0
        places.remove(place)
        if not places:
            del self.row_of[self.hash_of[row]]
            self.free.append(row)
        return 1


class SegmentIndex:
    """Insert, extend, truncate and remove donors; look up the windows of a prompt.

    | verb      | inputs               | mutates | complexity             |
    |-----------|----------------------|---------|------------------------|
    | add       | namespace, tokens    | yes     | O(new tokens)          |
    | truncate  | donor id, length     | yes     | O(dropped fingerprints)|
    | remove    | donor id             | yes     | O(its fingerprints)    |
    | hits      | namespace, tokens    | no      | O(prompt)              |
    | known     | namespace, hashes    | no      | O(hashes)              |
    """

    def __init__(self, *, window: int, min_run: int, capacity: int, limits: Mapping[str, DonorLimits] | None = None):
        """limits: what owners may keep, read whenever something must leave; owners without an entry have none."""
        self.window = window
        self.span = min_run - window + 1  # every shared run of min_run tokens is found
        self.capacity = capacity  # tokens
        self.generation = 0  # changes whenever a lookup might answer differently
        self.donors: OrderedDict[int, Donor] = OrderedDict()  # least recently used first
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
        if donor is None:
            donor = Donor(self._next_id, namespace, np.empty(0, np.int32))
            self._next_id += 1
            self.donors[donor.id] = donor
            self._tables.setdefault(namespace, _Table()).donors += 1
        self._count(donor, len(tokens) - len(donor.tokens))
        donor.tokens = np.asarray(tokens, dtype=np.int32).copy()
        self._fingerprint(donor)
        self.generation += 1
        if not donor.places:
            self.remove(donor.id)
            return None
        self.touch(donor.id)
        self._make_room(donor.owner)
        return donor.id if donor.id in self.donors else None

    def _make_room(self, owner: str) -> None:
        """One walk over the donors for each limit, however many must leave: the scheduler waits for it."""
        limit = self.limits.get(owner)
        if limit is not None and limit.exceeded(self.owned[owner], self.entered[owner]):
            mine = [donor.id for donor in self.donors.values() if donor.owner == owner]
            self._leave("quota", mine, lambda: limit.exceeded(self.owned[owner], self.entered[owner]))
        if self.tokens > self.capacity:
            order = victims([(donor.id, donor.owner) for donor in self.donors.values()], self.covered)
            self._leave("limit", order, lambda: self.tokens > self.capacity and len(self.donors) > 1)

    def _leave(self, reason: str, order: Iterable[int], too_many: Callable[[], bool]) -> None:
        for donor_id in order:
            if not too_many():
                return
            self.remove(donor_id)
            self.left[reason] += 1

    def _count(self, donor: Donor, tokens: int = 0, entries: int = 0) -> None:
        self.tokens += tokens
        self.entries += entries
        for count, change in ((self.owned, tokens), (self.entered, entries)):
            count[donor.owner] += change
            if not count[donor.owner]:
                del count[donor.owner]

    def _fingerprint(self, donor: Donor) -> None:
        # Winnowing is local: starting `span` windows back makes the same choices as one scan of everything.
        start = max(0, donor.scanned - self.span + 1)
        found = window_hashes(donor.tokens[start:], self.window)
        if start + len(found) <= donor.scanned:
            return  # no new window
        kept = winnow(found, self.span)
        hashes = found[kept].tolist()
        table = self._tables[donor.namespace]
        seen = {position for _, position in donor.places[-2 * self.span :]}
        shared: dict[int, int] = {}  # other donor -> length of the common beginning
        entries = 0
        for fingerprint, position in zip(hashes, (kept + start).tolist(), strict=True):
            if position in seen:
                continue
            row = table.row(fingerprint)
            places = table.places[row]
            if any(self._same_path(donor, place, position, shared) for place in places):
                continue  # another donor stands for this very node of the tree
            if any(place >> 32 == donor.id for place in places):
                continue  # text that repeats inside one donor: its first place is enough
            if len(places) >= OCCURRENCES:
                del places[0]
            else:
                entries += 1
            places.append(donor.id << 32 | position)
            donor.places.append((row, position))
        # A place passed over for another donor that has left since may come in late.
        donor.places.sort(key=lambda place: place[1])
        donor.scanned = max(donor.scanned, len(donor.tokens) - self.window + 1)
        self._count(donor, entries=entries)

    def _same_path(self, donor: Donor, place: int, position: int, shared: dict[int, int]) -> bool:
        other_id, other_position = place >> 32, place & 0xFFFFFFFF
        if other_position != position or other_id == donor.id:
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
        table = self._tables[donor.namespace]
        while donor.places and donor.places[-1][1] + self.window > length:
            row, position = donor.places.pop()
            self._count(donor, entries=-table.remove(row, donor.id << 32 | position))
        self._count(donor, length - len(donor.tokens))
        donor.tokens = donor.tokens[:length].copy()
        donor.scanned = min(donor.scanned, length - self.window + 1)
        self.generation += 1

    def remove(self, donor_id: int) -> None:
        """Forget a donor; unknown ids are ignored."""
        donor = self.donors.pop(donor_id, None)
        if donor is None:
            return
        table = self._tables[donor.namespace]
        for row, position in donor.places:
            self._count(donor, entries=-table.remove(row, donor.id << 32 | position))
        table.donors -= 1
        if not table.donors:
            del self._tables[donor.namespace]
        self._count(donor, tokens=-len(donor.tokens))
        self.generation += 1

    def clear(self) -> None:
        """Forget everything (the tree was flushed)."""
        self.left["flushed"] += len(self.donors)
        self.donors.clear()
        self._tables.clear()
        self.owned.clear()
        self.entered.clear()
        self.tokens = self.entries = 0
        self.generation += 1

    def touch(self, donor_id: int) -> None:
        """Mark a donor as used just now."""
        if donor_id in self.donors:
            self.donors.move_to_end(donor_id)

    # ---- questions ----

    def covered(self, owner: str) -> dict[int, int]:
        """Donors that the owner's guarantee covers, by id: their tokens. Most recently used first."""
        limit = self.limits.get(owner)
        if limit is None or not limit.guaranteed:
            return {}
        newest = ((donor.id, len(donor.tokens)) for donor in reversed(self.donors.values()) if donor.owner == owner)
        return to_hold(newest, limit.guaranteed)

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
        found = list(zip(hashes[kept].tolist(), kept.tolist(), strict=True))
        return [
            (place >> 32, place & 0xFFFFFFFF, start + position)
            for table in tables
            for fingerprint, position in found
            if (row := table.row_of.get(fingerprint)) is not None
            for place in table.places[row]
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
        return [False] * len(hashes) if table is None else [h in table.row_of for h in hashes]

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
        assert self.entries == sum(len(p) for t in self._tables.values() for p in t.places)
        assert self.entries == sum(self.entered.values()) and all(n > 0 for n in self.entered.values())
        for donor in self.donors.values():
            positions = [position for _, position in donor.places]
            assert positions == sorted(set(positions))
            assert not positions or positions[-1] + self.window <= len(donor.tokens)
        assert self._tables.keys() == {d.namespace for d in self.donors.values()}
        for namespace, table in self._tables.items():
            assert table.donors == sum(donor.namespace == namespace for donor in self.donors.values())
            assert len(table.row_of) + len(table.free) == len(table.places)
            for fingerprint, row in table.row_of.items():
                assert 0 < len(table.places[row]) <= OCCURRENCES
                for place in table.places[row]:
                    donor = self.donors[place >> 32]  # no place of a donor that left
                    position = place & 0xFFFFFFFF
                    assert donor.namespace == namespace
                    text = donor.tokens[position : position + self.window]
                    assert window_hashes(text, self.window).tolist() == [fingerprint]
                    assert (row, position) in donor.places


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the common beginning of two id arrays."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n
