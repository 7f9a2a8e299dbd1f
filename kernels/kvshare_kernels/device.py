"""Where tensors live: which operators Triton serves, and how small host arrays get to the device without a wait."""

import os

import numpy as np
import torch


def in_triton(tensor: torch.Tensor) -> bool:
    """Triton's kernels serve tensors on a GPU, and everywhere in Triton's interpreter (TRITON_INTERPRET=1, tests)."""
    return tensor.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


def on_device(values: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """The values as a tensor on `like`'s device. To a GPU through pinned memory, so that the host does not wait."""
    values = torch.from_numpy(np.ascontiguousarray(values))
    return values.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else values


def in_use(tensor: torch.Tensor) -> None:
    """Keep a tensor's memory until what the current stream has been given is done, whoever lets go of it before.

    For tensors made on another stream: an engine that overlaps batches drops them while the GPU still reads them.
    """
    if tensor.is_cuda:
        tensor.record_stream(torch.cuda.current_stream(tensor.device))
