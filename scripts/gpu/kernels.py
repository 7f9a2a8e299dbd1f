"""Stage `kernels`: each operator against what the device can do. Needs torch and Triton; FlashInfer where it is.

Ceilings first: bytes a device copy moves, operations a matrix product does. Then, by model shape and prompt length,
copying with rotation (share of the copy), attention over scattered rows (share of the product), and the rest.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.errors import TritonError

from kvshare_kernels import PagedRows, attention_column_mass, copy_rotate, scattered, token_deviation, top_k
from kvshare_kernels.triton_attention import Blocks, TritonAttention

from .results import Results, seconds
from .shapes import SHAPES, Shape

# cuDNN's first: on Hopper it is ahead of the FlashAttention 2 that torch would take, and reuse off deserves the best.
_CAUSAL = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def ceilings(device: str, small: bool) -> tuple[float, float]:
    """(bytes per second of a device copy, read and written; operations per second of a product) in half precision."""
    size = 1 << (20 if small else 30)
    source = torch.randn(size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    copied = 4 * size / seconds(lambda: target.copy_(source), device=device)
    n = 256 if small else 8192
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return copied, 2 * n**3 / seconds(lambda: a @ b, device=device)


def rotary(shape: Shape, positions: int, device: str) -> torch.Tensor:
    """SGLang's table: cosines, then sines, float32 [positions, dim]."""
    speeds = shape.theta ** (-torch.arange(0, shape.dim, 2, dtype=torch.float64, device=device) / shape.dim)
    angles = torch.arange(positions, dtype=torch.float64, device=device)[:, None] * speeds
    return torch.cat((angles.cos(), angles.sin()), dim=-1).float()


