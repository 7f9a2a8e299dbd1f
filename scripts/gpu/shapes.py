"""The model shapes that are measured, with dummy weights: what the published configurations say."""

from typing import NamedTuple


class Shape(NamedTuple):
    """One decoder of the Llama family."""

    layers: int
    hidden: int
    heads: int
    groups: int  # KV heads
    dim: int  # of a head
    inner: int  # of the feed-forward part
    vocabulary: int
    theta: float
    bias: bool = False  # of Q, K and V
    context: int = 131_072

    @property
    def kv_bytes(self) -> int:
        """K and V of one token in one layer, half precision."""
        return 2 * self.groups * self.dim * 2

    @property
    def weights(self) -> int:
        """Numbers in the matrices of one layer."""
        return self.hidden * (2 * self.heads + 2 * self.groups) * self.dim + 3 * self.hidden * self.inner

    def config(self) -> dict:
        """config.json of such a model, for SGLang's `--load-format dummy`."""
        architecture, kind = ("Qwen2ForCausalLM", "qwen2") if self.bias else ("LlamaForCausalLM", "llama")
        return {
            "architectures": [architecture],
            "model_type": kind,
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": self.context,
            "rope_theta": self.theta,  # without scaling: positions are moved by plain rotation
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "bos_token_id": 1,
            "eos_token_id": 2,
        }


SHAPES = {
    "llama-3.1-8b": Shape(32, 4096, 32, 8, 128, 14_336, 128_256, 500_000.0),
    "qwen2.5-7b": Shape(28, 3584, 28, 4, 128, 18_944, 152_064, 1_000_000.0, bias=True),
    "yi-1.5-9b": Shape(48, 4096, 32, 4, 128, 11_008, 64_000, 5_000_000.0),
    "tiny": Shape(3, 64, 4, 2, 16, 96, 128, 10_000.0),  # to try the stages without a GPU
}
