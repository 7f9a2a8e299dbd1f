"""One engine put together: prices measured, pipeline, executor and queue made, hooks put in place.

`wire` runs in the cache factory, so nothing is touched unless `--radix-cache-backend kvshare` was chosen.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
import time
from collections.abc import Iterable

import torch

from kvshare_sched import audit_adapter, queue_adapter
from kvshare_sched.config import KVShareConfig
from kvshare_sched.errors import UnsupportedError
from kvshare_sched.executor import Executor
from kvshare_sched.metrics import ShareMetrics
from kvshare_sched.pipeline import Pipeline
from kvshare_sched.planner import CostModel
from kvshare_sched.sglang_adapter import scheduler_hooks
from kvshare_sched.support import refuse, rotary_table
from kvshare_sched.tenants import gate
from kvshare_sched.tenants.desk import Desk
from kvshare_sched.tenants.log import BorrowLog
from radix_ext.donors import DonorTree

logger = logging.getLogger(__name__)


def wire(cache, ctx):
    """Build one rank's pipeline, executor and queue around its cache and model; returns (pipeline, queue or None).

    Raises ConfigError or UnsupportedError: the server must not start half wired.
    """
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.distributed import get_tp_group
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    config = KVShareConfig.load()
    runner = ctx.tp_worker.model_runner
    refuse(ctx.server_args, runner)
    cos_sin, neox = rotary_table(runner.model, runner.model_config.context_len)
    group = get_tp_group()
    costs = group.broadcast_object(_measure_costs(runner, cos_sin, neox), src=0)
    metrics = None
    if ctx.tp_rank == 0 and ctx.params.enable_metrics:
        metrics = ShareMetrics()
        metrics.started(config)
    records = config.tenants_file and ctx.tp_rank == 0
    desk = Desk(BorrowLog(config.borrow_log) if records else None)
    pipeline = Pipeline(config, DonorTree(cache), costs, metrics, desk=desk)
    chunk = resolved_view(ctx.server_args).chunked_prefill_size or 0
    Executor(pipeline, runner, cos_sin, neox, chunk).install()
    if config.audit_share > 0 and config.mode == "on":
        pipeline.auditor.agree = functools.partial(group.broadcast_object, src=0)
        audit_adapter.watch(pipeline.auditor, runner.model)
    queue = queue_adapter.create(config, ctx, pipeline, metrics)
    # All of them, whatever is switched on: SGLang hooks a place once a process, and each looks at its engine's cache.
    hooks = scheduler_hooks() | audit_adapter.hooks()
    for seam, hook in queue_adapter.hooks().items():
        hooks[seam] = _outside(hook, hooks[seam]) if seam in hooks else hook
    if config.tenants_file:
        hooks |= gate.hooks()
    for seam, hook in hooks.items():
        HookRegistry.register(seam, hook, HookType.AROUND)
    HookRegistry.apply_hooks()
    check_hooked(hooks)
    if ctx.tp_rank == 0:
        logger.info("kvshare: %s", config.describe())
        logger.info(
            "kvshare: measured %.1f us a cell, %.1f us a copied token, %.2f ms overhead, %.0f rows a pass, %d layers",
            *(costs.cell_s * 1e6, costs.copy_s * 1e6, costs.overhead_s * 1e3, costs.pass_rows, costs.layers),
        )
    return pipeline, queue


def check_hooked(seams: Iterable[str]) -> None:
    """Raise UnsupportedError for a place without its hook: SGLang only logs what it could not put in place."""
    for seam in seams:
        if not hasattr(pkgutil.resolve_name(seam), "__wrapped__"):
            raise UnsupportedError(f"{seam} could not be hooked; the log above says why. Run `kvshare doctor`.")


def _outside(outer, inner):
    """One AROUND hook out of two."""
    return lambda original, *args, **kwargs: outer(functools.partial(inner, original), *args, **kwargs)


_SAMPLE = 256  # rows and tokens per measurement
_TIMES = 16  # the quickest counts: at start-up, others often hold the machine


def _measure_costs(runner, cos_sin, neox) -> CostModel:
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
