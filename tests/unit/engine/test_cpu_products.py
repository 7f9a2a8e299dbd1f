"""Which layers of a loaded model multiply few rows our way, and that the vocabulary head is asked."""

import torch
from sglang.srt.layers.logits_processor import should_apply_lm_head_quant_method
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from kvshare_sched.engine.sglang.cpu import products


class Layer(torch.nn.Module):
    def __init__(self, method, dtype=torch.float32):
        super().__init__()
        self.quant_method = method
        self.weight = torch.nn.Parameter(torch.randn(6, 4).to(dtype), requires_grad=False)


class Foreign(UnquantizedLinearMethod):
    """Somebody else's way to multiply."""


def test_plain_float32_layers_only():
    model = torch.nn.ModuleDict(
        {
            "linear": Layer(UnquantizedLinearMethod()),
            "head": Layer(UnquantizedEmbeddingMethod()),
            "narrow": Layer(UnquantizedLinearMethod(), torch.bfloat16),
            "foreign": Layer(Foreign()),
            "norm": torch.nn.LayerNorm(4),
        }
    )
    products.install(model)
    products.install(model)
    found = {name: type(getattr(layer, "quant_method", None)) for name, layer in model.items()}
    assert found == {
        "linear": products.FewRowsLinearMethod,
        "head": products.FewRowsEmbeddingMethod,
        "narrow": UnquantizedLinearMethod,
        "foreign": Foreign,
        "norm": type(None),
    }
    head = model["head"]
    assert should_apply_lm_head_quant_method(head, head.quant_method)
    x = torch.randn(2, 4)
    for name in ("linear", "head"):
        layer = model[name]
        torch.testing.assert_close(layer.quant_method.apply(layer, x), x @ layer.weight.T)
    assert torch.equal(head.quant_method.embedding(head, torch.tensor([3])), head.weight[3:4])
