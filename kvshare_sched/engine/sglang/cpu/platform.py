"""A portable CPU platform for stock SGLang.

Stock SGLang on a CPU either imports vLLM's custom operators (no platform) or wants a CPU `sgl_kernel`
(`SGLANG_USE_CPU_ENGINE=1`) that no registry has. An out-of-tree platform makes it take its plain torch
paths instead.
"""

from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum
from sglang.srt.platforms.interface import PlatformCapabilities, SRTPlatform

from kvshare_sched.engine.sglang.cpu import ATTENTION_BACKEND

_MEMORY_SHARE = 0.3  # of main memory, weights included


class PortableCpuPlatform(SRTPlatform, CpuDeviceMixin):
    """CPU devices through the out-of-tree seam: no graphs, no Triton, our attention backend."""

    _enum = PlatformEnum.OOT
    device_name = "cpu"
    device_type = "cpu"
    capabilities = PlatformCapabilities()

    def apply_server_args_defaults(self, server_args) -> None:
        # SGLang has filled in intel_amx by now; its kernels are in no registry, so it never means a choice here.
        if server_args.attention_backend in (None, "intel_amx"):
            server_args.attention_backend = ATTENTION_BACKEND
        # Stock takes 80 % of the device for the KV pool; on a CPU the device is everybody's main memory.
        if server_args.mem_fraction_static is None and server_args.max_total_tokens is None:
            server_args.mem_fraction_static = _MEMORY_SHARE
        server_args.lora_backend = "torch_native"  # the others are Triton's

    def init_backend(self) -> None:
        from kvshare_sched.engine.sglang.cpu import pinning

        pinning.install()

    def get_default_attention_backend(self) -> str:
        return ATTENTION_BACKEND

    def is_pin_memory_available(self, device=None) -> bool:
        return False
