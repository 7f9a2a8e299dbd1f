"""Runs a batch in which some requests reuse KV: copy and rotate, then spans of layers over selected rows.

It stands in for the model's own `forward` on such batches and returns what the engine expects. Layers run
through the model's `forward_split_prefill`, so no model code is written again; between two spans the rows to
keep are picked out of the residual stream with the hand-off SGLang uses between pipeline stages.

Selected rows are submitted as ragged sequences, one per run of neighbouring positions, whose prefix is
everything before the run. That is ordinary causal attention to any SGLang backend, and each row sees exactly
the keys at positions up to its own. (Our CPU backend recognises the runs of one request and makes one pass;
on a GPU `gpu.attention` does.)
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections import defaultdict

import numpy as np
import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors

from kvshare_kernels import on_device, top_k
from kvshare_sched.engine.sglang import gpu_attention as row_attention
from kvshare_sched.engine.sglang import lora
from kvshare_sched.methods.base import Evidence
from kvshare_sched.methods.blending import Assembly
from kvshare_sched.records.request import Reason
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import sessions_of
from kvshare_sched.runtime.chunk import Chunk
from kvshare_sched.runtime.decode_repair import DecodeRepair
from kvshare_sched.runtime.probes import Witness, by_head

logger = logging.getLogger(__name__)


def even_at(layer: torch.nn.Module, attention) -> float:
    """The position at which a row's attention costs as many operations as its products with the layer's weights."""
    products = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    return products / (2 * attention.tp_q_head_num * attention.qk_head_dim)


def _brings_more(args, kwargs) -> bool:
    """Whether the model is given more than tokens: embeddings that stand in for some of the batch's, say.

    They are rows of the whole batch, and belong to requests that we may know nothing of.
    """
    return any(value is not None for value in (*args, *kwargs.values()))


class Executor:
    """Wraps one rank's model; `forward` has the signature of the model's own."""

    def __init__(self, pipeline: Pipeline, model_runner, cos_sin: torch.Tensor, neox: bool, chunk: int = 0):
        """chunk: prefill tokens of one pass, as SGLang has been told; 0: prompts are not cut."""
        self.pipeline = pipeline
        self.model_runner = model_runner
        self.model = model_runner.model
        self.layers = self.model.model.layers
        self.witness = Witness(model_runner)
        self.even_at = even_at(self.layers[0], self.witness.attention[0])
        self.assembly = Assembly(pipeline, self.witness, len(self.layers), cos_sin, neox)
        self._ordinary = self.model.forward
        self.row_attention = row_attention.create(model_runner, self.witness.attention) if cos_sin.is_cuda else None
        self.piece = chunk if chunk > 0 else 1 << 30  # rows that SGLang runs at once
        self.repair = DecodeRepair(pipeline, model_runner, self.witness, self._ordinary)

    def install(self) -> None:
        """Put `forward` in front of the model's own."""
        self.model.forward = self.forward

    def forward(self, input_ids, positions, forward_batch, *args, **kwargs):
        """The model's forward; batches with reuse take the other road, failures come back to the main one."""
        more = _brings_more(args, kwargs)
        if not more and (waiting := self.repair.waiting(forward_batch)):
            return self.repair.forward(waiting, input_ids, positions, forward_batch)
        self._leave_out(forward_batch, more)
        chunks = self._chunks(forward_batch)
        if chunks is None:
            return self._ordinary(input_ids, positions, forward_batch, *args, **kwargs)
        try:
            if any(c.reused.any() for c in chunks):
                with torch.no_grad():
                    output = self._run(input_ids, positions, forward_batch, chunks)
                # SGLang's fence says that the tables have been read, and we read them in every layer.
                self.model_runner.shared_read_done_event = None
                self._settle(chunks)
                return output
        except Exception:
            logger.exception("kvshare: reuse failed for a batch of %d; ordinary prefill", len(chunks))
            for chunk in chunks:
                self.pipeline.abandon(chunk.session)
            self._start_over(forward_batch)
        output = self._all_rows(input_ids, positions, forward_batch, *args, **kwargs)
        for chunk in chunks:
            chunk.session.cells += (chunk.end - chunk.start) * len(self.layers)
        self._settle(chunks)
        return output

    def _start_over(self, batch: ForwardBatch) -> None:
        """SGLang's own batch, as it came."""
        batch.residual_stream = None
        self.model_runner.attn_backend.init_forward_metadata(batch)
        lora.restore(self.model_runner, batch)

    def _all_rows(self, input_ids, positions, batch: ForwardBatch, *args, **kwargs):
        """Every row through every layer."""
        if len(input_ids) > self.piece and not _brings_more(args, kwargs):
            try:
                return self._in_pieces(input_ids, positions, batch)
            except Exception:
                logger.exception("kvshare: %d rows could not be computed in pieces", len(input_ids))
                self._start_over(batch)
        return self._ordinary(input_ids, positions, batch, *args, **kwargs)

    @torch.no_grad()
    def _in_pieces(self, input_ids, positions, batch: ForwardBatch):
        """The model's own forward over the rows of a batch, `piece` at a time.

        A batch that was to reuse holds several times the rows that SGLang has kept memory for.
        """
        rows, read = np.arange(len(input_ids)), self._read_rows(batch, np.arange(len(input_ids)))
        full, output = None, None
        for piece in np.split(rows, range(self.piece, len(rows), self.piece)):
            view, wanted = self._select(batch, input_ids, positions, piece), np.intersect1d(piece, read)

            def collect(module, args, view=view, piece=piece, wanted=wanted):
                nonlocal full
                _, hidden, head, _, *rest = args
                if full is None:
                    full = hidden.new_zeros((len(input_ids), hidden.shape[1]))
                full[on_device(wanted, input_ids)] = hidden[on_device(wanted - piece[0], input_ids)]
                if piece[-1] < rows[-1]:
                    return (view.input_ids, hidden, head, view, *rest)
                lora.restore(self.model_runner, batch)
                return (input_ids, full, head, batch, *rest)

            hook = self.model.logits_processor.register_forward_pre_hook(collect)
            try:
                output = self._span(view, 0, len(self.layers))
            finally:
                hook.remove()
        return output

    def _leave_out(self, batch: ForwardBatch, more: bool) -> None:
        """Requests that may not reuse in this batch become ordinary. more: see `_brings_more`."""
        for session in sessions_of(batch) if batch.forward_mode.is_extend() else ():
            if session is None or session.plan is None or session.done_upto >= session.prompt_len:
                continue
            if more:
                self.pipeline.abandon(session, Reason.MIXED_INPUT)
            elif session.weights != self.pipeline.weights:
                self.pipeline.abandon(session, Reason.DONOR_LOST)

    def _settle(self, chunks: list[Chunk]) -> None:
        for chunk in chunks:
            self.pipeline.chunk_done(chunk.session, chunk.end)

    def _chunks(self, batch: ForwardBatch) -> list[Chunk] | None:
        """The planned requests of an extend batch; None when there is none."""
        if not batch.forward_mode.is_extend() or not (sessions := sessions_of(batch)):
            return None
        chunks, row = [], 0
        for session, start, length in zip(
            sessions, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True
        ):
            start, end = int(start), int(start) + int(length)
            if session is not None and session.plan is not None and session.done_upto < session.prompt_len:
                reused = session.plan.reused_mask(start, end)
                forced = np.zeros(end - start, bool)
                forced[session.plan.forced_positions(start, end) - start] = True
                forced[-1] = reused[-1]  # the row that gives this chunk's logits always runs
                chunks.append(Chunk(session, row, start, end, reused, forced))
            row += end - start
        return chunks or None

    # ---- one batch ----

    def _run(self, input_ids, positions, batch: ForwardBatch, chunks: list[Chunk]):
        depth = len(self.layers)
        share_at: dict[int, list[tuple[Chunk, float]]] = defaultdict(list)  # check layer -> who chooses there
        for chunk in chunks:
            for check in chunk.checks(depth):
                share_at[check.layer].append((chunk, check.share))
        started = time.perf_counter()
        spread, blends = self.assembly.copy(batch, chunks)
        self.assembly.blend_unfitted([b for b in blends if b.chunk.looks])
        copied = time.perf_counter()

        keep = np.ones(input_ids.shape[0], bool)  # rows that run
        looked = self._first_pass(input_ids, positions, batch, chunks)
        partly = [c for c in chunks if not c.everything]
        for chunk in partly:
            if chunk.session.strategy.upfront is not None:
                self._choose_upfront(chunk, keep)
        self._choose_by_consensus([c for c in partly if c.session.strategy.first_pass], keep, looked, spread)
        view, rows = self._enter(input_ids, positions, batch, keep)
        cells, layer = np.zeros(len(chunks), np.int64), 0
        for check_layer, choosing in sorted(share_at.items(), key=lambda item: item[0]):
            with (
                self.witness.scores(check_layer, view, rows, [c for c, _ in choosing], keep) as scores,
                self.assembly.blending(blends, rows, keep),
            ):
                self._span(view, layer, check_layer + 1)
            cells += self._rows_of(chunks, keep) * (check_layer + 1 - layer)
            layer = check_layer + 1
            picked = top_k(scores, [chunk.budget(share) for chunk, share in choosing])
            for (chunk, _), best in zip(choosing, picked, strict=True):
                running = chunk.candidates[keep[chunk.candidates]]
                keep[running] = False
                keep[running[best]] = True
            if layer < depth:
                view, rows = self._narrow(view, rows, keep, batch, input_ids, positions, layer)
        cells += self._rows_of(chunks, keep) * (depth - layer)
        with self.assembly.blending(blends, rows, keep):
            output = self._finish(view, rows, layer, batch, input_ids, positions)
        spent = time.perf_counter() - copied

        for chunk, n in zip(chunks, cells.tolist(), strict=True):
            session = chunk.session
            ran = keep[chunk.row : chunk.row + len(chunk.reused)]
            session.recomputed += int((ran & chunk.reused).sum())
            if session.repair is not None:
                session.repair.stale[chunk.start : chunk.end] = chunk.reused & ~ran
            looking = len(chunk.asking) * chunk.session.strategy.first_pass(depth).stop if chunk.looks else 0
            session.cells += n + looking
            session.copy_s += (copied - started) / len(chunks)
            session.recompute_s += spent / len(chunks)
        return output

    @staticmethod
    def _rows_of(chunks: list[Chunk], keep: np.ndarray) -> np.ndarray:
        return np.array([keep[c.row : c.row + len(c.reused)].sum() for c in chunks], np.int64)

    @staticmethod
    def _choose_upfront(chunk: Chunk, keep: np.ndarray) -> None:
        """The choice of a strategy without check layers."""
        keep[chunk.candidates] = False
        positions = torch.from_numpy(chunk.candidates - chunk.row + chunk.start)
        picked = chunk.session.strategy.upfront(positions, chunk.budget(chunk.session.config.ratio)).numpy()
        keep[picked - chunk.start + chunk.row] = True

    def _first_pass(self, input_ids, positions, batch: ForwardBatch, chunks: list[Chunk]) -> dict[int, torch.Tensor]:
        """Attention each position receives from the fresh rows, by the chunk's first row; see `Witness.looks`.

        The fresh rows' KV is written on the way, and again in the pass that counts.
        """
        looking = [c for c in chunks if c.looks]
        layers = looking[0].session.strategy.first_pass(len(self.layers)) if looking else range(0)
        if not layers:
            return {}
        rows = np.concatenate([c.asking for c in looking])
        view = self._select(batch, input_ids, positions, rows)
        with self.witness.looks(layers, view, looking) as mass:
            self._span(view, 0, layers.stop)
        return {c.row: m for c, m in zip(looking, mass, strict=True)}

    def _choose_by_consensus(self, chunks: list[Chunk], keep: np.ndarray, looked, spread) -> None:
        """The choices of strategies that know their donors' spread and, if there was a first pass, who is looked at.

        looked, spread: by a chunk's first row.
        """
        scores = []
        for chunk in chunks:
            far, seen = spread[chunk.row], looked.get(chunk.row)
            at = on_device(chunk.candidates - chunk.row, far)
            alpha = torch.ones_like(far[at]) if seen is None else seen[at + chunk.start]
            work = 1 + (at + chunk.start) / self.even_at
            evidence = Evidence(at + chunk.start, alpha=alpha, spread=self.witness.over_ranks(far)[at], work=work)
            scores.append(chunk.session.strategy.score(evidence))
        budgets = [chunk.budget(chunk.session.config.ratio) for chunk in chunks]
        for chunk, best in zip(chunks, top_k(scores, budgets), strict=True):
            candidates = chunk.candidates
            keep[candidates] = False
            keep[candidates[best]] = True

    def _enter(self, input_ids, positions, batch, keep):
        """The batch as layer 0 shall see it, and its rows in the original batch (None for all)."""
        view = copy.copy(batch)
        view.input_ids, view.positions = input_ids, positions
        if keep.all():  # the batch's own attention plan stands: a first pass only happens where rows are dropped
            return view, None
        rows = np.flatnonzero(keep)
        return self._select(batch, input_ids, positions, rows), rows

    def _span(self, view: ForwardBatch, start: int, end: int):
        with self.row_attention.serving() if self.row_attention else contextlib.nullcontext():
            return self.model.forward_split_prefill(view.input_ids, view.positions, view, (start, end))

    def _narrow(self, view, rows, keep, batch, input_ids, positions, layer):
        """Between two spans: carry hidden state and residual over for the rows still kept."""
        kept = np.flatnonzero(keep)
        carried = residual_batch.to_pp(view.hidden_states, view).tensors
        index = on_device(kept if rows is None else np.searchsorted(rows, kept), input_ids)
        carried = {name: tensor[index] for name, tensor in carried.items()}
        narrow = self._select(batch, input_ids, positions, kept)
        narrow.hidden_states = self.layers[layer].attn_boundary.from_pp(PPProxyTensors(carried), narrow)
        return narrow, kept

    def _finish(self, view, rows, layer, batch, input_ids, positions):
        """Run the remaining layers; logits are taken from the original batch with the rows they need in place.

        The last layer makes K and V of all its rows, but goes on with those alone whose output is read.
        """
        depth = len(self.layers)
        if rows is None:
            return self._span(view, layer, depth)
        read = self._read_rows(batch, rows) if layer < depth else rows
        index, going_on = on_device(read, input_ids), on_device(np.searchsorted(rows, read), input_ids)

        def leave_out(module, args):
            q, k, v, _, *rest = args
            place = KVWriteLoc(view.out_cache_loc, None)
            self.witness.pool.set_kv_buffer(module, place, *by_head(module, k, v))
            stream = residual_batch.stream_of(view)
            stream.residual = stream.residual[going_on]
            narrow = self._select(batch, input_ids, positions, read)
            return q[going_on], k[going_on], v[going_on], narrow, *rest

        def restore(module, args):
            _, hidden, head, _, *rest = args
            full = hidden.new_zeros((input_ids.shape[0], hidden.shape[1]))
            full[index] = hidden
            lora.restore(self.model_runner, batch)  # for a vocabulary head with an adapter
            return (input_ids, full, head, batch, *rest)

        hooks = [self.model.logits_processor.register_forward_pre_hook(restore)]
        if len(read) < len(rows):
            hooks.append(self.witness.attention[depth - 1].register_forward_pre_hook(leave_out))
        try:
            return self._span(view, layer, depth)
        finally:
            for hook in hooks:
                hook.remove()

    @staticmethod
    def _read_rows(batch: ForwardBatch, rows: np.ndarray) -> np.ndarray:
        """Of the rows that run, those whose output SGLang reads: the last of each request, and what is scored."""
        if batch.capture_hidden_mode:
            return rows
        lengths = np.array([int(n) for n in batch.extend_seq_lens_cpu])
        first = lengths - 1
        if batch.return_logprob:
            first = np.minimum(first, [int(n) for n in batch.extend_logprob_start_lens_cpu])
        ends = np.cumsum(lengths)
        wanted = [np.arange(end - n + low, end) for end, n, low in zip(ends, lengths, first, strict=True)]
        return np.intersect1d(rows, np.concatenate(wanted))

    def _select(self, batch: ForwardBatch, input_ids, positions, rows: np.ndarray) -> ForwardBatch:
        """A batch of the given rows (int64, ascending): one sequence per run of neighbouring positions."""
        starts = np.concatenate(([0], np.cumsum([int(n) for n in batch.extend_seq_lens_cpu])))
        request = np.searchsorted(starts, rows, side="right") - 1
        prefix = np.array([int(n) for n in batch.extend_prefix_lens_cpu])
        where = prefix[request] + rows - starts[request]
        new_run = np.ones(len(rows), bool)
        new_run[1:] = (where[1:] != where[:-1] + 1) | (request[1:] != request[:-1])
        first = np.flatnonzero(new_run)
        lengths = np.diff(np.append(first, len(rows)))
        begins = where[first]

        def tensor(values, like):
            return on_device(values, input_ids).to(like.dtype)

        index, owner = on_device(rows, input_ids), on_device(request[first], input_ids)
        view = copy.copy(batch)
        view.batch_size = len(first)
        view.input_ids, view.positions = input_ids[index], positions[index]
        view.out_cache_loc = batch.out_cache_loc[index]
        view.req_pool_indices = batch.req_pool_indices[owner]
        view.seq_lens = tensor(begins + lengths, batch.seq_lens)
        view.orig_seq_lens = None
        view.seq_lens_cpu = torch.from_numpy(begins + lengths)
        view.seq_lens_sum = int((begins + lengths).sum())
        view.extend_num_tokens = len(rows)
        view.extend_seq_lens = tensor(lengths, batch.extend_seq_lens)
        view.extend_prefix_lens = tensor(begins, batch.extend_prefix_lens)
        view.extend_start_loc = tensor(first, batch.extend_seq_lens)
        view.extend_seq_lens_cpu, view.extend_prefix_lens_cpu = lengths.tolist(), begins.tolist()
        view.extend_logprob_start_lens_cpu = [0] * len(first)
        view.residual_stream = None
        view.hidden_states = None
        if self.row_attention:
            self.row_attention.plan(view, request[first])
        else:
            self.model_runner.attn_backend.init_forward_metadata(view)
        lora.route(self.model_runner, batch, view, request)
        return view
