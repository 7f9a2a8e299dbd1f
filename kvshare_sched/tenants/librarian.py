"""Computes the library's documents with requests of the server's own, and keeps them computed.

A document is prefilled as an ordinary request, opted out of reuse, in the namespace of its group, which no client's
request can name: its KV has seen nothing but the declared system prompt. It becomes a donor by the normal path, and the
scheduler pins it (`Desk`). Pinned KV goes only when the whole cache is emptied, so looking at one document in turn is
enough to notice that all must be computed again.
"""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import replace

from kvshare_sched.tenants.edge import Edge, own_request
from kvshare_sched.tenants.library import Document, Library, Rejected
from kvshare_sched.tenants.namespaces import DOCUMENTS, name_of
from kvshare_sched.tenants.stamping import stamp_document

logger = logging.getLogger(__name__)
_LOOK_S = 5.0  # between two looks at one document
_MISSING = 64  # tokens that may be computed again without calling the document evicted: pages, and the last token


class Librarian:
    """One per HTTP process. Changes come one at a time."""

    def __init__(self, library: Library, edge: Edge, manager, clock=time.time, show=lambda documents: None):
        """manager: SGLang's TokenizerManager. show: is given `list()` after changes, for the metrics."""
        self.library, self._edge, self._manager, self._clock = library, edge, manager, clock
        self._resident: dict[tuple[str, str], bool] = dict.fromkeys(library.documents, False)
        self._changing = asyncio.Lock()
        self._show = show
        show(self.list())

    def list(self) -> list[dict]:
        """Every document without its text, ascending."""
        return [
            {
                "group": document.group,
                "name": document.name,
                "version": document.version,
                "tokens": document.tokens,
                "expires": document.expires,
                "resident": self._resident.get(key, False),
            }
            for key, document in sorted(self.library.documents.items())
        ]

    async def add(self, wanted: Document) -> Document:
        """Keep a document and compute it; the same text again changes only its time to live. Raises Rejected."""
        async with self._changing:
            tenants = self._edge.tenants()
            if wanted.group not in tenants.groups:
                raise Rejected(404, f"group {wanted.group!r} is not declared in the tenants file")
            old = self.library.documents.get(wanted.key)
            expires = None if wanted.expires is None else self._clock() + wanted.expires
            if old is not None and (old.text, old.system) == (wanted.text, wanted.system):
                document = replace(old, expires=expires)
                self.library.put(document)
                return document
            document = replace(wanted, expires=expires, version=1 if old is None else old.version + 1)
            document = replace(document, tokens=len(self._ids(document)))
            longest = self._manager.max_req_input_len or self._manager.context_len
            if document.tokens >= longest:
                raise Rejected(
                    413, f"the document has {document.tokens} tokens; a prompt may have {longest}. Split it."
                )
            # Until the new version is computed both are held.
            need = self.library.tokens + document.tokens
            if need > tenants.library_tokens:
                raise Rejected(
                    409,
                    f"the library would hold {need} tokens; library.tokens in the tenants file is "
                    f"{tenants.library_tokens}. Remove documents, or raise it.",
                )
            await self._send(document)
            self.library.put(document)
            self._resident[document.key] = True
            self._show(self.list())
            if old is not None:
                await self._forget(old)
                await self._send(document)  # what both versions begin with was found under the old one
            return document

    async def remove(self, key: tuple[str, str]) -> Document:
        """Lend a document no longer. Raises Rejected."""
        async with self._changing:
            document = self.library.documents.get(key)
            if document is None:
                raise Rejected(404, f"group {key[0]!r} has no document {key[1]!r}")
            self.library.drop(key)
            self._resident.pop(key, None)
            self._show(self.list())
            await self._forget(document)
            return document

    async def run(self) -> None:
        """Expire documents, and compute those that are not there, for as long as the server runs."""
        while True:
            if not self._edge.starting():
                try:
                    await self.look_after()
                except Exception:
                    logger.exception("kvshare: the library could not be looked after")
            await asyncio.sleep(_LOOK_S)

    async def look_after(self) -> None:
        """One round: what has expired goes, what is missing is computed, one of the others is looked at."""
        for document in self.library.expired(self._clock()):
            await self.remove(document.key)
        missing = [key for key, there in self._resident.items() if not there]
        for number, key in enumerate(missing, 1):
            await self._compute(key)
            if number % 100 == 0:
                logger.info("kvshare: library: %d of %d documents computed", number, len(missing))
                self._show(self.list())
        if not missing and self._resident:
            key = next(iter(self._resident))
            self._resident[key] = self._resident.pop(key)  # the next time another one
            if not await self._compute(key):
                logger.info("kvshare: the library has left the cache and is computed again")
                self._resident.update((other, False) for other in self._resident if other != key)
        self._show(self.list())

    async def _compute(self, key: tuple[str, str]) -> bool:
        """Compute a document unless it is there; returns whether it was."""
        async with self._changing:
            document = self.library.documents.get(key)
            if document is None:
                return True
            cached = await self._send(document)
            self._resident[key] = True
            return cached >= max(1, document.tokens - _MISSING)

    async def _send(self, document: Document) -> int:
        return await self._ask(document, self._ids(document))

    async def _forget(self, document: Document) -> None:
        try:
            await self._ask(document, self._ids(document)[:1], forget=True)
        except Exception:
            logger.exception("kvshare: a removed document stays a donor until the cache is emptied")

    async def _ask(self, document: Document, ids: list[int], *, forget: bool = False) -> int:
        """Send one request of our own; returns how many of its tokens were cached."""
        from sglang.srt.managers.io_struct import GenerateReqInput

        obj = GenerateReqInput(
            input_ids=ids, sampling_params={"max_new_tokens": 1, "temperature": 0}, log_metrics=False
        )
        space = name_of(self._edge.mark, DOCUMENTS, document.group)
        held = self._edge.tenants().library_tokens
        stamp_document(obj, space, document.label, guaranteed=held, forget=forget)
        token = own_request.set(True)
        try:
            answer = await anext(self._manager.generate_request(obj, None))
        finally:
            own_request.reset(token)
        return answer["meta_info"]["cached_tokens"]

    def _ids(self, document: Document) -> list[int]:
        tokenizer = self._manager.tokenizer
        if tokenizer is None:
            raise Rejected(409, "the server has no tokenizer (--skip-tokenizer-init), so it cannot read documents")
        if not document.system:
            return list(tokenizer.encode(document.text))
        return [*tokenizer.encode(document.system), *tokenizer.encode(document.text, add_special_tokens=False)]
