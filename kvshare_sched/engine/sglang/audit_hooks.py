"""Audits in SGLang's scheduler: see the logits, run one reference when idle, keep its output from the client."""

from __future__ import annotations

import logging
import time
from array import array

from kvshare_sched.engine.sglang.hooks import pipeline_of
from kvshare_sched.engine.sglang.requests import REPORT_KEY, namespace_of
from kvshare_sched.quality.audit import Audit, Auditor
from kvshare_sched.reuse.session import Session, session_of, sessions_of
from kvshare_sched.tenants import seal

logger = logging.getLogger(__name__)


def watch(auditor: Auditor, model) -> None:
    """Let the auditor see what every forward pass of this rank's model returns."""
    inner = model.forward

    def forward(input_ids, positions, forward_batch, *args, **kwargs):
        output = inner(input_ids, positions, forward_batch, *args, **kwargs)
        auditor.observe(sessions_of(forward_batch), forward_batch, output)
        return output

    model.forward = forward


def on_idle(original, scheduler, *args, **kwargs):
    """Around `Scheduler.on_idle`: put a piece of a reference into the queue of an engine with nothing else to do.

    Every rank comes here in the same pass of its loop, with the same queue. With a request waiting the original
    neither checks nor sleeps, so the next pass runs it.
    """
    auditor = _auditor(scheduler)
    if auditor is not None and scheduler.is_fully_idle() and _may_compute(scheduler, auditor):
        allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        room = min(
            allocator.available_size() + cache.full_evictable_size() - 2 * scheduler.page_size,
            scheduler.max_req_input_len,
        )
        if (audit := auditor.start(room)) is not None:
            _send(scheduler, auditor, audit)
    return original(scheduler, *args, **kwargs)


def _may_compute(scheduler, auditor: Auditor) -> bool:
    """An engine that has given its memory away is idle too; and an operator may be waiting."""
    return not scheduler.weight_updater.offload_tags and not auditor.held_back


def _send(scheduler, auditor: Auditor, audit: Audit) -> None:
    auditor.started_s = time.perf_counter()
    try:
        with seal.ours():
            scheduler.handle_generate_request(request_of(audit, auditor.upto))
    except Exception:
        logger.exception("kvshare: audit %s could not be started", audit.rid)
    waiting = scheduler.waiting_queue
    if waiting and waiting[-1].rid == audit.rid:
        auditor.sent(waiting[-1])
    else:
        auditor.settle(None, None)


def process_input_requests(original, scheduler, recv_reqs):
    """Around `Scheduler.process_input_requests`: whoever has all answers finds the engine idle.

    SGLang refuses an operator, or ends, when a request runs: at a flush, an update of the weights, a release of memory
    and more. A client cannot know of a piece of ours. So one that waits is taken back, and when one runs, which takes a
    few passes, the operator's request and all behind it wait for its end.
    """
    auditor = _auditor(scheduler)
    if auditor is None:
        return original(scheduler, recv_reqs)
    recv_reqs = [*auditor.held_back, *recv_reqs]
    auditor.held_back = []
    first = next((at for at, one in enumerate(recv_reqs) if not _from_client(one)), None)
    if first is not None and not _withdrawn(scheduler, auditor):
        recv_reqs, auditor.held_back = recv_reqs[:first], recv_reqs[first:]
    return original(scheduler, recv_reqs)


def _from_client(recv_req) -> bool:
    from sglang.srt.managers import io_struct

    return isinstance(
        recv_req,
        (
            io_struct.TokenizedGenerateReqInput,
            io_struct.TokenizedEmbeddingReqInput,
            io_struct.BatchTokenizedGenerateReqInput,
            io_struct.BatchTokenizedEmbeddingReqInput,
            io_struct.AbortReq,
            io_struct.OpenSessionReqInput,
            io_struct.CloseSessionReqInput,
        ),
    )


