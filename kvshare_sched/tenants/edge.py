"""Identity at SGLang's HTTP edge: an ASGI middleware finds the caller, a hook writes it into every request.

Both live in the process that talks HTTP. They are wired only when KVSHARE_TENANTS_FILE is set and our backend is
chosen; otherwise SGLang runs as it is.
"""

from __future__ import annotations

import contextlib
import contextvars
import json
import logging
import time

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants.identity import SERVER, Caller, Refusal, identify
from kvshare_sched.tenants.namespaces import engine_mark
from kvshare_sched.tenants.policy import read
from kvshare_sched.tenants.quotas import Flights
from kvshare_sched.tenants.reload import TenantsFile
from kvshare_sched.tenants.stamping import requests_in, stamp_request

logger = logging.getLogger(__name__)
_LOOK_AGAIN_S = 1.0  # between two looks at the file's date
HEALTH = frozenset({"/health", "/health_generate", "/ready", "/ping"})
# What a tenant may call. Everything else changes or shows the server, and is for operators.
SERVED = frozenset(
    {
        *("/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"),
        *("/v1/messages/count_tokens", "/v1/models", "/model_info", "/get_model_info"),
        *("/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", "/v1/embeddings", "/v1/score", "/v1/rerank"),
        *("/encode", "/classify", "/v1/classify", "/api/chat", "/api/generate", "/api/tags", "/invocations"),
        "/vertex_generate",
    }
)
_START = frozenset({"/model_info", "/generate", "/encode", "/freeze_gc"})  # what a starting server asks itself
_caller: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("kvshare_caller", default=None)


class Edge:
    """What the HTTP process knows of tenants: the file in force, requests in flight, the engine's mark."""

    def __init__(self, file: TenantsFile, mark: str, *, low_first: bool = False, starting=lambda: False):
        """low_first: SGLang runs small priorities first. starting(): the server sends itself its first requests."""
        self.flights = Flights()
        self.mark = mark
        self.starting = starting
        self.low_first = low_first
        self._file = file
        self._looked = time.monotonic()
        self._frozen = False

    def tenants(self):
        """The tenants in force now."""
        if time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            return self._file.poll()
        return self._file.current

    def admit(self, scope) -> Caller | Refusal:
        """Whether a caller may use a path."""
        path = scope["path"].removeprefix(scope.get("root_path") or "")
        tenants = self.tenants()
        if scope["type"] == "http" and (path in HEALTH or path in tenants.open_paths or self._own(scope, path)):
            return Caller(SERVER)
        caller = identify(scope["headers"], tenants)
        if isinstance(caller, Refusal) or caller.operator:
            return caller
        if scope["type"] != "http" or path not in SERVED:
            return Refusal(403, "this path is for operators")
        if self.flights.full(caller.tenant):
            return Refusal(429, f"this tenant may have {caller.tenant.requests} requests in flight, and has")
        return caller

    def _own(self, scope, path: str) -> bool:
        """The requests a starting server sends itself over its loopback."""
        client = scope.get("client")
        if client is None or client[0] not in ("127.0.0.1", "::1") or path not in _START:
            return False
        if path == "/freeze_gc":  # the last of them
            mine, self._frozen = not self._frozen, True
            return mine
        return self.starting()


class Middleware:
    """ASGI: identify, refuse or pass on with the caller in the context that every handler runs in."""

    def __init__(self, app, edge: Edge, admin=None):
        """admin: an ASGI application for /kvshare/ paths, operators only; or None."""
        self.app, self.edge, self.admin = app, edge, admin

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        try:
            caller = self.edge.admit(scope)
        except Exception:
            logger.exception("kvshare: a caller could not be identified")
            caller = Refusal(400, "the caller could not be identified")
        if isinstance(caller, Refusal):
            await _refuse(scope, send, caller)
            return
        token = _caller.set(caller)
        try:
            ours = self.admin is not None and caller.operator and scope["path"].startswith("/kvshare/")
            await (self.admin if ours else self.app)(scope, receive, send)
        finally:
            _caller.reset(token)


