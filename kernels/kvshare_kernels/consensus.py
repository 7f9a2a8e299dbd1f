"""One text from several donors: how far they are apart, and the blend that comes closest to the rows computed anew.

Donors' keys are compared and blended as they stand at the target position. Everything is computed in float32. The
plain twins are in `reference`.
"""

from typing import NamedTuple

import torch

from kvshare_kernels.kv_copy import halves, rotate_run

_RIDGE = 0.1  # pull of the given weights, relative to how far the donors are apart
_BLOCK = 512  # rows blended together on a CPU: the intermediates stay in the cache; a GPU wants few large launches
_SILENT = 1e-6  # donors closer to one another than this share of their size tell nothing: the given weights stand


class Donors(NamedTuple):
    """K donors of n target rows, padded: a donor that lacks a row has weight 0 there and any valid slot."""

    slots: torch.Tensor  # int64 [K, n]
    weights: torch.Tensor  # float32 [K, n], the columns add up to 1
    cos: torch.Tensor  # float32 [K, n, R/2], cosines and signed sines of each row's shift
    sin: torch.Tensor
    part: torch.Tensor  # int64 [n], 0 to parts - 1: rows of one text, blended alike
    parts: int

    def take(self, rows: torch.Tensor) -> "Donors":
        """The same donors for some of the rows (int64, indices into n)."""
        return Donors(*(t[:, rows] for t in self[:4]), self.part[rows], self.parts)


def key_spread(k_buffers, donors: Donors, *, neox: bool) -> torch.Tensor:
    """How far the donors' keys are apart, float32 [n]; 0 where there is one donor.

    k_buffers: one [slots, G, D] tensor a layer. Weighted variance of the turned keys relative to the layer's mean
    squared norm, summed over the layers.
    """
    spread = torch.zeros_like(donors.weights[0])
    turns = _weighted_turns(donors, donors.weights)
    for keys in k_buffers:
        variance, size = torch.zeros_like(spread), torch.zeros_like(spread)
        for at in _blocks(spread):
            mixed, size[at] = _mixed(keys, donors, donors.weights, turns, at, neox)
            variance[at] = (size[at] - _squared(mixed)).clamp_(min=0)
        spread += variance / size.mean().clamp_(min=1e-20)
    return spread


def fit(buffer: torch.Tensor, donors: Donors, fresh: torch.Tensor, *, neox: bool | None) -> torch.Tensor:
    """Corrections to the donors' weights, float32 [parts, K], so that each part's blend comes closest to `fresh`.

    buffer [slots, G, D]; donors: of the n rows that have been computed anew; fresh [n, G, D], what came out; neox as
    for keys, None for values, which are not turned. Ridge regression of what the mean leaves over on what sets each
    donor apart from the mean; 0 for a part without rows.
    """
    count = len(donors.slots)
    moved = [_turned(buffer, donors, i, neox).flatten(1) for i in range(count)]
    mean = torch.zeros_like(moved[0])
    for rows, weight in zip(moved, donors.weights, strict=True):
        mean.addcmul_(rows, weight[:, None])
    size = sum(_squared(rows).mean() for rows in moved) / count if len(mean) else mean.new_zeros(())
    present = (donors.weights > 0)[..., None]
    sides = [(rows - mean).mul_(here) for rows, here in zip(moved, present, strict=True)]
    sides.append(fresh.float().flatten(1) - mean)  # what is to be explained, beside what may explain it
    products = torch.stack([torch.linalg.vecdot(a, b) for a in sides[:count] for b in sides], dim=1)
    sums = products.new_zeros(donors.parts, count * (count + 1)).index_add_(0, donors.part, products)
    gram, right = sums.view(donors.parts, count, count + 1).split((count, 1), dim=2)
    rows = sums.new_zeros(donors.parts).index_add_(0, donors.part, torch.ones_like(donors.weights[0]))
    pull = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1) + _SILENT * size * rows + 1e-20
    # The pull makes it regular, so the check for that, for which a GPU would have to be waited for, is left out.
    return torch.linalg.solve_ex(gram + torch.diag_embed(pull[:, None].expand(-1, count)), right).result[..., 0]


def blend(
    buffer: torch.Tensor, donors: Donors, target: torch.Tensor, correction: torch.Tensor | None, *, neox: bool | None
) -> None:
    """Write the donors' blend into the target slots (int64 [n]) of one buffer [slots, G, D].

    correction: from `fit`, float32 [parts, K]; None for the given weights as they are. neox as in `fit`.
    """
    weights = donors.weights
    if correction is not None:
        change = correction[donors.part].T * (weights > 0)  # [K, n]
        weights = weights * (1 - change.sum(dim=0)) + change
    turns = None if neox is None else _weighted_turns(donors, weights)
    for at in _blocks(target):
        mixed, _ = _mixed(buffer, donors, weights, turns, at, neox, sized=False)
        buffer.index_copy_(0, target[at], mixed.to(buffer.dtype))


def _blocks(rows: torch.Tensor) -> list[slice]:
    size = 32 * _BLOCK if rows.is_cuda else _BLOCK
    return [slice(start, start + size) for start in range(0, len(rows), size)]


def _weighted_turns(donors: Donors, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return weights[..., None] * donors.cos, weights[..., None] * donors.sin


def _squared(rows: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(rows.flatten(1), dim=1).square_()


def _mixed(buffer, donors, weights, turns, at: slice, neox: bool | None, *, sized: bool = True):
    """(weighted sum of the donors' rows [m, G, D], weighted sum of their squared norms [m] or 0), both float32."""
    size = 0
    mixed = torch.zeros((donors.slots[0, at].shape[0], *buffer.shape[1:]), dtype=torch.float32, device=buffer.device)
    for i in range(len(weights)):
        moved = buffer.index_select(0, donors.slots[i, at]).float()
        if sized:
            size = size + _squared(moved) * weights[i, at]  # turning keeps the norm
        if neox is None:
            mixed.addcmul_(moved, weights[i, at, None, None])
        else:
            _add_turned(mixed, moved, weights[i, at], turns[0][i, at], turns[1][i, at], neox)
    return mixed, size


def _add_turned(mixed, moved, weight, cos, sin, neox: bool) -> None:
    """Add rows turned by the angle of cos and sin, both weighted already; dimensions beyond R/2 pairs only weighted."""
    (a, b), rest = halves(cos.shape[-1], neox), slice(2 * cos.shape[-1], None)
    cos, sin = cos[:, None], sin[:, None]
    mixed[..., a].addcmul_(moved[..., a], cos).addcmul_(moved[..., b], sin, value=-1)
    mixed[..., b].addcmul_(moved[..., b], cos).addcmul_(moved[..., a], sin)
    mixed[..., rest].addcmul_(moved[..., rest], weight[:, None, None])


def _turned(buffer: torch.Tensor, donors: Donors, i: int, neox: bool | None) -> torch.Tensor:
    """Donor i's rows at their target positions, float32 [n, G, D]."""
    moved = buffer.index_select(0, donors.slots[i]).float()
    if neox is None:
        return moved
    return rotate_run(moved, donors.cos[i][:, None], donors.sin[i][:, None], neox=neox)
