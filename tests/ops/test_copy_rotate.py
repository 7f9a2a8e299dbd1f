"""`copy_rotate` against its twin: many runs and layers, any shift, donors untouched."""

import pytest
import torch
from samples import DTYPES, SIZES, tensor

from kvshare_kernels import copy_rotate, reference

SLOTS, LAYERS, LONGEST = 900, 3, 512
# Both sides compute in float32 and round once: neighbours in bfloat16 differ by 2**-7 at most.
KEYS = {torch.float32: {"rtol": 1e-5, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-5}}


def cos_sin(rotary_dim: int, device) -> torch.Tensor:
    """SGLang's table: cosines, then sines, float32 [LONGEST, R]."""
    speeds = 10_000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    angles = torch.arange(LONGEST, dtype=torch.float64)[:, None] * speeds
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float().to(device)


def pool(groups, dim, dtype, device):
    """(keys, values) of every layer."""
    return [
        [tensor(SLOTS, groups, dim, seed=10 * kind + layer, dtype=dtype, device=device) for layer in range(LAYERS)]
        for kind in (1, 2)
    ]


def random_runs(lengths, shifts, device, seed=0):
    """Runs over scattered slots; no target is a source or another run's target."""
    total = sum(lengths)
    slots = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed)).to(device)
    sources, targets = slots[:total].split(lengths), slots[total : 2 * total].split(lengths)
    return list(zip(sources, targets, shifts, strict=True))


def check(runs, groups, dim, rotary_dim, dtype, neox, device):
    table = cos_sin(rotary_dim, device)
    keys, values = pool(groups, dim, dtype, device)
    old_keys, old_values = pool(groups, dim, dtype, device)
    twin_keys, twin_values = pool(groups, dim, dtype, device)
    copy_rotate(keys, values, runs, table, neox=neox)
    source, target = (torch.cat([run[i] for run in runs]) for i in (0, 1))
    shift = torch.cat([torch.full((len(s),), moved, device=device) for s, _, moved in runs])
    reference.copy_rotate(twin_keys, twin_values, source, target, shift, table, neox=neox)
    others = torch.ones(SLOTS, dtype=torch.bool, device=device)
    others[target] = False
    for layer in range(LAYERS):
        assert torch.allclose(keys[layer].float(), twin_keys[layer].float(), **KEYS[dtype])
        assert torch.equal(values[layer], twin_values[layer])
        assert torch.equal(keys[layer][others], old_keys[layer][others])
        assert torch.equal(values[layer][others], old_values[layer][others])
        assert torch.equal(values[layer][target], old_values[layer][source])


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (32, 32), (64, 16)], ids=str)
@pytest.mark.parametrize("length", SIZES)
def test_one_run(length, dims, dtype, neox, device):
    check(random_runs([length], [-137], device), 3, *dims, dtype, neox, device)


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_runs_of_different_shift(dtype, neox, device):
    runs = random_runs([1, 19, 65, 2, 257, 40], [5, 0, -65, 511, -511, 0], device)
    check(runs, 3, 64, 64, dtype, neox, device)


def test_shift_of_zero_copies_bitwise(device):
    keys, values = pool(3, 64, torch.bfloat16, device)
    old = keys[0].clone()
    ((source, target, _),) = runs = random_runs([65], [0], device)
    copy_rotate(keys, values, runs, cos_sin(64, device), neox=True)
    assert torch.equal(keys[0][target], old[source])


def test_one_donor_may_serve_twice(device):
    source = torch.arange(10, 29, device=device)
    runs = [(source, source + 100, 3), (source, source + 200, -3)]
    check(runs, 1, 32, 32, torch.float32, True, device)


def test_no_runs_change_nothing(device):
    keys, values = pool(1, 32, torch.float32, device)
    copy_rotate(keys, values, [], cos_sin(32, device), neox=True)
    assert all(torch.equal(a, b) for a, b in zip(keys, pool(1, 32, torch.float32, device)[0], strict=True))


def test_layers_left_out_stay_as_they_were(device):
    keys, values = pool(1, 32, torch.float32, device)
    before = [x.clone() for x in (keys[0], values[0])]
    copy_rotate(keys[1:], values[1:], random_runs([19], [7], device), cos_sin(32, device), neox=True)
    assert torch.equal(keys[0], before[0]) and torch.equal(values[0], before[1])


def test_lists_of_different_length_are_refused(device):
    keys, values = pool(1, 32, torch.float32, device)
    with pytest.raises(ValueError):
        copy_rotate(keys, values[1:], random_runs([19], [7], device), cos_sin(32, device), neox=True)
