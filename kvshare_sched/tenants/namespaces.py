"""Names of isolation boundaries: framed, so that no two tuples share one, and readable back.

    extra_key  = frame("kvshare", mark of the engine, kind, name)     kind: tenant, documents
    cache_salt = digest(frame(extra_key and cache_salt of the body))  absent when the body has neither

What a client writes into its body can only divide its own tenant's namespace further. The name of a document namespace
is one that no client's request ever gets, so whatever is in there was sent by the server itself.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from radix_ext.records import Namespace

TENANT, DOCUMENTS = "tenant", "documents"
_MARK = "kvshare"
_LONGEST_NAME = 512  # characters of a name of ours, by far; longer texts are clients' own and are not remembered


def frame(*parts: str | None) -> str:
    """One string for a tuple: every part with its length in characters in front; None, and empty, are `-`.

    Injective for a given count of parts, and self-delimiting: appending anything to two different frames never
    makes them equal (SGLang appends the adapter's name to extra_key).
    """
    return "".join(f"{len(part)}:{part}" if part else "-" for part in parts)


def unframe(text: str) -> tuple[str | None, ...] | None:
    """The parts of a frame; None for a text that is none."""
    parts: list[str | None] = []
    while text:
        if text[0] == "-":
            parts.append(None)
            text = text[1:]
            continue
        size, colon, rest = text.partition(":")
        if not colon or not (size.isascii() and size.isdigit()) or size[0] == "0" or len(size) > 9:
            return None
        if len(rest) < int(size):
            return None
        parts.append(rest[: int(size)])
        text = rest[int(size) :]
    return tuple(parts)


def engine_mark(*settings: object) -> str:
    """A short name for everything that decides what a KV entry means: model, revision, weights, tokenizer, template,
    dtypes, page size, rotary settings, version of this plug-in. 16 hex digits."""
    return _digest(frame(*(repr(value) for value in settings)))[:16]


def name_of(mark: str, kind: str, name: str) -> str:
    """The extra_key of a tenant, or of the documents of a share group."""
    return frame(_MARK, mark, kind, name)


def within(extra_key: str | None, cache_salt: str | None) -> str | None:
    """The cache_salt of a request whose body names these; None when it names neither. Raw salts go no further."""
    return _digest(frame(extra_key, cache_salt)) if extra_key or cache_salt else None


def owner_of(extra_key: str | None) -> str:
    """The tenant a namespace belongs to; `documents:GROUP` for a library; an extra_key of no such form names itself."""
    return _owner_of(extra_key) if len(extra_key or "") <= _LONGEST_NAME else extra_key


def namespace(extra_key: str | None, cache_salt: str | None = None, lora_id: str | None = None) -> Namespace:
    """The isolation boundary of these parts, with its owner."""
    return Namespace(extra_key, cache_salt, lora_id, owner_of(extra_key))


@functools.lru_cache(maxsize=4096)
def _owner_of(extra_key: str | None) -> str:
    parts = unframe(extra_key) if extra_key and extra_key.startswith(frame(_MARK)) else None
    if parts is None or len(parts) != 4 or parts[2] not in (TENANT, DOCUMENTS) or parts[3] is None:
        return extra_key or ""
    return parts[3] if parts[2] == TENANT else f"{DOCUMENTS}:{parts[3]}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def digest_of(parts: Sequence[str | None]) -> str:
    """Hex sha256 of the framed parts."""
    return _digest(frame(*parts))
