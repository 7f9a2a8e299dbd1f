"""How far each token's freshly computed KV is from the cached one, in one launch, in Triton.

The plain twin is `reference.token_deviation`. Both tensors are read once and nothing of their size is written.
"""

import torch
import triton
import triton.language as tl

_LANES = 1024


@triton.jit(do_not_specialize=["tokens"])
def _deviation(
    fresh, cached, absolute, squared, tokens, width, fresh_stride, cached_stride,
    TOKENS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    here = (token < tokens)[:, None]
    row = token.to(tl.int64)[:, None]
    sums = tl.zeros((TOKENS,), tl.float32)
    squares = tl.zeros((TOKENS,), tl.float32)
    for start in range(0, width, LANES):
        at = start + tl.arange(0, LANES)[None, :]
        real = here & (at < width)
        a = tl.load(fresh + row * fresh_stride + at, mask=real, other=0.0).to(tl.float32)
        b = tl.load(cached + row * cached_stride + at, mask=real, other=0.0).to(tl.float32)
        sums += tl.sum(tl.abs(a - b), axis=1)
        squares += tl.sum((a - b) * (a - b), axis=1)
    tl.store(absolute + token, sums, mask=token < tokens)
    tl.store(squared + token, squares, mask=token < tokens)


def token_deviation(fresh: torch.Tensor, cached: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(L1 norm, squared L2 norm) of the difference of two [n, G, D] tensors, float32 [n] each."""
    if fresh.shape != cached.shape or fresh.device != cached.device:
        raise ValueError(f"{tuple(fresh.shape)} and {tuple(cached.shape)}: give two [n, G, D] tensors of one device")
    absolute, squared = (torch.empty(len(fresh), dtype=torch.float32, device=fresh.device) for _ in range(2))
    if len(fresh):
        a, b = fresh.flatten(1), cached.flatten(1)  # views, unless the heads of a token are apart
        a, b = (x if x.stride(1) == 1 else x.contiguous() for x in (a, b))
        width = a.shape[1]
        lanes = min(_LANES, triton.next_power_of_2(width))
        tokens = max(1, _LANES // lanes)
        _deviation[(triton.cdiv(len(a), tokens),)](
            a, b, absolute, squared, len(a), width, a.stride(0), b.stride(0), TOKENS=tokens, LANES=lanes
        )
    return absolute, squared
