"""One request's rows in a batch, and which of them are up to its method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from kvshare_sched.methods.base import Check
from kvshare_sched.reuse.session import Session


@dataclass(frozen=True, slots=True)
class Chunk:
    """One request's rows in a batch."""

    session: Session
    row: int  # first row in the batch
    start: int  # prompt position of that row
    end: int
    reused: np.ndarray  # bool [end - start]
    forced: np.ndarray  # bool [end - start], reused rows that are recomputed in any case

    @classmethod
    def of(cls, session: Session, row: int, start: int, end: int) -> Chunk:
        """The rows of a planned request from prompt position `start` to `end`."""
        reused = session.plan.reused_mask(start, end)
        forced = np.zeros(end - start, bool)
        forced[session.plan.forced_positions(start, end) - start] = True
        forced[-1] = reused[-1]  # the row that gives this chunk's logits always runs
        return cls(session, row, start, end, reused, forced)

    @property
    def asking(self) -> np.ndarray:
        """Batch rows without a donor up to the end of the question, int64 ascending.

        A continuation that the client wants scored is left out: it must not choose what it is scored against.
        """
        rows = np.flatnonzero(~self.reused)
        return rows[rows + self.start < self.session.asks_until] + self.row

    @property
    def looks(self) -> bool:
        """A first pass of the fresh rows shows who is looked at.

        Where most of the text has several donors their spread says enough; and the pass must not cost more than it
        can save.
        """
        method, asking = self.session.method, len(self.asking)
        if method.first_pass is None or self.everything or not asking:
            return False
        if not self.session.plan.mostly_lone(self.start, self.end):
            return False
        chosen = int(self.forced.sum()) + self.budget(self.session.config.ratio)
        fresh = len(self.reused) - int(self.reused.sum())
        return asking + fresh + chosen <= len(self.reused)

    @property
    def everything(self) -> bool:
        """Every row is to be recomputed: the reference, and what a ratio of 1 means."""
        return self.session.plan.schedule.recompute_all

    @property
    def checks(self) -> tuple[Check, ...]:
        """When the method chooses, and how many."""
        return self.session.plan.schedule.checks

    @property
    def candidates(self) -> np.ndarray:
        """Batch rows whose recompute is up to the strategy, int64 ascending."""
        return np.flatnonzero(self.reused & ~self.forced) + self.row

    def budget(self, share: float) -> int:
        """How many of the candidates a share of the reused rows buys beside the forced ones."""
        by_doubt = self.session.method.by_doubt and share < 1
        rows = self.session.plan.doubtful_len(self.start, self.end) if by_doubt else int(self.reused.sum())
        return max(0, math.ceil(share * rows) - int(self.forced.sum()))
