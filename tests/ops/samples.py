"""Random inputs of the operator tests, made on the CPU from a seed and moved to the device."""

import contextlib
import os
from collections.abc import Iterator

import numpy as np
import torch

SIZES = (1, 2, 19, 65, 257)
HEADS = ((9, 3), (4, 4), (8, 1))  # GQA as in the embedded model, MHA, one KV head
DIMS = (64, 32)
if os.environ.get("TRITON_INTERPRET") == "1":  # a thousand times slower than anything else: a few of each
    SIZES, HEADS, DIMS = (1, 65), HEADS[:1], DIMS[:1]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: {"rtol": 1e-5, "atol": 1e-5}, torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2}}


def tensor(*shape, seed=0, dtype=torch.float32, device="cpu") -> torch.Tensor:
    """Standard normal."""
    return torch.from_numpy(np.random.default_rng([seed, *shape]).standard_normal(shape)).to(device, dtype)


def scattered(rows: int, longest: int, seed=0, device="cpu") -> torch.Tensor:
    """`rows` ascending positions below `longest` with gaps between them, from 1 to the last one."""
    inner = np.random.default_rng(seed).choice(np.arange(2, longest - 1), max(0, rows - 2), replace=False)
    return torch.from_numpy(np.sort(np.concatenate(([1, longest - 1][-rows:], inner))).astype(np.int64)).to(device)


@contextlib.contextmanager
def no_host_waits() -> Iterator[None]:
    """Whatever makes the host wait for the GPU inside the block raises; what was queued before is waited for."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def same(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> bool:
    return torch.allclose(a.float(), b.float(), **TOLERANCE[dtype])
