"""Deviation, attention mass and the choice of tokens; the bound they stand for, checked by perturbation."""

import numpy as np
import pytest
import torch
from samples import DIMS, DTYPES, HEADS, SIZES, scattered, tensor

from kvshare_kernels import attention_column_mass, reference, token_deviation, top_k

# ---- token_deviation ----


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("groups", [3, 1])
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deviation_equals_its_twin(n, groups, dim, dtype, device):
    fresh, cached = (tensor(n, groups, dim, seed=s, dtype=dtype, device=device) for s in (1, 2))
    limit = 1e-5 if dtype is torch.float32 else 2**-8  # one rounding of each difference to 8 bits
    for mine, wanted in zip(token_deviation(fresh, cached), reference.token_deviation(fresh, cached), strict=True):
        assert mine.shape == (n,) and mine.dtype == torch.float32
        assert torch.allclose(mine, wanted, rtol=limit)


def test_deviation_by_hand(device):
    fresh = torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[5.0, 5.0], [5.0, 5.0]]], device=device)
    cached = torch.tensor([[[0.0, 4.0], [0.0, -3.0]], [[5.0, 5.0], [5.0, 5.0]]], device=device)
    absolute, squared = token_deviation(fresh, cached)
    assert absolute.tolist() == [6.0, 0.0] and squared.tolist() == [14.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_do_not_deviate(dtype, device):
    k = tensor(65, 3, 64, dtype=dtype, device=device)
    assert all((d == 0).all() for d in token_deviation(k, k.clone()))


# ---- attention_column_mass ----


def queries_and_keys(n, m, heads, dim, dtype, device):
    return (
        tensor(n, heads[0], dim, seed=1, dtype=dtype, device=device),
        tensor(m, heads[1], dim, seed=2, dtype=dtype, device=device),
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", ["dense", "prefix", "scattered"])
def test_mass_equals_its_twin_and_counts_the_rows(n, heads, dim, dtype, spread, device):
    positions = {
        "dense": torch.arange(n),
        "prefix": torch.arange(n) + 23,
        "scattered": scattered(n, 3 * n + 5, seed=n),
    }[spread].to(device)
    m = int(positions[-1]) + 4
    q, k = queries_and_keys(n, m, heads, dim, dtype, device)
    mass = attention_column_mass(q, k, positions, dim**-0.5)
    wanted = reference.attention_column_mass(q, k, positions, dim**-0.5)
    assert mass.dtype == torch.float32 and torch.allclose(mass, wanted, rtol=1e-4, atol=1e-5)
    assert mass.sum().item() == pytest.approx(n, rel=1e-5)
    assert (mass[int(positions[-1]) + 1 :] == 0).all() and (mass >= 0).all()


@pytest.mark.parametrize("block", [1, 7, 64, 128, 1000])
def test_mass_does_not_depend_on_the_block(block, device):
    q, k = queries_and_keys(130, 300, (9, 3), 32, torch.float32, device)
    positions = scattered(130, 300, device=device)
    wanted = reference.attention_column_mass(q, k, positions, 0.2)
    assert torch.allclose(attention_column_mass(q, k, positions, 0.2, block=block), wanted, rtol=1e-4, atol=1e-5)


def test_mass_of_strided_queries(device):
    q = tensor(19, 15, 64, seed=3, device=device)[:, :9]
    k = tensor(19, 3, 64, seed=4, device=device)
    positions = torch.arange(19, device=device)
    wanted = reference.attention_column_mass(q, k, positions, 0.125)
    assert torch.allclose(attention_column_mass(q, k, positions, 0.125), wanted, rtol=1e-4, atol=1e-5)


def test_single_row_spreads_one_unit_over_its_past(device):
    q, k = queries_and_keys(1, 6, (4, 2), 32, torch.float32, device)
    mass = attention_column_mass(torch.zeros_like(q), k, torch.tensor([3], device=device), 1.0)
    assert torch.allclose(mass, torch.tensor([0.25] * 4 + [0.0] * 2, device=device))


# ---- the bound behind the score: sum_i |dA_i|_1 <= sum_j alpha_j |dV_j|_1 (KVShare 4.4), head by head ----


def attention_weights(q, k, positions, scale):
    """Softmax weights [H, n, m] in float64, written out."""
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("nhd,mhd->hnm", q.double(), k.double().repeat_interleave(groups, dim=1)) * scale
    hidden = torch.arange(k.shape[0]) > positions[:, None]
    return torch.softmax(scores.masked_fill(hidden, -torch.inf), dim=-1)


def outputs(weights, v):
    """[H, n, D] float64."""
    per_group = weights.shape[0] // v.shape[1]
    return torch.einsum("hnm,mhd->hnd", weights, v.double().repeat_interleave(per_group, dim=1))


@pytest.fixture(params=HEADS, ids=str)
def attention(request):
    heads, groups = request.param
    q, k, v = tensor(19, heads, 32, seed=1), tensor(60, groups, 32, seed=2), tensor(60, groups, 32, seed=3)
    positions = scattered(19, 60)
    return q, k, v, positions, 32**-0.5


def test_column_sums_are_the_operators_mass(attention):
    q, k, _, positions, scale = attention
    alpha = attention_weights(q, k, positions, scale).sum(dim=1)  # [H, m]
    assert torch.allclose(attention_column_mass(q, k, positions, scale).double(), alpha.mean(dim=0), atol=1e-5)
    for head in range(q.shape[1]):
        group = head * k.shape[1] // q.shape[1]
        alone = reference.attention_column_mass(q[:, head : head + 1], k[:, group : group + 1], positions, scale)
        assert torch.allclose(alone.double(), alpha[head], atol=1e-5)


@pytest.mark.parametrize("j", [0, 7, 41, 59])
def test_one_changed_value_moves_the_output_by_exactly_its_score(attention, j):
    q, k, v, positions, scale = attention
    weights = attention_weights(q, k, positions, scale)
    change = torch.zeros_like(v, dtype=torch.float64)
    change[j] = tensor(*v.shape[1:], seed=j).double()
    moved = (outputs(weights, v.double() + change) - outputs(weights, v)).abs().sum(dim=(1, 2))  # [H]
    size = change[j].abs().sum(dim=-1).repeat_interleave(q.shape[1] // k.shape[1])
    assert torch.allclose(moved, weights.sum(dim=1)[:, j] * size, rtol=1e-9, atol=1e-12)
    if j <= int(positions[-1]):
        assert (moved > 0).all()


def test_one_changed_value_moves_the_reference_output_by_its_score(attention):
    q, k, v, positions, scale = attention
    changed, j = v.clone(), 7
    changed[j] += tensor(*v.shape[1:], seed=j)
    before, after = (reference.position_masked_attention(q, k, x, positions, scale) for x in (v, changed))
    moved = (after - before).abs().sum(dim=(0, 2)).double()
    size, _ = token_deviation(changed[j][:, None], v[j][:, None])  # one row a group
    score = attention_weights(q, k, positions, scale).sum(dim=1)[:, j] * size.repeat_interleave(
        q.shape[1] // k.shape[1]
    )
    assert torch.allclose(moved, score, rtol=1e-4)


@pytest.mark.parametrize("seed", range(10))
def test_any_change_of_values_stays_within_the_sum_of_scores(attention, seed):
    q, k, v, positions, scale = attention
    weights = attention_weights(q, k, positions, scale)
    change = tensor(*v.shape, seed=100 + seed).double()
    change[torch.randperm(60, generator=torch.Generator().manual_seed(seed))[: 6 * seed]] = 0
    moved = (outputs(weights, v.double() + change) - outputs(weights, v)).abs().sum(dim=(1, 2))
    sizes = change.abs().sum(dim=-1).repeat_interleave(q.shape[1] // k.shape[1], dim=1)  # [m, H]
    bound = (weights.sum(dim=1) * sizes.T).sum(dim=1)
    assert (moved <= bound * (1 + 1e-12)).all() and (moved > 0).all()


# ---- top_k ----


@pytest.mark.parametrize(
    ("score", "budget", "wanted"),
    [
        ([1, 3, 2], 2, [1, 2]),
        ([1, 3, 2], 0, []),
        ([1, 3, 2], 99, [0, 1, 2]),
        ([5, 5, 5, 5], 2, [0, 1]),  # ties go to the lower index
        ([1, 5, 0, 5, 5], 2, [1, 3]),
        ([0, 0, 4, 0], 3, [2]),  # only positive scores
        ([-1, -2, 3, 0], 4, [2]),
        ([0, -1], 1, []),
        ([], 3, []),
        ([1e-30, 0], 2, [0]),
        ([float("inf"), 1, 2], 2, [0, 2]),
    ],
)
def test_top_k_by_hand(score, budget, wanted, device):
    (chosen,) = top_k([torch.tensor(score, dtype=torch.float32, device=device)], [budget])
    assert chosen.dtype == np.int64 and chosen.tolist() == wanted


@pytest.mark.parametrize("n", [19, 65, 257, 1000])
@pytest.mark.parametrize("values", [3, 10**6])
def test_top_k_equals_a_stable_sort(n, values, device):
    score = torch.randint(-2, values, (n,), generator=torch.Generator().manual_seed(n)).float()
    for budget in (1, n // 10, n):
        order = sorted((i for i in range(n) if score[i] > 0), key=lambda i: (-score[i].item(), i))
        assert top_k([score.to(device)], [budget])[0].tolist() == sorted(order[:budget])


def test_larger_budgets_contain_smaller_ones(device):
    score = torch.randint(0, 9, (65,), generator=torch.Generator().manual_seed(1)).float().to(device)
    sets = [set(found.tolist()) for found in top_k([score] * 66, range(66))]
    assert all(a <= b for a, b in zip(sets, sets[1:], strict=False)) and len(sets[7]) == 7


def test_many_choices_are_one_wait(device, monkeypatch):
    """Each answer is its own, whatever its length, and all of them come to the host in one piece."""
    fetched, fetch = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(len(self)) or fetch(self))
    scores = [torch.tensor(x, device=device) for x in ([3.0, 0.0, 4.0], [], [-1.0], [1.0, 1.0, 1.0])]
    found = top_k(scores, [2, 5, 1, 2])
    assert [x.tolist() for x in found] == [[0, 2], [], [], [0, 1]] and fetched == [5]
    assert top_k([], []) == []
