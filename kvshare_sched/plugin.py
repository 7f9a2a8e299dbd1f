"""SGLang's entry point: register names, import nothing heavy, wire nothing until our backend is chosen."""

BACKEND = "kvshare"


def register() -> None:
    """Entry point of group `sglang.srt.plugins`; runs in every SGLang process, idempotent."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kvshare_sched import client_report, pages, support

    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, _radix_cache)
    hooks = {**support.hooks(), **client_report.hooks(), **pages.hooks()}
    if _with_tenants():
        from kvshare_sched.tenants import hooks as tenant_hooks

        hooks |= tenant_hooks.hooks()
    for seam, hook in hooks.items():
        HookRegistry.register(seam, hook, HookType.AROUND)


def _with_tenants() -> bool:
    """Whether a tenants file is named. A wrong setting is told by the launcher, which refuses to start."""
    from kvshare_sched.config import KVShareConfig
    from kvshare_sched.errors import ConfigError

    try:
        return bool(KVShareConfig.load().tenants_file)
    except ConfigError:
        return False


def _radix_cache(ctx):
    from radix_ext.backend import create

    return create(ctx)