def chosen_rows(tokens: int, share: float, seed: int = 0) -> np.ndarray:
    """Scattered positions and the prompt's end, as a selection leaves them; int64 ascending."""
    rng = np.random.default_rng(seed)
    end = max(1, min(64, tokens // 8))  # the question
    inner = rng.choice(tokens - end, max(1, int(share * tokens)), replace=False)
    return np.concatenate((np.sort(inner), np.arange(tokens - end, tokens)))


def attentions(shape: Shape, device: str) -> dict:
    """Name -> kernel, those that this machine has; says why not of the others."""
    found = {}
    size = shape.heads, shape.groups, shape.dim
    for name, kernel in scattered.kernels(*size, dtype=torch.bfloat16, device=device):
        if isinstance(kernel, str):
            print(f"no {name}: {kernel}", flush=True)
        else:
            found[name] = kernel
    return found


def causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """torch's causal attention, what reuse is compared with; q [1, H, n, D], k and v [1, G, n, D]."""
    with sdpa_kernel(_CAUSAL, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def copying(results: Results, name: str, tokens: int, device: str, ceiling: float) -> None:
    """Copy and rotate all layers of a prompt out of scattered runs."""
    shape = SHAPES[name]
    size = (2 * tokens, shape.groups, shape.dim)
    keys, values = (
        [torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(shape.layers)] for _ in range(2)
    )
    table = rotary(shape, 2 * tokens, device)
    block = min(512, tokens)
    order = torch.randperm(2 * tokens // block, device=device)
    in_runs = torch.arange(2 * tokens, device=device).view(-1, block)[order].flatten()  # as an allocator hands them out
    for layout, slots in (("runs", in_runs), ("single slots", torch.randperm(2 * tokens, device=device))):
        source, target = slots[:tokens].split(block), slots[tokens:].split(block)
        shifts = [(i * 7919) % tokens - tokens // 2 for i in range(len(source))]
        runs = list(zip(source, target, shifts, strict=True))
        spent = seconds(lambda: copy_rotate(keys, values, runs, table, neox=True), device=device)  # noqa: B023
        moved = 2 * tokens * shape.layers * shape.kv_bytes / spent
        results.add(
            model_shape=name, kernel="copy_rotate", layout=layout, prompt_tokens=tokens, seconds=spent,
            gb_s=moved / 1e9, share_of_limit=moved / ceiling,
        )  # fmt: skip


def attending(results: Results, name: str, tokens: int, share: float, device: str, ceiling: float, kernels) -> None:
    """One layer's attention: scattered rows, few rows over everything, and torch's causal prefill of all rows."""
    shape = SHAPES[name]
    size = (tokens, shape.groups, shape.dim)
    keys, values = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
    slots = torch.randperm(tokens, device=device).int()
    for kind, positions in (("scattered", chosen_rows(tokens, share)), ("few", np.arange(tokens - 16, tokens))):
        rows = PagedRows.checked(positions, [0, len(positions)], [0, tokens], slots)
        q = torch.randn(len(positions), shape.heads, shape.dim, device=device, dtype=torch.bfloat16)
        work = 4 * shape.heads * shape.dim * float((positions + 1).sum())
        for kernel, attention in kernels.items():
            planned = seconds(lambda: attention.plan(rows), device="cpu", repeats=3)  # noqa: B023
            spent = seconds(lambda: attention.run(q, keys, values, shape.dim**-0.5), device=device)  # noqa: B023
            results.add(
                model_shape=name, kernel=f"attention: {kernel}", rows=kind, prompt_tokens=tokens, ratio=share,
                seconds=spent, plan_s=planned, tflop_s=work / spent / 1e12, share_of_limit=work / spent / ceiling,
            )  # fmt: skip
    q = torch.randn(1, shape.heads, tokens, shape.dim, device=device, dtype=torch.bfloat16)
    k, v = (x.transpose(0, 1).unsqueeze(0) for x in (keys, values))
    spent = seconds(lambda: causal(q, k, v), device=device, repeats=3)
    work = 2 * shape.heads * shape.dim * float(tokens) ** 2
    results.add(
        model_shape=name, kernel="attention: torch, all rows", prompt_tokens=tokens, seconds=spent,
        tflop_s=work / spent / 1e12, share_of_limit=work / spent / ceiling,
    )  # fmt: skip


def scoring(results: Results, name: str, tokens: int, device: str, ceiling: float) -> None:
    """Deviation, attention mass and the choice, as a check layer needs them."""
    shape = SHAPES[name]
    fresh, cached = (
        torch.randn(tokens, shape.groups, shape.dim, device=device, dtype=torch.bfloat16) for _ in range(2)
    )
    score = torch.rand(tokens, device=device)
    q = torch.randn(16, shape.heads, shape.dim, device=device, dtype=torch.bfloat16)
    last = torch.arange(tokens - 16, tokens, device=device)
    read = float(2 * tokens * shape.kv_bytes // 2)
    for kernel, work, moved in (
        ("token_deviation", lambda: token_deviation(fresh, cached), read),
        ("attention_column_mass, 16 rows", lambda: attention_column_mass(q, cached, last, 0.1), read),
        ("top_k", lambda: top_k([score], [tokens // 10]), 4.0 * tokens),
    ):
        spent = seconds(work, device=device)
        results.add(
            model_shape=name, kernel=kernel, prompt_tokens=tokens, seconds=spent, gb_s=moved / spent / 1e9,
            share_of_limit=moved / spent / ceiling,
        )  # fmt: skip


def run(results: Results, shapes: list[str], lengths: list[int], share: float, device: str) -> None:
    """The whole stage; the shapes' own kernels are built once each."""
    copied, product = ceilings(device, small=device == "cpu")
    results.note(copy_gb_s=copied / 1e9, product_tflop_s=product / 1e12)
    for name in shapes:
        kernels = attentions(SHAPES[name], device)
        for tokens in lengths:
            copying(results, name, tokens, device, copied)
            attending(results, name, tokens, share, device, product, kernels)
            scoring(results, name, tokens, device, copied)
            if device != "cpu":
                torch.cuda.empty_cache()


def tune(results: Results, shapes: list[str], lengths: list[int], share: float, device: str) -> None:
    """Stage `tune`: the Triton attention cut in every way, for whoever changes its defaults."""
    for name in shapes:
        shape, tokens = SHAPES[name], lengths[-1]
        size = (tokens, shape.groups, shape.dim)
        keys, values = (torch.randn(size, device=device, dtype=torch.bfloat16) for _ in range(2))
        positions = chosen_rows(tokens, share)
        slots = torch.randperm(tokens, device=device).int()
        rows = PagedRows.checked(positions, [0, len(positions)], [0, tokens], slots)
        q = torch.randn(len(positions), shape.heads, shape.dim, device=device, dtype=torch.bfloat16)
        work = 4 * shape.heads * shape.dim * float((positions + 1).sum())
        for cut in itertools.product((64, 128), (32, 64, 128), (4, 8), (2, 3, 4)):
            attention = TritonAttention(shape.heads, shape.groups, shape.dim, blocks=Blocks(*cut))
            attention.plan(rows)
            try:
                spent = seconds(lambda: attention.run(q, keys, values, shape.dim**-0.5), device=device)  # noqa: B023
            except (TritonError, RuntimeError) as why:  # too large for the GPU, or the compiler gives up
                print(f"not {cut}: {why}"[:300], flush=True)
                continue
            results.add(
                model_shape=name, kernel="attention: triton", blocks=list(cut), prompt_tokens=tokens, ratio=share,
                seconds=spent, tflop_s=work / spent / 1e12,
            )  # fmt: skip
