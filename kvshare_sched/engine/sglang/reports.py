"""The report of a request on its way into SGLang's answer."""

from __future__ import annotations

import logging

from kvshare_sched.engine.sglang import trace
from kvshare_sched.engine.sglang.requests import REPORT_KEY, namespace_of
from kvshare_sched.observe import explain
from kvshare_sched.tenants.delayed_answers import HOLD_KEY

logger = logging.getLogger(__name__)
WHOLE_KEY = "kvshare_whole"  # in customized_info, for an answer of no token


def attach_report(req, session, report, pipeline) -> None:
    """Let the answer carry the report: one object, with the first output token, or with the end when there is none.

    Taken off before the client sees it: details, for our own pages; of a hidden request there is only when to answer.
    """
    info = req.customized_info or {}
    key = REPORT_KEY if req.sampling_params.max_new_tokens else WHOLE_KEY
    if key in info:
        return
    if session.hidden:
        told = {HOLD_KEY: tuple(session.hold(pipeline.costs))}
    else:
        details = _details(req, session, pipeline.index)
        told = report.to_json() | ({"details": details} if details else {})
    req.customized_info = info | {key: [told]}


def tell(req, session, pipeline, report) -> None:
    """The report is known: to the client with the answer, to the pages, and to SGLang's trace of the request, which the
    client may have begun."""
    attach_report(req, session, report, pipeline)
    if not session.hidden:
        trace.mark(req, report)


def _details(req, session, index) -> dict | None:
    """None for what no client has sent. Never raises: an answer with a report and no page beats no report."""
    if not session.of_client:
        return None
    try:
        return explain.details(session, namespace_of(req), index)
    except Exception:
        logger.exception("kvshare: request %s cannot be explained", req.rid)
        return None


def request_level_key(original, streamer, key):
    """Around `SchedulerOutputStreamer.is_request_level_customized_info_key`: the report of an answer of no token.

    What goes with output tokens reaches every chunk of an answer, what goes with the request its first one alone.
    """
    return key == WHOLE_KEY or original(streamer, key)
