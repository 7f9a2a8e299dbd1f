"""`copy_mean` against its twin: partial donors, weights, shifts, spread; one donor is `copy_rotate`."""

import pytest
import torch
from samples import DTYPES, same
from test_copy_rotate import KEYS, LAYERS, SLOTS, cos_sin, pool

from kvshare_kernels import copy_mean, copy_rotate, reference

ROWS = 40


def parts_of(spans, shifts, device, seed=0):
    """One part a span of target indices, from scattered slots; random weights that add up to 1 at every index."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(SLOTS, generator=generator)
    target, rest = slots[:ROWS].to(device), slots[ROWS:].to(device)
    weights = torch.zeros(len(spans), ROWS)
    for row, (low, high) in zip(weights, spans, strict=True):
        row[low:high] = torch.rand(high - low, generator=generator) + 0.1
    weights = (weights / weights.sum(dim=0)).to(device)
    parts, at = [], 0
    for weight, (low, high), shift in zip(weights, spans, shifts, strict=True):
        parts.append((rest[at : at + high - low], low, shift, weight[low:high]))
        at += high - low
    return target, parts


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("measured", [(), (1,), range(LAYERS)], ids=str)
def test_mean_and_spread(measured, dtype, neox, device):
    target, parts = parts_of([(0, 40), (0, 25), (10, 40), (30, 33)], [7, 0, -130, 44], device)
    table = cos_sin(32, device)
    keys, values = pool(3, 64, dtype, device)
    old_keys, old_values = pool(3, 64, dtype, device)
    twin_keys, twin_values = pool(3, 64, dtype, device)
    spread = copy_mean(keys, values, target, parts, table, neox=neox, measured=measured)
    wanted = reference.copy_mean(twin_keys, twin_values, target, parts, table, neox=neox, measured=measured)
    assert torch.allclose(spread.cpu(), wanted, rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert (spread > 0).all() == bool(measured)
    untouched = torch.ones(SLOTS, dtype=torch.bool, device=device)
    untouched[target] = False
    for layer in range(LAYERS):
        assert same(keys[layer], twin_keys[layer], dtype) and same(values[layer], twin_values[layer], dtype)
        assert torch.equal(keys[layer][untouched], old_keys[layer][untouched])
        assert torch.equal(values[layer][untouched], old_values[layer][untouched])


@pytest.mark.parametrize("shift", [0, 9, -200])
def test_one_donor_is_a_plain_copy_without_spread(shift, device):
    target, parts = parts_of([(0, 40)], [shift], device)
    table = cos_sin(64, device)
    keys, values = pool(3, 64, torch.float32, device)
    copied_keys, copied_values = pool(3, 64, torch.float32, device)
    spread = copy_mean(keys, values, target, parts, table, neox=True, measured=range(LAYERS))
    copy_rotate(copied_keys, copied_values, [(parts[0][0], target, shift)], table, neox=True)
    assert spread.max() < 1e-5
    for layer in range(LAYERS):
        assert torch.allclose(keys[layer], copied_keys[layer], **KEYS[torch.float32])
        assert torch.equal(values[layer], copied_values[layer])


def test_the_same_donor_twice_changes_nothing(device):
    target, parts = parts_of([(0, 40), (0, 40)], [5, 5], device)
    twice = [parts[0], (parts[0][0], 0, 5, parts[1][3])]
    table = cos_sin(64, device)
    keys, values = pool(3, 64, torch.float32, device)
    once_keys, once_values = pool(3, 64, torch.float32, device)
    spread = copy_mean(keys, values, target, twice, table, neox=True, measured=range(LAYERS))
    copy_rotate(once_keys, once_values, [(parts[0][0], target, 5)], table, neox=True)
    assert spread.max() < 1e-5
    for layer in range(LAYERS):
        assert torch.allclose(keys[layer], once_keys[layer], rtol=1e-5, atol=1e-5)
        assert torch.allclose(values[layer], once_values[layer], rtol=1e-5, atol=1e-5)
