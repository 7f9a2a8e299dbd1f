"""Prices of this machine, measured at start-up."""

from __future__ import annotations

import time

import torch

from kvshare_sched.reuse.costs import CostModel

_SAMPLE = 256  # rows and tokens per measurement


_TIMES = 16  # the quickest counts: at start-up, others often hold the machine


def measure_costs(runner, cos_sin, neox) -> CostModel:
    """Prices of this machine, measured on the real pool and on matrix products of the model's size."""
    from kvshare_kernels import copy_rotate

    layers = len(runner.model.model.layers)
    pool = runner.token_to_kv_pool
    device = pool.get_key_buffer(0).device
    keys = [pool.get_key_buffer(i) for i in range(layers)]
    values = [pool.get_value_buffer(i) for i in range(layers)]

    def seconds(work) -> float:
        times = []
        for _ in range(_TIMES):
            started = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        return min(times[1:])

    def copy(count):
        # The pool is empty at start-up: slots 1.. are moved onto themselves.
        slots = torch.arange(1, count + 1, device=device)
        return seconds(lambda: copy_rotate(keys, values, [(slots, slots, 1)], cos_sin, neox=neox))

    weights = [p for p in runner.model.model.layers[0].parameters() if p.dim() == 2]
    per_row = sum(p.numel() for p in weights)
    widest = max(weights, key=lambda p: p.numel())
    rows = torch.zeros(_SAMPLE, widest.shape[1], dtype=widest.dtype, device=device)
    try:
        product = seconds(lambda: rows @ widest.T) / (_SAMPLE * widest.numel())
        single = seconds(lambda: rows[:1] @ widest.T) / widest.numel()
    except RuntimeError:  # quantised weights have no plain product; assume the pool's bandwidth instead
        product, single = copy(_SAMPLE) / _SAMPLE / per_row, 0.0
    one, cell_s = copy(1), product * per_row
    return CostModel(
        cell_s=cell_s,
        # Its KV on all layers is a fraction of one layer's weights: what is dearer was measured on a busy machine, and
        # believing it would switch reuse off for as long as the server runs.
        copy_s=min(max(copy(_SAMPLE) - one, 0.0) / _SAMPLE, cell_s),
        overhead_s=3 * one,  # a copy, a second batch plan, a selection: each about one launch a layer
        layers=layers,
        pass_rows=single / product,  # one row reads all weights, as any pass does
    )
