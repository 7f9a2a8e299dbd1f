"""What reuse asks of a place that keeps donors, and what it hands out. The radix tree of an engine is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

from radix_ext.records import Donor


@dataclass(slots=True)
class DonorLease:
    """Receipt of one pin; releasing it twice is harmless."""

    donor_id: int
    slots: torch.Tensor  # int64 [length], slot of each donor token
    node: int
    released: bool = False


class DonorStore(Protocol):
    """A place that keeps the KV of donors. Asking has no side effects; a lease keeps what is read."""

    active: int  # leases that are out

    def live_len(self, donor: Donor) -> int:
        """Leading tokens of a donor whose KV is there right now."""

    def lease(self, donor: Donor, length: int) -> DonorLease | None:
        """Keep the first `length` tokens until `release`; None when fewer are still there."""

    def release(self, lease: DonorLease) -> None:
        """Give a lease back; a second time does nothing."""

    def touch(self, donor: Donor) -> None:
        """The donor has been used: it is worth keeping."""

    def hold(self, donor: Donor) -> int | None:
        """Keep a whole donor until `let_go`, for a guarantee; None when some of it has left. Counts as no lease."""

    def let_go(self, node: int) -> None:
        """Give back what `hold` has returned."""
