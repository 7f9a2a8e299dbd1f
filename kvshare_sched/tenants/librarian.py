"""Computes the library's documents with requests of the server's own, and keeps them computed.

A document is prefilled as an ordinary request, opted out of reuse, in the namespace of its group, which no client's
request can name: its KV has seen nothing but the declared system prompt. It becomes a donor by the normal path, and the
scheduler pins it (`Desk`). Pinned KV goes only when the whole cache is emptied, so looking at one document in turn is
enough to notice that all must be computed again. What is taken back counts as lent until the engine has confirmed that
it is dropped; that list needs no file, because KV does not outlive the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from kvshare_sched.tenants.library import Document, Library, Rejected
from kvshare_sched.tenants.middleware import Edge, own_request
from kvshare_sched.tenants.namespaces import DOCUMENTS, name_of
from kvshare_sched.tenants.stamp_request import stamp_document

logger = logging.getLogger(__name__)
_LOOK_S = 5.0  # between two looks at one document
_MISSING = 64  # tokens, or a page, that may be computed again without calling the document evicted
_ANY = [0]  # the prompt of a request that only says what to drop
_MOST_URGENT = 2**31  # above every ceiling of the tenants file


class Librarian:
    """One per HTTP process. Changes come one at a time."""

    def __init__(
        self,
        library: Library,
        edge: Edge,
        manager,
        new_request: Callable[..., Any],
        page: int = 1,
        clock=time.time,
        show=lambda documents: None,
    ):
        """manager: SGLang's TokenizerManager; new_request: makes what its `generate_request` takes;
        page: tokens of a KV page; show: is given `list()` after changes, for the metrics.
        """
        self.library, self._edge, self._manager, self._clock = library, edge, manager, clock
        self._new_request = new_request
        self._missing = max(_MISSING, page)
        self._resident: dict[tuple[str, str], bool] = dict.fromkeys(library.documents, False)
        self._leaving: dict[str, Document] = {}  # by label: taken back, but perhaps still lent by the engine
        self._tokens: dict[str, list[int]] = {}  # by label, of documents in the library
        self._changing = asyncio.Lock()
        self._show = show
        show(self.list())

    def list(self) -> list[dict]:
        """Every document without its text, ascending."""
        return [
            {
                "group": document.group,
                "name": document.name,
                "id": document.label,
                "version": document.version,
                "tokens": document.tokens,
                "expires": document.expires,
                "resident": self._resident.get(key, False),
            }
            for key, document in sorted(self.library.documents.items())
        ]

    def dropped(self, document: Document) -> bool:
        """Whether the engine has confirmed that it lends this document no longer."""
        return document.label not in self._leaving

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
            earlier = [
                d.version for d in (*self.library.documents.values(), *self._leaving.values()) if d.key == wanted.key
            ]
            document = replace(wanted, expires=expires, version=1 + max(earlier, default=0))
            ids = await self._encode(document)
            document = replace(document, tokens=len(ids))
            self._check_room(document, tenants.library_tokens)
            # On disk before it is lent, so that whatever is lent can be taken back.
            self.library.put(document)
            if old is not None:
                self._leaving[old.label] = old
            try:
                await self._ask(document, ids)
            except BaseException:
                self._leaving[document.label] = document  # it may have been computed all the same
                if old is None:
                    self.library.drop(document.key)
                else:
                    del self._leaving[old.label]
                    self.library.put(old)
                raise
            self._tokens[document.label] = ids
            # What both versions begin with was found under the old one, and has to be computed again.
            self._resident[document.key] = old is None
            self._show(self.list())
            await self._drop()
            return document

    def _check_room(self, document: Document, budget: int) -> None:
        longest = self._manager.max_req_input_len or self._manager.context_len
        if document.tokens >= longest:
            raise Rejected(413, f"the document has {document.tokens} tokens; a prompt may have {longest}. Split it.")
        # An old version is held until the new one is computed, and what is taken back until the engine has dropped it.
        need = self.library.tokens + sum(d.tokens for d in self._leaving.values()) + document.tokens
        if need > budget:
            raise Rejected(
                409,
                f"the library would hold {need} tokens; library.tokens in the tenants file is {budget}. "
                "Remove documents, or raise it.",
            )

    async def remove(self, key: tuple[str, str], *, only_expired: bool = False) -> Document:
        """Lend a document no longer; ask `dropped` whether the engine has confirmed it. Raises Rejected."""
        async with self._changing:
            document = self.library.documents.get(key)
            if document is not None and (not only_expired or document in self.library.expired(self._clock())):
                self.library.drop(key)
                self._leaving[document.label] = document
                self._resident.pop(key, None)
            elif document is None:
                document = next((d for d in self._leaving.values() if d.key == key), None)
            if document is None:
                raise Rejected(404, f"group {key[0]!r} has no document {key[1]!r}")
            self._show(self.list())
            await self._drop()
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
        async with self._changing:
            await self._drop()
        for document in self.library.expired(self._clock()):
            with contextlib.suppress(Rejected):  # an operator was quicker
                await self.remove(document.key, only_expired=True)
        wanted = self._wanted()
        missing = [key for key in wanted if not self._resident.get(key)]
        there = next((key for key in self._resident if key in wanted and key not in missing), None)
        for number, key in enumerate(missing, 1):
            await self._compute(key)
            if number % 100 == 0:
                logger.info("kvshare: library: %d of %d documents looked at", number, len(missing))
                self._show(self.list())
        if there is not None:
            self._resident[there] = self._resident.pop(there)  # the next time another one
            if not await self._compute(there):
                logger.info("kvshare: the library has left the cache and is computed again")
                self._resident.update((other, False) for other in self._resident if other != there)
        self._show(self.list())

    def _wanted(self) -> dict[tuple[str, str], Document]:
        """What is to be there: documents of declared groups, ascending, as far as the budget goes."""
        tenants, found = self._edge.tenants(), {}
        left = tenants.library_tokens - sum(document.tokens for document in self._leaving.values())
        for key, document in sorted(self.library.documents.items()):
            if document.group in tenants.groups and document.tokens <= left:
                found[key] = document
                left -= document.tokens
        return found

    async def _compute(self, key: tuple[str, str]) -> bool:
        """Compute a document unless it is there; returns whether it was. One that cannot be stops no other."""
        async with self._changing:
            document = self.library.documents.get(key)
            if document is None:
                return True
            self._resident[key] = False
            try:
                if (ids := self._tokens.get(document.label)) is None:
                    ids = self._tokens[document.label] = await self._encode(document)
                cached = await self._ask(document, ids)
            except Exception as problem:
                logger.warning("kvshare: document %s could not be computed: %s", document.label, type(problem).__name__)
                return True
            self._resident[key] = True
            return cached >= max(1, len(ids) - self._missing)

    async def _drop(self) -> None:
        """Have the engine drop what was taken back. What it does not confirm is asked for again in the next round."""
        for label, document in list(self._leaving.items()):
            try:
                await self._ask(document, _ANY, forget=True)
            except Exception:
                logger.exception("kvshare: document %s was removed and may still be lent; tried again", label)
                continue
            del self._leaving[label]
            self._tokens.pop(label, None)

    async def _ask(self, document: Document, ids: list[int], *, forget: bool = False) -> int:
        """Send one request of our own; returns how many of its tokens were cached. Raises when it did not run."""
        obj = self._new_request(
            input_ids=ids, sampling_params={"max_new_tokens": 1, "temperature": 0}, log_metrics=False
        )
        space = name_of(self._edge.mark, DOCUMENTS, document.group)
        held, revision = self._held(document.group), self._edge.tenants().revision
        stamp_document(obj, space, document.label, guaranteed=held, revision=revision, forget=forget)
        if forget and self._edge.sign:  # else None, the least urgent
            obj.priority = self._edge.sign * _MOST_URGENT
        token = own_request.set(True)
        try:
            answer = await anext(self._manager.generate_request(obj, None))
        finally:
            own_request.reset(token)
        meta = answer["meta_info"]
        if (meta.get("finish_reason") or {}).get("type") == "abort":
            raise RuntimeError("the request was aborted")
        return meta["cached_tokens"]

    def _held(self, group: str) -> int:
        """Tokens the engine may keep pinned for a group; over all groups never more than the budget."""
        return sum(d.tokens for d in (*self._wanted().values(), *self._leaving.values()) if d.group == group)

    async def _encode(self, document: Document) -> list[int]:
        """Token ids of system and text, made beside the loop: a long text takes seconds."""
        tokenizer = self._manager.tokenizer
        if tokenizer is None:
            raise Rejected(409, "the server has no tokenizer (--skip-tokenizer-init), so it cannot read documents")
        if not document.system:
            return list(await asyncio.to_thread(tokenizer.encode, document.text))
        system = await asyncio.to_thread(tokenizer.encode, document.system)
        return [*system, *await asyncio.to_thread(tokenizer.encode, document.text, add_special_tokens=False)]
