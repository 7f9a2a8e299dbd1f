"""The library over HTTP, for operators: GET, POST and DELETE on /kvshare/documents. A plain ASGI application."""

from __future__ import annotations

import asyncio
import json
import logging
from urllib.parse import parse_qs

from kvshare_sched.tenants.librarian import Librarian
from kvshare_sched.tenants.library import LONGEST_TEXT, Rejected, checked
from kvshare_sched.tenants.middleware import DOCUMENTS, path_of

logger = logging.getLogger(__name__)
_LONGEST_BODY = 6 * LONGEST_TEXT + 65_536  # bytes: JSON may write a character as \\uXXXX


class Admin:
    """Answers JSON: the document without its text, a list of them, or {"error": {"message", "code"}}.

    DELETE answers 202 while the engine has not confirmed that it lends the document no longer; asking again tells.
    """

    def __init__(self, librarian: Librarian):
        self.librarian = librarian

    async def __call__(self, scope, receive, send) -> None:
        try:
            status, answer = await self._answer(scope, receive)
        except Rejected as problem:
            status, answer = problem.status, {"error": {"message": str(problem), "code": problem.status}}
        except Exception:
            logger.exception("kvshare: a request to %s failed", DOCUMENTS)
            status, answer = 503, {"error": {"message": "the document could not be computed; see the log", "code": 503}}
        body = json.dumps(answer).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope, receive) -> tuple[int, dict]:
        if path_of(scope) != DOCUMENTS:
            raise Rejected(404, f"nothing is here; accepted: {DOCUMENTS}")
        if scope["method"] == "GET":
            return 200, {"documents": self.librarian.list()}
        if scope["method"] == "POST":
            document = await self.librarian.add(checked(await _json(receive)))
        elif scope["method"] == "DELETE":
            document = await self.librarian.remove(_key(scope["query_string"]))
        else:
            raise Rejected(405, "accepted: GET, POST, DELETE")
        told = {"group": document.group, "name": document.name, "version": document.version, "tokens": document.tokens}
        if scope["method"] == "POST":
            return 200, told
        dropped = self.librarian.dropped(document)
        return 200 if dropped else 202, told | {"dropped": dropped}


def _key(query: bytes) -> tuple[str, str]:
    try:
        values = parse_qs(query.decode("ascii"), strict_parsing=True, errors="strict", max_num_fields=8)
    except ValueError:
        values = {}
    if set(values) != {"group", "name"} or any(len(found) != 1 for found in values.values()):
        raise Rejected(400, "name the document with ?group=GROUP&name=NAME")
    return values["group"][0], values["name"][0]


async def _json(receive) -> object:
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Rejected(400, "the body ended early")
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > _LONGEST_BODY:
            raise Rejected(413, f"the body may have {_LONGEST_BODY} bytes")
        if not message.get("more_body"):
            break
    try:
        return await asyncio.to_thread(json.loads, b"".join(parts))
    except (ValueError, RecursionError):
        raise Rejected(400, "the body is no JSON") from None
