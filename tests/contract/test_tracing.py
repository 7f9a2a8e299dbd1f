"""Our event in SGLang's own trace of a request: its context, its spans, and nothing of OpenTelemetry behind them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from sglang.srt.observability import req_time_stats, trace

from kvshare_sched.engine.sglang import trace as tracing
from kvshare_sched.records.report import ShareReport
from kvshare_sched.records.request import Outcome, Reason

REPORT = ShareReport(5, 40, 7, 12, Outcome.REUSED, Reason.NONE, 1, 0, "consensus", match_s=0.25, copy_s=0.5)


class Span:
    """As much of OpenTelemetry's as SGLang uses; keeps its events."""

    def __init__(self, name: str):
        self.name, self.events = name, []

    def add_event(self, name, attributes=None, timestamp=None):
        self.events.append((name, attributes))

    def get_span_context(self):
        return self

    def set_attributes(self, *_, **__):
        pass

    add_link = end = set_attributes


@pytest.fixture
def spans(monkeypatch):
    """SGLang's tracing is on, and its spans end up in this list."""
    made: list[Span] = []

    def start_span(name, **_):
        made.append(Span(name))
        return made[-1]

    found = {
        "opentelemetry_initialized": True,
        "tracer": SimpleNamespace(start_span=start_span),
        "trace": SimpleNamespace(set_span_in_context=lambda span: span),
        "_trace_context_propagator": SimpleNamespace(extract=lambda headers: None),
        "threads_info": {},
    }
    for name, value in found.items():
        monkeypatch.setattr(trace, name, value, raising=False)
    return made


def waiting(level: int):
    """A request in the scheduler's queue."""
    context = trace.TraceReqContext("r1", module_name="request", trace_level=level)
    context.trace_req_start()
    stats = req_time_stats.SchedulerReqTimeStats(trace_ctx=context)
    stats.set_scheduler_recv_time()
    stats.set_wait_queue_entry_time()
    return SimpleNamespace(rid="r1", time_stats=stats)


@pytest.mark.parametrize("level", [1, 3])
@pytest.mark.parametrize(("ordinary", "place"), [(True, "prefill_waiting"), (False, "prefill_forward")])
def test_the_report_is_an_event_of_the_span_in_which_it_was_made(spans, level, ordinary, place):
    req = waiting(level)
    if ordinary:  # told at admission
        tracing.mark(req, REPORT)
    req.time_stats.set_forward_entry_time()
    if not ordinary:  # told when the last chunk has run
        tracing.mark(req, REPORT)
    req.time_stats.set_prefill_finished_time()
    req.time_stats.set_completion_time()
    ((name, said),) = [event for s in spans for event in s.events]
    assert name == "kvshare" and [s.name for s in spans if s.events] == [place]
    assert (said["kvshare.exact"], said["kvshare.reused"], said["kvshare.fresh"]) == (5, 40, 12)
    assert (said["kvshare.recomputed"], said["kvshare.strategy"]) == (7, "consensus")
    assert (said["kvshare.outcome"], said["kvshare.reason"]) == ("reused", "none")
    assert [said[f"kvshare.{phase}_s"] for phase in ("match", "copy", "recompute")] == [0.25, 0.5, 0.0]
    assert {type(value) for value in said.values()} <= {int, float, str}, "OpenTelemetry takes no others"


def test_nothing_where_tracing_is_off(spans):
    off = SimpleNamespace(rid="r", time_stats=req_time_stats.SchedulerReqTimeStats())
    assert isinstance(off.time_stats.trace_ctx, trace.TraceNullContext)
    for req in (off, waiting(level=0)):
        tracing.mark(req, REPORT)
    assert spans == []


def test_a_trace_that_fails_costs_the_request_nothing(caplog):
    tracing.mark(SimpleNamespace(rid="r", time_stats=SimpleNamespace(trace_ctx=None)), REPORT)
    assert "request r could not be traced" in caplog.text
