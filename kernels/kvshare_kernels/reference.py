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


def paged_attention(q, k_buffer, v_buffer, rows, scale, soft_cap=0.0):
    """The same for ragged rows over paged KV: each sequence of `rows` (a `PagedRows`) by itself.

    q [n, H, D]; k_buffer, v_buffer [slots, G, D]; soft_cap: 0, or scores s become soft_cap * tanh(s / soft_cap).
    Returns (out [n, H, D] in q's dtype, natural log of the sum of the exponentials of the scores, float32 [n, H]).
    """
    outs, sums = [], []
    for i in range(len(rows.qo_indptr) - 1):
        mine = slice(rows.qo_indptr[i], rows.qo_indptr[i + 1])
        slots = rows.kv_indices[rows.kv_indptr[i] : rows.kv_indptr[i + 1]].long()
        positions = torch.as_tensor(rows.positions[mine], device=q.device)
        scores = _scores(q[mine], k_buffer[slots], positions, scale, soft_cap)
        values = v_buffer[slots].repeat_interleave(q.shape[1] // v_buffer.shape[1], dim=1).float()
        outs.append(torch.einsum("hnm,mhd->nhd", torch.softmax(scores, dim=-1), values))
        sums.append(torch.logsumexp(scores, dim=-1).T)
    return torch.cat(outs).to(q.dtype), torch.cat(sums)


def attention_column_mass(q, k, q_positions, scale):
    """How much attention each key receives: sum over the rows of the causal softmax, mean over the heads.

    Shapes as in `position_masked_attention`; returns float32 [m] (KVShare 4.4, alpha).
    """
    return _probabilities(q, k, q_positions, scale).sum(dim=1).mean(dim=0)


def _probabilities(q, k, q_positions, scale):
    return torch.softmax(_scores(q, k, q_positions, scale), dim=-1)


def _scores(q, k, q_positions, scale, soft_cap=0.0):
    keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1).float()
    scores = torch.einsum("nhd,mhd->hnm", q.float(), keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    hidden = torch.arange(k.shape[0], device=k.device)[None, :] > q_positions[:, None]
    return scores.masked_fill(hidden[None], -math.inf)


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


def turned_donors(buffer, donors, cos_sin, shifts, *, neox):
    """The donors' rows at their target positions, float32 [K, n, G, D]; shifts int64 [K, n], neox None for values."""
    rows = [buffer[slots] for slots in donors.slots]
    if neox is not None:
        rows = [rotate(row.float(), shift, cos_sin, neox=neox) for row, shift in zip(rows, shifts, strict=True)]
    return torch.stack(rows).float()


def key_spread(k_buffers, donors, cos_sin, shifts, *, neox):
    """Sum over the layers of sum_i w_i |k_i - mean|^2 / mean_p sum_i w_i |k_i|^2, float32 [n]."""
    spread = torch.zeros_like(donors.weights[0])
    for keys in k_buffers:
        moved = turned_donors(keys, donors, cos_sin, shifts, neox=neox)
        mean = (donors.weights[:, :, None, None] * moved).sum(dim=0)
        away = (donors.weights * (moved - mean).square().sum(dim=(2, 3))).sum(dim=0)
        spread += away / (donors.weights * moved.square().sum(dim=(2, 3))).sum(dim=0).mean()
    return spread


def blended(moved, donors, correction):
    """The mean of `moved` [K, n, G, D] plus the corrected parts of what sets each donor apart, float32 [n, G, D].

    correction float32 [parts, K]. A donor that lacks a row says nothing there.
    """
    mean = (donors.weights[:, :, None, None] * moved).sum(dim=0)
    apart = (moved - mean) * (donors.weights > 0)[:, :, None, None]
    return mean + torch.einsum("nk,kngd->ngd", correction[donors.part], apart)


def token_deviation(fresh, cached):
    """Per-token difference of two [n, G, D] tensors: (L1 norm, squared L2 norm), each float32 [n]."""
    difference = (fresh.float() - cached.float()).flatten(1)
    return difference.abs().sum(dim=1), difference.square().sum(dim=1)


def linear(x, weight, bias=None):
    """x [n, in], weight [out, in], bias [out] or None: [n, out] in x's dtype."""
    product = torch.einsum("ni,oi->no", x.float(), weight.float())
    return (product if bias is None else product + bias.float()).to(x.dtype)
