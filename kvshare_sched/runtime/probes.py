"""What a check layer shows: how far each reused token's K and V deviate, and how much attention it receives.

The layer's attention module is asked just before it runs: its q, k, v are fresh, the KV pool still holds the
donors' copies in the very slots the layer is about to write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from kvshare_kernels import attention_column_mass, on_device, token_deviation
from kvshare_sched.methods.base import Evidence
from kvshare_sched.runtime.chunk import Chunk

_VOICES = 16  # last fresh rows whose attention counts; measured, all of them were no better
# Deviation below this share of the value's own norm is arithmetic noise: such a token is not worth a row.
_NOISE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


def by_head(module, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v [rows, heads * D] as an attention module gets them, as the KV pool takes them: [rows, heads, D]."""
    return k.view(-1, module.tp_k_head_num, module.qk_head_dim), v.view(-1, module.tp_v_head_num, module.v_head_dim)


class Witness:
    """Scores the candidate rows of a batch at a check layer of one rank's model."""

    def __init__(self, model_runner):
        from sglang.srt.layers.radix_attention import RadixAttention
        from sglang.srt.runtime_context import get_parallel

        self.pool = model_runner.token_to_kv_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.ranks = get_parallel().tp_group
        self.attention = {m.layer_id: m for m in model_runner.model.modules() if isinstance(m, RadixAttention)}

    @contextlib.contextmanager
    def scores(self, layer: int, view, rows, chunks: list[Chunk], keep: np.ndarray) -> Iterator[list[torch.Tensor]]:
        """While `layer` runs inside the block, the list fills with one score tensor a chunk.

        view: the batch the layer sees; rows: the original batch's row of each of its rows, None for all; keep:
        bool, rows of the original batch still running. Scores follow the chunk's running candidates, ascending.
        """
        found: list[torch.Tensor] = []

        def look(module, args):
            q, k, v, *_ = args
            evidence = self._evidence(layer, q, k, v, view, rows, chunks, keep)
            found.extend(c.session.strategy.score(e) for c, e in zip(chunks, evidence, strict=True))

        hook = self.attention[layer].register_forward_pre_hook(look)
        try:
            yield found
        finally:
            hook.remove()

    def _evidence(self, layer, q, k, v, view, rows, chunks, keep) -> Iterator[Evidence]:
        """q, k, v [rows of the view, heads * D] as the layer is about to use them."""
        module = self.attention[layer]
        q = q.view(-1, module.tp_q_head_num, module.qk_head_dim)
        k, v = by_head(module, k, v)
        keys, values = self.pool.get_key_buffer(layer), self.pool.get_value_buffer(layer)
        for chunk in chunks:
            running = chunk.candidates[keep[chunk.candidates]]
            local = running if rows is None else np.searchsorted(rows, running)
            index = on_device(local, q)
            slots = view.out_cache_loc[index].long()
            cached_v = values[slots].to(v.dtype)
            _, k_squared = token_deviation(k[index], keys[slots].to(k.dtype))
            v_absolute, v_squared = token_deviation(v[index], cached_v)
            size = cached_v.float().abs().flatten(1).sum(dim=1)
            alpha = torch.zeros_like(v_absolute)
            if chunk.session.strategy.needs_alpha and len(local):
                alpha = self._alpha(module, layer, chunk, rows, index, q, k, view)
            sums = self.over_ranks(torch.stack((k_squared, v_squared, v_absolute, alpha, size)))
            k_squared, v_squared, v_absolute, alpha, size = sums.unbind()
            noise = v_absolute <= _NOISE.get(q.dtype, 3e-2) * size
            where = running - chunk.row + chunk.start
            if chunk.session.repair is not None:
                chunk.session.repair.deviation[where] = v_absolute.cpu().numpy()
            positions = on_device(where, q)
            deviation = (x.masked_fill(noise, 0) for x in (k_squared, v_squared, v_absolute))
            yield Evidence(positions, *deviation, alpha=alpha)

    def _alpha(self, module, layer, chunk, rows, index, q, k, view) -> torch.Tensor:
        """Attention each candidate receives: mean over all heads, this rank's part of it (KVShare 4.4)."""
        low, high = chunk.row, chunk.row + len(chunk.reused)
        local = (low, high) if rows is None else tuple(np.searchsorted(rows, (low, high)))
        share = 1 / self.ranks.world_size
        if chunk.session.config.alpha == "one_query":
            # The next-to-last row of the chunk looks at the candidates only; none of them stands after it.
            query = q[max(local[0], local[1] - 2)][None]
            last = torch.full((1,), len(index) - 1, dtype=torch.int64, device=q.device)
            return attention_column_mass(query, k[index], last, module.scaling) * share
        sequence = int(np.searchsorted(np.cumsum(view.extend_seq_lens_cpu), local[0], side="right"))
        before = self._slots(view, sequence, chunk.start)
        prefix = self.pool.get_key_buffer(layer)[before].to(k.dtype)
        mine = slice(*local)
        mass = attention_column_mass(q[mine], torch.cat((prefix, k[mine])), view.positions[mine].long(), module.scaling)
        return mass[chunk.start + index - local[0]] * share

    @contextlib.contextmanager
    def looks(self, layers: range, view, chunks: list[Chunk]) -> Iterator[list[torch.Tensor]]:
        """While the asking rows pass through `layers` inside the block, each chunk's tensor fills with the attention
        that its positions [0, end) receive from the last of them: mean over heads, sum over rows and layers,
        float32 [end]. The last rows are the question and the turn to answer.

        view: the batch of the chunks' asking rows, in the chunks' order.
        """
        mass = [torch.zeros(c.end, dtype=torch.float32, device=view.positions.device) for c in chunks]
        edges = np.cumsum([0, *(len(c.asking) for c in chunks)]).tolist()
        sequences = np.searchsorted(np.cumsum(view.extend_seq_lens_cpu), edges[:-1], side="right")
        slots = [self._slots(view, int(s), c.end) for s, c in zip(sequences, chunks, strict=True)]

        def look(module, args, _):
            # The layer has run: the pool holds the keys of the fresh rows, too.
            q = args[0].view(-1, module.tp_q_head_num, module.qk_head_dim)
            keys = self.pool.get_key_buffer(module.layer_id)
            for i in range(len(chunks)):
                rows = slice(max(edges[i], edges[i + 1] - _VOICES), edges[i + 1])
                positions = view.positions[rows].long()
                k = keys[slots[i]].to(q.dtype)
                mass[i][: len(k)] += attention_column_mass(q[rows], k, positions, module.scaling)

        hooks = [self.attention[layer].register_forward_hook(look) for layer in layers]
        try:
            yield mass
            for i, found in enumerate(mass):
                mass[i] = self.over_ranks(found) / self.ranks.world_size
        finally:
            for hook in hooks:
                hook.remove()

    @contextlib.contextmanager
    def attention_paid(self, layer: int, view, rows: list[int]) -> Iterator[list[torch.Tensor]]:
        """While `layer` runs inside the block, the list fills: what each of these decode rows attends to.

        One float32 [seq_len] tensor a row of `view`, mean over the heads of all ranks.
        """
        module, found = self.attention[layer], []

        def look(_, args, output):  # after the layer, so that the pool holds this step's keys
            query = args[0].view(-1, module.tp_q_head_num, module.qk_head_dim)
            keys = self.pool.get_key_buffer(layer)
            for row in rows:
                slots = self.req_to_token[view.req_pool_indices[row], : view.seq_lens[row]].long()
                last = torch.full((1,), len(slots) - 1, dtype=torch.int64, device=slots.device)
                mass = attention_column_mass(query[row : row + 1], keys[slots], last, module.scaling)
                found.append(self.over_ranks(mass / self.ranks.world_size))

        hook = module.register_forward_hook(look)
        try:
            yield found
        finally:
            hook.remove()

    def _slots(self, view, sequence: int, end: int) -> torch.Tensor:
        """Slots of the positions [0, end) of one sequence's request, int64; does not wait for the device."""
        request = view.req_pool_indices[sequence : sequence + 1].long()
        return self.req_to_token[:, :end].index_select(0, request)[0].long()

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Scores are summed over the tensor-parallel ranks before anybody chooses, so all choose alike."""
        return self.ranks.all_reduce(sums) if self.ranks.world_size > 1 else sums
