"""SGLang on a plain CPU: an out-of-tree platform, an attention backend with fast products of few rows, and
torchvision's missing operators.

`activate` is the entry point of group `sglang.srt.platforms`. It answers only where no accelerator is
present and nobody chose SGLang's own CPU engine, so on a GPU machine the platform stays invisible.
`register_attention` is an entry point of group `sglang.srt.plugins` of its own: `SGLANG_PLUGINS=kvshare_cpu`
runs stock SGLang on this platform and backend without anything else of ours.
"""

import os

from kvshare_sched.client.device import has_nvidia_gpu

ATTENTION_BACKEND = "kvshare_cpu"


def activate() -> str | None:
    """Entry point: the platform class to use, or None where another platform should serve."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or has_nvidia_gpu():
        return None
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    from kvshare_sched.engine.sglang.cpu import threads, torchvision_ops

    threads.configure()
    torchvision_ops.install()
    return "kvshare_sched.engine.sglang.cpu.platform.PortableCpuPlatform"


def register_attention() -> None:
    """Entry point: make `--attention-backend kvshare_cpu` known; runs in every SGLang process, idempotent."""
    from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS, register_attention_backend
    from sglang.srt.server_args import add_attention_backend_choices

    if ATTENTION_BACKEND not in ATTENTION_BACKENDS:
        add_attention_backend_choices([ATTENTION_BACKEND])
        register_attention_backend(ATTENTION_BACKEND)(_create_attention)


def _create_attention(model_runner):
    from kvshare_sched.engine.sglang.cpu import products
    from kvshare_sched.engine.sglang.cpu.attention import PortableCpuAttention

    products.install(model_runner.model)
    return PortableCpuAttention(model_runner)
