"""The latest requests of every tenant, in the process that talks HTTP: reports and places, never a prompt.

`client_report` writes, `pages` reads.
"""

from __future__ import annotations

from collections import OrderedDict

EACH, TENANTS = 256, 64  # requests of a tenant that are kept, and tenants
RUNS = 4096  # runs of a tenant's prompts that are kept: a request has a few, or 256, which take 100 kB


class Recent:
    """Bounded; a busy tenant pushes out only its own.

    The event loop writes while other threads read, so readers walk over copies.
    """

    def __init__(self, each: int = EACH, tenants: int = TENANTS):
        self._each, self._tenants = each, tenants
        self._of: OrderedDict[str, OrderedDict[str, dict]] = OrderedDict()

    def remember(self, rid: str, report: dict, details: dict) -> None:
        """report: ShareReport as JSON; details: `explain.details`."""
        mine = self._of.setdefault(details["extra_key"], OrderedDict())
        self._of.move_to_end(details["extra_key"])
        mine.pop(rid, None)
        mine[rid] = {"rid": rid, "report": report, "details": details}
        runs = sum(len(record["details"]["runs"]) for record in mine.values())
        while len(mine) > self._each or (runs > RUNS and len(mine) > 1):
            runs -= len(mine.popitem(last=False)[1]["details"]["runs"])
        while len(self._of) > self._tenants:
            self._of.popitem(last=False)

    def find(self, rid: str) -> list[dict]:
        """What is kept of requests of this id, newest tenants first: clients choose ids, so two may choose the same."""
        return [record for mine in reversed(list(self._of.values())) if (record := mine.get(rid)) is not None]

    def latest(self, count: int) -> list[dict]:
        """Some of the latest requests of the latest tenants, newest first."""
        newest = (record for mine in reversed(list(self._of.values())) for record in reversed(list(mine.values())))
        return [record for record, _ in zip(newest, range(count), strict=False)]


requests = Recent()