def _withdrawn(scheduler, auditor: Auditor) -> bool:
    """Whether no piece of a reference is in the engine, after one that has not begun was taken out of the queue."""
    piece = auditor.piece
    for at, req in enumerate(scheduler.waiting_queue if piece is not None else ()):
        if req is piece:
            del scheduler.waiting_queue[at]
            scheduler._release_aborted_request(piece)
            auditor.withdrawn()
            break
    # SGLang takes a batch for running until the pass after it.
    last = scheduler.last_batch.reqs if scheduler.last_batch is not None else ()
    return auditor.piece is None and not any(s is not None and s.audit for s in map(session_of, last))


def stream_output(original, streamer, reqs, *args, **kwargs):
    """Around `SchedulerOutputStreamer.stream_output`: learn who has finished; a reference goes to nobody."""
    pipeline = pipeline_of(streamer)
    if pipeline is None:
        return original(streamer, reqs, *args, **kwargs)
    auditor = pipeline.auditor
    ours = [req for req in reqs if auditor.owns(req)]
    if ours:
        reqs = [req for req in reqs if not auditor.owns(req)]
    for req in reqs:
        if req.finished() and (session := session_of(req)) is not None and session.capture is not None:
            _finished(pipeline, session, req)
    for req in ours:
        if req.finished():
            req.finished_output = True  # should it come by again, SGLang passes it over
            computed = len(req.origin_input_ids) - req.cached_tokens
            auditor.timed(time.perf_counter(), computed)
            if auditor.partial and not _aborted(req):
                auditor.went_on(computed)
            else:
                auditor.settle(*reference_of(req))
    return original(streamer, reqs, *args, **kwargs)


def unload_lora_adapter(original, scheduler, recv_req):
    """Around `Scheduler.unload_lora_adapter`: an adapter goes, and the audits that wait for it.

    A request whose adapter is gone would stop the scheduler; none of ours is in the engine then.
    """
    auditor = _auditor(scheduler)
    if auditor is not None and recv_req.lora_id:
        auditor.forget("unloaded", lambda audit: audit.namespace.lora_id == recv_req.lora_id)
    return original(scheduler, recv_req)


def _auditor(scheduler) -> Auditor | None:
    pipeline = pipeline_of(scheduler)
    return None if pipeline is None else pipeline.auditor


def _finished(pipeline, session: Session, req) -> None:
    if session.weights != pipeline.weights:
        pipeline.auditor.drop(session, "weights")
        return
    try:
        pipeline.auditor.finished(session, namespace_of(req), req.origin_input_ids, req.output_ids_through_stop)
    except Exception:
        logger.exception("kvshare: request %s could not be queued for its audit", req.rid)


def _aborted(req) -> bool:
    from sglang.srt.managers.schedule_batch import FINISH_ABORT

    return isinstance(req.finished_reason, FINISH_ABORT)


def request_of(audit: Audit, upto: int):
    """One token after the first `upto`, opted out; after the last with the log-probabilities the audit compares.

    What earlier pieces have computed is an exact prefix.
    """
    from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
    from sglang.srt.sampling.sampling_params import SamplingParams

    sampling = SamplingParams(max_new_tokens=1, temperature=0.0, custom_params={REPORT_KEY: "off"})
    sampling.normalize(None)
    compared = upto == len(audit.tokens)
    return TokenizedGenerateReqInput(
        rid=audit.rid,
        input_text=None,
        input_ids=array("q", audit.tokens[:upto]),
        input_embeds=None,
        mm_inputs=None,
        token_type_ids=None,
        sampling_params=sampling,
        return_logprob=compared,
        logprob_start_len=audit.capture.prompt_len - 1 if compared else -1,
        top_logprobs_num=int(compared),
        token_ids_logprob=audit.ids if compared else None,
        stream=False,
        extra_key=audit.namespace.extra_key,
        cache_salt=audit.namespace.cache_salt,
        lora_id=audit.namespace.lora_id,
    )


def reference_of(req) -> tuple:
    """(log p of the audit's ids, likeliest id) at every sent token; (None, None) when the request was cut short.

    SGLang puts None in front: the first position it was asked for has no predecessor.
    """
    rows, best = req.logprob.input_token_ids_logprobs_val, req.logprob.input_top_logprobs_idx
    if not rows or not best:
        return None, None
    return rows[1:], [ids[0] for ids in best[1:]]
