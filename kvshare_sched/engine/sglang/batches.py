"""SGLang's model and batches as `runtime.port` asks for them: the only place that makes a ForwardBatch out of another.

Layers run through the model's `forward_split_prefill`, so no model code is written again. Between two spans the rows
to keep are picked out of the residual stream with the hand-off that SGLang uses between pipeline stages.

Selected rows are submitted as ragged sequences, one per run of neighbouring positions, whose prefix is everything
before the run. That is ordinary causal attention to any SGLang backend, and each row sees exactly the keys at
positions up to its own. Our CPU backend recognises the runs of one request and makes one pass; on a GPU
`gpu_attention` does.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from sglang.srt.layers.layer_boundary.residual import batch as residual_batch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, PPProxyTensors
from sglang.srt.runtime_context import get_parallel

from kvshare_kernels import on_device
from kvshare_sched.engine.sglang import gpu_attention, lora
from kvshare_sched.reuse.session import Session, sessions_of
from kvshare_sched.runtime.port import BatchRows, LayerHook

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Batch:
    """One call of the model's forward, as SGLang makes it."""

    input_ids: torch.Tensor  # int64 [rows]
    positions: torch.Tensor  # int64 [rows]
    forward: ForwardBatch
    args: tuple = ()
    kwargs: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def brings_more(self) -> bool:
        """Whether the model is given more than tokens: embeddings that stand in for some of the batch's, say.

        They are rows of the whole batch, and belong to requests that we may know nothing of.
        """
        return any(value is not None for value in (*self.args, *self.kwargs.values()))


@dataclass(slots=True)
class View:
    """Rows of a batch, as layers shall see them."""

    forward: ForwardBatch
    rows: np.ndarray | None  # int64, ascending, the batch's row of each row; None: all

    @property
    def positions(self) -> torch.Tensor:
        return self.forward.positions

    @property
    def slots(self) -> torch.Tensor:
        return self.forward.out_cache_loc


def even_at(layer: torch.nn.Module, attention) -> float:
    """The position at which a row's attention costs as many operations as its products with the layer's weights."""
    products = sum(p.numel() for p in layer.parameters() if p.dim() > 1)
    return products / (2 * attention.tp_q_head_num * attention.qk_head_dim)


def read_rows(batch: ForwardBatch, rows: np.ndarray) -> np.ndarray:
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


