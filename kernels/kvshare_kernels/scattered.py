"""Which kernels for scattered rows over paged KV this machine has, fastest first, each tried before it is offered."""

from collections.abc import Iterator

import numpy as np
import torch

from kvshare_kernels import reference
from kvshare_kernels.flashinfer_ragged import FlashInferAttention
from kvshare_kernels.paged_rows import PagedRows

_ACCEPTED = 0.05  # of values around 1; a row that sees one key too many is off by more


def kernels(
    heads: int, groups: int, dim: int, *, dtype: torch.dtype, device, soft_cap: float = 0.0
) -> Iterator[tuple[str, object]]:
    """Pairs of a name and a planned-and-run kernel, or the reason (str) why there is none; nothing is built before its
    turn. heads, groups: query and KV heads of `dim`."""
    shape, options = (heads, groups, dim), {"soft_cap": soft_cap, "dtype": dtype}
    ways = {
        "flashinfer": lambda: FlashInferAttention(*shape, **options, device=device),
        "flashinfer, stored mask": lambda: FlashInferAttention(*shape, **options, device=device, packed_mask=True),
        "triton": lambda: _triton(*shape, **options),
    }
    for name, create in ways.items():
        try:
            kernel = create()
            error = max(_error(kernel, rows, dtype, device) for rows in _samples(heads, device))
        except Exception as why:  # not installed, no compiler, a shape it does not serve
            yield name, f"{type(why).__name__}: {why}"[:300]
        else:
            yield name, kernel if error < _ACCEPTED else f"off by {error:.2g} in its self-test"


def _triton(heads, groups, dim, **options):
    from kvshare_kernels.triton_attention import TritonAttention  # a CPU need not have Triton

    return TritonAttention(heads, groups, dim, **options)


def _samples(heads: int, device) -> Iterator[PagedRows]:
    """Scattered rows of three sequences, one of them from its start on; and of so many sequences that with these query
    heads no kernel splits their keys."""
    for repeats in (1, 64 // heads + 1):
        positions = np.append([3, 150, 151, 260, 399], np.tile([7, 8, 0, 5], repeats))
        qo, kv = np.cumsum([0, 5, *[2, 2] * repeats]), np.cumsum([0, 400, *[9, 6] * repeats])
        yield PagedRows.checked(positions, qo, kv, torch.arange(kv[-1], dtype=torch.int32, device=device))


def _error(kernel, rows: PagedRows, dtype: torch.dtype, device) -> float:
    """Largest difference from the reference on random values; builds what is to be built."""
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    qkv = random(len(rows.positions), kernel.heads + 2 * kernel.groups, kernel.dim)
    q = qkv[:, : kernel.heads]  # not contiguous, as layers have it
    k, v = (random(len(rows.kv_indices), kernel.groups, kernel.dim) for _ in range(2))
    kernel.plan(rows)
    found, _ = kernel.run(q, k, v, kernel.dim**-0.5)
    wanted, _ = reference.paged_attention(q, k, v, rows, kernel.dim**-0.5, kernel.soft_cap)
    return float((found.float() - wanted.float()).abs().nan_to_num(torch.inf).max())
