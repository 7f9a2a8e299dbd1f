"""Audits in SGLang's scheduler: see the logits, run one reference when idle, keep its output from the client."""

from __future__ import annotations

import logging
import time
from array import array

from kvshare_sched.audit import Audit, Auditor
from kvshare_sched.sglang_adapter import REPORT_KEY, namespace_of
from kvshare_sched.tenants import gate

logger = logging.getLogger(__name__)


def watch(auditor: Auditor, model) -> None:
    """Let the auditor see what every forward pass of this rank's model returns."""
    inner = model.forward

    def forward(input_ids, positions, forward_batch, *args, **kwargs):
        output = inner(input_ids, positions, forward_batch, *args, **kwargs)
        auditor.observe(forward_batch, output)
        return output

    model.forward = forward


def on_idle(original, scheduler, *args, **kwargs):
    """Around `Scheduler.on_idle`: put a piece of a reference into the queue of an engine with nothing else to do.

    Every rank comes here in the same pass of its loop, with the same queue. With a request waiting the original
    neither checks nor sleeps, so the next pass runs it.
    """
    auditor = _auditor(scheduler.tree_cache)
    if auditor is not None and scheduler.is_fully_idle():
        allocator, cache = scheduler.token_to_kv_pool_allocator, scheduler.tree_cache
        room = min(
            allocator.available_size() + cache.full_evictable_size() - 2 * scheduler.page_size,
            scheduler.max_req_input_len,
        )
        if (audit := auditor.start(room)) is not None:
            try:
                auditor.started_s = time.perf_counter()
                with gate.ours():
                    scheduler.handle_generate_request(request_of(audit, auditor.upto))
            except Exception:
                logger.exception("kvshare: audit %s could not be started", audit.rid)
                auditor.settle(None, None)
    return original(scheduler, *args, **kwargs)


def stream_output(original, streamer, reqs, *args, **kwargs):
    """Around `SchedulerOutputStreamer.stream_output`: learn who has finished; a reference goes to nobody."""
    auditor = _auditor(streamer.tree_cache)
    if auditor is not None:
        ours = [req for req in reqs if auditor.owns(req.rid)]
        if ours:
            reqs = [req for req in reqs if not auditor.owns(req.rid)]
        for req in reqs:
            if req.finished() and auditor.watches(req.rid):
                _finished(auditor, req)
        for req in ours:
            if req.finished():
                req.finished_output = True  # should it come by again, SGLang passes it over
                computed = len(req.origin_input_ids) - req.cached_tokens
                auditor.timed(time.perf_counter(), computed)
                if auditor.partial(req.rid) and not _aborted(req):
                    auditor.went_on(computed)
                else:
                    auditor.settle(*reference_of(req))
    return original(streamer, reqs, *args, **kwargs)


def unload_lora_adapter(original, scheduler, recv_req):
    """Around `Scheduler.unload_lora_adapter`: SGLang waits for clients' requests under an adapter, but knows no audits.

    A request whose adapter is gone would stop the scheduler.
    """
    auditor = _auditor(scheduler.tree_cache)
    if auditor is not None and recv_req.lora_id and auditor.unloaded(recv_req.lora_id):
        batches = (scheduler.running_batch, scheduler.last_batch)  # the one in flight is the last
        reqs = [req for batch in batches if batch is not None for req in batch.reqs]
        for req in (*scheduler.waiting_queue, scheduler.chunked_req, *reqs):
            if req is not None and auditor.owns(req.rid):
                req.lora_id = None
    return original(scheduler, recv_req)


def _auditor(cache) -> Auditor | None:
    pipeline = getattr(cache, "pipeline", None)
    return None if pipeline is None else pipeline.auditor


def _finished(auditor: Auditor, req) -> None:
    try:
        auditor.finished(req.rid, namespace_of(req), req.origin_input_ids, req.output_ids_through_stop)
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


def hooks() -> dict[str, object]:
    """Seam -> hook body, all of kind AROUND."""
    return {
        "sglang.srt.managers.scheduler.Scheduler.on_idle": on_idle,
        "sglang.srt.managers.scheduler.Scheduler.unload_lora_adapter": unload_lora_adapter,
        "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer.stream_output": stream_output,
    }
