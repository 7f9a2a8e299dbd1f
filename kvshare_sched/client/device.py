"""Which hardware this machine has; needs no torch import."""

from __future__ import annotations

import os


def has_nvidia_gpu() -> bool:
    """True when the NVIDIA driver exposes at least one device; needs no torch import."""
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidia0")
