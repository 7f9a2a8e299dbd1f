"""Position-masked ragged attention over paged KV, and the attention each key receives, in Triton.

The plain twins are `reference.paged_attention` and `reference.attention_column_mass`. The heads of a group are packed
into the rows of one product, so any ratio of query to KV heads fills a block. A block of rows visits the keys up to
its last row's position and no more. Few rows over many keys would leave most of a GPU idle, so their keys are split
over several programs and the parts put together by their log-sum-exp.
"""

from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl

from kvshare_kernels.device import on_device
from kvshare_kernels.paged_rows import PagedRows

_M, _N = 64, 64  # packed rows and keys of a block that scores keys
_LOG2E = tl.constexpr(1.4426950408889634)
_PROGRAMS = 512  # enough for any GPU; fewer blocks than that are split by keys
_SPLIT = 1024  # keys of a part at least
DIMS = (16, 32, 64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _product(a, b, IEEE: tl.constexpr):
    # float32 inputs keep their precision: the default would round them to 10 bits. Triton's interpreter cannot
    # multiply bfloat16, so there everything takes this road.
    if IEEE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b)


@triton.jit
def _capped(scores, cap, CAPPED: tl.constexpr):
    if CAPPED:
        # tanh from exp of a negative argument, which cannot overflow
        away = tl.exp(-2 * tl.abs(scores / cap))
        scores = tl.where(scores < 0, -cap, cap) * (1 - away) / (1 + away)
    return scores


