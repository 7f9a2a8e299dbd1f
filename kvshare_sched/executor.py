"""Runs a batch in which some requests reuse KV: copy and rotate, then spans of layers over selected rows.

It stands in for the model's own `forward` on such batches and returns what the engine expects. Layers run
through the model's `forward_split_prefill`, so no model code is written again; between two spans the rows to
keep are picked out of the residual stream with the hand-off SGLang uses between pipeline stages.

Selected rows are submitted as ragged sequences, one per run of neighbouring positions, whose prefix is
everything before the run. That is ordinary causal attention to any SGLang backend, and each row sees exactly
the keys at positions up to its own. (Our CPU backend recognises the runs of one request and makes one pass.)
"""

from __future__ import annotations

import copy
import logging
import math
import time
from dataclasses import dataclass

import numpy as np
import torch
from kvshare_kernels import attention_column_mass, copy_rotate, token_deviation, top_k
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors

from kvshare_sched.pipeline import Pipeline, Session
from kvshare_sched.strategies.base import Evidence

logger = logging.getLogger(__name__)
# Deviation below this share of the value's own norm is arithmetic noise: such a token is not worth a row.
_NOISE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """One request's rows in a batch."""

    session: Session
    row: int  # first row in the batch
    start: int  # prompt position of that row
    end: int
    reused: np.ndarray  # bool [end - start]
    forced: np.ndarray  # bool [end - start], reused rows that are recomputed in any case

    @property
    def candidates(self) -> np.ndarray:
        """Batch rows whose recompute is up to the strategy, int64 ascending."""
        return np.flatnonzero(self.reused & ~self.forced) + self.row

    def budget(self, share: float) -> int:
        """How many of the candidates a share of the reused rows buys beside the forced ones."""
        reused = int(self.reused.sum())
        return max(0, math.ceil(share * reused) - int(self.forced.sum()))


