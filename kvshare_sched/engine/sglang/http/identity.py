"""The caller's identity written into every request: hooks around SGLang's tokenizer manager and its HTTP server.

They act in the process that talks HTTP, and are registered only when KVSHARE_TENANTS_FILE is set; they do nothing
unless our backend is chosen. Otherwise SGLang runs as it is.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import socket
from collections.abc import Mapping

from kvshare_sched.engine.sglang import hooks
from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants import delayed_answers
from kvshare_sched.tenants.admin import Admin
from kvshare_sched.tenants.identity import Refusal, identify, renewed
from kvshare_sched.tenants.librarian import Librarian
from kvshare_sched.tenants.library import Library
from kvshare_sched.tenants.middleware import Edge, Middleware, caller_here, own_request
from kvshare_sched.tenants.namespaces import engine_mark
from kvshare_sched.tenants.policy import Stamp, read
from kvshare_sched.tenants.reload import TenantsFile
from kvshare_sched.tenants.stamp_request import requests_in, stamp_request

logger = logging.getLogger(__name__)
_edge: Edge | None = None  # of this process; None: identity is not in force here


async def generate_request(original, manager, obj, request=None):
    """Around `TokenizerManager.generate_request`, which every endpoint calls: the caller decides, not the body."""
    edge = _edge
    if edge is None or own_request.get() or not hasattr(obj, "extra_key"):  # embeddings have no namespace
        async with contextlib.aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                yield answer
        return
    tenants, caller = edge.tenants(), caller_here.get()
    caller = identify((), tenants) if caller is None else renewed(caller, tenants)
    if isinstance(caller, Refusal):
        raise ValueError(caller.message)
    flight = edge.flights.start(caller.tenant, requests_in(obj))
    try:
        stamp_request(obj, caller, tenants, edge.mark, flight, sign=edge.sign)
        async with contextlib.aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                if not obj.stream:  # the only one; handlers ask for no second, so this may not go on
                    edge.flights.end(flight)
                yield answer
    finally:
        edge.flights.end(flight)


async def stream_one(original, manager, obj, state, request=None):
    """Around `TokenizerManager._stream_one_response`, which gives every part of every answer, streamed or not."""
    answers = original(manager, obj, state, request)
    stamp = _stamp_in(obj)
    if stamp is not None and stamp.hide_reuse is not None:
        answers = delayed_answers.shifted(answers, lambda: getattr(state, delayed_answers.DELAY, 0.0))
    async with contextlib.aclosing(answers):
        async for answer in answers:
            yield answer


async def send_one(original, manager, tokenized):
    """Around `TokenizerManager._send_one_request`: here the length of a prompt is known."""
    _count(manager, tokenized)
    return await original(manager, tokenized)


async def send_batch(original, manager, tokenized):
    """Around `TokenizerManager._send_batch_request`."""
    for one in tokenized:
        _count(manager, one)
    return await original(manager, tokenized)


def _count(manager, tokenized) -> None:
    """Count prompt and answer; an answer without a limit of its own may fill the context."""
    stamp = _stamp_in(tokenized)
    if stamp is not None:
        if stamp.hide_reuse is not None:
            tokenized.stream = True  # so that its first token is heard of at once, whatever the client gets
        params = tokenized.sampling_params
        prompt = len(tokenized.input_ids or tokenized.input_embeds or ())
        room = max(0, manager.context_len - prompt)
        answer = room if params.max_new_tokens is None else min(params.max_new_tokens, room)
        _edge.flights.grow(stamp.flight, prompt + answer)


def _stamp_in(obj) -> Stamp | None:
    """The stamp of a request, before or after it was tokenized; None where no tenants file is in force."""
    if _edge is None:
        return None
    params = getattr(obj, "sampling_params", None)
    return read(params.get("custom_params") if isinstance(params, Mapping) else getattr(params, "custom_params", None))


def run_http_server(
    original, server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, *rest, **more
):
    """Around `http_server._setup_and_run_http_server`: put the middleware around the app before it starts."""
    try:
        _install(server_args, tokenizer_manager, scheduler_infos[0]["max_total_num_tokens"])
    except ConfigError as problem:
        raise SystemExit(f"kvshare: {problem}") from None
    return original(server_args, tokenizer_manager, template_manager, port_args, scheduler_infos, *rest, **more)


def _install(server_args, manager, pool: int) -> None:
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.tokenizer_manager import ServerStatus, TokenizerManager

    from kvshare_sched.observe.metrics import EdgeMetrics
    from kvshare_sched.settings import BACKEND, KVShareConfig

    global _edge
    settings = resolved_view(server_args)
    if settings.radix_cache_backend != BACKEND:
        return
    hooked = (hook.place.rpartition(".") for hook in hooks.HOOKS if hook.when == hooks.When.LOAD_WITH_TENANTS)
    for name in (name for owner, _, name in hooked if owner.endswith(".TokenizerManager")):
        if not hasattr(getattr(TokenizerManager, name), "__wrapped__"):
            raise SystemExit(f"kvshare: TokenizerManager.{name} is not hooked; tenants could not be told apart.")
    config = KVShareConfig.load()
    file = TenantsFile(config.tenants_file, pool, config.index_tokens, manager.context_len)
    mark = functools.cache(functools.partial(mark_of, settings, manager.model_config))
    metrics = EdgeMetrics() if settings.enable_metrics else None
    counted = {"refused": metrics.refused} if metrics is not None else {}
    _edge = Edge(
        file,
        lambda: mark(manager.config_value("weight_version")),
        sign=_sign(settings),
        starting=lambda: manager.server_status == ServerStatus.Starting,
        own=_addresses(settings.host),
        **counted,
    )
    admin = background = None
    if config.library:
        from sglang.srt.managers.io_struct import GenerateReqInput

        shown = {"show": metrics.library} if metrics is not None else {}
        librarian = Librarian(Library(config.library), _edge, manager, GenerateReqInput, settings.page_size, **shown)
        admin, background = Admin(librarian), librarian.run
    http_server.app.add_middleware(Middleware, edge=_edge, admin=admin, background=background)
    logger.warning(
        "kvshare: %d tenants from %s: keys decide, bodies do not",
        len(file.current.tenants),
        config.tenants_file,
    )


def _addresses(host: str | None) -> set[str]:
    """Where a server that listens on `host` alone sends itself requests from."""
    try:
        return {str(found[4][0]) for found in socket.getaddrinfo(host, None)} if host else set()
    except OSError:
        return set()


def _sign(settings) -> int:
    if not settings.enable_priority_scheduling:
        return 0
    return -1 if settings.schedule_low_priority_values_first else 1


def mark_of(settings, model, weights: str) -> str:
    """The engine's mark; settings: resolved server arguments, model: a ModelConfig, weights: their version now."""
    from kvshare_sched import __version__

    text = model.hf_text_config
    return engine_mark(
        *(settings.model_path, settings.revision, weights, settings.tokenizer_path),
        *(settings.chat_template, settings.quantization, settings.json_model_override_args, str(model.dtype)),
        *(settings.kv_cache_dtype, settings.page_size),
        *(getattr(text, "rope_theta", None), getattr(text, "rope_scaling", None), __version__),
    )
