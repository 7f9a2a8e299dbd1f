"""SGLang's entry point: register names, import nothing heavy, wire nothing until our backend is chosen."""

from kvshare_sched.errors import ConfigError
from kvshare_sched.settings import BACKEND, KVShareConfig


def register() -> None:
    """Entry point of group `sglang.srt.plugins`; runs in every SGLang process, idempotent."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

    from kvshare_sched.engine.sglang import hooks
    from kvshare_sched.engine.sglang.hooks import When

    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, _radix_cache)
    hooks.register(When.LOAD, *([When.LOAD_WITH_TENANTS] if _with_tenants() else []))


def _with_tenants() -> bool:
    """Whether a tenants file is named. A wrong setting is told by the launcher, which refuses to start."""
    try:
        return bool(KVShareConfig.load().tenants_file)
    except ConfigError:
        return False


def _radix_cache(ctx):
    from kvshare_sched.engine.sglang.cache import create

    return create(ctx)
