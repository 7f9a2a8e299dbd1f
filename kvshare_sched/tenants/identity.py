"""From the headers of a request to the tenant it runs as. Pure; the body is never asked."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from kvshare_sched.tenants.file import ANONYMOUS, Tenant, Tenants

# No tenant of the file can have these names. Nobody lends to them, nothing limits them.
OPERATORS = Tenant("(operators)")
SERVER = Tenant("(server)")  # health checks, and the requests a starting server sends itself
_BEARER = "bearer "
_LONGEST_KEY = 4096  # characters


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is not served: HTTP status and a sentence for the client, without names of others."""

    status: int
    message: str


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sent a request: the tenant it runs as, and whether an operator's key came with it."""

    tenant: Tenant
    operator: bool = False
    headers: tuple[tuple[bytes, bytes], ...] = field(default=(), compare=False, repr=False)  # that say so

    @property
    def known(self) -> bool:
        """Whether a key, or the gateway, says who it is; the others share one name, and nothing that is under it."""
        return self.tenant != SERVER and self.tenant.name != ANONYMOUS


def identify(headers: Iterable[tuple[bytes, bytes]], tenants: Tenants) -> Caller | Refusal:
    """The caller of a request. headers: raw names (lower case, as ASGI has them) and values.

    A key decides; the gateway's header counts only beside the gateway's own key. A key nobody has is a mistake, of a
    tenant as a rule, and refused, unless the file says that strangers may bring any.
    """
    headers = tuple(headers)
    found = _who(headers, tenants)
    return found if isinstance(found, Refusal) else replace(found, headers=headers)


def _who(headers: Iterable[tuple[bytes, bytes]], tenants: Tenants) -> Caller | Refusal:
    wanted = {b"authorization": [], b"x-api-key": []}
    if tenants.gateway_header is not None:
        wanted[tenants.gateway_header.encode()] = []
    for name, value in headers:
        if (name := name.lower()) in wanted:
            wanted[name].append(value.decode("latin-1"))
    keys = {_token(value) for value in wanted[b"authorization"]} | set(wanted[b"x-api-key"])
    keys.discard("")
    if len(keys) > 1:
        return Refusal(400, "several API keys in one request; send one")
    digest = _digest(keys.pop()) if keys else None
    if digest is None:
        return _stranger(tenants, named=False)
    if digest in tenants.operator_keys:
        return Caller(OPERATORS, operator=True)
    if digest in tenants.gateway_keys:
        return _from_gateway(wanted[tenants.gateway_header.encode()], tenants)
    name = tenants.keys.get(digest)
    return Caller(tenants.tenants[name]) if name is not None else _stranger(tenants, named=True)


def renewed(caller: Caller, tenants: Tenants) -> Caller | Refusal:
    """Who the same headers name by the file in force now: a body may come long after them, its key taken back."""
    return caller if caller.tenant == SERVER else identify(caller.headers, tenants)


def _from_gateway(names: list[str], tenants: Tenants) -> Caller | Refusal:
    if len(names) > 1:
        return Refusal(400, f"the header {tenants.gateway_header} came {len(names)} times; send it once")
    name = names[0].strip() if names else ""
    tenant = tenants.tenants.get(name)
    return Caller(tenant) if tenant is not None else _stranger(tenants, named=bool(name))


def _stranger(tenants: Tenants, *, named: bool) -> Caller | Refusal:
    """named: a key, or the gateway, says who it is, and nobody of that name is known."""
    if tenants.anonymous is None or (named and not tenants.any_key):
        return Refusal(401, "an API key of a known tenant is needed (Authorization: Bearer KEY, or x-api-key)")
    return Caller(tenants.anonymous)


def _token(authorization: str) -> str:
    """The bearer token of the header; another scheme is no key."""
    return authorization[len(_BEARER) :].strip() if authorization[: len(_BEARER)].lower() == _BEARER else ""


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("latin-1")).hexdigest() if len(key) <= _LONGEST_KEY else "-"


def hash_of(key: str) -> str:
    """What the tenants file holds of a key."""
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
