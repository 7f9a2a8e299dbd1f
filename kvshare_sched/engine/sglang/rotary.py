"""The model's rotary table, at the precision that rotation of cached keys needs."""

from __future__ import annotations

import math

import torch

from kvshare_sched.engine.sglang.support import _attention_layers, _some
from kvshare_sched.errors import UnsupportedError

_BLOCK = 4096  # rows of the table made at once, in float64


def rotary_table(model, context_len: int | None = None) -> tuple[torch.Tensor, bool]:
    """The model's cosine and sine table, [positions, rotary_dim] float32, and whether halves rotate (neox).

    It is made from the angles of the model's own table before that was rounded to the model's dtype. The model's table
    must be that rotation at every position: then angles add up, which is what moving cached keys relies on. Positions
    from context_len on are left out: no request has them, and SGLang's spare rows there know of no scaling. Raises
    UnsupportedError for layers without a rotary embedding, for several of them, and for scaled variants that change
    length or switch factors by position.
    """
    rotary = _rotary(model)
    stored = rotary.cos_sin_cache[:context_len]
    exact = stored if stored.dtype == torch.float32 else rotary._compute_cos_sin_cache()[:context_len]
    angles = _angles(exact).to(stored.device)
    table = torch.empty(stored.shape, dtype=torch.float32, device=stored.device)
    for first in range(0, len(table), _BLOCK):
        rows = slice(first, first + _BLOCK)
        positions = torch.arange(first, first + len(table[rows]), dtype=torch.float64, device=stored.device)
        turned = positions[:, None] * angles
        table[rows] = torch.cat((turned.cos(), turned.sin()), dim=-1)
        # Half a unit of rounding of what is near 1, and of the float32 angle before, which grows with the position.
        accepted = torch.finfo(stored.dtype).eps / 2 + 1e-6 + positions * 2.0**-22
        beyond = ((stored[rows].float() - table[rows]).abs().amax(dim=-1) / accepted).max().item()
        if not beyond <= 1:  # NaN too
            raise UnsupportedError(
                f"rotary embedding {type(rotary).__name__} is not a plain rotation (its table is off by {beyond:.2g} "
                "times what rounding explains): cached keys cannot be moved to another position. Use a model without "
                "rope scaling."
            )
    return table, bool(rotary.is_neox_style)


def _rotary(model) -> torch.nn.Module:
    """The rotary embedding that all attention layers share. Raises UnsupportedError."""
    held: dict[torch.nn.Module | None, list[str]] = {}
    for name in _attention_layers(model):
        held.setdefault(getattr(model.get_submodule(name.rpartition(".")[0]), "rotary_emb", None), []).append(name)
    if without := held.pop(None, None):
        raise UnsupportedError(
            f"layers have no rotary embedding: {_some(without)}; accepted: the same one in all of them. Their keys do "
            "not depend on positions and must not be turned. Use another model, or drop --radix-cache-backend kvshare."
        )
    if len(held) != 1:
        raise UnsupportedError(
            f"the attention layers have {len(held)} rotary embeddings; accepted: the same one in every layer. Keys "
            "could not be moved. Use another model, or drop --radix-cache-backend kvshare."
        )
    (rotary,) = held
    table = getattr(rotary, "cos_sin_cache", None)
    if not isinstance(table, torch.Tensor) or table.dim() != 2 or len(table) < 2:
        raise UnsupportedError(
            f"rotary embedding {type(rotary).__name__} has no single table of cosines and sines by position: cached "
            "keys cannot be moved to another position. Use a model without rope scaling."
        )
    return rotary


def _angles(table: torch.Tensor) -> torch.Tensor:
    """By how much one position turns each pair, float64 [R/2]. table: float32 [positions, R].

    Row 1 gives it to the last digits of float32; rows 2, 4, 8 ... give as many more as the position has, whole turns
    being known from the row before.
    """
    cos, sin = table.double().chunk(2, dim=-1)
    angles, at = torch.atan2(sin[1], cos[1]), 1
    while 2 * at < len(table):
        at *= 2
        seen = torch.atan2(sin[at], cos[at])
        angles = (seen + 2 * math.pi * ((at * angles - seen) / (2 * math.pi)).round()) / at
    return angles