class SGLangEngine:
    """One rank's model; fulfils `runtime.port.Engine`."""

    def __init__(self, model_runner, chunk: int = 0):
        """chunk: prefill tokens of one pass, as SGLang has been told; 0: prompts are not cut."""
        self.runner = model_runner
        self.model = model_runner.model
        self.pool = model_runner.token_to_kv_pool
        self.ranks = get_parallel().tp_group
        self.attention = {m.layer_id: m for m in self.model.modules() if isinstance(m, RadixAttention)}
        self.scaling = {layer: module.scaling for layer, module in self.attention.items()}
        self._layers = self.model.model.layers
        self.layers = len(self._layers)
        self.even_at = even_at(self._layers[0], self.attention[0])
        on_gpu = self.pool.get_key_buffer(0).is_cuda
        self.row_attention = gpu_attention.create(model_runner, self.attention) if on_gpu else None
        # Every row of a decode view is a sequence. Backends on a GPU hold tables of as many as SGLang runs at once.
        self.decode_rows = model_runner.req_to_token_pool.size if model_runner.device != "cpu" else 1 << 30
        self._piece = chunk if chunk > 0 else 1 << 30  # rows that SGLang runs at once
        self._forward = self.model.forward

    def install(self, forward) -> None:
        """Put `forward(batch)` in front of the model's own."""
        self._instead = forward
        self.model.forward = self.forward

    def forward(self, input_ids, positions, forward_batch, *args, **kwargs):
        """Has the signature of the model's own."""
        return self._instead(Batch(input_ids, positions, forward_batch, args, kwargs))

    # ---- who is in a batch ----

    def requests(self, batch: Batch) -> list[BatchRows]:
        forward = batch.forward
        if not forward.forward_mode.is_extend():
            return []
        sessions = sessions_of(forward)
        found, row = [], 0
        for session, start, length in zip(
            sessions, forward.extend_prefix_lens_cpu if sessions else (), forward.extend_seq_lens_cpu, strict=False
        ):
            found.append(BatchRows(session, row, int(start), int(start) + int(length)))
            row += int(length)
        return found

    def decoding(self, batch: Batch) -> Sequence[Session | None]:
        return sessions_of(batch.forward) if batch.forward.forward_mode.is_decode() else ()

    # ---- views ----

    def whole(self, batch: Batch) -> View:
        forward = copy.copy(batch.forward)
        forward.input_ids, forward.positions = batch.input_ids, batch.positions
        return View(forward, None)

    def select(self, batch: Batch, rows: np.ndarray) -> View:
        """One sequence per run of neighbouring positions."""
        made, like = batch.forward, batch.input_ids
        starts = np.concatenate(([0], np.cumsum([int(n) for n in made.extend_seq_lens_cpu])))
        request = np.searchsorted(starts, rows, side="right") - 1
        prefix = np.array([int(n) for n in made.extend_prefix_lens_cpu])
        where = prefix[request] + rows - starts[request]
        new_run = np.ones(len(rows), bool)
        new_run[1:] = (where[1:] != where[:-1] + 1) | (request[1:] != request[:-1])
        first = np.flatnonzero(new_run)
        lengths = np.diff(np.append(first, len(rows)))
        begins = where[first]

        def tensor(values, dtype_of):
            return on_device(values, like).to(dtype_of.dtype)

        index, owner = on_device(rows, like), on_device(request[first], like)
        view = copy.copy(made)
        view.batch_size = len(first)
        view.input_ids, view.positions = batch.input_ids[index], batch.positions[index]
        view.out_cache_loc = made.out_cache_loc[index]
        view.req_pool_indices = made.req_pool_indices[owner]
        view.seq_lens = tensor(begins + lengths, made.seq_lens)
        view.orig_seq_lens = None
        view.seq_lens_cpu = torch.from_numpy(begins + lengths)
        view.seq_lens_sum = int((begins + lengths).sum())
        view.extend_num_tokens = len(rows)
        view.extend_seq_lens = tensor(lengths, made.extend_seq_lens)
        view.extend_prefix_lens = tensor(begins, made.extend_prefix_lens)
        view.extend_start_loc = tensor(first, made.extend_seq_lens)
        view.extend_seq_lens_cpu, view.extend_prefix_lens_cpu = lengths.tolist(), begins.tolist()
        view.extend_logprob_start_lens_cpu = [0] * len(first)
        view.residual_stream = None
        view.hidden_states = None
        if self.row_attention:
            self.row_attention.plan(view, request[first])
        else:
            self.runner.attn_backend.init_forward_metadata(view)
        lora.route(self.runner, made, view, request)
        return View(view, rows)

    def narrow(self, batch: Batch, view: View, rows: np.ndarray, layer: int) -> View:
        carried = residual_batch.to_pp(view.forward.hidden_states, view.forward).tensors
        index = on_device(rows if view.rows is None else np.searchsorted(view.rows, rows), batch.input_ids)
        carried = {name: tensor[index] for name, tensor in carried.items()}
        made = self.select(batch, rows)
        enter = self._layers[layer].attn_boundary.from_pp
        made.forward.hidden_states = enter(PPProxyTensors(carried), made.forward)
        return made

    def extend(self, batch: Batch, extra: Mapping[int, np.ndarray], tokens: np.ndarray) -> View:
        """Repair rows stand right before their request's own row: neighbours of one request, ascending positions.

        `rows` of the view: where the batch's own rows went, int64 [batch].
        """
        made, ids = batch.forward, batch.input_ids
        counts = np.array([len(extra.get(row, ())) for row in range(made.batch_size)], np.int64)
        owner = np.repeat(np.arange(made.batch_size), counts + 1)
        own = np.cumsum(counts + 1) - 1
        added = np.setdiff1d(np.arange(len(owner)), own)
        where = np.concatenate(list(extra.values()))
        source, at, place = (torch.from_numpy(x).to(ids.device) for x in (owner, added, where))

        def filled(original, values):
            return original[source].index_copy_(0, at, values.to(original.dtype))

        view = copy.copy(made)
        view.batch_size = len(owner)
        view.input_ids = filled(ids, torch.from_numpy(tokens).to(ids.device))
        view.positions = filled(batch.positions, place)
        view.req_pool_indices = made.req_pool_indices[source]
        slots = self._table[view.req_pool_indices[at].long(), place]
        view.out_cache_loc = filled(made.out_cache_loc, slots)
        view.seq_lens = filled(made.seq_lens, place + 1)
        view.orig_seq_lens = None
        if made.seq_lens_cpu is not None:
            view.seq_lens_cpu = made.seq_lens_cpu[torch.from_numpy(owner)]
            view.seq_lens_cpu[torch.from_numpy(added)] = torch.from_numpy(where + 1).to(view.seq_lens_cpu.dtype)
        if made.seq_lens_sum is not None:
            view.seq_lens_sum = made.seq_lens_sum + int((where + 1).sum())
        view.global_num_token_non_padded_cpu, view.num_token_non_padded = len(owner), None  # all rows are real
        view.residual_stream = None
        self.runner.attn_backend.init_forward_metadata(view)
        lora.route(self.runner, made, view, owner)
        return View(view, own)

    @property
    def _table(self) -> torch.Tensor:
        return self.runner.req_to_token_pool.req_to_token

    def table(self, view: View, row: int, end: int | None = None) -> torch.Tensor:
        """Does not wait for the device where `end` is given; None: up to the row's own position."""
        forward, sequence = view.forward, row
        if forward.forward_mode.is_extend():
            sequence = int(np.searchsorted(np.cumsum(forward.extend_seq_lens_cpu), row, side="right"))
        end = int(forward.seq_lens[sequence]) if end is None else end
        request = forward.req_pool_indices[sequence : sequence + 1].long()
        return self._table[:, :end].index_select(0, request)[0].long()

    # ---- running ----

    def run(self, view: View, start: int, end: int) -> Any:
        forward = view.forward
        with self.row_attention.serving() if self.row_attention else contextlib.nullcontext():
            return self.model.forward_split_prefill(forward.input_ids, forward.positions, forward, (start, end))

    def finish(self, batch: Batch, view: View, layer: int) -> Any:
        """The last layer makes K and V of all its rows, but goes on with those alone whose output is read."""
        if view.rows is None:
            return self.run(view, layer, self.layers)
        read = read_rows(batch.forward, view.rows) if layer < self.layers else view.rows
        going_on = on_device(np.searchsorted(view.rows, read), batch.input_ids)

        def leave_out(module, args):
            q, k, v, _, *rest = args
            place = KVWriteLoc(view.slots, None)
            self.pool.set_kv_buffer(module, place, *_by_head(module, k, v))
            stream = residual_batch.stream_of(view.forward)
            stream.residual = stream.residual[going_on]
            return q[going_on], k[going_on], v[going_on], self.select(batch, read).forward, *rest

        with contextlib.ExitStack() as hooks:
            hooks.enter_context(self._logits_of(batch, read, scattered=True))
            if len(read) < len(view.rows):
                handle = self.attention[self.layers - 1].register_forward_pre_hook(leave_out)
                hooks.callback(handle.remove)
            return self.run(view, layer, self.layers)

    def decode(self, batch: Batch, view: View) -> Any:
        with self._logits_of(batch, view.rows, scattered=False):
            return self._forward(view.forward.input_ids, view.forward.positions, view.forward)

    @contextlib.contextmanager
    def ahead(self, batch: Batch) -> Iterator[View]:
        view = View(copy.copy(batch.forward), None)
        try:
            yield view
        finally:
            residual_batch.clear(view.forward)

    @contextlib.contextmanager
    def _logits_of(self, batch: Batch, rows: np.ndarray, *, scattered: bool) -> Iterator[None]:
        """Inside the block, logits are computed of SGLang's own batch: sampling meets no row of ours.

        rows, scattered: the rows that run, in the batch, or with scattered=False those to take out of the view.
        """
        index = on_device(rows, batch.input_ids)

        def restore(module, args):
            _, hidden, head, _, *rest = args
            if scattered:
                full = hidden.new_zeros((len(batch), hidden.shape[1]))
                full[index] = hidden
            else:
                full = hidden[index]
            lora.restore(self.runner, batch.forward)  # for a vocabulary head with an adapter
            return (batch.input_ids, full, head, batch.forward, *rest)

        hook = self.model.logits_processor.register_forward_pre_hook(restore)
        try:
            yield
        finally:
            hook.remove()

    @contextlib.contextmanager
    def watching(
        self, layers: Sequence[int], *, before: LayerHook | None = None, after: LayerHook | None = None
    ) -> Iterator[None]:
        def heads(module, args):
            q, k, v, *_ = args
            return module.layer_id, q.view(-1, module.tp_q_head_num, module.qk_head_dim), *_by_head(module, k, v)

        hooks = []
        for module in (self.attention[layer] for layer in layers):
            if before is not None:
                hooks.append(module.register_forward_pre_hook(lambda m, args: before(*heads(m, args))))
            if after is not None:
                hooks.append(module.register_forward_hook(lambda m, args, _: after(*heads(m, args))))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    # ---- SGLang's own way ----

    def ordinary(self, batch: Batch) -> Any:
        return self._forward(batch.input_ids, batch.positions, batch.forward, *batch.args, **batch.kwargs)

    def restore(self, batch: Batch) -> None:
        """SGLang's own batch, as it came."""
        batch.forward.residual_stream = None
        self.runner.attn_backend.init_forward_metadata(batch.forward)
        lora.restore(self.runner, batch.forward)

    def fence(self) -> None:
        """SGLang's fence says that the tables of slots have been read; a batch of ours reads them in every layer."""
        self.runner.shared_read_done_event = None

    def all_rows(self, batch: Batch) -> Any:
        if len(batch) > self._piece and not batch.brings_more:
            try:
                return self._in_pieces(batch)
            except Exception:
                logger.exception("kvshare: %d rows could not be computed in pieces", len(batch))
                self.restore(batch)
        return self.ordinary(batch)

    @torch.no_grad()
    def _in_pieces(self, batch: Batch) -> Any:
        """The model's own forward over the rows of a batch, `piece` at a time.

        A batch that was to reuse holds several times the rows that SGLang has kept memory for.
        """
        rows = np.arange(len(batch))
        read, full, output = read_rows(batch.forward, rows), None, None
        for piece in np.split(rows, range(self._piece, len(rows), self._piece)):
            view, wanted = self.select(batch, piece), np.intersect1d(piece, read)

            def collect(module, args, view=view, piece=piece, wanted=wanted):
                nonlocal full
                _, hidden, head, _, *rest = args
                if full is None:
                    full = hidden.new_zeros((len(batch), hidden.shape[1]))
                full[on_device(wanted, batch.input_ids)] = hidden[on_device(wanted - piece[0], batch.input_ids)]
                if piece[-1] < rows[-1]:
                    return (view.forward.input_ids, hidden, head, view.forward, *rest)
                lora.restore(self.runner, batch.forward)
                return (batch.input_ids, full, head, batch.forward, *rest)

            hook = self.model.logits_processor.register_forward_pre_hook(collect)
            try:
                output = self.run(view, 0, self.layers)
            finally:
                hook.remove()
        return output


def _by_head(module, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [rows, heads * D] as an attention module gets them, as the KV pool takes them: [rows, heads, D]."""
    return k.view(-1, module.tp_k_head_num, module.qk_head_dim), v.view(-1, module.tp_v_head_num, module.v_head_dim)
