"""Every place of SGLang that we hook, in one table: what runs there, when it is put in, and in which order.

All hooks are of SGLang's kind AROUND: the body gets the original function and decides whether to call it. Bodies are
named and imported when they are needed, so that this table can be read in every process. They find the engine that they
serve by the cache of SGLang's object: `pipeline_of`, `queue_of`.
"""

from __future__ import annotations

import enum
import functools
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvshare_sched.engine.sglang.waiting_queue import ServerQueue
    from kvshare_sched.reuse.lifecycle import Pipeline


@enum.unique
class When(enum.Enum):
    """When hooks are put in."""

    LOAD = "when SGLang loads plug-ins, in every process"
    LOAD_WITH_TENANTS = "when SGLang loads plug-ins and a tenants file is named"
    CACHE = "when our cache is built, in the scheduler's process"
    CACHE_WITH_TENANTS = "when our cache is built and a tenants file is named"


@dataclass(frozen=True, slots=True)
class Hook:
    """One body at one place.

    takes: parameters of the place that the body relies on. order: where a place is hooked twice, 1 is the outermost.
    """

    place: str
    body: str  # module:function
    when: When
    takes: tuple[str, ...] = ()
    order: int = 1


_SRT = "sglang.srt"
_SCHEDULER = f"{_SRT}.managers.scheduler.Scheduler"
_ADDER = f"{_SRT}.managers.schedule_policy.PrefillAdder"
_POLICY = f"{_SRT}.managers.schedule_policy.SchedulePolicy"
_PARTS = f"{_SRT}.managers.scheduler_components"
_UPDATER = f"{_PARTS}.weight_updater.SchedulerWeightUpdaterManager"
_STREAMER = f"{_PARTS}.output_streamer.SchedulerOutputStreamer"
_TOKENIZER = f"{_SRT}.managers.tokenizer_manager.TokenizerManager"
_CHAT = f"{_SRT}.entrypoints.openai.serving_chat.OpenAIServingChat"
_COMPLETION = f"{_SRT}.entrypoints.openai.serving_completions.OpenAIServingCompletion"

_HERE = "kvshare_sched.engine.sglang"
_QUEUE = f"{_HERE}.queue_hooks"
_ADMISSION = f"{_HERE}.admission"
_AUDIT = f"{_HERE}.audit_hooks"
_IDENTITY = f"{_HERE}.http.identity"
_REPORTS = f"{_HERE}.http.reports"

_RESPONSE = ("request", "ret", "created")
_WEIGHT_UPDATES = (
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_tensor",
    "update_weights_from_ipc",
    "begin_weight_update",
    "end_weight_update",
)

