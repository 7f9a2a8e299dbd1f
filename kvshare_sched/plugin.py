"""SGLang's entry point: register names, import nothing heavy, wire nothing until our backend is chosen."""

BACKEND = "kvshare"


def register() -> None:
    """Entry point of group `sglang.srt.plugins`; runs in every SGLang process, idempotent."""
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from kvshare_sched import client_report, pages, support

    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, _radix_cache)
    for seam, hook in {**support.hooks(), **client_report.hooks(), **pages.hooks()}.items():
        HookRegistry.register(seam, hook, HookType.AROUND)


def _radix_cache(ctx):
    from radix_ext.backend import create

    return create(ctx)
