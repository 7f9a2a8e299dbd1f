"""SGLang on a plain CPU: an out-of-tree platform, an attention backend, and torchvision's missing operators.

`activate` is the entry point of group `sglang.srt.platforms`. It answers only where no accelerator is
present and nobody chose SGLang's own CPU engine, so on a GPU machine the platform stays invisible.
"""

import os


def has_nvidia_gpu() -> bool:
    """True when the NVIDIA driver exposes at least one device; needs no torch import."""
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidia0")


def activate() -> str | None:
    """Entry point: the platform class to use, or None where another platform should serve."""
    if os.environ.get("SGLANG_USE_CPU_ENGINE", "0") == "1" or has_nvidia_gpu():
        return None
    import torch

    if torch.cuda.is_available() or torch.xpu.is_available():
        return None
    from kvshare_sched.cpu import threads, torchvision_ops

    threads.configure()
    torchvision_ops.install()
    return "kvshare_sched.cpu.platform.PortableCpuPlatform"
