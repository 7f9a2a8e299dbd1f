"""Our order in SGLang's scheduler: which one is in force, and the bodies of the hooks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from kvshare_sched.engine.sglang.hooks import queue_of
from kvshare_sched.engine.sglang.waiting_queue import ServerQueue

logger = logging.getLogger(__name__)


def chosen(config, server_args, argv: Sequence[str]) -> str:
    """The order in force: ours, unless SGLang's own policy was asked for."""
    asked = any(a.split("=")[0] == "--schedule-policy" for a in argv) or server_args.schedule_policy != "fcfs"
    return "off" if asked else config.scheduler


def create(config, ctx, pipeline, metrics) -> ServerQueue | None:
    """The queue of one rank, or None when SGLang's own order stays in force."""
    from sglang.srt.arg_groups.model_override_base import resolved_view

    server_args = resolved_view(ctx.server_args)
    policy = chosen(config, server_args, sys.argv)
    if ctx.tp_rank == 0:
        logger.info("kvshare: order of the waiting queue: %s", "SGLang's own" if policy == "off" else policy)
    if policy == "off":
        return None
    chunk = server_args.chunked_prefill_size or 0
    told = metrics.queue if metrics is not None else None
    preempts = server_args.enable_priority_scheduling and not server_args.disable_priority_preemption
    return ServerQueue(policy, config, pipeline, max(0, chunk), told, preempts)


def calc_priority(original, policy, waiting_queue, *args, **kwargs):
    """Around `SchedulePolicy.calc_priority`: SGLang's own first, so that a failure of ours leaves its tiers.

    With priorities that sorts the list in every pass, so ours is compared with the list as it was before.
    """
    before = list(waiting_queue)
    result = original(policy, waiting_queue, *args, **kwargs)
    queue = queue_of(policy)
    if queue is not None and before and (ordered := queue.order(before, policy)) is not None:
        waiting_queue[:] = ordered
    return result


def chunk_limit(original, policy, chunked_req, waiting_queue, budget, page_size):
    """Around `SchedulePolicy.shortest_prefill_chunk_limit`: a long prompt leaves room for shorter ones."""
    queue = queue_of(policy)
    if queue is None:
        return original(policy, chunked_req, waiting_queue, budget, page_size)
    return queue.chunk_limit(chunked_req, budget, page_size)


def add_one_req(original, adder, req, *args, **kwargs):
    """Around `PrefillAdder.add_one_req`, outside of reuse: refuse whose turn it is not, charge what runs.

    Without room SGLang stops asking until a running request has left.
    """
    from sglang.srt.managers.schedule_policy import AddReqResult

    queue = queue_of(adder)
    if queue is None:
        return original(adder, req, *args, **kwargs)
    if not queue.may_start(req):
        return AddReqResult.OTHER
    if not queue.has_room(req, adder):
        return AddReqResult.NO_TOKEN
    before = len(adder.can_run_list)
    result = original(adder, req, *args, **kwargs)
    if len(adder.can_run_list) > before and adder.can_run_list[-1] is req:
        queue.admitted(req, adder)
    else:
        queue.refused(req, adder)
    return result


def preempt_to_schedule(original, adder, req, *args, **kwargs):
    """Around `PrefillAdder.preempt_to_schedule`: nobody loses its memory to a request that is then refused."""
    queue = queue_of(adder)
    if queue is not None and not queue.may_preempt(req, adder):
        return False
    return original(adder, req, *args, **kwargs)


def add_chunked_req(original, adder, req, *args, **kwargs):
    """Around `PrefillAdder.add_chunked_req`: the later chunks of a long prompt are charged when they run."""
    before = len(adder.can_run_list)
    result = original(adder, req, *args, **kwargs)
    queue = queue_of(adder)
    if queue is not None and len(adder.can_run_list) > before:
        queue.continued(req, unfinished=result is not None)
    return result


def on_idle(original, scheduler, *args, **kwargs):
    """Around `Scheduler.on_idle`: clients that gave up while they waited are not shown as waiting for ever."""
    queue = queue_of(scheduler)
    if queue is not None and queue.waits and scheduler.is_fully_idle():
        queue.idle()
    return original(scheduler, *args, **kwargs)