HOOKS = (
    # the launcher and the process that talks HTTP
    Hook(
        f"{_SRT}.server_args.ServerArgs.check_server_args", f"{_HERE}.support:check_server_args", When.LOAD, ("self",)
    ),
    Hook(
        f"{_TOKENIZER}.update_request_meta_info",
        f"{_REPORTS}:update_request_meta_info",
        When.LOAD,
        ("meta_info", "state", "customized_info", "index", "finish_reason"),
    ),
    Hook(f"{_CHAT}._build_chat_response", f"{_REPORTS}:build_response", When.LOAD, _RESPONSE),
    Hook(f"{_CHAT}._generate_chat_stream", f"{_REPORTS}:stream", When.LOAD),
    Hook(f"{_COMPLETION}._build_completion_response", f"{_REPORTS}:build_response", When.LOAD, _RESPONSE),
    Hook(f"{_COMPLETION}._generate_completion_stream", f"{_REPORTS}:stream", When.LOAD),
    Hook(
        f"{_SRT}.utils.common.add_prometheus_middleware",
        f"{_HERE}.http.pages:add_prometheus_middleware",
        When.LOAD,
        ("app",),
    ),
    # who is asking
    Hook(
        f"{_TOKENIZER}.generate_request",
        f"{_IDENTITY}:generate_request",
        When.LOAD_WITH_TENANTS,
        ("self", "obj", "request"),
    ),
    Hook(
        f"{_TOKENIZER}._stream_one_response",
        f"{_IDENTITY}:stream_one",
        When.LOAD_WITH_TENANTS,
        ("obj", "state", "request"),
    ),
    Hook(f"{_TOKENIZER}._send_one_request", f"{_IDENTITY}:send_one", When.LOAD_WITH_TENANTS, ("tokenized_obj",)),
    Hook(f"{_TOKENIZER}._send_batch_request", f"{_IDENTITY}:send_batch", When.LOAD_WITH_TENANTS, ("tokenized_objs",)),
    Hook(
        f"{_SRT}.entrypoints.http_server._setup_and_run_http_server",
        f"{_IDENTITY}:run_http_server",
        When.LOAD_WITH_TENANTS,
        ("server_args", "tokenizer_manager", "template_manager", "port_args", "scheduler_infos"),
    ),
    Hook(
        f"{_SCHEDULER}.handle_generate_request",
        "kvshare_sched.tenants.seal:handle_generate_request",
        When.CACHE_WITH_TENANTS,
        ("recv_req", "mm_input_error"),
    ),
    # admission: the queue decides whose turn it is, then reuse is planned and charged
    Hook(f"{_ADDER}.add_one_req", f"{_QUEUE}:add_one_req", When.CACHE, ("req",), order=1),
    Hook(
        f"{_ADDER}.add_one_req",
        f"{_ADMISSION}:add_one_req",
        When.CACHE,
        ("req", "has_chunked_req", "truncation_align_size"),
        order=2,
    ),
    Hook(f"{_ADDER}.add_chunked_req", f"{_QUEUE}:add_chunked_req", When.CACHE, ("req",), order=1),
    Hook(f"{_ADDER}.add_chunked_req", f"{_ADMISSION}:add_chunked_req", When.CACHE, ("req",), order=2),
    Hook(f"{_ADDER}.preempt_to_schedule", f"{_QUEUE}:preempt_to_schedule", When.CACHE, ("req",)),
    Hook(
        f"{_POLICY}.calc_priority",
        f"{_QUEUE}:calc_priority",
        When.CACHE,
        ("waiting_queue", "running_batch", "processed_tokens"),
    ),
    Hook(
        f"{_POLICY}.shortest_prefill_chunk_limit",
        f"{_QUEUE}:chunk_limit",
        When.CACHE,
        ("chunked_req", "waiting_queue", "budget", "page_size"),
    ),
    # batches and answers
    Hook(
        f"{_SRT}.model_executor.forward_batch_info.ForwardBatch.init_new",
        f"{_HERE}.requests:init_forward_batch",
        When.CACHE,
        ("batch",),
    ),
    Hook(
        f"{_STREAMER}.is_request_level_customized_info_key",
        f"{_HERE}.reports:request_level_key",
        When.CACHE,
        ("self", "key"),
    ),
    # an idle engine: the queue forgets who gave up, before an audit may send a request of its own
    Hook(f"{_SCHEDULER}.on_idle", f"{_QUEUE}:on_idle", When.CACHE, ("self",), order=1),
    Hook(f"{_SCHEDULER}.on_idle", f"{_AUDIT}:on_idle", When.CACHE, ("self",), order=2),
    Hook(
        f"{_SCHEDULER}.process_input_requests",
        f"{_AUDIT}:process_input_requests",
        When.CACHE,
        ("self", "recv_reqs"),
    ),
    Hook(f"{_STREAMER}.stream_output", f"{_AUDIT}:stream_output", When.CACHE, ("reqs", "return_logprob", "skip_req")),
    # what was computed before is lent no more
    Hook(f"{_SCHEDULER}.unload_lora_adapter", f"{_AUDIT}:unload_lora_adapter", When.CACHE, ("self", "recv_req")),
    *(
        Hook(f"{_UPDATER}.{name}", f"{_ADMISSION}:change_weights", When.CACHE, ("self", "recv_req"))
        for name in _WEIGHT_UPDATES
    ),
)


def bodies(*when: When) -> dict[str, Callable]:
    """Place -> what is put around it, of the rows for these occasions; two bodies of one place become one."""
    found: dict[str, Callable] = {}
    for hook in sorted((h for h in HOOKS if h.when in when), key=lambda h: h.order, reverse=True):
        body = pkgutil.resolve_name(hook.body)
        found[hook.place] = _outside(body, found[hook.place]) if hook.place in found else body
    return found


def _outside(outer: Callable, inner: Callable) -> Callable:
    """One body out of two."""
    return lambda original, *args, **kwargs: outer(functools.partial(inner, original), *args, **kwargs)


def register(*when: When) -> tuple[str, ...]:
    """Hand the bodies for these occasions to SGLang, which puts them in; returns their places."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    found = bodies(*when)
    for place, body in found.items():
        HookRegistry.register(place, body, HookType.AROUND)
    return tuple(found)


def pipeline_of(owner) -> Pipeline | None:
    """The pipeline of an object with a `tree_cache`; None where the cache is not ours."""
    return getattr(owner.tree_cache, "pipeline", None)


def queue_of(owner) -> ServerQueue | None:
    """The queue of an object with a `tree_cache`; None where the cache is not ours, or SGLang's order is in force."""
    return getattr(owner.tree_cache, "queue", None)
