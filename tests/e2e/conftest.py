"""One real server per configuration: a module names its arguments, the fixture starts and stops it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, start

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dashboards"))


@pytest.fixture(scope="module")
def server(request) -> Iterator[Server]:
    """The server of this module: `ARGUMENTS` and `ENVIRONMENT` are module constants."""
    arguments = getattr(request.module, "ARGUMENTS", [])
    environment = getattr(request.module, "ENVIRONMENT", {})
    with start(request.module.__name__, arguments, environment) as running:
        yield running


@pytest.fixture(scope="session")
def local_prometheus():
    """The module that starts Debian's Prometheus; skips where that can be neither found nor fetched."""
    import local_prometheus

    try:
        local_prometheus.binaries()
    except RuntimeError as problem:
        pytest.skip(str(problem))
    return local_prometheus


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request):
    """After every test the idle server holds no pin, no slot, no running request, and its log is clean."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").assert_idle_and_clean()


def pytest_collection_modifyitems(items):
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
