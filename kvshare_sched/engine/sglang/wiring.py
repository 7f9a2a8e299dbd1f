"""One engine put together: prices measured, pipeline, executor and queue made, hooks put in place.

`wire` runs in the cache factory, so nothing is touched unless `--radix-cache-backend kvshare` was chosen.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
from collections.abc import Iterable

from kvshare_sched.engine.sglang import audit_hooks, hooks, queue_hooks
from kvshare_sched.engine.sglang.batches import SGLangEngine
from kvshare_sched.engine.sglang.hooks import When
from kvshare_sched.engine.sglang.measure_costs import measure_costs
from kvshare_sched.engine.sglang.rotary import rotary_table
from kvshare_sched.engine.sglang.support import refuse
from kvshare_sched.engine.sglang.tree import DonorTree
from kvshare_sched.errors import UnsupportedError
from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.runtime.executor import Executor
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.borrow_log import BorrowLog
from kvshare_sched.tenants.scheduler_state import Desk

logger = logging.getLogger(__name__)


def wire(cache, ctx):
    """Build one rank's pipeline, executor and queue around its cache and model; returns (pipeline, queue or None).

    Raises ConfigError or UnsupportedError: the server must not start half wired.
    """
    from sglang.srt.arg_groups.model_override_base import resolved_view
    from sglang.srt.plugins.hook_registry import HookRegistry
    from sglang.srt.runtime_context import get_parallel

    config = KVShareConfig.load()
    runner = ctx.tp_worker.model_runner
    refuse(ctx.server_args, runner)
    cos_sin, neox = rotary_table(runner.model, runner.model_config.context_len)
    group = get_parallel().tp_group
    costs = group.broadcast_object(measure_costs(runner, cos_sin, neox), src=0)
    metrics = None
    if ctx.tp_rank == 0 and ctx.params.enable_metrics:
        metrics = ShareMetrics()
        metrics.started(config)
    records = config.tenants_file and ctx.tp_rank == 0
    desk = Desk(BorrowLog(config.borrow_log) if records else None)
    pipeline = Pipeline(config, DonorTree(cache), costs, metrics, desk=desk)
    chunk = resolved_view(ctx.server_args).chunked_prefill_size or 0
    engine = SGLangEngine(runner, chunk)
    engine.install(Executor(pipeline, engine, cos_sin, neox).forward)
    if config.audit_share > 0 and config.mode == "on":
        pipeline.auditor.agree = functools.partial(group.broadcast_object, src=0)
        audit_hooks.watch(pipeline.auditor, runner.model)
    queue = queue_hooks.create(config, ctx, pipeline, metrics)
    # All of them, whatever is switched on: SGLang hooks a place once a process, and each looks at its engine's cache.
    places = hooks.register(When.CACHE, *([When.CACHE_WITH_TENANTS] if config.tenants_file else []))
    HookRegistry.apply_hooks()
    check_hooked(places)
    if ctx.tp_rank == 0:
        logger.info("kvshare: %s", config.describe())
        logger.info(
            "kvshare: measured %.1f us a cell, %.1f us a copied token, %.2f ms overhead, %.0f rows a pass, %d layers",
            *(costs.cell_s * 1e6, costs.copy_s * 1e6, costs.overhead_s * 1e3, costs.pass_rows, costs.layers),
        )
    return pipeline, queue


def check_hooked(places: Iterable[str]) -> None:
    """Raise UnsupportedError for a place without its hook: SGLang only logs what it could not put in place."""
    for place in places:
        if not hasattr(pkgutil.resolve_name(place), "__wrapped__"):
            raise UnsupportedError(f"{place} could not be hooked; the log above says why. Run `kvshare doctor`.")
