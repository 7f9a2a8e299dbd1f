"""LoRA in SGLang pins host memory without asking whether it can: a torch without an accelerator raises there."""

import functools

import torch
from sglang.srt.lora.lora_manager import LoRAManager
from torch.overrides import TorchFunctionMode


class _Unpinned(TorchFunctionMode):
    """Tensors that are to be pinned are made as they are."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs = dict(kwargs or {})
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def install() -> None:
    """The two places where the manager pins: when it wraps the model's layers, and for every batch."""
    for name in ("init_state", "prepare_lora_batch"):
        setattr(LoRAManager, name, _unpinned(getattr(LoRAManager, name)))


def _unpinned(method):
    @functools.wraps(method)
    def called(*args, **kwargs):
        with _Unpinned():
            return method(*args, **kwargs)

    return called
