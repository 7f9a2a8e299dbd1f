"""What owners of donors may keep in the index, and which donors a guarantee covers. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DonorLimits:
    """What a tenant may keep in the index: tokens of donors and entries; and how many tokens others never push out."""

    most: int | None = None
    guaranteed: int = 0
    entries: int | None = None

    def exceeded(self, tokens: int, entries: int) -> bool:
        """Whether somebody who has so much must give something up."""
        return (self.most is not None and tokens > self.most) or (self.entries is not None and entries > self.entries)


def to_hold(donors: Iterable[tuple[int, int]], guaranteed: int, least: int = 1) -> dict[int, int]:
    """Which of an owner's donors a guarantee of so many tokens covers; whole ones only. They stay in the index and
    pinned in the tree. donors: (id, tokens), most recently used first; returned in that order. None is shorter than
    `least` tokens, so nobody is looked at once there is no room for so many.
    """
    held, left = {}, guaranteed
    for donor_id, tokens in donors:
        if left < least:
            break
        if 0 < tokens <= left:
            held[donor_id] = tokens
            left -= tokens
    return held
