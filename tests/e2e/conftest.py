"""One real server per configuration, never two at a time: modules that name the same arguments share it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import Server, start

from kvshare_sched.client.device import has_nvidia_gpu

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "dashboards"))


class _Slot:
    """Room for one server."""

    def __init__(self):
        self._stack, self._asked, self._server = contextlib.ExitStack(), None, None

    def take(self, module) -> Server:
        """The server a module asks for: the one that runs, or in its place a new one."""
        asked = _configuration(module)
        if asked != self._asked:
            self.clear()
            self._server = self._stack.enter_context(start(module.__name__, *asked))
            self._asked = asked
        return self._server

    def clear(self) -> None:
        self._asked = None
        self._stack.close()


def _configuration(module) -> tuple[list[str], dict[str, str]]:
    return getattr(module, "ARGUMENTS", []), getattr(module, "ENVIRONMENT", {})


@pytest.fixture(scope="session")
def slot() -> Iterator[_Slot]:
    slot = _Slot()
    yield slot
    slot.clear()


@pytest.fixture(scope="module")
def server(request, slot) -> Server:
    """The server of this module: `ARGUMENTS` and `ENVIRONMENT` are module constants."""
    return slot.take(request.module)


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


def pytest_collection_modifyitems(config, items):
    """End to end comes last: an idle server keeps a core busy, and the rest of the tests need both.

    Modules that start servers of their own come before those that share one; these in groups of one configuration.
    """
    if not has_nvidia_gpu():
        left_out = [item for item in items if "/e2e/" in str(item.path) and item.get_closest_marker("gpu")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    ours = [item for item in items if "/e2e/" in str(item.path)]
    for item in ours:
        item.add_marker(pytest.mark.e2e)
    shared = {item.module for item in ours if "server" in item.fixturenames}
    ours.sort(key=lambda item: str(_configuration(item.module)) if item.module in shared else "")
    items[:] = [item for item in items if "/e2e/" not in str(item.path)] + ours
