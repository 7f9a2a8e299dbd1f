"""Which reused tokens deviate: per-token KV deviation, attention mass, and the top-k choice.

Plain twins: `reference.token_deviation`, `reference.attention_column_mass`. On a GPU the first two are Triton kernels.
"""

from collections.abc import Sequence

import numpy as np
import torch

from kvshare_kernels.device import in_triton


def token_deviation(fresh: torch.Tensor, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L1 norm, squared L2 norm) of the difference of two [n, G, D] tensors, float32 [n] each."""
    if in_triton(fresh):
        from kvshare_kernels import triton_deviation

        return triton_deviation.token_deviation(fresh, cached)
    difference = (fresh - cached).float().flatten(1)
    return difference.abs().sum(dim=1), difference.square().sum(dim=1)


def attention_column_mass(
    q: torch.Tensor, k: torch.Tensor, q_positions: torch.Tensor, scale: float, *, block: int = 128
) -> torch.Tensor:
    """Attention received by each key: causal softmax summed over the rows, mean over the heads, float32 [m].

    q [n, H, D], k [m, G, D] (key j at position j), q_positions int64 [n] ascending. Works in row blocks, so
    that no n x m matrix is ever held.
    """
    rows, heads, dim = q.shape
    groups = k.shape[1]
    if in_triton(q) and rows:
        from kvshare_kernels import triton_attention

        if dim in triton_attention.DIMS and q.dtype == k.dtype and q.dtype in triton_attention.DTYPES:
            return triton_attention.attention_column_mass(q, k, q_positions, scale)
    mass = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
    keys = k.float().permute(1, 2, 0)  # [G, D, m]
    key_positions = torch.arange(k.shape[0], device=k.device)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        positions = q_positions[start:stop]
        seen = int(positions[-1]) + 1
        query = q[start:stop].float().view(stop - start, groups, heads // groups, dim)
        query = query.permute(1, 2, 0, 3).reshape(groups, -1, dim)
        scores = torch.bmm(query, keys[:, :, :seen]).mul_(scale)
        hidden = key_positions[:seen] > positions[:, None]
        scores.view(groups, heads // groups, stop - start, seen).masked_fill_(hidden, float("-inf"))
        mass[:seen] += torch.softmax(scores, dim=-1).sum(dim=(0, 1))
    return mass / heads


def top_k(scores: Sequence[torch.Tensor], budgets: Sequence[int]) -> list[np.ndarray]:
    """Of each score (float [n]) the ascending indices, int64 on the host, of the `budget` highest above zero.

    Ties go to the lower index. Fewer indices come back when fewer scores are positive: a token without deviation is
    never worth recomputing (KVShare 4.4, step 5). The stable sort makes all ranks choose alike. However many scores,
    the host waits for the device once.
    """
    if not scores:
        return []
    picked = []
    for score, budget in zip(scores, budgets, strict=True):
        highest, order = (x[:budget] for x in torch.sort(score, descending=True, stable=True))
        picked.append(torch.where(highest > 0, order, -1))
    found = torch.cat(picked).cpu().numpy()
    parts = np.split(found, np.cumsum([len(p) for p in picked])[:-1])
    return [np.sort(part[part >= 0]) for part in parts]
