"""Donors in the live tree: how much of a donor still exists, and pins that keep it while it is read.

Slots always come from the live tree path, never from a saved list: slots are recycled. Matching is
read-only (`match_full_device_prefix`), so a peek moves nothing.
"""

from __future__ import annotations

from array import array

import numpy as np
from sglang.srt.mem_cache.radix_cache import RadixKey

from radix_ext.records import Donor
from radix_ext.stores.base import DonorLease


class DonorTree:
    """The questions we ask SGLang's tree about donors."""

    def __init__(self, cache):
        self._cache = cache
        self.active = 0  # leases held

    def live_len(self, donor: Donor) -> int:
        """Leading tokens of a donor whose KV is on the device right now. Read-only, O(donor)."""
        return self._match(donor)[0]

    def prefix_len(self, key: RadixKey) -> int:
        """Leading tokens of a key whose exact KV is on the device right now. Read-only."""
        return self._cache.tree_core.match_full_device_prefix(key)[0]

    def lease(self, donor: Donor, length: int) -> DonorLease | None:
        """Pin a donor's path; None when fewer than `length` of its tokens are still there."""
        matched, node = self._match(donor)
        if matched < length:
            return None
        self._cache.tree_core.inc_full_pin(node)
        self.active += 1
        slots = self._cache.path_device_indices(node)[:length].long()
        return DonorLease(donor.id, slots, node)

    def hold(self, donor: Donor) -> int | None:
        """Pin a donor's whole path until `let_go`; None when some of it has left. Counts as no lease."""
        matched, node = self._match(donor)
        if matched < len(donor.tokens):
            return None
        self._cache.tree_core.inc_full_pin(node)
        return node

    def let_go(self, node: int) -> None:
        """Give the pin of `hold` back."""
        self._cache.tree_core.dec_full_pin(node)

    def release(self, lease: DonorLease) -> None:
        """Give one pin back."""
        if lease.released:
            return
        lease.released = True
        self._cache.tree_core.dec_full_pin(lease.node)
        self.active -= 1

    def touch(self, donor: Donor) -> None:
        """Refresh the path's recency in the tree: a donor that serves is worth keeping."""
        self._cache.touch_prefix(radix_key(donor))

    def _match(self, donor: Donor) -> tuple[int, int]:
        matched, node, _ = self._cache.tree_core.match_full_device_prefix(radix_key(donor))
        return matched, node


def radix_key(donor: Donor) -> RadixKey:
    """The donor's tokens as the tree's key, in the donor's namespace."""
    tokens = array("q", np.ascontiguousarray(donor.tokens, dtype=np.int64).tobytes())
    return RadixKey(tokens, donor.namespace.tree_key, cache_salt=donor.namespace.cache_salt)
