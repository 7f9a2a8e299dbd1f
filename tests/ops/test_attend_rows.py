"""`attend_rows` against the dense reference: dense, with a prefix, scattered; a misaligned mask must fail."""

import pytest
import torch
import torch.nn.functional as F
from samples import DIMS, DTYPES, HEADS, SIZES, same, scattered, tensor

from kvshare_kernels import attend_rows, plan_rows, reference


def inputs(rows, keys, heads, dim, dtype, device):
    query_heads, groups = heads
    return (
        tensor(rows, query_heads, dim, seed=1, dtype=dtype, device=device),
        tensor(keys, groups, dim, seed=2, dtype=dtype, device=device),
        tensor(keys, groups, dim, seed=3, dtype=dtype, device=device),
    )


def attended(q, k, v, positions, scale):
    out = torch.full_like(q, float("nan"))
    attend_rows(q, k, v, plan_rows(positions, q.shape[1] // k.shape[1], q.dtype), scale, out)
    return out


def check(q, k, v, positions):
    scale = q.shape[-1] ** -0.5
    wanted = reference.position_masked_attention(q, k, v, positions, scale)
    assert same(attended(q, k, v, positions, scale), wanted, q.dtype)


every_shape = [
    pytest.mark.parametrize("rows", SIZES),
    pytest.mark.parametrize("heads", HEADS, ids=str),
    pytest.mark.parametrize("dim", DIMS),
    pytest.mark.parametrize("dtype", DTYPES, ids=str),
]


def all_shapes(test):
    for mark in every_shape:
        test = mark(test)
    return test


@all_shapes
def test_whole_prompt(rows, heads, dim, dtype, device):
    check(*inputs(rows, rows, heads, dim, dtype, device), torch.arange(rows, device=device))


@all_shapes
def test_dense_rows_after_a_prefix(rows, heads, dim, dtype, device):
    check(*inputs(rows, rows + 37, heads, dim, dtype, device), torch.arange(37, 37 + rows, device=device))


@all_shapes
def test_scattered_rows(rows, heads, dim, dtype, device):
    check(*inputs(rows, 3 * rows + 5, heads, dim, dtype, device), scattered(rows, 3 * rows + 5, device=device))


@pytest.mark.parametrize("spare", [0, 1, 64])
def test_keys_beyond_the_last_row_are_not_seen(spare, device):
    q, k, v = inputs(5, 40 + spare, (4, 2), 32, torch.float32, device)
    positions = torch.tensor([0, 3, 17, 38, 39], device=device)
    seen = attended(q, k, v, positions, 0.2)
    k[40:], v[40:] = 1e4, float("nan")
    assert torch.equal(attended(q, k, v, positions, 0.2), seen)


def test_each_row_sees_exactly_its_past(device):
    q, k, v = inputs(4, 90, (4, 2), 32, torch.float32, device)
    positions = torch.tensor([2, 30, 31, 89], device=device)
    before = attended(q, k, v, positions, 0.2)
    for changed, noticed in ((0, [1, 1, 1, 1]), (30, [0, 1, 1, 1]), (31, [0, 0, 1, 1]), (60, [0, 0, 0, 1])):
        other = v.clone()
        other[changed] += 1
        difference = (attended(q, k, other, positions, 0.2) - before).abs().amax(dim=(1, 2))
        assert (difference > 0).int().tolist() == noticed, changed


def test_first_row_of_a_prompt_copies_its_value(device):
    q, k, v = inputs(1, 6, (9, 3), 32, torch.float32, device)
    out = attended(q, k, v, torch.zeros(1, dtype=torch.int64, device=device), 1.0)
    assert torch.allclose(out[0], v[0].repeat_interleave(3, dim=0))


def test_scale_matters_as_defined(device):
    q, k, v = inputs(7, 30, (9, 3), 64, torch.float32, device)
    for positions in (scattered(7, 30), torch.arange(7), torch.arange(9, 16)):
        for scale in (0.01, 1.0):
            wanted = reference.position_masked_attention(q, k, v, positions.to(device), scale)
            assert same(attended(q, k, v, positions.to(device), scale), wanted, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_batch_out_of_one_pool(dtype, device):
    """Rows of three requests in one tensor, keys scattered over a pool, q and out strided views."""
    heads, groups, dim, scale = 9, 3, 64, 64**-0.5
    plans = [(70, scattered(19, 70, seed=1)), (130, torch.arange(100, 130)), (33, torch.arange(33))]
    rows = sum(len(p) for _, p in plans)
    pool_k, pool_v = (tensor(400, groups, dim, seed=s, dtype=dtype, device=device) for s in (5, 6))
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0)).to(device)
    packed = tensor(rows + 2, heads + 2 * groups, dim, seed=7, dtype=dtype, device=device)
    q = packed[1:-1, :heads]  # as cut out of one QKV product
    storage = torch.full((rows + 2, heads, dim), -7.0, dtype=dtype, device=device)
    out, start, used = storage[1:-1], 0, 0
    for length, positions in plans:
        slots = order[used : used + length]
        stop = start + len(positions)
        where = positions.to(device)
        plan = plan_rows(where, heads // groups, dtype)
        attend_rows(q[start:stop], pool_k[slots], pool_v[slots], plan, scale, out[start:stop])
        wanted = reference.position_masked_attention(q[start:stop], pool_k[slots], pool_v[slots], where, scale)
        assert same(out[start:stop], wanted, dtype)
        start, used = stop, used + length
    assert (storage[0] == -7).all() and (storage[-1] == -7).all()


def aligned_to_the_last_rows(q, k, v, positions, scale):
    """The mistake: a causal mask that counts rows back from the last key, whatever their positions."""
    n, m = q.shape[0], int(positions[-1]) + 1
    mask = torch.arange(m) <= torch.arange(m - n, m)[:, None]
    query, key, value = (x.transpose(0, 1)[None] for x in (q, k[:m], v[:m]))
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [2, 19, 65])
def test_kernel_that_ignores_positions_fails_this_comparison(rows, dtype):
    q, k, v = inputs(rows, 3 * rows + 5, (9, 3), 64, dtype, "cpu")
    scale = 64**-0.5
    for positions, right in (
        (torch.arange(5, 5 + rows), True),  # where rows are dense, the mistake does not show
        (scattered(rows, 3 * rows + 5), False),
    ):
        wanted = reference.position_masked_attention(q, k, v, positions, scale)
        assert same(aligned_to_the_last_rows(q, k, v, positions, scale), wanted, dtype) is right
        assert same(attended(q, k, v, positions, scale), wanted, dtype)
