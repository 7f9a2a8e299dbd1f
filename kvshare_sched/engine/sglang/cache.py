"""The radix cache backend `kvshare`: SGLang's UnifiedRadixCache plus three overrides.

The exact tree stays exact: a request's KV enters it only up to the first token that reused another
context's KV. What enters is indexed as a donor, what is flushed leaves the index.
"""

from __future__ import annotations

from sglang.srt.mem_cache.registry import TreeCacheBuildContext, create_unified_radix_cache
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from kvshare_sched.engine.sglang.requests import namespace_of, said_of, tokens_of
from kvshare_sched.engine.sglang.wiring import wire
from kvshare_sched.reuse.session import session_of


class KVShareRadixCache(UnifiedRadixCache):
    """`pipeline` and `queue` are attached by the factory; without them this is the stock cache."""

    pipeline = None
    queue = None

    def checkpoint(self, req, *, up_to: int, **kwargs) -> None:
        session = session_of(req)
        if session is not None:
            up_to = min(up_to, self.pipeline.exact_up_to(session, req.kv.cache_protected_len))
        super().checkpoint(req, up_to=up_to, **kwargs)
        if session is not None:
            self.pipeline.publish(session, namespace_of(req), tokens_of(req)[: req.kv.cache_protected_len])

    def on_release(self, req, *, checkpointed: bool) -> None:
        super().on_release(req, checkpointed=checkpointed)
        self._released(req)

    def claim_kv_row(self, req) -> bool:
        """A turn of a streaming session ends and leaves its KV to the next one: `on_release` never comes."""
        claimed = super().claim_kv_row(req)
        if claimed:
            self._released(req)
        return claimed

    def _released(self, req) -> None:
        if (session := session_of(req)) is not None:
            self.pipeline.release(session, lambda: said_of(req), req.finished())
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
