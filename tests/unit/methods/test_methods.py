"""The strategy matrix: every selection rule keeps its schedule, its budget and its order."""

import pytest
import torch

from kvshare_sched.errors import ConfigError
from kvshare_sched.methods.base import Evidence
from kvshare_sched.methods.registry import get, names
from kvshare_sched.settings import KVShareConfig

CHECKING = ("dhd", "cacheblend")
UPFRONT = ("epic", "naive", "random", "full")
LOOKING = ("consensus",)  # choose by what is known of the donors and a first pass of the fresh rows
RUNS = torch.cat([torch.arange(10, 60), torch.arange(100, 130), torch.arange(130, 150) + 50])


def config(**changes) -> KVShareConfig:
    return KVShareConfig(**changes)


def evidence(n=5, **changes) -> Evidence:
    zeros = {name: torch.zeros(n) for name in ("k_squared", "v_squared", "v_absolute", "alpha")}
    return Evidence(torch.arange(n), **(zeros | changes))


def test_every_name_is_one_strategy_and_in_this_matrix():
    assert sorted(names()) == sorted((*CHECKING, *UPFRONT, *LOOKING))
    assert [get(name).name for name in names()] == list(names())
    with pytest.raises(ConfigError):
        config(strategy="none of them")


@pytest.mark.parametrize("name", names())
def test_a_strategy_chooses_in_one_way_and_says_where_it_is_from(name):
    strategy = get(name)
    assert bool(strategy.checks(config(), 30)) == (name in CHECKING)
    assert (strategy.score is None) == (strategy.upfront is not None) == (name in UPFRONT)
    assert (strategy.first_pass is not None) == (name in LOOKING)
    assert strategy.source and strategy.needs_alpha == (name == "dhd")


@pytest.mark.parametrize("name", CHECKING)
@pytest.mark.parametrize("layers", [1, 2, 3, 4, 5, 30])
@pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("check_layer", [1, 2, 28, 29, 99])
def test_schedule_is_ascending_and_budgets_are_nested(name, layers, ratio, check_layer):
    checks = get(name).checks(config(ratio=ratio, check_layer=check_layer), layers)
    at = [check.layer for check in checks]
    shares = [check.share for check in checks]
    assert bool(checks) == (layers > 1)
    if checks:  # after the last layer there is nothing to select for, and no residual stream any more
        assert at == sorted(set(at)) and at[0] == min(check_layer, layers - 2) and at[-1] <= layers - 2
        assert shares == sorted(shares, reverse=True) and shares[-1] >= 0 and shares[0] <= 1


@pytest.mark.parametrize("layers", [3, 4, 5, 12, 30, 64])
@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.16, 0.5])
@pytest.mark.parametrize("check_layer", [1, 2, 9])
def test_gradual_filtering_spends_the_ratio_on_average(layers, ratio, check_layer):
    checks = get("cacheblend").checks(config(ratio=ratio, check_layer=check_layer), layers)
    share_of = {check.layer: check.share for check in checks}
    first = checks[0].layer
    in_force, shares = 1.0, []
    for layer in range(first + 1, layers):  # the share chosen at the layer below, or still in force
        in_force = share_of.get(layer - 1, in_force)
        shares.append(in_force)
    assert sum(shares) / len(shares) == pytest.approx(ratio)
    assert first == min(check_layer, layers - 2) and len(checks) == min(3, layers - 1 - first)


def test_gradual_filtering_near_the_whole_never_spends_more():
    for ratio in (0.6, 0.8, 0.99):
        checks = get("cacheblend").checks(config(ratio=ratio), 30)
        shares = [c.share for c in checks] + [checks[-1].share] * (30 - 2 - len(checks))
        assert sum(shares) / len(shares) <= ratio + 1e-9 and max(shares) <= 1