class Executor:
    """Wraps one rank's model; `forward` has the signature of the model's own."""

    def __init__(self, pipeline: Pipeline, model_runner, cos_sin: torch.Tensor, neox: bool):
        self.pipeline = pipeline
        self.model_runner = model_runner
        self.model = model_runner.model
        self.cos_sin, self.neox = cos_sin, neox
        self.layers = self.model.model.layers
        self.pool = model_runner.token_to_kv_pool
        self.attention = _attention_modules(self.model)
        self._ordinary = self.model.forward

    def install(self) -> None:
        """Put `forward` in front of the model's own."""
        self.model.forward = self.forward

    def forward(self, input_ids, positions, forward_batch, *args, **kwargs):
        """The model's forward; batches with reuse take the other road, failures come back to the main one."""
        chunks = self._chunks(forward_batch)
        if chunks is None:
            return self._ordinary(input_ids, positions, forward_batch, *args, **kwargs)
        try:
            if any(c.reused.any() for c in chunks):
                with torch.no_grad():
                    output = self._run(input_ids, positions, forward_batch, chunks)
                self._settle(chunks)
                return output
        except Exception:
            logger.exception("kvshare: reuse failed for a batch of %d; ordinary prefill", len(chunks))
            for chunk in chunks:
                self.pipeline.abandon(chunk.session)
            forward_batch.residual_stream = None
            self.model_runner.attn_backend.init_forward_metadata(forward_batch)
        output = self._ordinary(input_ids, positions, forward_batch, *args, **kwargs)
        for chunk in chunks:
            chunk.session.cells += (chunk.end - chunk.start) * len(self.layers)
        self._settle(chunks)
        return output

    def _settle(self, chunks: list[_Chunk]) -> None:
        for chunk in chunks:
            self.pipeline.chunk_done(chunk.session, chunk.end)

    def _chunks(self, batch: ForwardBatch) -> list[_Chunk] | None:
        """The planned requests of an extend batch; None when there is none."""
        if not batch.forward_mode.is_extend() or not batch.rids or not self.pipeline.sessions:
            return None
        chunks, row = [], 0
        for rid, start, length in zip(batch.rids, batch.extend_prefix_lens_cpu, batch.extend_seq_lens_cpu, strict=True):
            session = self.pipeline.sessions.get(rid)
            start, end = int(start), int(start) + int(length)
            if session is not None and session.plan is not None and session.done_upto < session.prompt_len:
                reused = session.plan.reused_mask(start, end)
                forced = np.zeros(end - start, bool)
                forced[session.plan.forced_positions(start, end) - start] = True
                forced[-1] = reused[-1]  # the row that gives this chunk's logits always runs
                chunks.append(_Chunk(session, row, start, end, reused, forced))
            row += end - start
        return chunks or None

    # ---- one batch ----

    def _run(self, input_ids, positions, batch: ForwardBatch, chunks: list[_Chunk]):
        strategy, config = self.pipeline.strategy, self.pipeline.config
        total, depth = input_ids.shape[0], len(self.layers)
        everything = config.ratio >= 1 and strategy.name != "naive"
        checks = () if everything else strategy.checks(config, depth)
        started = time.perf_counter()
        self._copy(batch, chunks, first_layer=checks[0].layer if checks else 0)
        copied = time.perf_counter()

        keep = np.ones(total, bool)  # rows that run
        if not checks and not everything:
            for chunk in chunks:
                keep[chunk.candidates] = False
                positions_of = torch.from_numpy(chunk.candidates - chunk.row + chunk.start)
                picked = strategy.upfront(positions_of, chunk.budget(config.ratio)).numpy()
                keep[picked - chunk.start + chunk.row] = True

        view, rows, layer = self._enter(input_ids, positions, batch, keep)
        cells = np.zeros(len(chunks), np.int64)
        for check in checks:
            with self._probe(check.layer, view, rows, chunks, keep) as scores:
                self._span(view, layer, check.layer + 1)
            cells += self._rows_of(chunks, keep) * (check.layer + 1 - layer)
            layer = check.layer + 1
            for chunk, score in zip(chunks, scores.result, strict=True):
                running = chunk.candidates[keep[chunk.candidates]]
                keep[running] = False
                keep[running[top_k(score, chunk.budget(check.share)).cpu().numpy()]] = True
            if layer < depth:
                view, rows = self._narrow(view, rows, keep, batch, input_ids, positions, layer)
        cells += self._rows_of(chunks, keep) * (depth - layer)
        output = self._finish(view, rows, layer, input_ids, batch)
        spent = time.perf_counter() - copied

        for chunk, n in zip(chunks, cells.tolist(), strict=True):
            session = chunk.session
            session.recomputed += int((keep[chunk.row : chunk.row + len(chunk.reused)] & chunk.reused).sum())
            session.cells += n
            session.copy_s += (copied - started) / len(chunks)
            session.recompute_s += spent / len(chunks)
        return output

    @staticmethod
    def _rows_of(chunks: list[_Chunk], keep: np.ndarray) -> np.ndarray:
        return np.array([keep[c.row : c.row + len(c.reused)].sum() for c in chunks], np.int64)

    def _copy(self, batch: ForwardBatch, chunks: list[_Chunk], first_layer: int) -> None:
        """Donor KV into the chunks' own slots, keys rotated; layers below the first check are never read."""
        runs = []
        for chunk in chunks:
            session = chunk.session
            parts = self.pipeline.copies(session, chunk.start, chunk.end)
            if parts and session.approximate_from is None:
                session.approximate_from = session.plan.approximate_from
            for segment, lease in parts:
                low = chunk.row + segment.start - chunk.start
                source = lease.slots[segment.donor_start : segment.donor_end]
                runs.append((source, batch.out_cache_loc[low : low + segment.length].long(), segment.shift))
        layers = range(first_layer, len(self.layers))
        copy_rotate(
            [self.pool.get_key_buffer(i) for i in layers],
            [self.pool.get_value_buffer(i) for i in layers],
            runs,
            self.cos_sin,
            neox=self.neox,
        )

    def _enter(self, input_ids, positions, batch, keep):
        """The batch as layer 0 shall see it: (view, batch rows or None for all, layer)."""
        view = copy.copy(batch)
        view.input_ids, view.positions = input_ids, positions
        if keep.all():
            return view, None, 0
        rows = np.flatnonzero(keep)
        return self._select(batch, input_ids, positions, rows), rows, 0

    def _span(self, view: ForwardBatch, start: int, end: int):
        return self.model.forward_split_prefill(view.input_ids, view.positions, view, (start, end))

    def _narrow(self, view, rows, keep, batch, input_ids, positions, layer):
        """Between two spans: carry hidden state and residual over for the rows still kept."""
        kept = np.flatnonzero(keep)
        carried = residual_batch.to_pp(view.hidden_states, view).tensors
        index = torch.from_numpy(kept if rows is None else np.searchsorted(rows, kept)).to(input_ids.device)
        carried = {name: tensor[index] for name, tensor in carried.items()}
        narrow = self._select(batch, input_ids, positions, kept)
        narrow.hidden_states = self.layers[layer].attn_boundary.from_pp(PPProxyTensors(carried), narrow)
        return narrow, kept

    def _finish(self, view, rows, layer, input_ids, batch):
        """Run the remaining layers; logits are taken from the original batch with the kept rows in place."""
        if rows is None:
            return self._span(view, layer, len(self.layers))
        index = torch.from_numpy(rows).to(input_ids.device)

        def restore(module, args):
            _, hidden, head, _, *rest = args
            full = hidden.new_zeros((input_ids.shape[0], hidden.shape[1]))
            full[index] = hidden
            return (input_ids, full, head, batch, *rest)

        hook = self.model.logits_processor.register_forward_pre_hook(restore)
        try:
            return self._span(view, layer, len(self.layers))
        finally:
            hook.remove()

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
        device = input_ids.device

        def tensor(values, like):
            return torch.as_tensor(values, device=device).to(like.dtype)

        index = torch.from_numpy(rows).to(device)
        owner = torch.from_numpy(request[first]).to(device)
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
        self.model_runner.attn_backend.init_forward_metadata(view)
        return view

    # ---- evidence at a check layer ----

    def _probe(self, layer: int, view, rows, chunks, keep) -> _Probe:
        return _Probe(self, layer, view, rows, chunks, keep)

    def evidence(self, layer, q, k, v, view, rows, chunks, keep) -> list[Evidence]:
        """Deviation of the fresh K and V of the candidate rows from the copied ones, and attention received.

        q, k, v [rows of the view, heads * D] as the layer is about to use them; the pool still holds the copies.
        """
        module = self.attention[layer]
        q = q.view(-1, module.tp_q_head_num, module.qk_head_dim)
        k = k.view(-1, module.tp_k_head_num, module.qk_head_dim)
        v = v.view(-1, module.tp_v_head_num, module.v_head_dim)
        keys, values = self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer)
        found = []
        for chunk in chunks:
            running = chunk.candidates[keep[chunk.candidates]]
            local = running if rows is None else np.searchsorted(rows, running)
            index = torch.from_numpy(local).to(q.device)
            slots = view.out_cache_loc[index].long()
            cached_v = values[slots].to(v.dtype)
            _, k_squared = token_deviation(k[index], keys[slots].to(k.dtype))
            v_absolute, v_squared = token_deviation(v[index], cached_v)
            size = cached_v.float().abs().flatten(1).sum(dim=1)
            alpha = torch.zeros_like(v_absolute)
            if self.pipeline.strategy.needs_alpha and len(local):
                alpha = self._alpha(module, layer, chunk, rows, index, q, k, view)
            sums = self._over_ranks(torch.stack((k_squared, v_squared, v_absolute, alpha, size)))
            k_squared, v_squared, v_absolute, alpha, size = sums.unbind()
            noise = v_absolute <= _NOISE.get(q.dtype, 3e-2) * size
            where = torch.from_numpy(running - chunk.row + chunk.start)
            found.append(
                Evidence(
                    where,
                    *(x.masked_fill(noise, 0) for x in (k_squared, v_squared, v_absolute)),
                    alpha=alpha,
                )
            )
        return found

    def _alpha(self, module, layer, chunk, rows, index, q, k, view):
        """Attention each candidate receives, this rank's heads over all heads (KVShare 4.4)."""
        low, high = chunk.row, chunk.row + len(chunk.reused)
        local = (low, high) if rows is None else tuple(np.searchsorted(rows, (low, high)))
        share = 1 / self._ranks()
        if self.pipeline.config.alpha == "one_query":
            # The next-to-last row of the chunk looks at the candidates only; all of them stand before it.
            query = q[max(local[0], local[1] - 2)][None]
            last = torch.full((1,), len(index) - 1, dtype=torch.int64, device=q.device)
            return attention_column_mass(query, k[index], last, module.scaling) * share
        request = view.req_pool_indices[self._sequence_of(view, local[0])]
        before = self.model_runner.req_to_token_pool.req_to_token[request, : chunk.start].long()
        prefix = self.pool.get_key_buffer(layer)[before].to(k.dtype)
        mine = slice(*local)
        mass = attention_column_mass(q[mine], torch.cat((prefix, k[mine])), view.positions[mine].long(), module.scaling)
        return mass[chunk.start + index - local[0]] * share

    @staticmethod
    def _sequence_of(view: ForwardBatch, row: int) -> int:
        ends = np.cumsum(view.extend_seq_lens_cpu)
        return int(np.searchsorted(ends, row, side="right"))

    @staticmethod
    def _ranks() -> int:
        from sglang.srt.distributed import get_tp_group

        return get_tp_group().world_size

    def _over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Scores are summed over the tensor-parallel ranks before anybody chooses, so all choose alike."""
        from sglang.srt.distributed import get_tp_group

        group = get_tp_group()
        return group.all_reduce(sums) if group.world_size > 1 else sums


class _Probe:
    """Context in which a check layer hands over its q, k, v; `result` holds one score tensor a chunk after it."""

    def __init__(self, executor: Executor, layer: int, view, rows, chunks, keep):
        self._executor = executor
        self._layer = layer
        self._where = (view, rows, chunks, keep)
        self.result: list[torch.Tensor] = []

    def __enter__(self) -> _Probe:
        module = self._executor.attention[self._layer]
        self._hook = module.register_forward_pre_hook(self._look)
        return self

    def _look(self, module, args):
        found = self._executor.evidence(self._layer, *args[:3], *self._where)
        score = self._executor.pipeline.strategy.score
        self.result = [score(evidence) for evidence in found]

    def __exit__(self, *exc):
        self._hook.remove()


def _attention_modules(model) -> list:
    """The decoder's attention modules in layer order."""
    from sglang.srt.layers.radix_attention import RadixAttention

    found = {m.layer_id: m for m in model.modules() if isinstance(m, RadixAttention)}
    return [found[i] for i in sorted(found)]
