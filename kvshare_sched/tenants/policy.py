"""Who may lend to whom, as data; default: nobody but the requester's own namespace.

The process that knows who is asking writes the answer beside the request (`Stamp`); the scheduler looks donors up only
in the namespaces named there. A donor that may not lend is never looked at, so its length, age or existence changes
nothing. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from kvshare_sched.tenants.file import Tenant, Tenants
from kvshare_sched.tenants.namespaces import DOCUMENTS, TENANT, name_of

STAMP_KEY = "kvshare_tenant"  # in custom_params
OWN, DOCUMENT, TRUSTED = "own", "document", "trusted"


@dataclass(frozen=True, slots=True)
class Lender:
    """A namespace that may lend, and why. Its cache_salt is empty: what a client has set apart stays apart."""

    extra_key: str
    rule: str  # DOCUMENT or TRUSTED
    group: str


@dataclass(frozen=True, slots=True)
class Stamp:
    """What the scheduler must know of a request's tenant; the same on every rank, because it comes with the request.

    Lengths in tokens; None: no limit. `document`: this is the server's own request that computes a document.
    """

    tenant: str
    lenders: tuple[Lender, ...] = ()
    weight: float = 1.0
    target_kl: float | None = None
    donor_tokens: int | None = None
    index_entries: int | None = None
    guaranteed: int = 0
    hide_reuse: float | None = None
    flight: int = 0  # of the process that counts requests in flight
    document: str = ""
    forget: bool = False  # the document is to be dropped
    revision: int = 0  # of the promises in the tenants file

    @property
    def public(self) -> Stamp:
        """The same without lenders whose conversations are private: what is found there a client may be told of."""
        return replace(self, lenders=tuple(one for one in self.lenders if one.rule != TRUSTED))

    def to_text(self) -> str:
        """For `custom_params`, which hold JSON values only."""
        data = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "lenders"}
        return json.dumps(data | {"lenders": [[one.extra_key, one.rule, one.group] for one in self.lenders]})

    @classmethod
    def from_text(cls, text: str) -> Stamp:
        data = json.loads(text)
        return cls(**data | {"lenders": tuple(Lender(*one) for one in data["lenders"])})


def lenders(tenant: Tenant, tenants: Tenants, mark: str) -> Iterator[Lender]:
    """Namespaces besides its own that a tenant may borrow from: documents first, then trusted members, by name."""
    # The file may have changed since the tenant was looked up.
    groups = [tenants.groups[name] for name in sorted(tenant.groups) if name in tenants.groups]
    for group in groups:
        yield Lender(name_of(mark, DOCUMENTS, group.name), DOCUMENT, group.name)
    seen = {tenant.name}
    for group in groups:
        for member in group.members if group.trusted else ():
            if member not in seen:
                seen.add(member)
                yield Lender(name_of(mark, TENANT, member), TRUSTED, group.name)


def stamp_of(tenant: Tenant, tenants: Tenants, mark: str, flight: int) -> Stamp:
    """Everything the scheduler must know of a request of this tenant."""
    return Stamp(
        tenant.name,
        tuple(lenders(tenant, tenants, mark)),
        tenant.weight,
        tenant.target_kl,
        donor_tokens=tenant.donor_tokens,
        index_entries=tenant.index_entries,
        guaranteed=tenant.guaranteed_donor_tokens,
        hide_reuse=tenant.hide_reuse,
        flight=flight,
        revision=tenants.revision,
    )


def read(params: Mapping[str, object] | None) -> Stamp | None:
    """The stamp in a request's `custom_params`; None without one. Only asked when a tenants file is in force."""
    text = (params or {}).get(STAMP_KEY)
    return Stamp.from_text(text) if isinstance(text, str) else None
