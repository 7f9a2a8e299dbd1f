"""Copy KV between slots and rotate the keys to their new positions, for many layers at once.

The plain twin is `reference.copy_rotate`. This form walks runs of equal shift, so that one pair of cosine
and sine rows serves a whole run and the elementwise work broadcasts over it.
"""

from collections.abc import Sequence

import torch


def rotation_rows(cos_sin: torch.Tensor, shift: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines, float32 [R/2] each, that move a rotated key by `shift` positions."""
    cos, sin = cos_sin[abs(shift)].float().chunk(2)
    return cos, (sin if shift >= 0 else -sin)


def rotate_run(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, neox: bool) -> torch.Tensor:
    """Rotate keys [n, G, D] of one run by the same shift; computes in float32, returns k's dtype."""
    half = cos.shape[0]
    a, b = (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    out = k.clone() if k.dtype == torch.float32 else k.float()  # half precision would lose the angle
    first, second = out[..., a], out[..., b]
    turned = first * sin
    first.mul_(cos).addcmul_(second, sin, value=-1)
    second.mul_(cos).add_(turned)
    return out.to(k.dtype)


def copy_rotate(
    k_buffers: Sequence[torch.Tensor],
    v_buffers: Sequence[torch.Tensor],
    runs: Sequence[tuple[torch.Tensor, torch.Tensor, int]],
    cos_sin: torch.Tensor,
    *,
    neox: bool,
) -> None:
    """Copy each run's KV from its donor slots to its target slots, on all the given layers.

    k_buffers, v_buffers: one [slots, G, D] tensor a layer, written in place. runs: (source slots int64 [n],
    target slots int64 [n], shift), where all targets are disjoint from all sources. cos_sin [positions, R].
    """
    angles = [rotation_rows(cos_sin, shift) for _, _, shift in runs]
    for keys, values in zip(k_buffers, v_buffers, strict=True):
        for (source, target, shift), (cos, sin) in zip(runs, angles, strict=True):
            moved = keys.index_select(0, source)
            keys.index_copy_(0, target, rotate_run(moved, cos, sin, neox=neox) if shift else moved)
            values.index_copy_(0, target, values.index_select(0, source))
