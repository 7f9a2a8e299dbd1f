"""Tenants in the scheduler: limits learnt from their requests, pins that keep guarantees, the record of borrowing.

Everything comes with the requests, so every tensor-parallel rank knows the same. Limits hold from a tenant's next
request on; a tenant that has sent none keeps what it had.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvshare_sched.tenants.borrow_log import BorrowLog, Source, loans
from kvshare_sched.tenants.namespaces import namespace
from kvshare_sched.tenants.policy import OWN, Stamp
from radix_ext.limits import DonorLimits
from radix_ext.records import Namespace, Segment

_KNOWN = 65_536  # documents whose donors are remembered; more are kept as long as the tree likes


def lenders_of(stamp: Stamp | None, own: Namespace) -> tuple[Namespace, ...]:
    """The namespaces besides its own that a request may borrow from."""
    return tuple(namespace(one.extra_key, None, own.lora_id) for one in stamp.lenders) if stamp is not None else ()


class Desk:
    """One per pipeline. `limits` is what the index reads of guarantees and when something must leave."""

    def __init__(self, log: BorrowLog | None = None):
        """log: of rank 0 only."""
        self.limits: dict[str, DonorLimits] = {}
        self._log = log
        self._revision = 0  # of the promises in the tenants file
        self._held: dict[str, dict[int, tuple[int, int]]] = {}  # owner -> donor -> (length, pinned node)
        self._documents: dict[tuple[str, str], set[int]] = {}  # (owner, document) -> donors that hold its text
        self._holds: dict[int, str] = {}  # the other way round

    def learn(self, stamp: Stamp, tree) -> None:
        """A request of this tenant is admitted.

        When the file makes other promises, those of before end for everybody: who is no longer in it sends nothing that
        would say so. A request that waited since before says nothing any more.
        """
        if stamp.revision > self._revision:
            self._revision = stamp.revision
            self.limits.clear()
            self.let_go(tree)
        if stamp.revision == self._revision:
            self.limits[stamp.tenant] = DonorLimits(stamp.donor_tokens, stamp.guaranteed, stamp.index_entries)

    def sources(self, segments: Sequence[Segment], donors) -> dict[int, Source]:
        """Whose KV an admitted request is about to use; its donors may be gone when it has. donors: of the index."""
        used = {place.donor_id for segment in segments for place in segment.places}
        return {i: (donors[i].namespace, self._holds.get(i)) for i in used}

    def borrowed(self, rid: str, stamp: Stamp, own: Namespace, segments: Sequence[Segment], sources) -> Counter[str]:
        """Record what a request has borrowed: the segments that ran; sources: as of its admission.

        Returns donor tokens read by kind of donor: OWN, or the rule that allows it; every donor of a text counts.
        """
        found = loans(segments, sources, own, stamp.lenders)
        if found and self._log is not None:
            self._log.write(rid, stamp, found)
        kinds = Counter({OWN: sum(place.length for segment in segments for place in segment.places)})
        for loan in found:
            kinds[loan["rule"]] += loan["tokens"]
            kinds[OWN] -= loan["tokens"]
        return kinds

    def published(self, owner: str, index, tree) -> None:
        """An owner's donors have changed: pin those its guarantee covers, most recently used first."""
        held, wanted = self._held.setdefault(owner, {}), index.covered(owner)
        for donor_id, length in wanted.items():
            if donor_id in held and held[donor_id][0] == length:
                continue
            node = tree.hold(index.donors[donor_id])  # before the old pin goes, so that nothing leaves in between
            if donor_id in held:
                tree.let_go(held.pop(donor_id)[1])
            if node is not None:
                held[donor_id] = (length, node)
        for donor_id in [donor_id for donor_id in held if donor_id not in wanted]:
            tree.let_go(held.pop(donor_id)[1])
        if not held:
            del self._held[owner]

    def document(self, owner: str, name: str, donor_id: int | None) -> None:
        """A document of the library has become a donor."""
        if donor_id is not None and len(self._documents) < _KNOWN:
            self._documents.setdefault((owner, name), set()).add(donor_id)
            self._holds[donor_id] = name

    def forget(self, owner: str, name: str, index, tree) -> None:
        """A document has left the library: nobody borrows it from now on."""
        for donor_id in sorted(self._documents.pop((owner, name), ())):
            index.remove(donor_id)
            self._holds.pop(donor_id, None)
        self.published(owner, index, tree)

    def let_go(self, tree) -> None:
        """Give all pins back. They return when their owners publish next."""
        for held in self._held.values():
            for _, node in held.values():
                tree.let_go(node)
        self._held.clear()

    def flushed(self) -> None:
        """The tree was emptied, and the pins with it."""
        self._held.clear()
        self._documents.clear()
        self._holds.clear()

    @property
    def held_tokens(self) -> int:
        """Donor tokens pinned for guarantees and documents."""
        return sum(length for held in self._held.values() for length, _ in held.values())
