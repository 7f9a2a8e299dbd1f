"""`linear`: few rows and many, with and without bias, from strided views, in the model's shapes."""

import pytest
import torch
from samples import DTYPES, same, tensor

from kvshare_kernels import linear, reference
from kvshare_kernels.few_rows import FEW


@pytest.mark.parametrize("rows", [1, 2, 4, 9, FEW, FEW + 1])
@pytest.mark.parametrize("shape", [(96, 57), (57, 96)], ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_product(rows, shape, with_bias, dtype, device):
    x = tensor(rows, shape[1], seed=1, dtype=dtype, device=device) * 0.1
    weight = tensor(*shape, seed=2, dtype=dtype, device=device)
    bias = tensor(shape[0], seed=3, dtype=dtype, device=device) if with_bias else None
    found = linear(x, weight, bias)
    assert found.shape == (rows, shape[0]) and found.dtype == dtype and found.is_contiguous()
    assert same(found, reference.linear(x, weight, bias), dtype)


@pytest.mark.parametrize("rows", [1, 4])
def test_parts_of_larger_tensors(rows, device):
    x = tensor(rows, 200, seed=1, device=device)[:, 70:166] * 0.1
    weight = tensor(80, 120, seed=2, device=device)[10:50, 5:101]
    assert same(linear(x, weight), reference.linear(x, weight), torch.float32)


def test_inputs_are_left_as_they_are(device):
    x, weight = tensor(3, 40, seed=1, device=device), tensor(20, 40, seed=2, device=device)
    before = x.clone(), weight.clone()
    linear(x, weight)
    assert torch.equal(x, before[0]) and torch.equal(weight, before[1])
