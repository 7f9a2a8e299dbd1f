"""Adapters (LoRA): which rows of our batches belong to which.

SGLang's LoRA layers find the adapter of every row in what `LoRAManager.prepare_lora_batch` left behind, once for each
batch. Batches of ours have other rows, so it is told of them before their layers run (`route`), and of the batch SGLang
made before its logits are computed or its own forward runs after all (`restore`). A request's rows are one segment
however far apart they stand: no batch of ours has more segments than SGLang's, whatever a LoRA backend sizes by that.
"""

from __future__ import annotations

import copy

import numpy as np

from kvshare_kernels import on_device


def route(model_runner, batch, view, owners: np.ndarray) -> None:
    """The layers that run next serve `view`, made from SGLang's `batch`.

    owners: int64 [rows of view], ascending: the request in `batch` each row belongs to.
    """
    manager = model_runner.lora_manager
    if manager is None:
        return
    told = copy.copy(view)
    if view.forward_mode.is_decode():  # every row is a sequence
        requests = owners
    else:
        requests, counts = np.unique(owners, return_counts=True)
        told.batch_size = len(requests)
        told.extend_seq_lens = on_device(counts, batch.extend_seq_lens).to(batch.extend_seq_lens.dtype)
        told.extend_seq_lens_cpu = counts.tolist()
        told.extend_logprob_start_lens_cpu = [0] * len(requests)
    told.lora_ids = [batch.lora_ids[i] for i in requests.tolist()]
    manager.prepare_lora_batch(told)


def restore(model_runner, batch) -> None:
    """What runs next serves SGLang's own batch, all its rows."""
    if model_runner.lora_manager is not None:
        model_runner.lora_manager.prepare_lora_batch(batch)
