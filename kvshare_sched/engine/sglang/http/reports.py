"""The report in the client's answer; runs in the process that talks HTTP.

SGLang collects `customized_info` as a list per output token. Ours is one object per answer: it arrives with the first
output, or under a key of its own with the end of an answer that has none, and is repeated in the `meta_info` of every
later chunk of the same answer. The OpenAI endpoints have no meta_info; their `metadata`, which clients ignore when they
do not know it, gets a list `kvshare` with one report for each of the `choices` in the same JSON object (streams: the
last chunk).
"""

from __future__ import annotations

import json
import time
from collections import OrderedDict

from kvshare_sched.observe import recent_requests
from kvshare_sched.tenants.delayed_answers import DELAY, HOLD_KEY, Hold, delay_s

_ATTRIBUTE = "kvshare_report"
_KEYS = {"kvshare", "kvshare_whole"}  # `requests.REPORT_KEY` and `reports.WHOLE_KEY`
_RECENT = 8192  # answers whose report a stream may still ask for
_recent: OrderedDict[str, dict] = OrderedDict()  # request id -> report


def update_request_meta_info(original, manager, meta_info, state, customized_info, index, finish_reason):
    """Around `TokenizerManager.update_request_meta_info`: our key becomes one object, not a list."""
    if not _KEYS.isdisjoint(customized_info):
        sent = [customized_info[key][index] or () for key in sorted(_KEYS & customized_info.keys())]
        reports = [report for values in sent for report in values if report is not None]
        if reports and HOLD_KEY in reports[0]:
            setattr(state, DELAY, delay_s(Hold(*reports[0][HOLD_KEY]), time.perf_counter()))
        elif reports:
            if (details := reports[0].pop("details", None)) is not None:  # for our own pages only
                recent_requests.requests.remember(meta_info["id"], reports[0], details)
            setattr(state, _ATTRIBUTE, reports[0])
        customized_info = {k: v for k, v in customized_info.items() if k not in _KEYS}
    report = getattr(state, _ATTRIBUTE, None)
    if report is not None:
        meta_info["kvshare"] = report
    _remember(meta_info["id"], report)
    return original(manager, meta_info, state, customized_info, index, finish_reason)


def _remember(rid: str, report: dict | None) -> None:
    """For the stream of this answer. One without a report must not find that of an earlier client with the same id."""
    _recent.pop(rid, None)
    if report is not None:
        _recent[rid] = report
        if len(_recent) > _RECENT:
            _recent.popitem(last=False)


def build_response(original, handler, request, ret, created):
    """Around the OpenAI handlers' response builders: `metadata["kvshare"]`, one report a choice."""
    response = original(handler, request, ret, created)
    reports = [item["meta_info"].get("kvshare") for item in ret]
    if any(reports) and hasattr(response, "metadata"):
        response.metadata = {**(response.metadata or {}), "kvshare": reports}
    return response


async def stream(original, handler, *args, **kwargs):
    """Around the OpenAI handlers' streams: the same in the chunk that ends a choice."""
    async for chunk in original(handler, *args, **kwargs):
        yield _with_report(chunk) if '"finish_reason":"' in chunk else chunk


def _with_report(chunk: str) -> str:
    data = json.loads(chunk.removeprefix("data: "))
    report = _recent.get(data.get("id"))
    if report is None:
        return chunk
    data["metadata"] = {**(data.get("metadata") or {}), "kvshare": [report] * len(data["choices"])}
    return f"data: {json.dumps(data)}\n\n"
