"""The waiting requests by row: the numbers they are sorted by as arrays, and what goes with each.

Rows are dense: whoever leaves gives its row to the last one.
"""

from __future__ import annotations

import numpy as np

from kvshare_sched.scheduling.duplicates import Texts, Wanted
from kvshare_sched.scheduling.order import Rows, Waiting

_WORK, _EXACT, _REUSED, _SHARED = map(Rows._fields.index, ("work", "exact", "reused", "shared"))
_PRICED = 128  # rows whose part of a common text is looked at again at a time


class Table:
    """One row a request. Its id is in one row at most."""

    def __init__(self):
        self.rids: list[str] = []
        self.waiting: list[Waiting] = []
        self.accounts: list[str] = []
        self.texts: list[Texts] = []
        self.items = np.empty(64, object)  # what the caller knows the requests by
        self.row: dict[str, int] = {}
        self._data = np.zeros((len(Rows._fields), 64))
        self._wanted = Wanted()
        self._priced = 0  # the row that was looked at last

    def __len__(self) -> int:
        return len(self.rids)

    @property
    def rows(self) -> Rows:
        """Their numbers; views."""
        return Rows(*self._data[:, : len(self)])

    def work(self, rid: str) -> float:
        """What a request will cost, tokens of ordinary prefill."""
        return float(self._data[_WORK, self.row[rid]])

    def add(self, waiting: Waiting, account: str, number: int, texts: Texts, item: object) -> None:
        """A request comes; number: its account's."""
        row = len(self)
        if row == self._data.shape[1]:
            self._data = np.concatenate((self._data, np.zeros_like(self._data)), axis=1)
            self.items = np.concatenate((self.items, np.empty(row, object)))
        w = waiting
        self._data[:, row] = (w.tier, w.arrival, w.since, w.work, w.exact, w.reused, w.prompt, 0, number)
        self._wanted.add(texts)
        self.row[w.rid] = row
        self.items[row] = item
        self.rids.append(w.rid)
        self.waiting.append(waiting)
        self.accounts.append(account)
        self.texts.append(texts)

    def revise(self, rid: str, work: float, exact: int, reused: int, texts: Texts) -> bool:
        """Other numbers for a request; returns whether they are other ones."""
        row, changed = self.row[rid], False
        if texts != self.texts[row]:
            self._wanted.remove(self.texts[row])
            self._wanted.add(texts)
            self.texts[row], changed = texts, True
        if tuple(self._data[_WORK : _REUSED + 1, row]) != (work, exact, reused):
            self._data[_WORK : _REUSED + 1, row] = (work, exact, reused)
            changed = True
        return changed

    def take(self, rid: str) -> tuple[Waiting, str]:
        """A request leaves; returns what it was when it came, and its account."""
        row, last = self.row.pop(rid), len(self) - 1
        waiting, account = self.waiting[row], self.accounts[row]
        self._wanted.remove(self.texts[row])
        for column in (self.rids, self.waiting, self.accounts, self.texts):
            column[row] = column[last]
            column.pop()
        self.items[row], self.items[last] = self.items[last], None
        if row != last:
            self._data[:, row] = self._data[:, last]
            self.row[self.rids[row]] = row
        return waiting, account

    def price(self) -> None:
        """Look again at what the others' parts of common texts come to, a bounded number of rows at a time."""
        for _ in range(min(_PRICED, len(self))):
            self._priced = (self._priced + 1) % len(self)
            self._data[_SHARED, self._priced] = self._wanted.shared(self.texts[self._priced])
