"""Shared by all tests: a deterministic Hypothesis profile and the device the operator tests run on."""

import pytest
from hypothesis import settings

settings.register_profile("kvshare", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("kvshare")


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="torch device of tests/ops, for example cuda")


@pytest.fixture
def device(request) -> str:
    return request.config.getoption("--device")
