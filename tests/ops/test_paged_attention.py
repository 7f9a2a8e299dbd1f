"""Ragged rows over paged KV: what is planned, and on a GPU or in Triton's interpreter the kernel itself.

The kernel's tests run where Triton does: `--device cuda`, or TRITON_INTERPRET=1 (see test_interpreted.py).
"""

import numpy as np
import pytest
import torch
from samples import DIMS, HEADS, TOLERANCE, no_host_waits, same, scattered, tensor

from kvshare_kernels import PagedRows, reference

SLOTS = 1000
TIGHT = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def paged(lengths, positions, device, page=1, seed=0) -> PagedRows:
    """Sequences of `lengths` keys in scattered pages of a pool; the rows stand at `positions`."""
    order = np.random.default_rng(seed).permutation(SLOTS // page)
    slots, used = [], 0
    for length in lengths:
        pages = order[used : used + -(-length // page)]
        used += len(pages)
        slots.append((pages[:, None] * page + np.arange(page)).flatten()[:length])
    qo = np.cumsum([0, *map(len, positions)])
    kv = np.cumsum([0, *lengths])
    indices = torch.from_numpy(np.concatenate(slots).astype(np.int32)).to(device)
    return PagedRows.checked(np.concatenate(positions), qo, kv, indices)


def mixed(device, page=1) -> PagedRows:
    """Scattered rows, a whole prompt, rows behind a prefix, a single row, in one batch."""
    positions = [
        scattered(19, 257).numpy(),
        np.arange(65),
        np.arange(40, 70),
        np.array([129]),
        scattered(7, 33).numpy(),
    ]
    return paged([257, 65, 70, 130, 40], positions, device, page)


def inputs(rows, heads, dim, dtype, device):
    n = len(rows.positions)
    q = tensor(n, heads[0] + 2 * heads[1], dim, seed=1, dtype=dtype, device=device)[:, : heads[0]]  # as layers have it
    return q, *(tensor(SLOTS, heads[1], dim, seed=s, dtype=dtype, device=device) for s in (2, 3))


# ---- the record ----


def test_blocks_of_rows_see_the_same_keys_in_two_parts(device):
    rows = mixed(device)
    cut = rows.cut(8)
    counts, shared = np.diff(cut.span.qo_indptr), np.diff(cut.shared_indptr)
    assert counts.max() == 8 and counts.sum() == len(rows.positions) and (shared == 0).any() and (shared > 100).any()
    PagedRows.checked(*cut.span)
    sequence = np.repeat(np.arange(5), np.diff(rows.qo_indptr))
    for i, first in enumerate(cut.span.qo_indptr[:-1]):
        begin = rows.kv_indptr[sequence[first]]
        seen = rows.kv_indices[begin : begin + rows.positions[cut.span.qo_indptr[i + 1] - 1] + 1]
        inner = cut.span.kv_indices[cut.span.kv_indptr[i] : cut.span.kv_indptr[i + 1]]
        below = cut.shared_indices[cut.shared_indptr[i] : cut.shared_indptr[i + 1]]
        assert torch.equal(torch.cat((below, inner)), seen) and len(below) == rows.positions[first]
    back = np.repeat(shared, counts) + cut.span.positions
    assert np.array_equal(back, rows.positions)


def test_reference_is_the_dense_one_for_each_sequence(device):
    rows = mixed(device)
    q, k, v = inputs(rows, (9, 3), 32, torch.float32, device)
    out, _ = reference.paged_attention(q, k, v, rows, 0.2)
    for i in range(5):
        mine = slice(rows.qo_indptr[i], rows.qo_indptr[i + 1])
        slots = rows.kv_indices[rows.kv_indptr[i] : rows.kv_indptr[i + 1]].long()
        positions = torch.from_numpy(rows.positions[mine]).to(device)
        wanted = reference.position_masked_attention(q[mine], k[slots], v[slots], positions, 0.2)
        assert same(out[mine], wanted, torch.float32)


@pytest.mark.parametrize(
    ("positions", "qo", "kv", "slots", "says"),
    [
        ([0, 1], [0, 2], [0, 2, 4], 4, "alike long"),
        ([0, 1], [0, 0, 2], [0, 1, 3], 3, "needs a row"),
        ([0, 1], [0, 3], [0, 3], 3, "needs a row"),
        ([1, 1], [0, 2], [0, 2], 2, "ascend"),
        ([-1, 1], [0, 2], [0, 2], 2, "ascend"),
        ([0, 2], [0, 2], [0, 2], 2, "beyond"),
        ([0, 1], [0, 2], [0, 2], 3, "one slot a key"),
    ],
)
def test_what_does_not_fit_is_told(positions, qo, kv, slots, says, device):
    with pytest.raises(ValueError, match=says):
        PagedRows.checked(positions, qo, kv, torch.zeros(slots, dtype=torch.int32, device=device))


# ---- the kernel ----


@pytest.fixture
def kernel():
    from kvshare_kernels.triton_attention import TritonAttention

    return TritonAttention


def check(kernel, rows, heads, dim, dtype, device, soft_cap=0.0, scale=None):
    q, k, v = inputs(rows, heads, dim, dtype, device)
    scale = scale or dim**-0.5
    attention = kernel(*heads, dim, soft_cap=soft_cap, dtype=dtype)
    attention.plan(rows)
    out, sums = attention.run(q, k, v, scale)
    wanted, wanted_sums = reference.paged_attention(q, k, v, rows, scale, soft_cap)
    assert out.dtype == dtype and sums.dtype == torch.float32
    assert torch.allclose(out.float(), wanted.float(), rtol=TIGHT[dtype], atol=TIGHT[dtype])
    assert torch.allclose(sums, wanted_sums, rtol=1e-3, atol=1e-3)


@pytest.mark.triton
@pytest.mark.parametrize(("heads", "dim"), [(h, d) for h in HEADS for d in DIMS] + [((14, 2), 128)], ids=str)
@pytest.mark.parametrize("dtype", list(TIGHT), ids=str)
def test_kernel_equals_its_twin(kernel, heads, dim, dtype, device):
    check(kernel, mixed(device), heads, dim, dtype, device)


@pytest.mark.triton
@pytest.mark.parametrize("page", [16, 64])
def test_kernel_over_larger_pages(kernel, page, device):
    rows = paged([257, 65, 130], [scattered(19, 257).numpy(), np.arange(65), np.array([3, 129])], device, page)
    check(kernel, rows, (9, 3), 64, torch.float32, device)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernel_with_a_soft_cap(kernel, dtype, device):
    check(kernel, mixed(device), (8, 2), 64, dtype, device, soft_cap=2.0, scale=1.0)


@pytest.mark.triton
def test_kernel_splits_few_rows_over_many_keys(kernel, device, monkeypatch):
    from kvshare_kernels import triton_attention

    monkeypatch.setattr(triton_attention, "_SPLIT", 64)
    rows = paged([900], [np.array([0, 1, 63, 64, 400, 899])], device)
    for dtype in (torch.float32, torch.bfloat16):
        check(kernel, rows, (8, 2), 64, dtype, device)
    attention = kernel(8, 2, 64)
    attention.plan(rows)
    assert attention.parts > 4


@pytest.mark.triton
def test_kernel_writes_where_it_is_told(kernel, device):
    rows = mixed(device)
    q, k, v = inputs(rows, (9, 3), 64, torch.float32, device)
    attention = kernel(9, 3, 64, dtype=torch.float32)
    attention.plan(rows)
    wanted, _ = attention.run(q, k, v, 0.1)
    for out in (torch.full_like(q, float("nan")), torch.full((len(q), 11, 64), float("nan"), device=device)[:, 1:-1]):
        assert attention.run(q, k, v, 0.1, out=out)[0] is out and torch.equal(out, wanted)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_kernel_aligned_to_the_last_rows_fails_this_comparison(kernel, dtype, device):
    """The mistake both public CacheBlend codes make: rows counted back from the last key, whatever their positions."""
    for positions, right in ((np.arange(50, 115), True), (scattered(65, 200).numpy(), False)):
        last = int(positions[-1])
        rows = paged([last + 1], [positions], device)
        q, k, v = inputs(rows, (9, 3), 64, dtype, device)
        aligned = rows._replace(positions=np.arange(last + 1 - len(positions), last + 1))
        attention = kernel(9, 3, 64, dtype=dtype)
        attention.plan(aligned)
        found, _ = attention.run(q, k, v, 0.125)
        wanted, _ = reference.paged_attention(q, k, v, rows, 0.125)
        assert torch.allclose(found.float(), wanted.float(), **TOLERANCE[dtype]) is right


@pytest.mark.triton
def test_kernel_says_what_does_not_fit(kernel, device):
    rows = mixed(device)
    q, k, v = inputs(rows, (4, 2), 64, torch.float32, device)
    with pytest.raises(ValueError, match="multiple"):
        kernel(9, 2, 64)
    with pytest.raises(ValueError, match="power of two"):
        kernel(4, 2, 80)
    with pytest.raises(ValueError, match="half precision"):
        kernel(4, 2, 64, dtype=torch.float64)
    attention = kernel(4, 2, 64, dtype=torch.float32)
    attention.plan(rows)
    for wrong in ((q[1:], k, v), (q, k.half(), v), (q.transpose(1, 2).contiguous().transpose(1, 2), k, v)):
        with pytest.raises(ValueError):
            attention.run(*wrong, 0.1)


@pytest.mark.gpu
def test_batches_of_any_size_share_a_compiled_kernel(device):
    from kvshare_kernels import attention_column_mass, copy_rotate, token_deviation
    from kvshare_kernels.triton_attention import _attend, _received
    from kvshare_kernels.triton_copy import _copy_rotate
    from kvshare_kernels.triton_deviation import _deviation

    # Of shapes that no other test has.
    k, table = tensor(600, 2, 32, seed=1, dtype=torch.float16, device=device), torch.ones(512, 32, device=device)
    kernels, compiled = (_attend, _received, _copy_rotate, _deviation), []
    for rows in (1, 2, 16, 17, 100, 256):
        slots = torch.arange(rows, device=device)
        attention_column_mass(tensor(rows, 6, 32, dtype=torch.float16, device=device), k[: rows + 3], slots, 0.1)
        copy_rotate([k], [k.clone()], [(slots, slots + 300, 3)], table, neox=True)
        token_deviation(k[:rows], k[300 : 300 + rows])
        compiled.append([sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels])
    assert all(counts == compiled[0] for counts in compiled)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_the_device(kernel, device):
    """Everything between two selections is queued without a look at what the device has computed."""
    from kvshare_kernels import attention_column_mass, copy_rotate, slots_of, token_deviation

    rows = mixed(device)
    q, k, v = inputs(rows, (8, 2), 64, torch.bfloat16, device)
    slots, table = torch.arange(200, device=device), torch.ones(512, 64, device=device)
    requests = torch.arange(800, dtype=torch.int32, device=device).view(4, 200), slots[:2]
    attention = kernel(8, 2, 64)

    def work():
        attention.plan(rows)
        attention.run(q, k, v, 0.1)
        rows.cut(8)
        slots_of(*requests, np.array([7, 130]))
        copy_rotate([k], [v], [(slots[:100], slots[100:], 3)], table, neox=True)
        token_deviation(k[:50], k[50:100])
        attention_column_mass(q[:5], k, slots[:5], 0.1)

    work()  # compiled
    with no_host_waits():
        work()
