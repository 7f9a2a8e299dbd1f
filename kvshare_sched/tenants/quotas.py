"""Quotas: what a tenant may have in flight, and which of its donors are safe. Pure bookkeeping, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvshare_sched.tenants.file import Tenant


class OverQuota(ValueError):
    """A tenant has as much in flight as it may; SGLang's handlers answer with `status_code` where they look at it."""

    status_code = 429


@dataclass(slots=True)
class _Flight:
    tenant: str
    limit: int | None  # tokens
    requests: int
    tokens: int = 0


class Flights:
    """Requests and tokens in flight per tenant, in the process that talks HTTP."""

    def __init__(self, refused: Callable[[str, str], None] = lambda tenant, quota: None):
        """refused(tenant, quota) is told of every refusal; quota: requests or tokens."""
        self.refused = refused
        self.requests: Counter[str] = Counter()
        self.tokens: Counter[str] = Counter()
        self._open: dict[int, _Flight] = {}
        self._next = 1

    def full(self, tenant: Tenant) -> bool:
        """Whether not a single further request fits."""
        return tenant.requests is not None and self.requests[tenant.name] >= tenant.requests

    def start(self, tenant: Tenant, requests: int) -> int:
        """Count a call of so many requests; returns its number, to be given back once. Raises OverQuota."""
        now = self.requests[tenant.name]
        if tenant.requests is not None and now + requests > tenant.requests:
            self.refused(tenant.name, "requests")
            raise OverQuota(
                f"{requests} more requests would be {now + requests} in flight; accepted: {tenant.requests}. "
                "Send them when others have ended."
            )
        self.requests[tenant.name] += requests
        number, self._next = self._next, self._next + 1
        self._open[number] = _Flight(tenant.name, tenant.tokens, requests)
        return number

    def grow(self, number: int, tokens: int) -> None:
        """One of its requests has turned out to need so many tokens, answer included. Raises OverQuota."""
        flight = self._open.get(number)
        if flight is None:
            return
        now = self.tokens[flight.tenant]
        if flight.limit is not None and now + tokens > flight.limit:
            self.refused(flight.tenant, "tokens")
            raise OverQuota(
                f"{tokens} more tokens would be {now + tokens} in flight; this tenant may have {flight.limit}. "
                "Ask for a shorter answer, or send it when others have ended."
            )
        self.tokens[flight.tenant] += tokens
        flight.tokens += tokens

    def end(self, number: int) -> None:
        """The call has ended, however."""
        flight = self._open.pop(number, None)
        if flight is None:
            return
        for count, size in ((self.requests, flight.requests), (self.tokens, flight.tokens)):
            count[flight.tenant] -= size
            if not count[flight.tenant]:
                del count[flight.tenant]
