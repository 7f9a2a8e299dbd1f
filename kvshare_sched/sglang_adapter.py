"""SGLang's objects on one side, our records on the other: views of requests, what travels with them, admission."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from kvshare_sched import explain, tracing
from kvshare_sched.audit import tenant_of
from kvshare_sched.config import KVShareConfig
from kvshare_sched.renewal import ANSWER
from kvshare_sched.session import Rids, attach, session_of
from kvshare_sched.tenants.desk import lenders_of
from kvshare_sched.tenants.hold import HOLD_KEY
from kvshare_sched.tenants.policy import Stamp, read
from kvshare_sched.types import Namespace, Outcome, Reason, RequestView

logger = logging.getLogger(__name__)
REPORT_KEY = "kvshare"  # in customized_info, meta_info and custom_params
WHOLE_KEY = "kvshare_whole"  # in customized_info, for an answer of no token
_ROWS = 8  # rows of a pass for every token of its budget, at most


# ---- requests ----


def namespace_of(req) -> Namespace:
    """The boundary SGLang's own tree keeps for this request.

    SGLang has appended the adapter's id to its extra_key; here it stands for itself, so that owners can be read.
    """
    key = (req.extra_key or "").removesuffix(req.lora_id or "")
    return Namespace(key, req.cache_salt, req.lora_id)


def tokens_of(req) -> np.ndarray:
    """Prompt and output ids so far, int64. A copy: a view would forbid SGLang to append to its array."""
    return np.frombuffer(req.full_untruncated_fill_ids, dtype=np.int64).copy()


def said_of(req) -> np.ndarray | None:
    """Prompt and the beginning of the answer, int64; None without an answer."""
    if not req.output_ids:
        return None
    return np.concatenate((np.frombuffer(req.origin_input_ids, np.int64), np.array(req.output_ids[:ANSWER], np.int64)))


def takes_part(req) -> bool:
    """Whether a request is of a kind that can reuse: its prompt is its tokens, and its KV is all that is wanted."""
    return not (
        req.input_embeds is not None
        or req.multimodal_inputs is not None
        or req.positional_embed_overrides is not None
        or req.session is not None
        or req.return_hidden_states
        or req.return_pooled_hidden_states
        or req.skip_radix_cache_insert
        or req.beam_group is not None  # its output ids hold places, not what was answered
    )


def init_forward_batch(original, cls, batch, *args, **kwargs):
    """Around `ForwardBatch.init_new`: a batch knows its requests; SGLang's knows their ids alone."""
    made = original(cls, batch, *args, **kwargs)
    made.rids = Rids(batch.reqs)
    return made


def is_probe(req) -> bool:
    """Whether it is SGLang's health check; a client that borrows the name hides a prompt of one token, no more."""
    from sglang.srt.managers.utils import is_health_check_generate_req

    return len(req.origin_input_ids) == 1 and is_health_check_generate_req(req)


def stamp_of(req, config: KVShareConfig) -> Stamp | None:
    """What the HTTP process wrote about a request's tenant, which the gate has checked. Without a tenants file clients
    could write it themselves, so it counts for nothing then. Never raises."""
    if not config.tenants_file:
        return None
    try:
        return read(req.sampling_params.custom_params)
    except Exception:
        logger.exception("kvshare: request %s has no readable stamp; it borrows nothing", req.rid)
        return None


def view_of(req, stamp: Stamp | None = None) -> RequestView | Reason:
    """What the planner may know of a request, or why it cannot take part. Never raises."""
    try:
        return _view_of(req, stamp)
    except Exception:
        logger.exception("kvshare: request %s could not be read; ordinary prefill", req.rid)
        return Reason.ERROR


def _view_of(req, stamp: Stamp | None) -> RequestView | Reason:
    params = req.sampling_params.custom_params or {}
    wishes = params.get(REPORT_KEY) or {}
    if req.retracted_stain or len(req.output_ids) > 0:  # first: whatever it asks for, its tokens have been counted
        return Reason.RETRACTED
    if wishes == "off":
        return Reason.OPTED_OUT
    if not isinstance(wishes, Mapping):
        return Reason.BAD_SETTING
    if not takes_part(req):
        return Reason.UNSUPPORTED_INPUT
    tokens = tokens_of(req)
    fresh_from = len(tokens)
    if req.return_logprob and req.logprob_start_len >= 0:
        # The row before the first wanted token predicts it.
        fresh_from = min(fresh_from, max(req.prefix_len, req.logprob_start_len - 1))
    namespace = namespace_of(req)
    return RequestView(req.rid, namespace, tokens, req.prefix_len, fresh_from, wishes, lenders_of(stamp, namespace))


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


def _tell(req, session, pipeline, report) -> None:
    """The report is known: to the client with the answer, to the pages, and to SGLang's trace of the request, which the
    client may have begun."""
    attach_report(req, session, report, pipeline)
    if not session.hidden:
        tracing.mark(req, report)


def _details(req, session, index) -> dict | None:
    """None for what no client has sent. Never raises: an answer with a report and no page beats no report."""
    if not session.of_client:
        return None
    try:
        return explain.details(session, namespace_of(req), index)
    except Exception:
        logger.exception("kvshare: request %s cannot be explained", req.rid)
        return None


# ---- scheduler hooks ----


def add_one_req(original, adder, req, has_chunked_req, *args, **kwargs):
    """Around `PrefillAdder.add_one_req`: plan and pin at admission, charge only the rows that will run."""
    pipeline = getattr(adder.tree_cache, "pipeline", None)
    args = (has_chunked_req, *args)
    if pipeline is None:
        return original(adder, req, *args, **kwargs)
    if has_chunked_req and not adder.can_run_list:
        return _other()  # the cut prompt waits for memory; SGLang takes it to run in any batch there is
    stamp = stamp_of(req, pipeline.config)
    session = pipeline.admit(view_of(req, stamp), req.rid, len(req.origin_input_ids), req.prefix_len, stamp)
    session.tenant = tenant_of(namespace_of(req))
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
    session.on_report = functools.partial(_tell, req, session, pipeline)
    attach(req, session)
    pipeline.begin(session)
    if adder.new_chunked_req is req:
        _keep_for_rest(adder, req)
    return result


def add_chunked_req(original, adder, req, *args, **kwargs):
    """Around `PrefillAdder.add_chunked_req`: the same charge for the later chunks of a long prompt, and memory for
    its rest."""
    pipeline = getattr(adder.tree_cache, "pipeline", None)
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
    pipeline = getattr(manager.scheduler.tree_cache, "pipeline", None)
    if pipeline is not None:
        pipeline.weights_change()
    return original(manager, recv_req)


def request_level_key(original, streamer, key):
    """Around `SchedulerOutputStreamer.is_request_level_customized_info_key`: the report of an answer of no token.

    What goes with output tokens reaches every chunk of an answer, what goes with the request its first one alone.
    """
    return key == WHOLE_KEY or original(streamer, key)


_WEIGHTS = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
)


def scheduler_hooks() -> dict[str, object]:
    """Seam -> hook body, all of kind AROUND."""
    parts = "sglang.srt.managers.scheduler_components"
    updater = f"{parts}.weight_updater.SchedulerWeightUpdaterManager"
    streamer = f"{parts}.output_streamer.SchedulerOutputStreamer"
    return {
        **{f"{updater}.{name}": change_weights for name in _WEIGHTS},
        f"{streamer}.is_request_level_customized_info_key": request_level_key,
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_one_req": add_one_req,
        "sglang.srt.managers.schedule_policy.PrefillAdder.add_chunked_req": add_chunked_req,
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new": init_forward_batch,
    }
