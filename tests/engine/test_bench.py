"""The bench itself: an engine that does not start, or has ended, leaves nothing behind."""

from __future__ import annotations

import gc
import logging
from unittest import mock

import bench
import pytest
import zmq

from kvshare_sched.engine.sglang import wiring


def test_an_engine_that_does_not_start_holds_up_nobody(flat):
    """SGLang has opened its sockets by then; an open one would stop the next collection for ever."""
    opened, ordinary = [], zmq.Context.socket

    def noted(*args, **kwargs):
        opened.append(ordinary(*args, **kwargs))
        return opened[-1]

    with (
        mock.patch.object(zmq.Context, "socket", noted),
        mock.patch.object(wiring, "refuse", side_effect=RuntimeError("no start")),
        pytest.raises(RuntimeError, match="no start"),
        bench.running(flat),
    ):
        pass
    assert opened and all(socket.closed for socket in opened)
    gc.collect()
    with bench.running(flat) as engine:
        ticket = engine.send([1, 2, 3])
        engine.run()
        assert len(ticket.output) == 4


def test_logging_is_as_it_was(flat):
    ours, root = logging.getLogger("kvshare_sched"), logging.root
    before = (root.level, list(root.handlers), root.manager.disable, ours.level, ours.getEffectiveLevel())
    with bench.running(flat) as engine:
        engine.send([1, 2, 3])
        engine.run()
        assert root.level == logging.ERROR, "the test's point: SGLang has set it"
    assert before == (root.level, list(root.handlers), root.manager.disable, ours.level, ours.getEffectiveLevel())
