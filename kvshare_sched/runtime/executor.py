"""Runs a batch in which some requests reuse KV: copy and rotate, then spans of layers over selected rows.

It stands in for the model's own forward on such batches and returns what the engine expects. `port.Engine` runs the
layers; between two spans the executor says which rows go on.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict

import numpy as np
import torch

from kvshare_kernels import on_device, top_k
from kvshare_sched.methods.base import Evidence
from kvshare_sched.records.request import Reason
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.runtime.assembly import Assembly
from kvshare_sched.runtime.chunk import Chunk
from kvshare_sched.runtime.decode_repair import DecodeRepair
from kvshare_sched.runtime.port import Engine
from kvshare_sched.runtime.probes import Probes

logger = logging.getLogger(__name__)


class Executor:
    """`forward` stands in for one rank's model."""

    def __init__(self, pipeline: Pipeline, engine: Engine, cos_sin: torch.Tensor, neox: bool):
        """cos_sin: the model's rotary table, float32 [positions, R]."""
        self.pipeline, self.engine = pipeline, engine
        self.probes = Probes(engine)
        self.assembly = Assembly(pipeline, engine, cos_sin, neox)
        self.repair = DecodeRepair(pipeline, engine, self.probes)

    def forward(self, batch):
        """The engine's output for a batch; a failure ends reuse for its requests and computes all rows."""
        if not batch.brings_more and (waiting := self.repair.waiting(batch)):
            return self.repair.forward(waiting, batch)
        chunks = self._chunks(batch)
        if not chunks:
            return self.engine.ordinary(batch)
        try:
            if any(c.reused.any() for c in chunks):
                with torch.no_grad():
                    output = self._run(batch, chunks)
                self.engine.fence()
                self._settle(chunks)
                return output
        except Exception:
            logger.exception("kvshare: reuse failed for a batch of %d; ordinary prefill", len(chunks))
            for chunk in chunks:
                self.pipeline.abandon(chunk.session)
            self.engine.restore(batch)
        output = self.engine.all_rows(batch)
        for chunk in chunks:
            chunk.session.ran((chunk.end - chunk.start) * self.engine.layers)
        self._settle(chunks)
        return output

    def _settle(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self.pipeline.chunk_done(chunk.session, chunk.end)

    def _chunks(self, batch) -> list[Chunk]:
        """The planned requests of a prefill batch; those that may not reuse in this one become ordinary."""
        chunks = []
        for rows in self.engine.requests(batch):
            session = rows.session
            if session is None or session.plan is None or session.done_upto >= session.prompt_len:
                continue
            if batch.brings_more:
                self.pipeline.abandon(session, Reason.MIXED_INPUT)
            elif session.weights != self.pipeline.weights:
                self.pipeline.abandon(session, Reason.DONOR_LOST)
            if session.plan is not None:
                chunks.append(Chunk.of(session, rows.row, rows.start, rows.end))
        return chunks

    # ---- one batch ----

    def _run(self, batch, chunks: list[Chunk]):
        depth, run = self.engine.layers, self.engine.run
        share_at: dict[int, list[tuple[Chunk, float]]] = defaultdict(list)  # check layer -> who chooses there
        for chunk in chunks:
            for check in chunk.checks:
                share_at[check.layer].append((chunk, check.share))
        started = time.perf_counter()
        whole = self.engine.whole(batch)
        spread, blends = self.assembly.copy(whole, chunks)
        self.assembly.blend_unfitted([b for b in blends if b.chunk.looks])
        copied = time.perf_counter()

        keep = np.ones(len(batch), bool)  # rows that run
        self._choose_before_layer_0(batch, chunks, keep, spread)
        # The batch's own attention plan stands where no row is left out: a first pass only happens elsewhere.
        view = whole if keep.all() else self.engine.select(batch, np.flatnonzero(keep))
        cells, layer = np.zeros(len(chunks), np.int64), 0
        for check_layer, choosing in sorted(share_at.items(), key=lambda item: item[0]):
            with (
                self.probes.scores(check_layer, view, [c for c, _ in choosing], keep) as scores,
                self.assembly.blending(blends, view.rows, keep),
            ):
                run(view, layer, check_layer + 1)
            cells += _rows_of(chunks, keep) * (check_layer + 1 - layer)
            layer = check_layer + 1
            picked = top_k(scores, [chunk.budget(share) for chunk, share in choosing])
            for (chunk, _), best in zip(choosing, picked, strict=True):
                running = chunk.candidates[keep[chunk.candidates]]
                keep[running] = False
                keep[running[best]] = True
            if layer < depth:
                view = self.engine.narrow(batch, view, np.flatnonzero(keep), layer)
        cells += _rows_of(chunks, keep) * (depth - layer)
        with self.assembly.blending(blends, view.rows, keep):
            output = self.engine.finish(batch, view, layer)
        self._note(chunks, keep, cells.tolist(), copied - started, time.perf_counter() - copied)
        return output

    def _note(self, chunks: list[Chunk], keep: np.ndarray, cells: list[int], copy_s: float, compute_s: float) -> None:
        """Add what a batch has done to its requests. cells: computed (layer x token) cells of each chunk."""
        for chunk, n in zip(chunks, cells, strict=True):
            session = chunk.session
            ran = keep[chunk.row : chunk.row + len(chunk.reused)]
            if session.repair is not None:
                session.repair.stale[chunk.start : chunk.end] = chunk.reused & ~ran
            looking = len(chunk.asking) * session.plan.schedule.first_pass if chunk.looks else 0
            recomputed = int((ran & chunk.reused).sum())
            session.ran(n + looking, recomputed, copy_s / len(chunks), compute_s / len(chunks))

    def _choose_before_layer_0(self, batch, chunks: list[Chunk], keep: np.ndarray, spread) -> None:
        """The choices of methods without check layers. spread: of the donors, by a chunk's first row."""
        seen = self._first_pass(batch, chunks)
        partly = [c for c in chunks if not c.everything]
        for chunk in partly:
            if chunk.session.method.upfront is not None:
                _choose_upfront(chunk, keep)
        self._choose_by_score([c for c in partly if c.session.method.first_pass], keep, seen, spread)

    def _first_pass(self, batch, chunks: list[Chunk]) -> dict[int, torch.Tensor]:
        """Attention each position receives from the fresh rows, by the chunk's first row.

        The fresh rows' KV is written on the way, and again in the pass that counts.
        """
        looking = [c for c in chunks if c.looks]
        layers = looking[0].session.method.first_pass(self.engine.layers) if looking else range(0)
        if not layers:
            return {}
        view = self.engine.select(batch, np.concatenate([c.asking for c in looking]))
        with self.probes.attention_of_fresh_rows(layers, view, looking) as mass:
            self.engine.run(view, 0, layers.stop)
        return {c.row: m for c, m in zip(looking, mass, strict=True)}

    def _choose_by_score(self, chunks: list[Chunk], keep: np.ndarray, attention, spread) -> None:
        """The choices of methods that score with their donors' spread and, after a first pass, the attention received.

        attention, spread: by a chunk's first row.
        """
        scores = []
        for chunk in chunks:
            far, seen = spread[chunk.row], attention.get(chunk.row)
            at = on_device(chunk.candidates - chunk.row, far)
            alpha = torch.ones_like(far[at]) if seen is None else seen[at + chunk.start]
            work = 1 + (at + chunk.start) / self.engine.even_at
            evidence = Evidence(at + chunk.start, alpha=alpha, spread=self.probes.over_ranks(far)[at], work=work)
            scores.append(chunk.session.method.score(evidence))
        budgets = [chunk.budget(chunk.session.config.ratio) for chunk in chunks]
        for chunk, best in zip(chunks, top_k(scores, budgets), strict=True):
            candidates = chunk.candidates
            keep[candidates] = False
            keep[candidates[best]] = True


def _rows_of(chunks: list[Chunk], keep: np.ndarray) -> np.ndarray:
    return np.array([keep[c.row : c.row + len(c.reused)].sum() for c in chunks], np.int64)


def _choose_upfront(chunk: Chunk, keep: np.ndarray) -> None:
    """The choice of a method that needs no scores."""
    keep[chunk.candidates] = False
    positions = torch.from_numpy(chunk.candidates - chunk.row + chunk.start)
    picked = chunk.session.method.upfront(positions, chunk.budget(chunk.session.config.ratio)).numpy()
    keep[picked - chunk.start + chunk.row] = True
