"""One tiny random model of every accepted kind, whose KV does not depend on context in the layer that is looked at.

SGLang builds the real class from a small configuration, on disk there is nothing but that; the weights are drawn in the
started engine. Then only one layer's attention adds to the residual stream. Below it K and V depend on their token and
position alone, above it nobody reads them: reuse must be exact, and each layer can be looked at in turn.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import bench
import torch

LAYERS, VOCABULARY, POSITIONS = 4, 512, 8192
REUSED = 96  # tokens of the text that is sent again
_SIZES = {
    "torch_dtype": "float32",
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": POSITIONS,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": VOCABULARY - 1,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}


@dataclass(frozen=True)
class Model:
    """A configuration: `changes` to the small sizes above."""

    name: str
    architecture: str  # SGLang's model class
    model_type: str  # of transformers' configuration
    changes: Mapping[str, object] = field(default_factory=dict)

    @property
    def config(self) -> dict[str, object]:
        return _SIZES | {"architectures": [self.architecture], "model_type": self.model_type} | dict(self.changes)

    def write(self, folder: Path) -> Path:
        """A model folder without weights."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        return folder


def _llama(name: str, **changes) -> Model:
    return Model(name, "LlamaForCausalLM", "llama", changes)


def _rope(kind: str, **values) -> dict[str, object]:
    return {"rope_parameters": {"rope_theta": 10000.0, "rope_type": kind, **values}}


_YARN = {"factor": 4.0, "original_max_position_embeddings": 1024, "mscale": 1.0, "mscale_all_dim": 1.0}
_YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "llama_4_scaling_beta": 0.1}
# Every class on the list of `kvshare_sched.engine.sglang.support`, and what its configurations vary in.
ACCEPTED = (
    _llama("llama"),
    _llama("llama-tied", tie_word_embeddings=True),
    _llama("llama-bias", attention_bias=True, mlp_bias=True),
    _llama("llama-one-kv-head", num_key_value_heads=1),
    _llama("llama-as-many-kv-heads", num_key_value_heads=4),
    _llama("llama-head-32", head_dim=32),
    _llama("llama-partial-rotary", partial_rotary_factor=0.5),
    _llama(
        "llama-llama3",
        **_rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256),
    ),
    _llama("llama-linear", **_rope("linear", factor=4.0)),
    _llama("llama-dynamic", **_rope("dynamic", factor=2.0)),
    Model("iquest-coder", "IQuestCoderForCausalLM", "llama"),
    Model("internlm3", "InternLM3ForCausalLM", "llama", {"qkv_bias": True}),
    Model("mistral", "MistralForCausalLM", "mistral", {"sliding_window": None}),
    Model("ministral3", "Ministral3ForCausalLM", "ministral3"),
    Model("ministral3-yarn", "Ministral3ForCausalLM", "ministral3", _rope("yarn", **_YARN)),  # as it is published
    Model("phi3", "Phi3ForCausalLM", "phi3", {"sliding_window": None}),
    Model("phi3-partial-rotary", "Phi3ForCausalLM", "phi3", {"sliding_window": None, "partial_rotary_factor": 0.75}),
    Model("qwen2", "Qwen2ForCausalLM", "qwen2"),
    Model("qwen2-moe", "Qwen2MoeForCausalLM", "qwen2_moe", {"shared_expert_intermediate_size": 0, **_EXPERTS}),
    Model("qwen3", "Qwen3ForCausalLM", "qwen3"),
    Model("qwen3-moe", "Qwen3MoeForCausalLM", "qwen3_moe", {"mlp_only_layers": [], **_EXPERTS}),
    Model("glm4", "Glm4ForCausalLM", "glm4", {"partial_rotary_factor": 0.5}),
    Model("apertus", "ApertusForCausalLM", "apertus", {"hidden_act": "xielu"}),
)
_DENSE = {"interleave_moe_layer_step": 100, "num_local_experts": 1, "num_experts_per_tok": 1, "moe_layers": []}
LLAMA4 = Model(
    "llama4",
    "Llama4ForCausalLM",
    "llama4_text",
    {"intermediate_size_mlp": 96, "use_qk_norm": False, "attn_temperature_tuning": False, **_DENSE},
)
TELEFLM = Model(
    "teleflm",
    "TeleFLMForCausalLM",
    "llama",
    {"use_mup": True, "input_mult": 2.0, "output_mult": 1.0, "mup_scale_factor": 1.0},
)
NANBEIGE = Model("nanbeige", "NanbeigeForCausalLM", "nanbeige")