async def _refuse(scope, send, refusal: Refusal) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close", "code": 1008, "reason": refusal.message})
        return
    body = json.dumps({"error": {"message": refusal.message, "code": refusal.status}}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refusal.status == 429:
        headers.append((b"retry-after", b"1"))
    await send({"type": "http.response.start", "status": refusal.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


# ---- hooks ----

_edge: Edge | None = None  # of this process; None: identity is not in force here
own_request: contextvars.ContextVar[bool] = contextvars.ContextVar("kvshare_own_request", default=False)


async def generate_request(original, manager, obj, request=None):
    """Around `TokenizerManager.generate_request`, which every endpoint calls: the caller decides, not the body."""
    edge = _edge
    if edge is None or own_request.get() or not hasattr(obj, "extra_key"):  # embeddings have no namespace
        async with contextlib.aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                yield answer
        return
    caller = _caller.get() or identify((), edge.tenants())
    if isinstance(caller, Refusal):
        raise ValueError(caller.message)
    flight = edge.flights.start(caller.tenant, requests_in(obj))
    try:
        stamp_request(obj, caller, edge.tenants(), edge.mark, flight, low_first=edge.low_first)
        async with contextlib.aclosing(original(manager, obj, request)) as answers:
            async for answer in answers:
                yield answer
    finally:
        edge.flights.end(flight)


async def send_one(original, manager, tokenized):
    """Around `TokenizerManager._send_one_request`: here the length of a prompt is known."""
    _count(tokenized)
    return await original(manager, tokenized)


async def send_batch(original, manager, tokenized):
    """Around `TokenizerManager._send_batch_request`."""
    for one in tokenized:
        _count(one)
    return await original(manager, tokenized)


def _count(tokenized) -> None:
    params = getattr(tokenized, "sampling_params", None)
    stamp = read(getattr(params, "custom_params", None)) if _edge is not None else None
    if stamp is not None:
        _edge.flights.grow(stamp.flight, len(tokenized.input_ids or ()) + (params.max_new_tokens or 0))


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

    from kvshare_sched.config import KVShareConfig
    from kvshare_sched.plugin import BACKEND

    global _edge
    settings = resolved_view(server_args)
    if settings.radix_cache_backend != BACKEND:
        return
    for name in ("generate_request", "_send_one_request", "_send_batch_request"):
        if not hasattr(getattr(TokenizerManager, name), "__wrapped__"):
            raise SystemExit(f"kvshare: TokenizerManager.{name} is not hooked; tenants could not be told apart.")
    config = KVShareConfig.load()
    file = TenantsFile(config.tenants_file, pool, config.index_tokens)
    _edge = Edge(
        file,
        mark_of(settings, manager.model_config),
        low_first=settings.schedule_low_priority_values_first,
        starting=lambda: manager.server_status == ServerStatus.Starting,
    )
    http_server.app.add_middleware(Middleware, edge=_edge)
    logger.warning(
        "kvshare: %d tenants from %s: keys decide, bodies do not",
        len(file.current.tenants),
        config.tenants_file,
    )


def mark_of(settings, model) -> str:
    """The engine's mark; settings: resolved server arguments, model: SGLang's ModelConfig."""
    from kvshare_sched import __version__

    text = model.hf_text_config
    return engine_mark(
        *(settings.model_path, settings.revision, settings.weight_version, settings.tokenizer_path),
        *(settings.chat_template, str(model.dtype), settings.kv_cache_dtype, settings.page_size),
        *(getattr(text, "rope_theta", None), getattr(text, "rope_scaling", None), __version__),
    )


def hooks() -> dict[str, object]:
    """Seam -> hook body, all of kind AROUND."""
    manager = "sglang.srt.managers.tokenizer_manager.TokenizerManager"
    return {
        f"{manager}.generate_request": generate_request,
        f"{manager}._send_one_request": send_one,
        f"{manager}._send_batch_request": send_batch,
        "sglang.srt.entrypoints.http_server._setup_and_run_http_server": run_http_server,
    }
