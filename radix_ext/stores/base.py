"""What a place that keeps donors hands out."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class DonorLease:
    """Receipt of one pin; releasing it twice is harmless."""

    donor_id: int
    slots: torch.Tensor  # int64 [length], slot of each donor token
    node: int
    released: bool = False