@contextlib.contextmanager
def running(model: Model, folder: Path, *, arguments: Sequence[str] = (), **options) -> Iterator[bench.Bench]:
    """A started engine on the model, with seeded weights. options: as `bench.running` takes them."""
    words = ["--load-format", "dummy", *arguments]
    with bench.running(model.write(folder), arguments=words, **options) as engine:
        fill(engine.runner.model)
        yield engine


def fill(model: torch.nn.Module, seed: int = 0) -> None:
    """Weights at the scales of a trained model: streams keep their size, attention picks a few tokens."""
    draw = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        made = torch.randn(parameter.shape, generator=draw)
        if parameter.dim() < 2:
            made = (0.1 * made) + (1.0 if "norm" in name else 0.5 if "act_fn" in name else 0.0)
        elif "embed" in name:
            made *= 0.2
        else:
            made *= (1.5 if "qkv" in name else 1.0) / parameter.shape[-1] ** 0.5
        parameter.data.copy_(made)


class OneLayer:
    """Lets one layer's attention add to the residual stream, and no other's."""

    def __init__(self, model: torch.nn.Module):
        self._projections = [_output_projection(model, name) for name in _attention(model)]
        self._weights = [p.weight.detach().clone() for p in self._projections]

    def __call__(self, chosen: int) -> None:
        for layer, (projection, weight) in enumerate(zip(self._projections, self._weights, strict=True)):
            projection.weight.data.copy_(weight if layer == chosen else torch.zeros_like(weight))


def _attention(model: torch.nn.Module) -> list[str]:
    from sglang.srt.layers.radix_attention import RadixAttention

    found = {m.layer_id: name for name, m in model.named_modules() if isinstance(m, RadixAttention)}
    return [found[layer] for layer in sorted(found)]


def _output_projection(model: torch.nn.Module, attention: str) -> torch.nn.Module:
    from sglang.srt.layers.linear import RowParallelLinear

    parent = model.get_submodule(attention.rpartition(".")[0])
    (projection,) = (m for m in parent.children() if isinstance(m, RowParallelLinear))
    return projection


def text(seed: int, length: int) -> list[int]:
    """Random ids; two seeds have no run in common."""
    return torch.randint(1, VOCABULARY - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@dataclass
class Compared:
    """One request that reused a text, beside the same request computed without."""

    layer: int  # whose attention was looked at
    strategy: str
    report: dict
    difference: float  # largest |log p - log p| of the output tokens up to the first that differs, nats
    same_tokens: bool


def compare(engine: bench.Bench, strategies: Mapping[str, Iterable[int]]) -> list[Compared]:
    """Each strategy on each of its layers against the same prompt computed in full."""
    one, found = OneLayer(engine.runner.model), []
    document = text(1, REUSED)
    for layer in sorted({layer for layers in strategies.values() for layer in layers}):
        one(layer)
        for number in range(2):  # two donors, so that consensus has something to compare
            engine.send(text(10 + number, 40) + document + text(20, 9), extra_key=f"{layer}", tokens=1)
            engine.run()
        for number, strategy in enumerate(name for name, layers in strategies.items() if layer in layers):
            prompt = text(100 + number, 57 + 3 * number) + document + text(200, 21)
            found.append(_compared(layer, strategy, *_both(engine, prompt, layer, strategy)))
    return found


def _both(engine: bench.Bench, prompt: list[int], layer: int, strategy: str) -> tuple[bench.Ticket, bench.Ticket]:
    asked = {"tokens": 3, "return_logprob": True, "logprob_start_len": -1}
    wish = {"kvshare": {"strategy": strategy, "ratio": 0.2}}
    borrowed = engine.send(prompt, extra_key=f"{layer}", custom=wish, **asked)
    engine.run()
    computed = engine.send(prompt, extra_key=f"{layer} apart", custom={"kvshare": "off"}, **asked)
    engine.run()
    return borrowed, computed


def _compared(layer: int, strategy: str, borrowed: bench.Ticket, computed: bench.Ticket) -> Compared:
    difference = 0.0
    for ours, theirs, mine, full in zip(
        borrowed.output, computed.output, borrowed.output_logprobs, computed.output_logprobs, strict=True
    ):
        difference = max(difference, abs(mine - full))
        if ours != theirs:
            break
    return Compared(layer, strategy, borrowed.report, difference, borrowed.output == computed.output)
