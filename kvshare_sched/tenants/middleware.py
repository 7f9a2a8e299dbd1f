"""The door: an ASGI middleware that finds out who is asking, and refuses whoever may not use a path.

Knows nothing of SGLang but its paths. What comes of the caller is in `hooks`.
"""

from __future__ import annotations

import asyncio
import contextvars
import json
import logging
import time
from collections.abc import Callable

from kvshare_sched.tenants.identity import SERVER, Caller, Refusal, identify
from kvshare_sched.tenants.quotas import Flights
from kvshare_sched.tenants.reload import TenantsFile

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
PAGES = "/kvshare/requests/"  # a tenant's own requests; the pages look whose they are
DOCUMENTS = "/kvshare/documents"
_START = frozenset({"/model_info", "/generate", "/encode", "/freeze_gc"})  # what a starting server asks itself
own_request: contextvars.ContextVar[bool] = contextvars.ContextVar("kvshare_own_request", default=False)
caller_here: contextvars.ContextVar[Caller | None] = contextvars.ContextVar("kvshare_caller", default=None)


class Edge:
    """What the HTTP process knows of tenants: the file in force, requests in flight, the engine's mark."""

    def __init__(
        self,
        file: TenantsFile,
        mark: Callable[[], str],
        *,
        sign: int = 0,
        starting=lambda: False,
        own=(),
        refused: Callable[[str, str], None] = lambda tenant, quota: None,
    ):
        """mark(): that of the engine, which changes with its weights. sign: 1 where SGLang runs large priorities first,
        -1 small ones, 0 where it looks at none. starting(): the server sends itself its first requests, from loopback
        or one of the addresses `own`. refused: as `Flights` takes it.
        """
        self.flights = Flights(refused)
        self._mark = mark
        self.starting = starting
        self.sign = sign
        self._file = file
        self._looked = time.monotonic()
        self._frozen = False
        self._own_addresses = frozenset({"127.0.0.1", "::1", *own})

    @property
    def mark(self) -> str:
        """The engine's mark now."""
        return self._mark()

    def tenants(self):
        """The tenants in force now."""
        if time.monotonic() - self._looked >= _LOOK_AGAIN_S:
            self._looked = time.monotonic()
            return self._file.poll()
        return self._file.current

    def admit(self, scope) -> Caller | Refusal:
        """Whether a caller may use a path."""
        path, tenants = path_of(scope), self.tenants()
        opened = path in HEALTH or (path in tenants.open_paths and path not in SERVED)
        # A browser's question before it sends its key. Only where routes answer: a mount would answer it like a GET.
        opened |= scope.get("method") == "OPTIONS" and path in SERVED
        if scope["type"] == "http" and (opened or self._own(scope, path)):
            return Caller(SERVER)
        caller = identify(scope["headers"], tenants)
        if isinstance(caller, Refusal) or caller.operator:
            return caller
        if scope["type"] == "http" and path.startswith(PAGES):
            return caller
        if scope["type"] != "http" or path not in SERVED:
            return Refusal(403, "this path is for operators")
        if self.flights.full(caller.tenant):
            self.flights.refused(caller.tenant.name, "requests")
            return Refusal(429, f"this tenant may have {caller.tenant.requests} requests in flight, and has")
        return caller

    def _own(self, scope, path: str) -> bool:
        """The requests a starting server sends itself."""
        client = scope.get("client")
        if client is None or client[0] not in self._own_addresses or path not in _START:
            return False
        if path == "/freeze_gc":  # the last of them
            mine, self._frozen = not self._frozen, True
            return mine
        return self.starting()


def path_of(scope) -> str:
    """The path as routes name it."""
    return scope["path"].removeprefix(scope.get("root_path") or "")


class Middleware:
    """ASGI: identify, refuse or pass on with the caller in the context that every handler runs in."""

    def __init__(self, app, edge: Edge, admin=None, background=None):
        """admin: an ASGI application for DOCUMENTS, operators only; background: runs as long as the app."""
        self.app, self.edge, self.admin, self.background = app, edge, admin, background

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._live(scope, receive, send)
            return
        try:
            caller = self.edge.admit(scope)
        except Exception:
            logger.exception("kvshare: a caller could not be identified")
            caller = Refusal(400, "the caller could not be identified")
        if isinstance(caller, Refusal):
            await _refuse(scope, send, caller)
            return
        token = caller_here.set(caller)
        try:
            ours = self.admin is not None and caller.operator and path_of(scope).startswith(DOCUMENTS)
            await (self.admin if ours else self.app)(scope, receive, send)
        finally:
            caller_here.reset(token)

    async def _live(self, scope, receive, send) -> None:
        task = asyncio.create_task(self.background()) if self.background is not None else None
        try:
            await self.app(scope, receive, send)
        finally:
            if task is not None:
                task.cancel()


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