def test_kvshare_scores_value_deviation_by_attention():
    score = get("dhd").score(evidence(3, alpha=torch.tensor([0.5, 0.0, 2.0]), v_absolute=torch.tensor([4.0, 9, 3])))
    assert score.tolist() == [2.0, 0.0, 6.0]


def test_cacheblend_scores_key_and_value_deviation():
    score = get("cacheblend").score(
        evidence(3, k_squared=torch.tensor([1.0, 0, 2]), v_squared=torch.tensor([0.0, 0, 5]))
    )
    assert score.tolist() == [1.0, 0.0, 7.0]


@pytest.mark.parametrize("name", CHECKING)
def test_tokens_without_deviation_score_zero(name):
    score = get(name).score(evidence(4, alpha=torch.ones(4)))
    assert score.tolist() == [0.0] * 4


@pytest.mark.parametrize("name", UPFRONT)
@pytest.mark.parametrize("ratio", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_choice_upfront_is_a_sorted_subset_within_its_budget(name, ratio):
    picked = get(name).upfront(RUNS, int(ratio * len(RUNS)))
    budget = {"full": len(RUNS), "naive": 0}.get(name, ratio * len(RUNS))
    assert picked.dtype == torch.int64 and len(picked) <= budget
    assert picked.tolist() == sorted(set(picked.tolist()) & set(RUNS.tolist()))


@pytest.mark.parametrize("name", UPFRONT)
def test_choice_upfront_of_nothing_is_nothing(name):
    assert get(name).upfront(RUNS[:0], 10).tolist() == []


def test_full_takes_all_and_naive_none():
    assert get("full").upfront(RUNS, 10).tolist() == RUNS.tolist()
    assert get("naive").upfront(RUNS, len(RUNS)).tolist() == []


def test_epic_takes_equally_many_heads_of_every_run():
    picked = get("epic").upfront(RUNS, 12).tolist()  # 12 of 100 tokens, 3 runs
    assert picked == [10, 11, 12, 13, 100, 101, 102, 103, 180, 181, 182, 183]


def test_epic_takes_short_runs_whole():
    positions = torch.tensor([5, 6, 20, 21, 22, 23, 24, 25, 26, 27])
    assert get("epic").upfront(positions, int(0.8 * len(positions))).tolist() == [5, 6, 20, 21, 22, 23]


def test_random_is_seeded_and_spreads():
    first, second = (get("random").upfront(RUNS, 20).tolist() for _ in range(2))
    assert first == second and len(first) == 20
    assert first != RUNS[:20].tolist() and min(first) < 60 <= max(first)
    torch.manual_seed(1)  # the global generator plays no part
    assert get("random").upfront(RUNS, 20).tolist() == first


@pytest.mark.parametrize("name", names())
def test_naive_forces_nothing_and_the_others_the_configured_head(name):
    assert get(name).forced_head(config(forced_head=7)) == (0 if name == "naive" else 7)


def test_consensus_wants_tokens_looked_at_and_uncertain():
    score = get("consensus").score
    alpha, spread = torch.tensor([0.0, 4.0, 1.0, 4.0, 4.0]), torch.tensor([5.0, 1.0, 1.0, 0.0, 1.0])
    found = score(evidence(5, alpha=alpha, spread=spread, work=torch.tensor([1.0, 1.0, 1.0, 1.0, 4.0])))
    assert found.tolist() == [0, 2, 1, 0, 0.5]  # worth per unit of work: a late row costs more


@pytest.mark.parametrize("layers", [3, 4, 6, 30, 80])
def test_the_first_pass_stops_in_the_lower_half(layers):
    looked_at, compared = get("consensus").first_pass(layers), get("consensus").compared(layers)
    assert looked_at and looked_at.start >= layers // 5 and looked_at[-1] < looked_at.stop <= layers / 2
    assert compared and compared[0] == layers // 2 and compared[-1] < layers
    assert get("consensus").first_pass(2).stop == 0 and list(get("consensus").compared(2)) == [0, 1]
