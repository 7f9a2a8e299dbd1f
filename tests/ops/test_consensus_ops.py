"""Several donors of one text: spread, blend and fit against their twins and against what they promise."""

import pytest
import torch
from samples import DTYPES, same
from test_copy_rotate import KEYS, LAYERS, SLOTS, cos_sin, pool

from kvshare_kernels import Donors, blend, copy_rotate, fit, key_spread, reference, rotation_rows

ROWS = 40
TABLE = 256


def world(spans, shifts, device, parts=1, seed=0):
    """(target slots, donors, shifts int64 [K, n], table): one donor a span of rows, from scattered slots."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(SLOTS, generator=generator)
    target, rest = order[:ROWS].to(device), order[ROWS:].to(device)
    weights = torch.zeros(len(spans), ROWS)
    slots = torch.zeros(len(spans), ROWS, dtype=torch.int64)
    for i, (low, high) in enumerate(spans):
        weights[i, low:high] = torch.rand(high - low, generator=generator) + 0.1
        slots[i] = rest.cpu()[torch.randint(len(rest), (ROWS,), generator=generator)]
    weights = weights / weights.sum(dim=0)
    moved = torch.tensor(shifts)[:, None].repeat(1, ROWS)
    table = cos_sin(32, device)
    part = torch.arange(ROWS) * parts // ROWS
    donors = Donors(
        slots.to(device), weights.to(device), *rotation_rows(table, moved.to(device)), part.to(device), parts
    )
    return target, donors, moved.to(device), table


PARTIAL = ([(0, 40), (0, 25), (10, 40), (30, 33)], [7, 0, -130, 44])


@pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_spread_equals_its_twin(dtype, neox, device):
    _, donors, shifts, table = world(*PARTIAL, device)
    keys, _ = pool(3, 64, dtype, device)
    found = key_spread(keys, donors, neox=neox)
    wanted = reference.key_spread(keys, donors, table, shifts, neox=neox)
    assert torch.allclose(found.cpu(), wanted.cpu(), rtol=1e-4 if dtype == torch.float32 else 2e-2, atol=1e-5)
    assert (found > 0).all()


def test_spread_of_one_donor_and_of_the_same_donor_twice_is_nothing(device):
    _, one, _, _ = world([(0, 40)], [9], device)
    keys, _ = pool(3, 64, torch.float32, device)
    twice = Donors(*(t.repeat(2, *[1] * (t.dim() - 1)) for t in one[:4]), one.part, 1)
    twice.weights.mul_(0.5)
    assert key_spread(keys, one, neox=True).max() < 1e-5
    assert key_spread(keys, twice, neox=True).max() < 1e-5


@pytest.mark.parametrize("neox", [True, False, None], ids=["neox", "interleaved", "values"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("corrected", [False, True])
def test_blend_equals_its_twin_and_writes_nothing_else(corrected, dtype, neox, device):
    target, donors, shifts, table = world(*PARTIAL, device, parts=3)
    keys, _ = pool(3, 64, dtype, device)
    buffer, before = keys[0], keys[0].clone()
    correction = torch.randn(3, 4, generator=torch.Generator().manual_seed(4)).to(device) if corrected else None
    blend(buffer, donors, target, correction, neox=neox)
    moved = reference.turned_donors(before, donors, table, shifts, neox=neox)
    wanted = reference.blended(moved, donors, torch.zeros(3, 4, device=device) if correction is None else correction)
    assert same(buffer[target], wanted.to(dtype), dtype)
    untouched = torch.ones(SLOTS, dtype=torch.bool, device=device)
    untouched[target] = False
    assert torch.equal(buffer[untouched], before[untouched])


@pytest.mark.parametrize("shift", [0, 9, -200])
def test_one_donor_is_a_plain_copy(shift, device):
    target, donors, _, table = world([(0, 40)], [shift], device)
    keys, values = pool(3, 64, torch.float32, device)
    copied_keys, copied_values = pool(3, 64, torch.float32, device)
    copy_rotate(copied_keys, copied_values, [(donors.slots[0], target, shift)], table, neox=True)
    for layer in range(LAYERS):
        blend(keys[layer], donors, target, None, neox=True)
        blend(values[layer], donors, target, None, neox=None)
        assert torch.allclose(keys[layer], copied_keys[layer], **KEYS[torch.float32])
        assert torch.equal(values[layer], copied_values[layer])


def truth_of(weights, donors, buffer, table, shifts, neox):
    """Rows that are, part by part, a known mixture of the donors."""
    moved = reference.turned_donors(buffer, donors, table, shifts, neox=neox)
    return torch.einsum("nk,kngd->ngd", weights[donors.part], moved)


@pytest.mark.parametrize("neox", [True, None], ids=["keys", "values"])
def test_fit_finds_the_mixture_that_made_the_rows(neox, device):
    """Fitted on every fifth row, the blend comes close to the truth on the others, and the plain mean does not."""
    target, donors, shifts, table = world([(0, 40)] * 3, [5, -30, 77], device, parts=2)
    keys, _ = pool(3, 64, torch.float32, device)
    mixture = torch.tensor([[0.9, 0.05, 0.05], [0.0, 0.2, 0.8]], device=device)
    truth = truth_of(mixture, donors, keys[0], table, shifts, neox)
    known = torch.arange(0, ROWS, 5, device=device)
    others = torch.tensor([i for i in range(ROWS) if i % 5], device=device)
    correction = fit(keys[0], donors.take(known), truth[known], neox=neox)
    fitted, plain = keys[0].clone(), keys[0].clone()
    blend(fitted, donors.take(others), target[others], correction, neox=neox)
    blend(plain, donors.take(others), target[others], None, neox=neox)
    wrong = (plain[target[others]] - truth[others]).square().sum()
    assert (fitted[target[others]] - truth[others]).square().sum() < 0.05 * wrong


def test_fit_leaves_the_mean_where_nothing_is_to_learn(device):
    """No row of a part, donors that agree, or rows that are the mean already: the given weights stand."""
    target, donors, shifts, table = world([(0, 40)] * 2, [5, 5], device, parts=2)
    keys, _ = pool(3, 64, torch.float32, device)
    first_part = torch.arange(0, 10, device=device)
    mean = reference.blended(
        reference.turned_donors(keys[0], donors, table, shifts, neox=True), donors, torch.zeros(2, 2, device=device)
    )
    correction = fit(keys[0], donors.take(first_part), mean[first_part] + 1, neox=True)
    assert correction[0].abs().max() > 1e-3 and correction[1].abs().max() == 0
    assert fit(keys[0], donors.take(first_part), mean[first_part], neox=True).abs().max() < 1e-4
    agreed = donors._replace(slots=donors.slots[:1].repeat(2, 1))
    other = torch.randn(10, *keys[0].shape[1:], generator=torch.Generator().manual_seed(1)).to(device)
    assert fit(keys[0], agreed.take(first_part), other, neox=True).abs().max() < 1e-2


def test_fit_ignores_a_donor_where_it_has_nothing(device):
    """Whatever stands in the padding slots, the result is the same."""
    _, donors, _, _ = world([(0, 40), (0, 20)], [5, 40], device)
    keys, _ = pool(3, 64, torch.float32, device)
    fresh = torch.randn(ROWS, *keys[0].shape[1:], generator=torch.Generator().manual_seed(2)).to(device)
    padded = donors._replace(slots=donors.slots.clone())
    padded.slots[1, 20:] = donors.slots[0, :20]
    once, again = (fit(keys[0], d, fresh, neox=True) for d in (donors, padded))
    assert torch.allclose(once, again, atol=1e-5)
