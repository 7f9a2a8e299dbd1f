"""The radix cache backend `kvshare`: SGLang's UnifiedRadixCache plus three overrides.

The exact tree stays exact: a request's KV enters it only up to the first token that reused another
context's KV. What enters is indexed as a donor, what is flushed leaves the index.
"""

from __future__ import annotations

from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from kvshare_sched.sglang_adapter import namespace_of, said_of, tokens_of
from kvshare_sched.wiring import wire


class KVShareRadixCache(UnifiedRadixCache):
    """`pipeline` and `queue` are attached by the factory; without them this is the stock cache."""

    pipeline = None
    queue = None

    def checkpoint(self, req, *, up_to: int, **kwargs) -> None:
        if self.pipeline is not None:
            up_to = min(up_to, self.pipeline.exact_up_to(req.rid))
        super().checkpoint(req, up_to=up_to, **kwargs)
        if self.pipeline is not None:
            self.pipeline.publish(req.rid, namespace_of(req), tokens_of(req)[: req.kv.cache_protected_len])

    def on_release(self, req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        if self.pipeline is not None:
            self.pipeline.release(req.rid, lambda: said_of(req))
        if self.queue is not None:
            self.queue.released(req)

    def reset(self) -> None:
        super().reset()
        if self.pipeline is not None:
            self.pipeline.flush()


def create(ctx: TreeCacheBuildContext) -> UnifiedRadixCache:
    """Factory for `register_radix_cache_backend`: build the cache and wire reuse into this rank's engine."""
    cache = create_unified_radix_cache(ctx, cache_class=KVShareRadixCache)
    cache.pipeline, cache.queue = wire(cache, ctx)
    return cache
