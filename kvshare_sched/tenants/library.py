"""The documents of the library on disk: one JSON file each, so that a restarted server knows what to compute again.

KV is never stored, only text: whatever changes the meaning of KV (weights, template, dtype) changes nothing here.
"""

from __future__ import annotations

import json
import logging
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.tenants.namespaces import digest_of

logger = logging.getLogger(__name__)
_NAME = re.compile(r"[^\x00-\x1f\x7f]{1,200}")
LONGEST_TEXT = 16_000_000  # characters
LONGEST_TTL_S = 10 * 365 * 86_400


class Rejected(ValueError):
    """An administrator's request that cannot be served; `status` is the HTTP status of the answer."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class Document:
    """A text that the server computes by itself and lends to a group. `expires`: seconds since 1970, or never."""

    group: str
    name: str
    text: str
    system: str = ""  # stands in front of the text when its KV is computed
    version: int = 1
    expires: float | None = None
    tokens: int = 0  # of system and text, as counted when it was added

    @property
    def key(self) -> tuple[str, str]:
        return self.group, self.name

    @property
    def label(self) -> str:
        """What the scheduler calls this version; nothing of the name can be read from it."""
        return digest_of((self.group, self.name, str(self.version)))[:32]


def checked(data: object) -> Document:
    """A document out of an administrator's JSON: group, name, text, and optionally system and ttl_s. Raises Rejected.

    `expires` holds the time to live until the library turns it into a date.
    """
    if not isinstance(data, dict):
        raise Rejected(400, "the body must be a JSON object with group, name and text")
    if unknown := sorted(set(map(str, data)) - {"group", "name", "text", "system", "ttl_s"}):
        raise Rejected(400, f"{unknown[0][:80]!r} is not known; accepted: group, name, text, system, ttl_s")
    for field in ("group", "name", "text", "system"):
        if not isinstance(data.get(field, "" if field == "system" else None), str):
            raise Rejected(400, f"{field} must be a text")
    if not _NAME.fullmatch(data["name"]):
        raise Rejected(400, "name must have 1 to 200 characters, none of them a control character")
    if not data["text"].strip():
        raise Rejected(400, "text must not be empty")
    try:
        (data["text"] + data.get("system", "") + data["group"] + data["name"]).encode()
    except UnicodeEncodeError:
        raise Rejected(400, "a text holds half of a surrogate pair, which no encoding can write") from None
    if len(data["text"]) + len(data.get("system", "")) > LONGEST_TEXT:
        raise Rejected(413, f"system and text may have {LONGEST_TEXT} characters; split the document")
    ttl = data.get("ttl_s")
    if ttl is not None and (isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0 < ttl <= LONGEST_TTL_S):
        raise Rejected(400, f"ttl_s must be a number of seconds above 0 and up to {LONGEST_TTL_S}")
    return Document(data["group"], data["name"], data["text"], data.get("system", ""), expires=ttl)


def _read(data: dict) -> Document:
    """A document out of its file; raises ValueError or TypeError for what is none."""
    document = Document(**data)
    texts = (document.group, document.name, document.text, document.system)
    numbers = (document.version, document.tokens)
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in numbers):
        raise TypeError("group, name, text and system must be texts; version and tokens whole numbers")
    if document.expires is not None and type(document.expires) not in (int, float):
        raise TypeError("expires must be a number of seconds, or null")
    return document


class Library:
    """The documents by (group, name), and their files in one folder."""

    def __init__(self, folder: str):
        """Raises ConfigError when the folder cannot be used. Files that cannot be read are left alone and logged."""
        self._folder = Path(folder)
        self.documents: dict[tuple[str, str], Document] = {}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            files = sorted(self._folder.glob("*.json"))
        except OSError as problem:
            raise ConfigError(f"KVSHARE_LIBRARY={folder!r} cannot be used: {problem}. Name a folder.") from None
        for path in files:
            try:
                document = _read(json.loads(path.read_text(encoding="utf-8")))
                self.documents[document.key] = document
            except (OSError, ValueError, TypeError, RecursionError):
                logger.exception("kvshare: %s is no document of the library and is left alone", path)

    @property
    def tokens(self) -> int:
        return sum(document.tokens for document in self.documents.values())

    def put(self, document: Document) -> None:
        """Keep a document; it replaces the one of the same name. The file is whole or not there."""
        path = self._path(document.key)
        draft = path.with_suffix(".tmp")
        draft.write_text(json.dumps(asdict(document)), encoding="utf-8")
        os.replace(draft, path)
        self.documents[document.key] = document

    def drop(self, key: tuple[str, str]) -> None:
        """Forget a document."""
        self._path(key).unlink(missing_ok=True)
        del self.documents[key]

    def expired(self, now: float) -> list[Document]:
        """Documents whose time is over."""
        return [d for d in self.documents.values() if d.expires is not None and d.expires <= now]

    def _path(self, key: tuple[str, str]) -> Path:
        return self._folder / f"{digest_of(key)[:32]}.json"
