"""Layers that are refused, with SGLang's own rotary embeddings."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from torch import nn

from kvshare_sched import support
from kvshare_sched.errors import UnsupportedError


class Attention(nn.Module):
    def __init__(self, layer: int, rotary: nn.Module | None):
        super().__init__()
        self.rotary_emb = rotary
        self.attn = RadixAttention(4, 64, 1.0, 2, layer)


def model(*rotary: nn.Module | None) -> nn.Module:
    return nn.ModuleList(Attention(layer, each) for layer, each in enumerate(rotary))


def rope(scaling=None, dtype=torch.float32, *, positions=4096, base=10000, dim=64) -> nn.Module:
    made = get_rope(dim, dim, positions, base, True, scaling, dtype=dtype)
    made.cos_sin_cache = made.cos_sin_cache.clone()  # SGLang shares it with whoever asks next
    return made


def test_two_tables_by_length_are_refused():
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "original_max_position_embeddings": 1024}
    rotary = get_rope(64, 64, 4096, 10000, True, {"rope_type": "longrope", **factors}, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="no single table"):
        support.rotary_table(model(rotary))


def test_layers_that_turn_their_keys_otherwise_are_refused_by_name():
    one, other = rope(), rope(base=20000)
    with pytest.raises(UnsupportedError, match=r"no rotary embedding: 1\.attn, 3\.attn; accepted: the same one"):
        support.rotary_table(model(one, None, one, None))
    with pytest.raises(UnsupportedError, match="2 rotary embeddings"):
        support.rotary_table(model(one, other, one))


def test_layers_that_do_not_attend_to_everything_are_refused_by_name():
    layers = model(*[rope()] * 5)
    assert support._attention_refusals(layers) == []
    layers[1].attn.use_irope = True
    layers[2].attn.sliding_window_size = 512
    layers[3].attn.is_cross_attention = True
    said = support._attention_refusals(layers)
    assert [line.partition(";")[0] for line in said] == [
        "layers attend in chunks (use_irope): 1.attn",
        "layers slide a window: 2.attn",
        "layers are not causal self-attention: 3.attn",
    ]
