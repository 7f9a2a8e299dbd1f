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
            error = _error(kernel, dtype, device)
        except Exception as why:  # not installed, no compiler, a shape it does not serve
            yield name, f"{type(why).__name__}: {why}"[:300]
        else:
            yield name, kernel if error < _ACCEPTED else f"off by {error:.2g} in its self-test"


def _triton(heads, groups, dim, **options):
    from kvshare_kernels.triton_attention import TritonAttention  # a CPU need not have Triton

    return TritonAttention(heads, groups, dim, **options)


def _error(kernel, dtype: torch.dtype, device) -> float:
    """Largest difference from the reference on a few scattered rows of two sequences; builds what is to be built."""
    keys = 400
    generator = torch.Generator().manual_seed(0)
    positions = np.array([3, 150, 151, 260, 399, 7, 8])
    slots = torch.arange(keys + 9, dtype=torch.int32, device=device)
    rows = PagedRows.checked(positions, [0, 5, 7], [0, keys, keys + 9], slots)

    def random(*size):
        return torch.randn(size, generator=generator).to(device, dtype)

    q = random(len(positions), kernel.heads, kernel.dim)
    k, v = (random(keys + 9, kernel.groups, kernel.dim) for _ in range(2))
    kernel.plan(rows)
    found, _ = kernel.run(q, k, v, kernel.dim**-0.5)
    wanted, _ = reference.paged_attention(q, k, v, rows, kernel.dim**-0.5, kernel.soft_cap)
    return float((found.float() - wanted.float()).abs().nan_to_num(torch.inf).max())
