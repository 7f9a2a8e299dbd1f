"""Our part of a request in SGLang's own traces (`--enable-trace`): one event with what the report says.

OpenTelemetry is SGLang's business: its trace context drops everything when tracing is off for a request, so nothing is
imported here. The event stands in the span in which the report was made: `prefill_forward` after the last chunk of a
prompt that reused, `prefill_waiting` when an ordinary one is admitted.
"""

from __future__ import annotations

import logging

from kvshare_sched.records.report import ShareReport

logger = logging.getLogger(__name__)
EVENT, LEVEL = "kvshare", 1  # as important as SGLang's own `retract`
_COUNTS = ("exact", "reused", "recomputed", "fresh", "discovered", "donors", "strategy", "outcome", "reason")
_PHASES = ("match_s", "copy_s", "recompute_s")  # the work of several chunks is added up, so these are no spans


def attributes(report: ShareReport) -> dict[str, str | int | float]:
    """OpenTelemetry's attributes: counts in tokens, phases in seconds."""
    told = report.to_json()
    return {f"kvshare.{name}": told[name] for name in (*_COUNTS, *_PHASES)}


def mark(req, report: ShareReport) -> None:
    """Add the event to a request of SGLang's scheduler that is traced. Never raises."""
    try:
        context = req.time_stats.trace_ctx
        if context.tracing_enable:
            context.trace_event(EVENT, LEVEL, attrs=attributes(report))
    except Exception:
        logger.exception("kvshare: request %s could not be traced", req.rid)