@triton.jit
def _step(
    query, position, start, high, kv_indices, keys, values, k_slot, v_slot, scale, cap, top, total, mixed,
    DIM: tl.constexpr, CAPPED: tl.constexpr, IEEE: tl.constexpr, N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """N keys more: the highest score so far, the sum of exponentials below it, the weighted values."""
    key, dim = start + tl.arange(0, N), tl.arange(0, DIM)
    inside = key < high
    slot = tl.load(kv_indices + key, mask=inside, other=0).to(tl.int64)
    k = tl.load(keys + slot[None, :] * k_slot + dim[:, None], mask=inside[None, :], other=0.0)
    scores = _capped(_product(query, k, IEEE) * scale, cap, CAPPED)
    if MASKED:
        scores = tl.where((key[None, :] <= position[:, None]) & inside[None, :], scores, float("-inf"))
    highest = tl.maximum(top, tl.max(scores, axis=1))
    shown = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
    weights = tl.exp2((scores - shown[:, None]) * _LOG2E)
    before = tl.exp2((top - shown) * _LOG2E)
    v = tl.load(values + slot[:, None] * v_slot + dim[None, :], mask=inside[:, None], other=0.0)
    mixed = mixed * before[:, None] + _product(weights.to(v.dtype), v, IEEE)
    return highest, total * before + tl.sum(weights, axis=1), mixed


# What changes from batch to batch is not specialised: Triton would compile again, in front of a user, for one row, a
# multiple of 16 rows, tables that start at a multiple of 16 bytes.
@triton.jit(do_not_specialize=["block_rows", "block_key", "rows"])
def _attend(
    q, keys, values, out, sums, positions, block_row, block_rows, block_key, kv_indices,
    rows, scale, cap, chunk,
    q_row, q_head, k_slot, k_head, v_slot, v_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, CAPPED: tl.constexpr, IEEE: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    block, group, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(block_row + block)
    count = tl.load(block_rows + block)
    base = tl.load(block_key + block).to(tl.int64)
    packed = tl.arange(0, M)
    row = first + packed // GROUP
    head = group * GROUP + packed % GROUP
    real = packed < count * GROUP
    position = tl.load(positions + row, mask=real, other=-1)
    dim = tl.arange(0, DIM)
    row64 = row.to(tl.int64)
    query = tl.load(q + row64[:, None] * q_row + head[:, None] * q_head + dim[None, :], mask=real[:, None], other=0.0)

    low = part * chunk
    high = tl.minimum(tl.max(position, axis=0) + 1, low + chunk)
    # All rows of the block see the keys up to its first row's position: no mask there, up to a whole block of keys.
    shared = tl.min(tl.where(real, position, high), axis=0) + 1
    free = low + tl.maximum(tl.minimum(shared, high) - low, 0) // N * N
    top = tl.full((M,), float("-inf"), tl.float32)
    total = tl.zeros((M,), tl.float32)
    mixed = tl.zeros((M, DIM), tl.float32)
    keys, values, kv_indices = keys + group * k_head, values + group * v_head, kv_indices + base
    for start in range(low, free, N):
        top, total, mixed = _step(
            query, position, start, high, kv_indices, keys, values, k_slot, v_slot, scale, cap, top, total, mixed,
            DIM, CAPPED, IEEE, N, False,
        )  # fmt: skip
    for start in range(free, high, N):
        top, total, mixed = _step(
            query, position, start, high, kv_indices, keys, values, k_slot, v_slot, scale, cap, top, total, mixed,
            DIM, CAPPED, IEEE, N, True,
        )  # fmt: skip
    seen = tl.where(total > 0, total, 1.0)
    at = (part * rows + row64) * HEADS + head
    tl.store(
        out + at[:, None] * DIM + dim[None, :], (mixed / seen[:, None]).to(out.dtype.element_ty), mask=real[:, None]
    )
    tl.store(sums + at, tl.where(total > 0, top + tl.log(seen), float("-inf")), mask=real)


@triton.jit(do_not_specialize=["rows", "length"])
def _received(
    q, keys, sums, positions, mass, rows, length, scale,
    q_row, q_head, k_row, k_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, IEEE: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(1)
    key = tl.program_id(0) * N + tl.arange(0, N)
    inside = key < length
    dim = tl.arange(0, DIM)
    k = tl.load(
        keys + key.to(tl.int64)[None, :] * k_row + group * k_head + dim[:, None], mask=inside[None, :], other=0.0
    )
    received = tl.zeros((N,), tl.float32)
    for start in range(0, rows * GROUP, M):
        packed = start + tl.arange(0, M)
        row, head = (packed // GROUP).to(tl.int64), group * GROUP + packed % GROUP
        real = packed < rows * GROUP
        position = tl.load(positions + row, mask=real, other=-1)
        if tl.max(position, axis=0) >= tl.program_id(0) * N:  # rows ascend: the first blocks do not come this far
            query = tl.load(
                q + row[:, None] * q_row + head[:, None] * q_head + dim[None, :], mask=real[:, None], other=0.0
            )
            total = tl.load(sums + row * HEADS + head, mask=real, other=0.0)
            weights = tl.exp2((_product(query, k, IEEE) * scale - total[:, None]) * _LOG2E)
            received += tl.sum(tl.where(key[None, :] <= position[:, None], weights, 0.0), axis=0)
    tl.store(mass + group * length + key, received, mask=inside)


class Blocks(NamedTuple):
    """How a block of the kernel is cut: packed rows, keys, warps, and how many steps ahead keys are fetched."""

    rows: int
    keys: int
    warps: int
    stages: int


_SMALL = Blocks(64, 32, 4, 2)  # float32, large heads, and GPUs with 100 kB of shared memory
_LARGE = Blocks(128, 64, 8, 3)  # not tuned on a GPU yet


class TritonAttention:
    """Planned once a batch, run once a layer. heads, groups: query and KV heads; dim: of a head, one of DIMS.

    dtype: of q, keys and values; blocks: how to cut, None for what suits dtype and GPU. Raises ValueError.
    """

    def __init__(self, heads, groups, dim, *, soft_cap=0.0, dtype=torch.bfloat16, blocks: Blocks | None = None):
        if heads % groups or heads // groups > _SMALL.rows or dim not in DIMS or dtype not in DTYPES:
            raise ValueError(
                f"{heads} query heads, {groups} KV heads of {dim}, {dtype}: give a multiple, a power of two from 16 to "
                "256, and float32 or half precision"
            )
        self.heads, self.groups, self.dim, self.soft_cap, self.dtype = heads, groups, dim, soft_cap, dtype
        self.given = blocks

    def plan(self, rows: PagedRows) -> None:
        """Cut the rows into blocks; what is written for one batch stands until the next plan."""
        sequence, starts, counts = self._cut(rows.qo_indptr, rows.kv_indices)
        longest = int(rows.positions[starts + counts - 1].max()) + 1
        positions = on_device(rows.positions.astype(np.int32), rows.kv_indices)
        self._plan(positions, starts, counts, rows.kv_indptr[sequence], longest, rows.kv_indices)

    def _cut(self, qo_indptr: np.ndarray, like: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sequence, first row and number of rows of each block."""
        large = self.dim <= 128 and self.dtype != torch.float32 and _roomy(like)
        self.block = self.given or (_LARGE if large else _SMALL)
        held = self.block.rows // (self.heads // self.groups)
        starts = [np.arange(a, b, held) for a, b in zip(qo_indptr[:-1], qo_indptr[1:], strict=True)]
        sequence = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        starts = np.concatenate(starts)
        return sequence, starts, np.minimum(held, qo_indptr[sequence + 1] - starts)

    def _plan(self, positions, starts, counts, first_key, longest: int, kv_indices) -> None:
        self.parts = max(1, min(_PROGRAMS // (len(starts) * self.groups), longest // _SPLIT))
        step = self.parts * self.block.keys
        self.chunk = -(-longest // step) * self.block.keys
        self.rows, self.blocks = len(positions), len(starts)
        self.positions, self.kv_indices = positions, kv_indices
        table = on_device(np.concatenate((starts, counts, first_key)).astype(np.int32), kv_indices)
        self.table = table.split(self.blocks)

    def run(self, q, k_buffer, v_buffer, scale: float, *, out: torch.Tensor | None = None):
        """(out [n, H, D] in q's dtype, log-sum-exp float32 [n, H]); q [n, H, D], buffers [slots, G, D]."""
        if q.shape != (self.rows, self.heads, self.dim) or k_buffer.shape[1:] != (self.groups, self.dim):
            raise ValueError(
                f"q {tuple(q.shape)} and keys {tuple(k_buffer.shape)}: planned for q "
                f"[{self.rows}, {self.heads}, {self.dim}] and keys [slots, {self.groups}, {self.dim}]"
            )
        if {q.dtype, k_buffer.dtype, v_buffer.dtype} != {self.dtype}:
            raise ValueError(f"{q.dtype}, {k_buffer.dtype}, {v_buffer.dtype}: planned for {self.dtype}")
        if q.stride(2) != 1 or k_buffer.stride(2) != 1 or v_buffer.stride(2) != 1:
            raise ValueError("the dimensions of a head must lie side by side")
        block = self.block
        alone = self.parts == 1
        written = out if alone and out is not None and out.is_contiguous() else None
        if written is None:
            dtype = q.dtype if alone else torch.float32
            written = torch.empty((self.parts, *q.shape), dtype=dtype, device=q.device)
        sums = torch.empty((self.parts, self.rows, self.heads), dtype=torch.float32, device=q.device)
        _attend[(self.blocks, self.groups, self.parts)](
            q, k_buffer, v_buffer, written, sums, self.positions, *self.table, self.kv_indices,
            self.rows, scale, self.soft_cap, self.chunk,
            q.stride(0), q.stride(1), k_buffer.stride(0), k_buffer.stride(1), v_buffer.stride(0), v_buffer.stride(1),
            HEADS=self.heads, GROUP=self.heads // self.groups, DIM=self.dim, CAPPED=self.soft_cap > 0,
            IEEE=q.dtype == torch.float32 or not q.is_cuda, M=block.rows, N=block.keys,
            num_warps=block.warps, num_stages=block.stages,
        )  # fmt: skip
        if written is out:
            return out, sums[0]
        if not alone:
            whole = torch.logsumexp(sums, dim=0)
            written, sums = (written * (sums - whole).exp()[..., None]).sum(dim=0, keepdim=True), whole[None]
        result = written[0].to(q.dtype)
        return (result if out is None else out.copy_(result)), sums[0]


def _roomy(like: torch.Tensor) -> bool:
    """Whether a block may use the shared memory that GPUs for servers have."""
    if not like.is_cuda:
        return False
    return torch.cuda.get_device_properties(like.device).shared_memory_per_block_optin >= 160_000


def attention_column_mass(q: torch.Tensor, k: torch.Tensor, q_positions: torch.Tensor, scale: float) -> torch.Tensor:
    """As `reference.attention_column_mass`, float32 [m], from each row's log-sum-exp: no n x m matrix is ever held.

    q [n, H, D], k [m, G, D], q_positions int64 [n] ascending. Does not wait for the device.
    """
    (rows, heads, dim), (length, groups, _) = q.shape, k.shape
    attention = TritonAttention(heads, groups, dim, dtype=q.dtype)
    sequence, starts, counts = attention._cut(np.array([0, rows]), k)
    every = torch.arange(length, dtype=torch.int32, device=k.device)
    attention._plan(q_positions.int(), starts, counts, 0 * sequence, length, every)
    _, sums = attention.run(q, k, k, scale)
    mass = torch.empty((groups, length), dtype=torch.float32, device=q.device)
    _received[(triton.cdiv(length, _N), groups)](
        q, k, sums, attention.positions, mass, rows, length, scale,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        HEADS=heads, GROUP=heads // groups, DIM=dim, IEEE=q.dtype == torch.float32 or not q.is_cuda, M=_M, N=_N,
    )  # fmt: skip
    return mass.sum(dim=0) / heads
