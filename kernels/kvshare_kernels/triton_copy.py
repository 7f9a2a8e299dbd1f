"""Gather, rotate, scatter in one launch for all layers, keys and values, in Triton.

The plain twin is `reference.copy_rotate`. One program moves a few tokens of one layer: both halves of the rotated
pairs are read once, turned in float32 and written once, so the traffic is that of a copy.
"""

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl

from kvshare_kernels.device import on_device

_LANES = 2048  # elements a program handles at a time
_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit(do_not_specialize=["tokens"])
def _copy_rotate(
    addresses, source, target, shift, cos_sin, tokens, layers,
    k_stride, v_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAIRS: tl.constexpr, NEOX: tl.constexpr, DTYPE: tl.constexpr,
    TOKENS: tl.constexpr, LANES: tl.constexpr, REST: tl.constexpr, VALUES: tl.constexpr, V_WIDTH: tl.constexpr,
):  # fmt: skip
    layer = tl.program_id(1)
    # torch aligns buffers to more than that; said here, because an address out of a table tells Triton nothing.
    keys = tl.multiple_of(tl.load(addresses + layer).to(tl.pointer_type(DTYPE)), 16)
    values = tl.multiple_of(tl.load(addresses + layers + layer).to(tl.pointer_type(DTYPE)), 16)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = token < tokens
    old = tl.load(source + token, mask=here, other=0).to(tl.int64)[:, None]
    new = tl.load(target + token, mask=here, other=0).to(tl.int64)[:, None]
    moved = tl.load(shift + token, mask=here, other=0)[:, None]
    row = here[:, None]

    lane = tl.arange(0, LANES)[None, :]
    head, pair = lane // PAIRS, lane % PAIRS
    real = row & (head < HEADS)
    angle = cos_sin + tl.abs(moved).to(tl.int64) * (2 * PAIRS) + pair
    cos = tl.load(angle, mask=real, other=1.0)
    sin = tl.load(angle + PAIRS, mask=real, other=0.0) * tl.where(moved < 0, -1.0, 1.0)
    sin = tl.where(moved == 0, 0.0, sin)
    if NEOX:
        first = head * DIM + pair
        second = first + PAIRS
    else:
        first = head * DIM + 2 * pair
        second = first + 1
    a = tl.load(keys + old * k_stride + first, mask=real, other=0.0).to(tl.float32)
    b = tl.load(keys + old * k_stride + second, mask=real, other=0.0).to(tl.float32)
    tl.store(keys + new * k_stride + first, (a * cos - b * sin).to(DTYPE), mask=real)
    tl.store(keys + new * k_stride + second, (b * cos + a * sin).to(DTYPE), mask=real)

    if DIM > 2 * PAIRS:  # dimensions that are not rotated
        rest = tl.arange(0, REST)[None, :]
        over: tl.constexpr = DIM - 2 * PAIRS
        at = rest // over * DIM + 2 * PAIRS + rest % over
        real = row & (rest < HEADS * over)
        tl.store(keys + new * k_stride + at, tl.load(keys + old * k_stride + at, mask=real), mask=real)

    at = tl.arange(0, VALUES)[None, :]
    real = row & (at < V_WIDTH)
    tl.store(values + new * v_stride + at, tl.load(values + old * v_stride + at, mask=real), mask=real)


def copy_rotate(
    k_buffers: Sequence[torch.Tensor],
    v_buffers: Sequence[torch.Tensor],
    source: torch.Tensor,
    target: torch.Tensor,
    shift: torch.Tensor,
    cos_sin: torch.Tensor,
    *,
    neox: bool,
) -> None:
    """As `reference.copy_rotate`: source, target, shift int [n]; cos_sin float32 [positions, R], contiguous.

    All buffers alike in shape, dtype and strides, heads and dimensions of a slot without gaps. Raises ValueError.
    """
    if len(k_buffers) != len(v_buffers):
        raise ValueError(f"{len(k_buffers)} key and {len(v_buffers)} value buffers: give one of each a layer")
    if not len(k_buffers) or not len(source):
        return
    keys, values = k_buffers[0], v_buffers[0]
    for kind, buffers in (("key", k_buffers), ("value", v_buffers)):
        like = buffers[0]
        if any((b.shape, b.stride(), b.dtype) != (like.shape, like.stride(), like.dtype) for b in buffers):
            raise ValueError(f"the {kind} buffers differ between layers: give them alike in shape, strides and dtype")
        if like.dim() != 3 or like.stride()[1:] != (like.shape[2], 1):
            raise ValueError(
                f"{kind} buffers {tuple(like.shape)} with strides {like.stride()}: give [slots, G, D], NHD"
            )
    if keys.dtype not in _DTYPES or values.dtype != keys.dtype:
        raise ValueError(f"buffers of {keys.dtype} and {values.dtype}: give float32, float16 or bfloat16, both alike")
    heads, dim, rotary = keys.shape[1], keys.shape[2], cos_sin.shape[1]
    if rotary % 2 or rotary > dim or cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
        raise ValueError(
            f"cos_sin {cos_sin.dtype} {tuple(cos_sin.shape)}: give float32 [positions, R], R even, <= {dim}"
        )
    pairs, width = rotary // 2, values.shape[1] * values.shape[2]
    lanes = triton.next_power_of_2(heads * pairs)
    tokens = max(1, _LANES // lanes)
    table = on_device(np.array([b.data_ptr() for b in (*k_buffers, *v_buffers)]), keys)
    _copy_rotate[(triton.cdiv(len(source), tokens), len(k_buffers))](
        table, source, target, shift, cos_sin, len(source), len(k_buffers),
        keys.stride(0), values.stride(0),
        HEADS=heads, DIM=dim, PAIRS=pairs, NEOX=neox, DTYPE=_DTYPES[keys.dtype],
        TOKENS=tokens, LANES=lanes, REST=triton.next_power_of_2(max(1, heads * (dim - rotary))),
        VALUES=triton.next_power_of_2(width), V_WIDTH=width,
    )  # fmt: skip
