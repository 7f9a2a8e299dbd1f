"""`attend_last` (decode): one row a request, batched, with and without padding."""

import pytest
import torch
from samples import DIMS, DTYPES, HEADS, same, tensor

from kvshare_kernels import attend_last, reference


def inputs(lengths, heads, dim, dtype, device):
    batch, longest = len(lengths), max(lengths)
    q = tensor(batch, heads[0], dim, seed=1, dtype=dtype, device=device)
    k, v = (tensor(batch, longest, heads[1], dim, seed=s, dtype=dtype, device=device) for s in (2, 3))
    return q, k, v


def wanted(q, k, v, lengths, scale):
    """Each request by itself, without its padding."""
    rows = [
        reference.position_masked_attention(
            q[i : i + 1], k[i, :n], v[i, :n], torch.tensor([n - 1], device=q.device), scale
        )
        for i, n in enumerate(lengths)
    ]
    return torch.cat(rows)


def mask_of(lengths, device):
    return (torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None])[:, None, None]


@pytest.mark.parametrize("lengths", [[1], [19], [65, 65, 65], [257, 257]], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_lengths_need_no_mask(lengths, heads, dim, dtype, device):
    q, k, v = inputs(lengths, heads, dim, dtype, device)
    out = torch.full_like(q, float("nan"))
    attend_last(q, k, v, None, dim**-0.5, out)
    assert same(out, wanted(q, k, v, lengths, dim**-0.5), dtype)


@pytest.mark.parametrize("lengths", [[1, 2], [19, 65, 1], [257, 130, 255]], ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padded_batch(lengths, heads, dim, dtype, device):
    q, k, v = inputs(lengths, heads, dim, dtype, device)
    out = torch.full_like(q, float("nan"))
    attend_last(q, k, v, mask_of(lengths, device), dim**-0.5, out)
    assert same(out, wanted(q, k, v, lengths, dim**-0.5), dtype)


def test_padding_is_never_read_into_the_answer(device):
    lengths = [19, 65, 1]
    q, k, v = inputs(lengths, (9, 3), 32, torch.float32, device)
    first, second = torch.empty_like(q), torch.empty_like(q)
    attend_last(q, k, v, mask_of(lengths, device), 0.2, first)
    for i, n in enumerate(lengths):
        k[i, n:], v[i, n:] = 50.0, -1e6
    attend_last(q, k, v, mask_of(lengths, device), 0.2, second)
    assert torch.equal(first, second)


def test_requests_do_not_mix(device):
    lengths = [33, 33, 33]
    q, k, v = inputs(lengths, (9, 3), 32, torch.float32, device)
    first, second = torch.empty_like(q), torch.empty_like(q)
    attend_last(q, k, v, None, 0.2, first)
    v[1] += 1
    attend_last(q, k, v, None, 0.2, second)
    assert torch.equal(first[[0, 2]], second[[0, 2]]) and not torch.equal(first[1], second[1])


def test_strided_query_and_output(device):
    lengths = [19, 7]
    _, k, v = inputs(lengths, (9, 3), 64, torch.float32, device)
    q = tensor(2, 15, 64, seed=9, device=device)[:, :9]
    storage = torch.full((4, 9, 64), -7.0, device=device)
    attend_last(q, k, v, mask_of(lengths, device), 0.125, storage[1:3])
    assert same(storage[1:3], wanted(q, k, v, lengths, 0.125), torch.float32)
    assert (storage[[0, 3]] == -7).all()
