"""Tiny random models on disk, and an independent float64 forward pass over them.

Two kinds. `deep`: an ordinary random Llama, so KV depends on what stands before it. `flat`: the same, but only the last
layer's attention adds to the residual stream, so K and V of every layer depend on their token and position alone while
the answer still depends on all of them. On `flat` reuse must be exact, whatever is borrowed from where.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

HIDDEN, HEADS, GROUPS, DIM, INNER, VOCABULARY, LAYERS, POSITIONS = 64, 4, 2, 16, 96, 512, 4, 8192
THETA, EPSILON = 10000.0, 1e-5
_ADAPTED = ["k_proj", "q_proj", "v_proj"]
_PROJECTIONS = {
    "self_attn.q_proj": (HEADS * DIM, HIDDEN),
    "self_attn.k_proj": (GROUPS * DIM, HIDDEN),
    "self_attn.v_proj": (GROUPS * DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * DIM),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def write_llama(folder: Path, *, flat: bool = False, seed: int = 0) -> Path:
    """A model folder that SGLang loads; weights float32, the same for the same seed."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float32",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "head_dim": DIM,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": POSITIONS,
        "rms_norm_eps": EPSILON,
        "hidden_act": "silu",
        "rope_theta": THETA,
        "tie_word_embeddings": False,
        "eos_token_id": VOCABULARY - 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    save_file(_weights(flat, seed), str(folder / "model.safetensors"))
    return folder


def write_adapter(folder: Path, seed: int) -> Path:
    """An adapter (LoRA) of rank 4 on q, k and v of every layer, so that `flat` stays flat."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = torch.Generator().manual_seed(seed)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none", "target_modules": _ADAPTED}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    weights = {}
    for layer, name in itertools.product(range(LAYERS), _ADAPTED):
        out, into = _PROJECTIONS[f"self_attn.{name}"]
        at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
        weights[f"{at}.lora_A.weight"] = torch.randn(4, into, generator=draw) / into**0.5
        weights[f"{at}.lora_B.weight"] = torch.randn(out, 4, generator=draw) / 4
    save_file(weights, str(folder / "adapter_model.safetensors"))
    return folder


def _weights(flat: bool, seed: int) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)

    def matrix(out: int, into: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(out, into, generator=draw) / into**0.5

    weights = {"model.embed_tokens.weight": matrix(VOCABULARY, HIDDEN, HIDDEN**0.5)}
    for layer in range(LAYERS):
        for name, shape in _PROJECTIONS.items():
            # Large q and k make attention pick few tokens, so a wrong key or position shows.
            made = matrix(*shape, scale=1.5 if name[10:] in ("q_proj", "k_proj") else 1.0)
            if flat and name == "self_attn.o_proj" and layer < LAYERS - 1:
                made.zero_()
            weights[f"model.layers.{layer}.{name}.weight"] = made
        for name in ("input", "post_attention"):
            weights[f"model.layers.{layer}.{name}_layernorm.weight"] = torch.ones(HIDDEN)
    weights["model.norm.weight"] = torch.ones(HIDDEN)
    weights["lm_head.weight"] = matrix(VOCABULARY, HIDDEN, 2.0)
    return weights


@dataclass
class Truth:
    """One sequence computed from nothing.

    k, v float64 [layers, tokens, groups, dim]; logits float64 [tokens, vocabulary].
    """

    k: np.ndarray
    v: np.ndarray
    logits: np.ndarray

    @cached_property
    def log_p(self) -> np.ndarray:
        top = self.logits.max(axis=-1, keepdims=True)
        return self.logits - top - np.log(np.exp(self.logits - top).sum(axis=-1, keepdims=True))


class Reference:
    """The model of a folder in float64 numpy, written without SGLang: the definition of a Llama."""

    def __init__(self, folder: Path, adapter: Path | None = None):
        self.weights = {k: v.double().numpy() for k, v in load_file(str(folder / "model.safetensors")).items()}
        if adapter is not None:
            deltas = load_file(str(adapter / "adapter_model.safetensors"))
            for name in {key.rsplit(".lora_", 1)[0] for key in deltas}:
                a, b = (deltas[f"{name}.lora_{side}.weight"].double().numpy() for side in "AB")
                self.weights[name.removeprefix("base_model.model.") + ".weight"] += 2.0 * b @ a  # lora_alpha / r
        self._known: dict[bytes, Truth] = {}

    def __call__(self, tokens) -> Truth:
        """tokens int [n]; the last few hundred sequences are remembered."""
        tokens = np.asarray(tokens, np.int64)
        key = tokens.tobytes()
        if key not in self._known:
            if len(self._known) > 300:
                self._known.pop(next(iter(self._known)))
            self._known[key] = self._forward(tokens)
        return self._known[key]

    def _forward(self, tokens: np.ndarray) -> Truth:
        n, w = len(tokens), self.weights
        positions = np.arange(n)
        angle = positions[:, None] / THETA ** (np.arange(0, DIM, 2) / DIM)
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

        def turned(x: np.ndarray) -> np.ndarray:
            one, two = x[..., : DIM // 2], x[..., DIM // 2 :]
            return np.concatenate((one * cos - two * sin, two * cos + one * sin), axis=-1)

        def normed(x: np.ndarray, name: str) -> np.ndarray:
            return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + EPSILON) * w[name]

        hidden, keys, values = w["model.embed_tokens.weight"][tokens], [], []
        future = np.triu(np.full((n, n), -np.inf), 1)
        for layer in range(LAYERS):
            at = f"model.layers.{layer}."
            x = normed(hidden, at + "input_layernorm.weight")
            q, k, v = (
                (x @ w[f"{at}self_attn.{p}_proj.weight"].T).reshape(n, heads, DIM)
                for p, heads in (("q", HEADS), ("k", GROUPS), ("v", GROUPS))
            )
            q, k = turned(q), turned(k)
            keys.append(k)
            values.append(v)
            k, v = (np.repeat(x, HEADS // GROUPS, axis=1).transpose(1, 0, 2) for x in (k, v))  # [heads, n, dim]
            scores = q.transpose(1, 0, 2) @ k.transpose(0, 2, 1) * DIM**-0.5 + future
            weight = np.exp(scores - scores.max(axis=-1, keepdims=True))
            weight /= weight.sum(axis=-1, keepdims=True)
            seen = (weight @ v).transpose(1, 0, 2).reshape(n, HEADS * DIM)
            hidden = hidden + seen @ w[f"{at}self_attn.o_proj.weight"].T
            x = normed(hidden, at + "post_attention_layernorm.weight")
            gate = x @ w[f"{at}mlp.gate_proj.weight"].T
            up = x @ w[f"{at}mlp.up_proj.weight"].T
            hidden = hidden + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}mlp.down_proj.weight"].T
        logits = normed(hidden, "model.norm.weight") @ w["lm_head.weight"].T
        return Truth(np.stack(keys), np.stack(values), logits)
