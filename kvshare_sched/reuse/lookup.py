"""Which donors stand in for a prompt, alive in the tree, and the pins that keep them while they are read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from kvshare_sched.quality.audit import Blamed
from kvshare_sched.records.request import RequestView
from kvshare_sched.settings import KVShareConfig
from radix_ext.index import SegmentIndex
from radix_ext.limits import DonorLimits
from radix_ext.matcher import find_segments
from radix_ext.records import Segment
from radix_ext.stores.base import DonorLease, DonorStore

_MEMO_SIZE = 1024  # prompts whose last lookup is remembered
_SHUT_SIZE = 16_384  # pairs of borrower and donor that are kept apart
_MAX_REMATCH = 8  # donors found dead while planning one request, before it runs as ordinary prefill


class DonorLost(Exception):
    """A donor left the tree between matching and leasing."""


class Lending:
    """Index and tree of one engine as one: looking up has no side effects on tree or pool, leasing pins."""

    def __init__(self, config: KVShareConfig, tree: DonorStore, limits: Mapping[str, DonorLimits]):
        """limits: what owners of donors may keep, read whenever something must leave the index."""
        self.tree = tree
        self.index = SegmentIndex(
            window=config.window, min_run=config.min_run, capacity=config.index_tokens, limits=limits
        )
        self._min_run = config.min_run
        self._shut_for: OrderedDict[tuple[str, int], None] = OrderedDict()  # (borrower, donor) that do not go together
        self._memo: OrderedDict[tuple, tuple] = OrderedDict()  # who asks and what -> (generation, segments)

    # ---- peek ----

    def match(self, view: RequestView, donors: int = 1) -> tuple[Segment, ...]:
        """Segments other requests could lend, all live in the tree right now; up to `donors` donors of each text.

        Memoised per prompt and index generation. Donors the tree has evicted meanwhile are shortened or
        dropped from the index on the way: that only corrects the index.
        """
        text = hash(view.token_ids.tobytes())
        for _ in range(_MAX_REMATCH):
            key = (view.namespace, view.lenders, view.exact_len, view.fresh_from, text, donors)
            generation, segments = self._memo.get(key, (None, ()))
            if generation != self.index.generation:
                segments = self._look_up(view, donors)
                self._memo[key] = (self.index.generation, segments)
                self._memo.move_to_end(key)
                while len(self._memo) > _MEMO_SIZE:
                    self._memo.popitem(last=False)
            if self._all_live(segments):
                return segments
        return ()

    def _look_up(self, view: RequestView, donors: int) -> tuple[Segment, ...]:
        # The last token is always computed; a request never borrows from itself (it is no donor while waiting).
        hits = self.index.hits(view.namespace, view.token_ids, view.exact_len, view.lenders)
        if self._shut_for:
            borrower = view.namespace.owner
            hits = [hit for hit in hits if (borrower, hit[0]) not in self._shut_for]
        return find_segments(
            view.token_ids,
            hits,
            lambda donor_id: self.index.donors[donor_id].tokens,
            start=view.exact_len,
            end=min(view.fresh_from, view.prompt_len - 1),
            min_run=self._min_run,
            donors=donors,
        )

    def _all_live(self, segments: tuple[Segment, ...]) -> bool:
        live = True
        for donor_id, needed in _needed(segments).items():
            length = self.tree.live_len(self.index.donors[donor_id])
            if length < needed:
                self.index.truncate(donor_id, length)
                live = False
        return live

    # ---- pins ----

    def lease(self, segments: tuple[Segment, ...]) -> dict[int, DonorLease]:
        """Pin every donor that these segments need, by donor id. Raises DonorLost, and holds nothing then."""
        leases: dict[int, DonorLease] = {}
        for donor_id, needed in _needed(segments).items():
            try:
                lease = self.tree.lease(self.index.donors[donor_id], needed)
                if lease is None:
                    raise DonorLost
            except BaseException:
                self.release(leases)
                raise
            leases[donor_id] = lease
        return leases

    def release(self, leases: dict[int, DonorLease]) -> None:
        """Give pins back and empty the table."""
        for lease in leases.values():
            self.tree.release(lease)
        leases.clear()

    # ---- what changes who lends ----

    def used(self, leases: Mapping[int, DonorLease]) -> None:
        """These donors serve: worth keeping, in index and tree."""
        for donor_id in leases:
            self.index.touch(donor_id)
            self.tree.touch(self.index.donors[donor_id])

    def shut(self, blamed: Blamed) -> None:
        """Audits blame a donor: one's own leaves the index, another's is kept from this borrower."""
        if isinstance(blamed, int):
            self.index.remove(blamed)
            return
        self._shut_for[blamed] = None
        while len(self._shut_for) > _SHUT_SIZE:
            self._shut_for.popitem(last=False)
        self._memo.clear()

    def flush(self) -> None:
        """The tree was emptied."""
        self.index.clear()
        self._memo.clear()


def _needed(segments: tuple[Segment, ...]) -> dict[int, int]:
    """Donor id -> tokens of it that must be live, ascending ids."""
    needed: dict[int, int] = {}
    for segment in (place for s in segments for place in s.places):
        needed[segment.donor_id] = max(needed.get(segment.donor_id, 0), segment.donor_end)
    return dict(sorted(needed.items()))
