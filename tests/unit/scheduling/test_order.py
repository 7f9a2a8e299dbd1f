"""Keys and ties: who comes first under each policy."""

from __future__ import annotations

import numpy as np
import pytest

from kvshare_sched.scheduling.order import KEYS, Rows, ranked


def rows(**columns) -> Rows:
    count = len(next(iter(columns.values())))
    base = {name: np.zeros(count) for name in Rows._fields} | {
        "arrival": np.arange(count),
        "prompt": np.full(count, 100),
    }
    return Rows(**(base | {name: np.array(values, float) for name, values in columns.items()}))


@pytest.mark.parametrize("policy", KEYS)
def test_equal_requests_come_by_arrival_even_when_rows_are_shuffled(policy):
    arrival = np.random.default_rng(0).permutation(50)
    found = ranked(policy, rows(arrival=arrival, work=[7] * 50), clock=9.0)
    assert arrival[found].tolist() == list(range(50))


@pytest.mark.parametrize("policy", KEYS)
def test_the_tier_comes_before_everything(policy):
    found = ranked(policy, rows(tier=[1, 0, 2], work=[1, 1000, 1], exact=[90, 0, 99], arrival=[0, 5, 1]), clock=10.0)
    assert found.tolist() == [1, 0, 2]


def test_fair_is_shortest_work_first_among_those_that_came_together():
    assert ranked("fair", rows(work=[500, 20, 100]), clock=1000.0).tolist() == [1, 2, 0]


def test_fair_lets_a_dear_request_pass_once_it_has_waited_long_for_what_it_costs():
    waiting = rows(work=[1000, 100], since=[0, 9000])
    assert ranked("fair", waiting, clock=9500.0).tolist() == [0, 1]  # 9.5 times its work against 5 times
    assert ranked("fair", waiting, clock=9950.0).tolist() == [0, 1] and 950 / 100 < 9950 / 1000
    assert ranked("fair", waiting, clock=11000.0).tolist() == [1, 0]


def test_a_request_without_work_does_not_divide_by_zero():
    assert ranked("fair", rows(work=[0, 5]), clock=3.0).tolist() == [0, 1]


def test_lpm_looks_at_exact_tokens_and_hit_rate_at_the_reusable_share():
    waiting = rows(exact=[50, 0, 10], reused=[0, 90, 0], prompt=[100, 100, 10])
    assert ranked("lpm", waiting, clock=0.0).tolist() == [0, 2, 1]
    assert ranked("hit_rate", waiting, clock=0.0).tolist() == [2, 1, 0]
    assert ranked("fcfs", waiting, clock=0.0).tolist() == [0, 1, 2]
