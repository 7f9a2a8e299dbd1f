"""Donor KV into a request's own slots, keys turned to their new positions: one donor's, or a blend of several.

The only place that reads another request's KV. Sources are slots of leased donors, targets the slots SGLang
allocated for the request that borrows. A text with one donor is copied before the layers run. A text with several
is blended layer by layer, once the rows of it that are computed anew have shown that layer which donors to trust.
"""

from __future__ import annotations

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from kvshare_kernels import Donors, blend, copy_rotate, fit, in_use, key_spread, on_device, rotation_rows
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import Session
from kvshare_sched.runtime.chunk import Chunk
from kvshare_sched.runtime.port import Engine, View
from radix_ext.records import Segment

# Spread a compared layer, taken for the start of a text with one donor in a foreign context: some twice the usual one
# of several donors, because one donor is further from the truth than they are together. Further inside, a token
# depends ever more on its own text: so many tokens in, the spread has fallen to seven tenths.
_LONE_SPREAD = 0.006
_LONE_REACH = 16
_OWN_NOISE = 0.1  # a donor with the very same left context weighs 1 / this against 1 / (1 + this) for a foreign one


@dataclass(slots=True)
class Blend:
    """The texts of one chunk that several donors have."""

    chunk: Chunk
    rows: np.ndarray  # int64 [n], rows of the batch
    target: torch.Tensor  # int64 [n], their slots
    donors: Donors
    spread: torch.Tensor  # float32 [n]
    lone: torch.Tensor  # bool [n], where the spread tells nothing


class Assembly:
    """Copies for one rank's KV pool. cos_sin: the model's rotary table, float32 [positions, R]."""

    def __init__(self, pipeline: Pipeline, engine: Engine, cos_sin: torch.Tensor, neox: bool):
        self.pipeline, self.engine = pipeline, engine
        self.keys = [engine.pool.get_key_buffer(i) for i in range(engine.layers)]
        self.values = [engine.pool.get_value_buffer(i) for i in range(engine.layers)]
        self.cos_sin, self.neox = cos_sin, neox

    def copy(self, whole: View, chunks: list[Chunk]) -> tuple[dict[int, torch.Tensor], list[Blend]]:
        """Donor KV of texts with one donor into the chunks' own slots; layers below a first check are never read.

        Returns how far each chunk's donors are apart, float32 [rows of the chunk], by the chunk's first row, and the
        texts with several donors, of which nothing has been written yet.
        """
        by_first_layer: dict[int, list] = defaultdict(list)
        spread, blends = {}, []
        for chunk in chunks:
            checks = chunk.checks
            runs = by_first_layer[checks[0].layer if checks else 0]
            session = chunk.session
            parts = self.pipeline.copies(session, chunk.start, chunk.end)
            if parts:
                session.copied()
            found = spread[chunk.row] = torch.zeros(len(chunk.reused), device=whole.slots.device)
            for segment, lease in parts:
                low = segment.start - chunk.start
                found[low : low + segment.length] = self._lone_spread(session, segment)
                if not segment.others:
                    target = whole.slots[chunk.row + low : chunk.row + low + segment.length].long()
                    in_use(lease.slots)
                    runs.append((lease.slots[segment.donor_start : segment.donor_end], target, segment.shift))
            if shared := [segment for segment, _ in parts if segment.others]:
                blends.append(job := self._blend(whole, chunk, shared))
                several = ((job.donors.weights > 0).sum(dim=0) > 1) & ~job.lone
                at = on_device(job.rows - chunk.row, found)
                found[at] = torch.where(several, job.spread, found[at])
        for first, runs in by_first_layer.items():
            copy_rotate(self.keys[first:], self.values[first:], runs, self.cos_sin, neox=self.neox)
        return spread, blends

    def _blend(self, whole: View, chunk: Chunk, segments: list[Segment]) -> Blend:
        device = whole.slots.device
        width = max(len(s.places) for s in segments)
        total = sum(s.length for s in segments)
        weights, shifts = np.zeros((width, total), np.float32), np.zeros((width, total), np.int64)
        slots = torch.empty((width, total), dtype=torch.int64, device=device)
        rows, part, lone, at = [], [], [], 0
        for number, segment in enumerate(segments):
            lease = chunk.session.leases[segment.donor_id]
            slots[:, at : at + segment.length] = lease.slots[segment.donor_start : segment.donor_end]
            for i, place in enumerate(segment.places):
                here = slice(at + place.start - segment.start, at + place.end - segment.start)
                lent = chunk.session.leases[place.donor_id].slots
                in_use(lent)
                slots[i, here] = lent[place.donor_start : place.donor_end]
                weights[i, here], shifts[i, here] = 1 / (_OWN_NOISE + place.doubt), place.shift
            rows.append(np.arange(segment.start, segment.end) - chunk.start + chunk.row)
            part.append(np.full(segment.length, number))
            lone.append(np.full(segment.length, segment.lone))
            at += segment.length
        rows = np.concatenate(rows)
        donors = Donors(
            slots,
            on_device(weights / weights.sum(axis=0), slots),
            *rotation_rows(self.cos_sin, on_device(shifts, slots)),
            on_device(np.concatenate(part), slots),
            len(segments),
        )
        target = whole.slots[on_device(rows, slots)].long()
        compared = [self.keys[layer] for layer in chunk.session.method.compared(len(self.keys))]
        spread = key_spread(compared, donors, neox=self.neox)
        return Blend(chunk, rows, target, donors, spread, on_device(np.concatenate(lone), slots))

    def blend_unfitted(self, blends: list[Blend]) -> None:
        """Write the blends with their given weights, on all layers: what a first pass looks at."""
        for job in blends:
            for keys, values in zip(self.keys, self.values, strict=True):
                blend(keys, job.donors, job.target, None, neox=self.neox)
                blend(values, job.donors, job.target, None, neox=None)

    @contextlib.contextmanager
    def blending(self, blends: list[Blend], rows: np.ndarray | None, keep: np.ndarray) -> Iterator[None]:
        """While layers run inside the block, each writes the blends of the rows it does not compute.

        rows: the original batch's row of each row that runs, None for all; keep: bool, the rows that run.
        """
        if rows is None or not blends:
            yield
            return
        work = []
        for job in blends:
            anew = keep[job.rows]
            if anew.all():
                continue
            local, old, new = (
                on_device(x, job.target)
                for x in (np.searchsorted(rows, job.rows[anew]), np.flatnonzero(~anew), np.flatnonzero(anew))
            )
            work.append((job, local, job.donors.take(new), job.donors.take(old), job.target[old]))

        def write(layer, q, k, v):
            # Just before the layer attends: k and v of the rows that run are there, the pool does not hold them yet.
            started = time.perf_counter()
            for _, local, known, unknown, target in work:
                for buffer, fresh, neox in ((self.keys[layer], k, self.neox), (self.values[layer], v, None)):
                    trust = fit(buffer, known, fresh[local], neox=neox)
                    blend(buffer, unknown, target, trust, neox=neox)
            spent = (time.perf_counter() - started) / max(1, len(work))
            for session in (job.chunk.session for job, *_ in work):
                session.blended(spent)

        with self.engine.watching(range(self.engine.layers), before=write):
            yield

    def _lone_spread(self, session: Session, segment: Segment) -> torch.Tensor:
        """What is taken for the spread of a text with one donor, float32 [length]."""
        layers = len(session.method.compared(len(self.keys)))
        inside = torch.arange(segment.length, device=self.cos_sin.device) / _LONE_REACH
        return (_LONE_SPREAD * layers * segment.doubt) * (1 + inside).rsqrt()
