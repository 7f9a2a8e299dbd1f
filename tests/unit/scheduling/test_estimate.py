"""What a request is thought to cost, from which of its fingerprints are known."""

from __future__ import annotations

import pytest

from kvshare_sched.scheduling.estimate import Prices, estimate

PRICES = Prices(reuse=True, recompute=0.2, copy=0.05, least=64)
PRINTS, POSITIONS = list(range(10)), list(range(0, 1000, 100))


def of(known, exact=0, prices=PRICES):
    return estimate(1000, exact, PRINTS, POSITIONS, [bool(int(k)) for k in known], prices)


def test_nothing_known_is_all_work_and_all_of_it_is_given():
    found = of("0000000000")
    assert (found.exact, found.reused, found.work) == (0, 0, 1000)
    assert found.texts.given == PRINTS and sum(n for _, n in found.texts.lacks) == 1000


def test_reused_tokens_cost_their_recompute_and_their_copy():
    found = of("1111100000")
    assert found.reused == 500 and found.work == pytest.approx(500 + 500 * 0.25)
    assert found.texts.given == [], "everything fresh stands behind approximate tokens"


def test_what_comes_before_the_first_reused_token_is_given():
    assert of("0001100000").texts.given == [0, 1, 2]


def test_the_exact_part_costs_nothing_and_its_fingerprints_do_not_count():
    found = of("1111111100", exact=600)
    assert (found.exact, found.reused) == (600, 200)
    assert found.work == pytest.approx(200 + 200 * 0.25)


@pytest.mark.parametrize("prices", [Prices(False, 0.2, 0.05, 64), Prices(True, 0.2, 0.05, 2000)])
def test_without_reuse_or_with_too_little_left_all_of_it_is_work(prices):
    found = of("1111100000", prices=prices)
    assert found.reused == 0 and found.work == 1000
    assert not found.texts.takes, "so it need not wait for anybody's text"


def test_a_request_whose_kv_enters_no_tree_gives_nothing():
    assert of("0000000000", prices=Prices(True, 0.2, 0.05, 64, lends=False)).texts.given == []


def test_a_prompt_without_fingerprints_and_a_cached_one():
    assert estimate(30, 0, [], [], [], PRICES).work == 30
    assert estimate(30, 30, [], [], [], PRICES).work == 1
