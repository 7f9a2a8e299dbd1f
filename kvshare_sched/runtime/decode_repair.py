"""Repair rows ride in the decode step: prompt positions computed again, in their own slots, beside the new token.

Every layer writes the K and V of all rows before it attends, so a new token sees the repaired values in the very
step that repairs them. The logits processor gets the original batch and the original rows: sampling, penalties,
log-probabilities and stop conditions never meet a repair row.

A decode step that replays a CUDA graph does not come here; a server with `repair_rows` set is refused with such
graphs (`support.py`), and a single request's wish for repair is not heeded there.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time

import numpy as np
import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch

from kvshare_sched.engine.sglang import lora
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import Session, sessions_of
from kvshare_sched.runtime.probes import Witness

logger = logging.getLogger(__name__)


class DecodeRepair:
    """Decode batches of one rank's model; `ordinary` is the model's own forward."""

    def __init__(self, pipeline: Pipeline, model_runner, witness: Witness, ordinary):
        self.pipeline = pipeline
        self.model_runner = model_runner
        self.model = model_runner.model
        self.witness = witness
        self._ordinary = ordinary
        # Every row is a sequence. Backends on a GPU hold tables of as many as SGLang runs at once.
        on_gpu = model_runner.device != "cpu"
        self.rows = model_runner.req_to_token_pool.size if on_gpu else 1 << 30
        self.check_layer = min(pipeline.config.check_layer, len(self.model.model.layers) - 1)

    def waiting(self, batch) -> dict[int, Session]:
        """Batch row -> session, for the requests of a decode batch that have something to repair."""
        if not batch.forward_mode.is_decode():
            return {}
        return {row: s for row, s in enumerate(sessions_of(batch)) if s is not None and s.to_repair}

    def forward(self, waiting: dict[int, Session], input_ids, positions, batch):
        """The model's forward with repair rows; a failure ends these requests' repair and leaves plain decode."""
        try:
            with torch.no_grad():
                output = self._run(waiting, input_ids, positions, batch)
            self.model_runner.shared_read_done_event = None  # the tables are read until here
            return output
        except Exception:
            logger.exception("kvshare: repair failed for a batch of %d; plain decode", batch.batch_size)
            for session in waiting.values():
                session.repair = None
            batch.residual_stream = None
            self.model_runner.attn_backend.init_forward_metadata(batch)
            lora.restore(self.model_runner, batch)
            return self._ordinary(input_ids, positions, batch)

    def _run(self, waiting, input_ids, positions, batch):
        started = time.perf_counter()
        self._look_ahead(waiting, input_ids, positions, batch)
        chosen, free = {}, self.rows - batch.batch_size
        for row, session in waiting.items():
            chosen[row] = session.repair.next(session.approximate_from)[: max(0, free)]
            free -= len(chosen[row])
        chosen = {row: positions for row, positions in chosen.items() if len(positions)}
        if not chosen:
            return self._ordinary(input_ids, positions, batch)
        tokens = np.concatenate([waiting[row].repair.tokens[p] for row, p in chosen.items()])
        view, rows = self._with_rows(input_ids, positions, batch, chosen, tokens)
        prepared = time.perf_counter() - started
        lagged = {int(rows[row]): s for row, s in waiting.items() if s.repair.order == "lagged"}
        with self._original_logits(input_ids, batch, rows), self._noting_attention(view, lagged):
            output = self._ordinary(view.input_ids, view.positions, view)
        for row, repaired in chosen.items():
            self.pipeline.repaired(waiting[row], repaired, prepared / len(chosen))
        return output

    def _look_ahead(self, waiting, input_ids, positions, batch) -> None:
        """Order `attention` wants this step's attention: the plain rows run up to the check layer first."""
        wanted = {row: s for row, s in waiting.items() if s.repair.order == "attention"}
        if not wanted:
            return
        ahead = copy.copy(batch)
        with self._noting_attention(ahead, wanted):
            self.model.forward_split_prefill(input_ids, positions, ahead, (0, self.check_layer + 1))
        residual_batch.clear(ahead)

    @contextlib.contextmanager
    def _noting_attention(self, view, sessions: dict[int, Session]):
        """While the model runs inside the block, the sessions learn what their rows of `view` attend to."""
        if not sessions:
            yield
            return
        with self.witness.attention_paid(self.check_layer, view, list(sessions)) as found:
            yield
        for session, attention in zip(sessions.values(), found, strict=True):
            session.repair.attention = attention[: session.prompt_len].cpu().numpy()

    def _with_rows(self, input_ids, positions, batch, chosen: dict[int, np.ndarray], tokens: np.ndarray):
        """The batch with repair rows, and where its own rows went, int64 [batch].

        chosen: batch row -> prompt positions, rows ascending; tokens: int64, those positions' ids in that order. Repair
        rows stand right before their request's own row: neighbours of one request, ascending positions.
        """
        counts = np.array([len(chosen.get(row, ())) for row in range(batch.batch_size)], np.int64)
        owner = np.repeat(np.arange(batch.batch_size), counts + 1)
        own = np.cumsum(counts + 1) - 1
        extra = np.setdiff1d(np.arange(len(owner)), own)
        where = np.concatenate(list(chosen.values()))
        device = input_ids.device
        source, at, place = (torch.from_numpy(x).to(device) for x in (owner, extra, where))

        def filled(original, values):
            return original[source].index_copy_(0, at, values.to(original.dtype))

        view = copy.copy(batch)
        view.batch_size = len(owner)
        view.input_ids = filled(input_ids, torch.from_numpy(tokens).to(device))
        view.positions = filled(positions, place)
        view.req_pool_indices = batch.req_pool_indices[source]
        slots = self.witness.req_to_token[view.req_pool_indices[at].long(), place]
        view.out_cache_loc = filled(batch.out_cache_loc, slots)
        view.seq_lens = filled(batch.seq_lens, place + 1)
        view.orig_seq_lens = None
        if batch.seq_lens_cpu is not None:
            view.seq_lens_cpu = batch.seq_lens_cpu[torch.from_numpy(owner)]
            view.seq_lens_cpu[torch.from_numpy(extra)] = torch.from_numpy(where + 1).to(view.seq_lens_cpu.dtype)
        if batch.seq_lens_sum is not None:
            view.seq_lens_sum = batch.seq_lens_sum + int((where + 1).sum())
        view.global_num_token_non_padded_cpu, view.num_token_non_padded = len(owner), None  # all rows are real
        view.residual_stream = None
        self.model_runner.attn_backend.init_forward_metadata(view)
        lora.route(self.model_runner, batch, view, owner)
        return view, own

    @contextlib.contextmanager
    def _original_logits(self, input_ids, batch, rows: np.ndarray):
        index = torch.from_numpy(rows).to(input_ids.device)

        def restore(module, args):
            _, hidden, head, _, *rest = args
            lora.restore(self.model_runner, batch)
            return (input_ids, hidden[index], head, batch, *rest)

        hook = self.model.logits_processor.register_forward_pre_hook(restore)
        try:
            yield
        finally:
            hook.remove()
