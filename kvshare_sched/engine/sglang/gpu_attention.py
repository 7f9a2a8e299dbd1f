"""Attention of selected rows on a GPU; everything else stays with SGLang's own backend.

On a GPU that backend takes no batch with more sequences than requests fit into its pool, so scattered rows cannot be
submitted to it run by run. `RowAttention` stands before it while a reuse batch runs: a batch whose rows have gaps it
computes itself, one sequence a request with a position mask, and single rows likewise; all others it hands on.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_context import forward_context, get_forward_context

from kvshare_kernels import PagedRows, on_device, scattered, slots_of
from kvshare_sched.errors import UnsupportedError

logger = logging.getLogger(__name__)
_MARK = "kvshare_rows"  # on a batch: number of the plan it was given


class RowAttention(AttentionBackend):
    """kernel: planned and run as `kvshare_kernels.triton_attention.TritonAttention` is."""

    def __init__(self, model_runner, kernel):
        super().__init__()
        self.model_runner, self.kernel = model_runner, kernel
        self.req_to_token_pool = model_runner.req_to_token_pool
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.plans = 0

    def plan(self, view, owners: np.ndarray) -> None:
        """Prepare `view`, in which sequence i belongs to request owners[i], ascending; replaces the plan before it."""
        lengths, prefixes = (np.asarray(x, np.int64) for x in (view.extend_seq_lens_cpu, view.extend_prefix_lens_cpu))
        first = np.flatnonzero(np.diff(owners, prepend=-1))  # sequence each request starts with
        # Single rows, the last layer's, have no gaps but stay here: planning them, SGLang's FlashInfer backend would
        # wait for the device.
        if len(first) == len(owners) and lengths.max() > 1:
            self.model_runner.attn_backend.init_forward_metadata(view)
            return
        into = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        seen = (prefixes + lengths)[np.append(first[1:], len(owners)) - 1]
        requests = view.req_pool_indices[on_device(first, view.req_pool_indices)].long()
        rows = PagedRows(
            positions=np.repeat(prefixes, lengths) + into,
            qo_indptr=np.append((np.cumsum(lengths) - lengths)[first], lengths.sum()),
            kv_indptr=np.concatenate(([0], np.cumsum(seen))),
            kv_indices=slots_of(self.req_to_token_pool.req_to_token, requests, seen),
        )
        self.kernel.plan(rows)
        self.plans += 1
        setattr(view, _MARK, self.plans)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Layers that run inside the block find this backend."""
        with forward_context(replace(get_forward_context(), attn_backend=self)):
            yield

    def forward(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs):
        """One layer's attention, as SGLang's backends are called."""
        plan = getattr(forward_batch, _MARK, None)
        if plan is None:
            return self.model_runner.attn_backend.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
        if plan != self.plans:
            raise RuntimeError(f"layer {layer.layer_id} runs a batch of plan {plan}, but {self.plans} is in force")
        pool = self.token_to_kv_pool
        if save_kv_cache and k is not None:
            pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        q = q.reshape(-1, layer.tp_q_head_num, layer.qk_head_dim)
        keys, values = pool.get_key_buffer(layer.layer_id), pool.get_value_buffer(layer.layer_id)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        self.kernel.run(q, keys, values, layer.scaling, out=out)
        return out.view(q.shape[0], -1)


def create(model_runner, attention: Mapping[int, torch.nn.Module]) -> RowAttention:
    """The backend of a loaded model; attention: its attention modules by layer.

    The first kernel that this machine has and that passes its self-test. Raises UnsupportedError where none does.
    """
    shapes = {
        (m.tp_q_head_num, m.tp_k_head_num, m.qk_head_dim, m.v_head_dim, m.logit_cap, m.attn_type, m.sliding_window_size)
        for m in attention.values()
    }
    heads, groups, dim, v_dim, soft_cap, kind, window = next(iter(shapes))
    if len(shapes) > 1 or kind != AttentionType.DECODER or window > -1 or v_dim != dim:
        raise UnsupportedError(
            f"attention layers of {len(shapes)} shapes, the first {heads}/{groups} heads of {dim}/{v_dim}, {kind}, "
            f"window {window}: accepted is one shape of full causal attention, keys and values of one size."
        )
    buffer = model_runner.token_to_kv_pool.get_key_buffer(0)
    if buffer.dim() != 3 or buffer.dtype != model_runner.dtype:
        raise UnsupportedError(
            f"KV pool {buffer.dtype} {tuple(buffer.shape)} of a {model_runner.dtype} model is not supported; accepted "
            "is [slots, heads, dim] in the model's dtype: unset SGLANG_USE_HND_KVCACHE, leave --kv-cache-dtype at auto."
        )
    return RowAttention(model_runner, _kernel(heads, groups, dim, soft_cap, buffer))


def _kernel(heads: int, groups: int, dim: int, soft_cap: float, buffer: torch.Tensor):
    reasons = []
    for name, kernel in scattered.kernels(
        heads, groups, dim, dtype=buffer.dtype, device=buffer.device, soft_cap=soft_cap
    ):
        if not isinstance(kernel, str):
            logger.info("kvshare: scattered rows run in %s%s", name, "".join(f"; not in {r}" for r in reasons))
            return kernel
        reasons.append(f"{name} ({kernel})")
    raise UnsupportedError("no kernel for scattered rows: " + "; ".join(reasons))
