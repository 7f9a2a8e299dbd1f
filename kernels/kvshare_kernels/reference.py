"""Plain torch twins: they define what every operator means. Slow, dense and obvious on purpose.

Shapes use: n rows (queries), m keys, H query heads, G KV heads (H a multiple of G), D head dim.
"""

import math

import torch


def position_masked_attention(q, k, v, q_positions, scale):
    """Attention in which a row sees the keys of its own request up to its own position.

    q [n, H, D], k and v [m, G, D] where key j stands at position j, q_positions [n] int64 (any order,
    gaps allowed), scale float. Returns [n, H, D] in q's dtype.
    """
    probs = _probabilities(q, k, q_positions, scale)
    values = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1).float()
    return torch.einsum("hnm,mhd->nhd", probs, values).to(q.dtype)


def attention_column_mass(q, k, q_positions, scale):
    """How much attention each key receives: sum over the rows of the causal softmax, mean over the heads.

    Shapes as in `position_masked_attention`; returns float32 [m] (KVShare 4.4, alpha).
    """
    return _probabilities(q, k, q_positions, scale).sum(dim=1).mean(dim=0)


def _probabilities(q, k, q_positions, scale):
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    hidden = torch.arange(k.shape[0], device=k.device)[None, :] > q_positions[:, None]
    return torch.softmax(scores.masked_fill(hidden[None], -math.inf), dim=-1)


def rotate(k, shift, cos_sin, *, neox):
    """Move rotated keys by `shift` positions: Rot(p + shift) x = Rot(shift) Rot(p) x.

    k [n, G, D], shift [n] int64 (may be negative), cos_sin [max_position, R] with R/2 cosines then R/2 sines
    of each position (SGLang's table), R <= D the rotary dimension, neox: halves rather than even/odd pairs.
    Returns [n, G, D] in k's dtype; the dimensions beyond R stay as they are.
    """
    rotary_dim = cos_sin.shape[1]
    table = cos_sin[shift.abs()].float()
    cos, sin = table.chunk(2, dim=-1)
    cos, sin = cos[:, None], (sin * torch.sign(shift).float()[:, None])[:, None]
    turning, rest = k[..., :rotary_dim].float(), k[..., rotary_dim:]
    first, second = turning.chunk(2, dim=-1) if neox else (turning[..., ::2], turning[..., 1::2])
    turned = (first * cos - second * sin, second * cos + first * sin)
    turned = torch.cat(turned, dim=-1) if neox else torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat((turned.to(k.dtype), rest), dim=-1)


def copy_rotate(k_buffers, v_buffers, source, target, shift, cos_sin, *, neox):
    """Copy KV from slots `source` to slots `target` on every layer, keys rotated by `shift`.

    k_buffers, v_buffers: one [slots, G, D] tensor a layer, written in place; source and target [n] int64,
    disjoint; shift [n] int64.
    """
    for keys, values in zip(k_buffers, v_buffers, strict=True):
        keys[target] = rotate(keys[source], shift, cos_sin, neox=neox)
        values[target] = values[source]


def copy_mean(k_buffers, v_buffers, target, parts, cos_sin, *, neox, measured=()):
    """Weighted mean of several donors' KV into `target`; see `kv_copy.copy_mean` for the arguments.

    Returns the spread float32 [n]: sum over the measured layers of sum_i w_i |k_i - mean|^2 / mean_p sum_i w_i |k_i|^2.
    """
    spread = torch.zeros(len(target))
    for layer, (keys, values) in enumerate(zip(k_buffers, v_buffers, strict=True)):
        moved = []  # per donor: weights [n], keys and values [n, G, D], zero where it has no part
        for source, first, shift, weight in parts:
            at = slice(first, first + len(source))
            w = torch.zeros(len(target))
            k, v = (torch.zeros(len(target), *keys.shape[1:]) for _ in range(2))
            w[at] = weight
            k[at] = rotate(keys[source], torch.full((len(source),), shift), cos_sin, neox=neox).float()
            v[at] = values[source].float()
            moved.append((w, k, v))
        mean_k, mean_v = (sum(m[0][:, None, None] * m[i] for m in moved) for i in (1, 2))
        if layer in measured:
            away = sum(w * (k - mean_k).square().sum(dim=(1, 2)) for w, k, _ in moved)
            size = sum(w * k.square().sum(dim=(1, 2)) for w, k, _ in moved).mean()
            spread += away / size
        keys[target], values[target] = mean_k.to(keys.dtype), mean_v.to(values.dtype)
    return spread


def token_deviation(fresh, cached):
    """Per-token difference of two [n, G, D] tensors: (L1 norm, squared L2 norm), each float32 [n]."""
    difference = (fresh.float() - cached.float()).flatten(1)
    return difference.abs().sum(dim=1), difference.square().sum(dim=1)
