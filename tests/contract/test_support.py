"""The rotary table that keys are moved with, on SGLang's own rotary embeddings, and settings that are refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.layers.rotary_embedding import get_rope
from torch import nn

from kvshare_sched.engine.sglang import support
from kvshare_sched.engine.sglang.rotary import rotary_table
from kvshare_sched.errors import UnsupportedError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Scaled, and a rotation all the same.
ROTATIONS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear-3": {"rope_type": "linear", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 1024,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "dynamic-alpha": {"rope_type": "dynamic", "factor": 2.0, "alpha": 1000.0},
    "yarn": {  # as Ministral 3 has it: nothing is made longer
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 1024,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}


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


def turned(rotary: nn.Module, keys: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return rotary.forward_native(positions, keys.clone(), keys.clone())[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ROTATIONS)
def test_a_key_that_is_moved_is_the_key_at_its_new_position(kind, dtype):
    """In float32 whatever the model's dtype, whose rounding the model's own table has."""
    from kvshare_kernels import rotation_rows
    from kvshare_kernels.kv_copy import rotate_run

    table, neox = rotary_table(model(*[rope(ROTATIONS[kind], dtype)] * 3))
    assert table.dtype == torch.float32 and neox
    exact = rope(ROTATIONS[kind])
    keys = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    start, shift = torch.tensor([0, 7, 500, 1000, 2000]), 1913
    cos, sin = rotation_rows(table, shift)
    moved = rotate_run(turned(exact, keys, start)[:, None], cos, sin, neox=neox)[:, 0]
    # SGLang rounds the angle to float32, at position 4096 to 1.2e-4 in the worst case.
    assert (moved - turned(exact, keys, start + shift)).abs().max() < 2e-3
    assert table.shape == rope(ROTATIONS[kind]).cos_sin_cache.shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_table_is_as_good_as_float32_can_be(dtype):
    table, _ = rotary_table(model(rope(None, dtype, positions=131072, base=500000)))
    frequencies = (1.0 / 500000 ** (torch.arange(0, 64, 2).float() / 64)).double()  # as SGLang rounds them
    for at in (1, 1000, 65535, 131071):
        angle = at * frequencies
        assert (table[at].double() - torch.cat((angle.cos(), angle.sin()))).abs().max() < 1e-6


def test_long_contexts_are_no_reason_to_refuse():
    """A million positions: SGLang's float32 angles are off by 0.03 at the end."""
    rotary_table(model(rope(None, positions=1_010_000, base=1_000_000)))


def test_rows_behind_the_context_do_not_count():
    """SGLang adds spare rows to the table, without the scaling."""
    rotary = rope({"rope_type": "linear", "factor": 4.0}, positions=1024)
    rotary._ensure_cos_sin_cache_length(6000)
    table, _ = rotary_table(model(rotary), 4096)
    assert len(table) == 4096
    with pytest.raises(UnsupportedError, match="not a plain rotation"):
        rotary_table(model(rotary), 5000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_angles_that_change_with_the_position_are_refused(dtype):
    """As a table that is made anew for longer prompts would be, or one that switches factors."""
    switching, longer = rope(None, dtype), rope(None, dtype)
    switching.cos_sin_cache[1024:] = rope({"rope_type": "linear", "factor": 2.0}, dtype).cos_sin_cache[1024:4096]
    longer.cos_sin_cache *= 1.1
    for broken in (switching, longer):
        with pytest.raises(UnsupportedError, match="not a plain rotation.*times what rounding explains.*rope scaling"):
            rotary_table(model(broken))
    yarn = rope({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}, dtype)
    with pytest.raises(UnsupportedError, match="not a plain rotation"):  # makes keys longer
        rotary_table(model(yarn))


def test_two_tables_by_length_are_refused():
    factors = {"short_factor": [1.0] * 32, "long_factor": [2.0] * 32, "original_max_position_embeddings": 1024}
    rotary = get_rope(64, 64, 4096, 10000, True, {"rope_type": "longrope", **factors}, dtype=torch.float32)
    with pytest.raises(UnsupportedError, match="no single table"):
        rotary_table(model(rotary))


def test_layers_that_turn_their_keys_otherwise_are_refused_by_name():
    one, other = rope(), rope(base=20000)
    with pytest.raises(UnsupportedError, match=r"no rotary embedding: 1\.attn, 3\.attn; accepted: the same one"):
        rotary_table(model(one, None, one, None))
    with pytest.raises(UnsupportedError, match="2 rotary embeddings"):
        rotary_table(model(one, other, one))


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


@pytest.mark.parametrize("name", support.SETTINGS)
def test_every_setting_that_is_not_fine_is_refused_by_name(name, monkeypatch):
    from sglang.srt.arg_groups import model_override_base
    from sglang.srt.model_executor.cuda_graph_config import Backend

    settings = SimpleNamespace(
        **{"kv_cache_dtype": "auto", "device": "cpu", "enable_torch_compile": False, "dp_size": 1},
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=Backend.DISABLED)),
    )
    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    monkeypatch.setattr(model_override_base, "model_config_of", lambda args: None)
    monkeypatch.setattr(support, "_model_refusals", lambda model: [])
    assert support.refusals(settings) == []
    setattr(settings, name, "something else")
    (line,) = support.refusals(settings)
    assert line.startswith(f"{name}='something else' is not supported: ") and "Accepted: " in line
