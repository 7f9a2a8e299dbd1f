"""Copy KV between slots and rotate the keys to their new positions, for many layers at once.

The plain twin is `reference.copy_rotate`. On a CPU it walks runs of equal shift, so that one pair of cosine and sine
rows serves a whole run and the elementwise work broadcasts over it; on a GPU one launch moves everything.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvshare_kernels.device import in_triton, on_device


def rotation_rows(cos_sin: torch.Tensor, shift: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines, float32 [..., R/2], that move rotated keys by `shift` positions (int64 [...])."""
    cos, sin = cos_sin[abs(shift)].float().chunk(2, dim=-1)
    return cos, sin * torch.as_tensor(shift, device=sin.device).sign()[..., None]


def halves(pairs: int, neox: bool) -> tuple[slice, slice]:
    """The two dimensions of each of the rotated pairs."""
    return (slice(0, pairs), slice(pairs, 2 * pairs)) if neox else (slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2))


def rotate_run(k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, neox: bool) -> torch.Tensor:
    """Rotate keys [n, G, D] by the same shift, or row by row; computes in float32, returns k's dtype.

    cos, sin: from `rotation_rows`, [R/2] for all rows or [n, 1, R/2].
    """
    a, b = halves(cos.shape[-1], neox)
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
    if runs and in_triton(cos_sin):
        from kvshare_kernels import triton_copy

        source, target = (torch.cat([run[i] for run in runs]) for i in (0, 1))
        shift = on_device(np.repeat([run[2] for run in runs], [len(run[0]) for run in runs]).astype(np.int32), source)
        triton_copy.copy_rotate(k_buffers, v_buffers, source, target, shift, cos_sin, neox=neox)
        return
    angles = [rotation_rows(cos_sin, shift) for _, _, shift in runs]
    for keys, values in zip(k_buffers, v_buffers, strict=True):
        for (source, target, shift), (cos, sin) in zip(runs, angles, strict=True):
            moved = keys.index_select(0, source)
            keys.index_copy_(0, target, rotate_run(moved, cos, sin, neox=neox) if shift else moved)
            values.index_copy_(0, target, values.index_select(0, source))
