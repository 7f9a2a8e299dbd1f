"""The record of borrowing: one JSON line for every request that used another namespace's KV.

Names of tenants and groups, rules and lengths; no token, no text, no salt, no key. A document is named by the id of its
version in the library's list, a request by a digest of its id.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence

from kvshare_sched.tenants.namespaces import owner_of
from kvshare_sched.tenants.policy import Lender, Stamp
from radix_ext.records import Namespace, Segment

logger = logging.getLogger(__name__)
Source = tuple[Namespace, str | None]  # of a donor: its namespace, and the document it holds


def loans(
    segments: Sequence[Segment], donors: Mapping[int, Source], own: Namespace, lenders: Sequence[Lender]
) -> list[dict]:
    """What was borrowed: tokens by lender and rule, with the documents among them, ascending by lender."""
    rules = {one.extra_key: one for one in lenders}
    tokens: dict[str, int] = {}
    documents: dict[str, set[str]] = {}
    for place in (place for segment in segments for place in segment.places):
        namespace, document = donors[place.donor_id]
        if namespace != own:
            tokens[namespace.extra_key] = tokens.get(namespace.extra_key, 0) + place.length
            documents.setdefault(namespace.extra_key, set()).update([document] if document else ())
    return sorted(
        (
            {"from": owner_of(key), "rule": rules[key].rule, "group": rules[key].group, "tokens": count}
            | ({"documents": sorted(documents[key])} if documents[key] else {})
            for key, count in tokens.items()
        ),
        key=lambda loan: (loan["from"], loan["rule"]),
    )


class BorrowLog:
    """Appends to a file, or to the server's log when there is none. Never raises: an answer beats its record,
    and the failure is logged."""

    def __init__(self, path: str, clock=time.time):
        self._file = open(path, "a", encoding="utf-8", buffering=1) if path else None  # noqa: SIM115
        self._clock = clock

    def write(self, rid: str, stamp: Stamp, found: Sequence[dict]) -> None:
        """Record the loans of one request."""
        line = json.dumps(
            {
                "time": round(self._clock(), 3),
                "request": hashlib.sha256(rid.encode("utf-8", "surrogatepass")).hexdigest()[:16],
                "tenant": stamp.tenant,
                "borrowed": list(found),
            }
        )
        try:
            if self._file is None:
                logger.info("kvshare: borrowed: %s", line)
            else:
                self._file.write(line + "\n")
        except (OSError, ValueError):
            logger.exception("kvshare: the record of borrowing could not be written")
