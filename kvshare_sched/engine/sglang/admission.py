"""Admission: reuse is planned when SGLang's adder takes a request, and the adder is charged what will run."""

from __future__ import annotations

import functools
import logging
from dataclasses import replace

from kvshare_sched.engine.sglang.hooks import pipeline_of
from kvshare_sched.engine.sglang.reports import tell
from kvshare_sched.engine.sglang.requests import is_probe, namespace_of, stamp_of, view_of
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.reuse.session import attach, session_of

logger = logging.getLogger(__name__)
_ROWS = 8  # rows of a pass for every token of its budget, at most


def add_one_req(original, adder, req, has_chunked_req, *args, **kwargs):
    """Around `PrefillAdder.add_one_req`: plan and pin at admission, charge only the rows that will run."""
    pipeline = pipeline_of(adder)
    args = (has_chunked_req, *args)
    if pipeline is None:
        return original(adder, req, *args, **kwargs)
    if has_chunked_req and not adder.can_run_list:
        return _other()  # the cut prompt waits for memory; SGLang takes it to run in any batch there is
    stamp = stamp_of(req, pipeline.config)
    session = pipeline.admit(view_of(req, stamp), req.rid, len(req.origin_input_ids), req.prefix_len, stamp)
    session.tenant = namespace_of(req).owner
    session.probe, session.audit = is_probe(req), pipeline.auditor.owns(req)
    session.partial = session.audit and pipeline.auditor.partial
    # SGLang keeps one cut prompt and tells of one from an earlier pass; one from this pass counts as well.
    if (has_chunked_req or adder.new_chunked_req is not None) and not _fits_whole(pipeline, session, adder, req):
        pipeline.withdraw(session)
        return _other()
    budget = adder.rem_chunk_tokens
    result, admitted = _charged(original, pipeline, session, adder, req, budget, *args, **kwargs)
    if not admitted:
        pipeline.withdraw(session)
        idle = not adder.can_run_list and (adder.running_batch is None or not adder.running_batch.reqs)
        if not idle:
            return result
        # Nothing else runs, so waiting frees nothing: without its leases the donors themselves can make room.
        if session.plan is not None:
            reason, none = Reason.NO_MEMORY, {"plan": None, "leases": {}}
            session = replace(session, reason=reason, outcome=Outcome.ORDINARY, **none)
            result, admitted = _charged(original, pipeline, session, adder, req, budget, *args, **kwargs)
        # Only when that is not enough, what was guaranteed to others.
        if not admitted and pipeline.desk.held_tokens:
            pipeline.desk.let_go(pipeline.tree)
            result, admitted = _charged(original, pipeline, session, adder, req, budget, *args, **kwargs)
        if not admitted:
            return result
    session.on_report = functools.partial(tell, req, session, pipeline)
    attach(req, session)
    pipeline.begin(session)
    if adder.new_chunked_req is req:
        _keep_for_rest(adder, req)
    return result


def add_chunked_req(original, adder, req, *args, **kwargs):
    """Around `PrefillAdder.add_chunked_req`: the same charge for the later chunks of a long prompt, and memory for
    its rest."""
    pipeline = pipeline_of(adder)
    if pipeline is None:
        return original(adder, req, *args, **kwargs)
    unfinished = req
    if _has_memory(pipeline, adder, req):
        budget = adder.rem_chunk_tokens
        if budget is not None and adder.chunked_req_limit is not None:  # it leaves room for shorter prompts
            budget = min(budget, adder.chunked_req_limit)
        unfinished, _ = _charged(original, pipeline, session_of(req), adder, req, budget, *args, **kwargs)
    if unfinished is not None:
        _keep_for_rest(adder, req)
    return unfinished


