"""One real server per configuration: a module names its arguments, the fixture starts and stops it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from harness import Server, start

from kvshare_sched.cpu import has_nvidia_gpu


@pytest.fixture(scope="module")
def server(request) -> Iterator[Server]:
    """The server of this module: `ARGUMENTS` and `ENVIRONMENT` are module constants."""
    arguments = getattr(request.module, "ARGUMENTS", [])
    environment = getattr(request.module, "ENVIRONMENT", {})
    with start(request.module.__name__, arguments, environment) as running:
        yield running


@pytest.fixture(autouse=True)
def leaves_nothing_behind(request):
    """After every test the idle server holds no pin, no slot, no running request, and its log is clean."""
    yield
    if "server" in request.fixturenames:
        request.getfixturevalue("server").assert_idle_and_clean()


def pytest_collection_modifyitems(config, items):
    for item in items:
        if "/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)
    if not has_nvidia_gpu():
        left_out = [item for item in items if "/e2e/" in str(item.path) and item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
