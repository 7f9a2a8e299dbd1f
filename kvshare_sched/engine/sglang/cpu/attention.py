"""SGLang attention backend for a plain CPU: one pass per request, no padded queries.

Extend: a sequence is (request slot, prefix length, number of new rows). Neighbouring sequences of one and
the same request slot are rows of one request with gaps between them, which is how the executor submits
selected rows; they share one gather of the request's keys and one pass. Any other SGLang backend treats the
same batch correctly too, sequence by sequence.
"""

from typing import NamedTuple

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.runtime_context import get_parallel

from kvshare_kernels import attend_last, attend_rows, plan_rows
from kvshare_kernels.ragged_attention import RowPlan
from kvshare_sched.errors import UnsupportedError

# Above this many keys a decode batch takes its requests one by one. Measured on 2 AVX2 cores, 9 heads in 3 groups, ms a
# layer: 8 requests of 128 keys 0.19 in one product, 0.40 one by one; of 256 0.34 and 0.46; of 512 0.7 and 0.8. But 20
# of 1,310: 56 and 7, since so large a copy of the keys is memory that the allocator fetches page by page and returns.
_FEW_KEYS = 256


class _Rows(NamedTuple):
    """New rows of one request in a batch."""

    start: int  # first row in the batch
    stop: int
    slots: torch.Tensor | slice  # the request's KV slots, int64 [last position + 1], or their one range
    plan: RowPlan


class _Decode(NamedTuple):
    """One row a request, keys padded to the longest request."""

    slots: torch.Tensor  # int64 [batch, longest]
    mask: torch.Tensor | None  # bool [batch, 1, 1, longest], None when nothing is padded


def _as_range(slots: torch.Tensor) -> torch.Tensor | slice:
    """One slice when the slots are consecutive (a fresh request's usually are): its keys need no gather."""
    first = int(slots[0])
    consecutive = torch.equal(slots, torch.arange(first, first + len(slots)))
    return slice(first, first + len(slots)) if consecutive else slots


def _take(buffer: torch.Tensor, slots: torch.Tensor | slice) -> torch.Tensor:
    """Rows of a KV buffer, in the shape of `slots`. `index_select` takes two thirds of the time of `buffer[slots]`."""
    if isinstance(slots, slice):
        return buffer[slots]
    return buffer.index_select(0, slots.flatten()).unflatten(0, slots.shape)


class PortableCpuAttention(AttentionBackend):
    """Causal multi-head attention with GQA for decoder layers, float32 or half precision."""

    def __init__(self, model_runner):
        super().__init__()
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.dtype = model_runner.dtype  # of queries
        ranks, config = get_parallel().attn_tp_size, model_runner.model_config
        self.shared = config.num_attention_heads // ranks // config.get_num_kv_heads(ranks)  # query heads per key head
        self.rows: list[_Rows] = []
        self.decode: _Decode | None = None

    def init_forward_metadata(self, forward_batch):
        if forward_batch.forward_mode.is_decode_or_idle():
            self.decode = self._plan_decode(forward_batch)
        else:
            self.rows = self._plan_extend(forward_batch)

    def _plan_extend(self, batch) -> list[_Rows]:
        lengths = [int(n) for n in batch.extend_seq_lens_cpu]
        return self._passes(batch, lengths, [int(n) for n in batch.extend_prefix_lens_cpu])

    def _passes(self, batch, lengths: list[int], prefixes: list[int]) -> list[_Rows]:
        """One pass for all neighbouring rows of a request."""
        requests = batch.req_pool_indices.tolist()
        plan, start, i = [], 0, 0
        while i < len(requests):
            request, stop = requests[i], start
            while i < len(requests) and requests[i] == request:
                stop, last = stop + lengths[i], prefixes[i] + lengths[i]
                i += 1
            if stop > start:
                slots = _as_range(self.req_to_token[request, :last].long())
                positions = batch.positions[start:stop].long()
                plan.append(_Rows(start, stop, slots, plan_rows(positions, self.shared, self.dtype)))
            start = stop
        return plan

    def _plan_decode(self, batch) -> _Decode | None:
        """Batch the rows of several short requests.

        Else every request gets a pass of its own, with the repair rows that stand before its new token: a batch would
        gather a request's keys once for each of its rows, and a pass need not gather keys that stand in one range.
        """
        lengths, requests = batch.seq_lens.long(), batch.req_pool_indices
        rows = lengths.numel()
        repeated = bool((requests[1:] == requests[:-1]).any())
        if rows <= 1 or repeated or (longest := int(lengths.max())) > _FEW_KEYS:
            self.rows = self._passes(batch, [1] * rows, (lengths - 1).tolist())
            return None
        slots = self.req_to_token[batch.req_pool_indices.long(), :longest].long()
        exists = torch.arange(longest) < lengths[:, None]
        slots.masked_fill_(~exists, 0)  # rows beyond a request's end hold stale slots
        padded = not exists.all()
        return _Decode(slots, exists[:, None, None] if padded else None)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_):
        keys, values, q, out = self._store_and_view(q, k, v, layer, forward_batch, save_kv_cache)
        self._attend(self.rows, keys, values, q, out, layer)
        return out.view(q.shape[0], -1)

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **_):
        keys, values, q, out = self._store_and_view(q, k, v, layer, forward_batch, save_kv_cache)
        if self.decode is None:
            self._attend(self.rows, keys, values, q, out, layer)
        else:
            slots, mask = self.decode
            attend_last(q, _take(keys, slots).to(q.dtype), _take(values, slots).to(q.dtype), mask, layer.scaling, out)
        return out.view(q.shape[0], -1)

    def _attend(self, plan, keys, values, q, out, layer):
        for start, stop, slots, rows in plan:
            k, v = _take(keys, slots).to(q.dtype), _take(values, slots).to(q.dtype)
            attend_rows(q[start:stop], k, v, rows, layer.scaling, out[start:stop])

    def _store_and_view(self, q, k, v, layer, batch, save):
        if (
            layer.is_cross_attention
            or layer.attn_type != AttentionType.DECODER
            or layer.sliding_window_size > -1
            or layer.logit_cap > 0
            or layer.qk_head_dim != layer.v_head_dim
        ):
            raise UnsupportedError(
                f"attention backend kvshare_cpu serves plain causal decoder layers; layer {layer.layer_id} has "
                f"cross_attention={layer.is_cross_attention} type={layer.attn_type} "
                f"sliding_window={layer.sliding_window_size} logit_cap={layer.logit_cap} "
                f"head dims {layer.qk_head_dim}/{layer.v_head_dim}: use --attention-backend torch_native"
            )
        pool = self.token_to_kv_pool
        if save and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(batch.out_cache_loc, None), k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        return keys, values, q, torch.empty_like(q)

    def support_triton(self):
        return False
