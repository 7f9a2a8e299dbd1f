"""Donor KV into a request's own slots, keys rotated to their new positions: one donor's, or the mean of several.

The only place that reads another request's KV. Sources are slots of leased donors, targets the slots SGLang
allocated for the request that borrows.
"""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import torch

from kvshare_kernels import copy_mean, copy_rotate
from kvshare_sched.evidence import Chunk
from kvshare_sched.pipeline import Pipeline, Session
from kvshare_sched.types import Segment

# Spread a measured layer, taken for text with one donor in a foreign context: some twice the usual one of several
# donors, because one donor is further from the truth than their mean.
_LONE_SPREAD = 0.006
_OWN_NOISE = 0.1  # a donor with the very same left context weighs 1 / this against 1 / (1 + this) for a foreign one


class Assembly:
    """Copies for one rank's KV pool. cos_sin: the model's rotary table, float32 [positions, R]."""

    def __init__(self, pipeline: Pipeline, pool, depth: int, cos_sin: torch.Tensor, neox: bool):
        self.pipeline = pipeline
        self.keys = [pool.get_key_buffer(i) for i in range(depth)]
        self.values = [pool.get_value_buffer(i) for i in range(depth)]
        self.cos_sin, self.neox = cos_sin, neox

    def copy(self, batch, chunks: list[Chunk]) -> dict[int, torch.Tensor]:
        """Donor KV into the chunks' own slots, keys rotated; layers below a chunk's first check are never read.

        Returns how far the donors are apart, float32 [rows of the chunk], by the chunk's first row.
        """
        by_first_layer: dict[int, list] = defaultdict(list)
        spread = {}
        for chunk in chunks:
            checks = chunk.checks(len(self.keys))
            runs = by_first_layer[checks[0].layer if checks else 0]
            session = chunk.session
            parts = self.pipeline.copies(session, chunk.start, chunk.end)
            if parts and session.approximate_from is None:
                session.approximate_from = session.plan.approximate_from
            spread[chunk.row] = torch.zeros(len(chunk.reused), device=batch.out_cache_loc.device)
            for segment, lease in parts:
                low = segment.start - chunk.start
                target = batch.out_cache_loc[chunk.row + low : chunk.row + low + segment.length].long()
                if segment.others:
                    spread[chunk.row][low : low + segment.length] = self._copy_mean(session, segment, target)
                else:
                    runs.append((lease.slots[segment.donor_start : segment.donor_end], target, segment.shift))
                    spread[chunk.row][low : low + segment.length] = self._lone_spread(session, segment)
        for first, runs in by_first_layer.items():
            copy_rotate(self.keys[first:], self.values[first:], runs, self.cos_sin, neox=self.neox)
        return spread

    def _copy_mean(self, session: Session, segment: Segment, target: torch.Tensor) -> torch.Tensor:
        """The mean of a segment's donors into `target`; float32 [length], how far they are apart."""
        weights = np.zeros((len(segment.places), segment.length), np.float32)
        for row, place in zip(weights, segment.places, strict=True):
            row[place.start - segment.start : place.end - segment.start] = 1 / (_OWN_NOISE + place.foreign)
        alone = torch.from_numpy((weights > 0).sum(axis=0) == 1).to(target.device)  # parts that only one donor has
        weights = torch.from_numpy(weights / weights.sum(axis=0)).to(target.device)
        parts = []
        for weight, place in zip(weights, segment.places, strict=True):
            low = place.start - segment.start
            source = session.leases[place.donor_id].slots[place.donor_start : place.donor_end]
            parts.append((source, low, place.shift, weight[low : low + place.length]))
        measured = self._measured(session)
        spread = copy_mean(self.keys, self.values, target, parts, self.cos_sin, neox=self.neox, measured=measured)
        return spread.masked_fill_(alone, self._lone_spread(session, segment))

    def _measured(self, session: Session) -> range:
        """Layers where the donors' keys are compared."""
        first_pass = session.strategy.first_pass
        return (first_pass(len(self.keys)) if first_pass else None) or range(len(self.keys))

    def _lone_spread(self, session: Session, segment: Segment) -> float:
        return _LONE_SPREAD * len(self._measured(session)) * segment.foreign
