"""SGLang's entry point: register names, import nothing heavy, wire nothing until our backend is chosen."""

BACKEND = "kvshare"
CPU_ATTENTION = "kvshare_cpu"


def register() -> None:
    """Entry point of group `sglang.srt.plugins`; runs in every SGLang process, idempotent."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.srt.server_args import add_attention_backend_choices

    from kvshare_sched import client_report, support

    if CPU_ATTENTION not in ATTENTION_BACKENDS:
        add_attention_backend_choices([CPU_ATTENTION])
        register_attention_backend(CPU_ATTENTION)(_cpu_attention)
    if BACKEND not in registered_radix_cache_backends():
        register_radix_cache_backend(BACKEND, _radix_cache)
    for seam, hook in {**support.hooks(), **client_report.hooks()}.items():
        HookRegistry.register(seam, hook, HookType.AROUND)


def _cpu_attention(runner):
    from kvshare_sched.cpu.attention import PortableCpuAttention

    return PortableCpuAttention(runner)


def _radix_cache(ctx):
    from radix_ext.backend import create

    return create(ctx)