def _has_memory(pipeline, adder, req) -> bool:
    """Whether a cut prompt may go on; else it waits, as SGLang lets prompts wait in other pools, until answers end.

    Its rest was kept for it, so that is rare: answers that go on meanwhile may be longer than SGLang guesses.
    """
    rest = adder.ceil_paged_tokens(len(req.full_untruncated_fill_ids) - req.prefix_len)
    if rest <= adder.cur_rem_tokens:
        return True
    if adder.running_batch.reqs:
        return False
    pipeline.desk.let_go(pipeline.tree)  # nobody is left who would give memory back
    room = int(adder.cur_rem_tokens)
    if 0 < room < adder.rem_chunk_tokens:
        adder.chunked_req_limit = min(room, adder.chunked_req_limit or room)
    return room > 0


def _keep_for_rest(adder, req) -> None:
    """Take memory for the rest of a cut prompt, and for its answer, from what a pass may give to others.

    SGLang keeps the chunk of this pass alone: with it a cut prompt uses every pass up, so nobody else comes in.
    """
    rest = adder.ceil_paged_tokens(len(req.full_untruncated_fill_ids) - req.extend_end)
    adder.memory_budget.total_offset += rest + adder._get_running_request_total_token_offset(req)


def _fits_whole(pipeline, session, adder, req) -> bool:
    """Whether a request can run in one piece; SGLang keeps one unfinished prompt at a time."""
    start, whole = req.prefix_len, len(req.full_untruncated_fill_ids)
    budget = adder.rem_chunk_tokens
    if budget is None:
        return True
    saved = whole - start - _price(pipeline, session, start, whole)
    return adder.ceil_paged_tokens(whole - start) <= budget + saved


def _other():
    from sglang.srt.managers.schedule_policy import AddReqResult

    return AddReqResult.OTHER


def _price(pipeline, session, start: int, end: int) -> int:
    """What a pass is charged for a chunk, in tokens of its budget: what is computed, and something for every row.

    SGLang has kept memory for the activations of one chunk, and check layers run all rows: so a pass holds no more
    than `_ROWS` times as many.
    """
    return max(session.charge(start, end, pipeline.costs), -(-(end - start) // _ROWS))


def _charged(original, pipeline, session, adder, req, budget, *args, **kwargs):
    """Call the adder with a budget raised by what reuse saves; SGLang then charges the full extend.

    budget: tokens this request may cost in this pass; None without a limit.
    """
    start, reuses = req.prefix_len, session is not None and session.plan is not None
    saved = _saving(pipeline, session, adder, req, budget) if reuses else 0
    _raise_budget(adder, saved)
    before = len(adder.can_run_list)
    result = original(adder, req, *args, **kwargs)
    admitted = len(adder.can_run_list) > before and adder.can_run_list[-1] is req
    spent = req.extend_len - _price(pipeline, session, start, req.extend_end) if admitted and reuses else 0
    _raise_budget(adder, spent - saved)  # what SGLang cut off, or everything when nothing was admitted
    return result, admitted


def _saving(pipeline, session, adder, req, budget: int | None) -> int:
    """Rows that a pass may hold on top of `budget`, since reuse computes only part of them."""
    start, whole = req.prefix_len, len(req.full_untruncated_fill_ids)
    if budget is None:
        return whole - start - _price(pipeline, session, start, whole)
    budget = max(0, budget)
    end = min(session.end_for_budget(start, budget, whole, pipeline.costs), start + _ROWS * budget)
    if end < whole:
        saved = (end - start) // adder.page_size * adder.page_size - budget
    else:
        saved = whole - start - _price(pipeline, session, start, whole)
    # Where memory is short SGLang goes on with a cut prompt at any price, which is right for a budget and no more.
    return max(0, min(saved, int(adder.rem_total_tokens) - budget))


def _raise_budget(adder, tokens: int) -> None:
    adder.rem_input_tokens += tokens
    if adder.rem_chunk_tokens is not None:
        adder.rem_chunk_tokens += tokens
    if adder.chunked_req_limit is not None:
        adder.chunked_req_limit += tokens


def change_weights(original, manager, recv_req):
    """Around all that replaces a running engine's weights: what the old ones computed is lent no more.

    Before, because SGLang flushes its tree behind the change, if it is asked to and can.
    """
    pipeline = pipeline_of(manager.scheduler)
    if pipeline is not None:
        pipeline.weights_change()
    return original(manager, recv_req)
