"""Random traffic with fixed seeds. A longer run, and the shortest steps to a finding: `long_run.py --help`."""

from __future__ import annotations

import pytest
from long_run import machine, run_seed


@pytest.fixture(scope="module")
def kind(tmp_path_factory):
    return machine(tmp_path_factory.mktemp("traffic"))


@pytest.mark.parametrize("seed", range(8))
def test_random_traffic_breaks_no_promise(kind, seed):
    run_seed(kind, seed, examples=2, steps=40)


def test_the_traffic_meets_what_it_is_for(kind):
    """After the seeds above: requests that reuse, and answers and trees that were compared."""
    numbers = kind.numbers
    assert numbers["requests"] > 200 and numbers["reused"] > 50, numbers
    assert numbers["answers_compared"] > 100 and numbers["tree_tokens_compared"] > 20_000, numbers
