"""The loaded model's linear layers and its vocabulary head multiply few rows as `kvshare_kernels.linear` does."""

import torch
from sglang.srt.layers.quantization.unquant import UnquantizedEmbeddingMethod, UnquantizedLinearMethod

from kvshare_kernels import linear


class FewRowsLinearMethod(UnquantizedLinearMethod):
    """A linear layer without quantization."""

    def apply(self, layer, x, bias=None):
        return linear(x, layer.weight, bias)


class FewRowsEmbeddingMethod(UnquantizedEmbeddingMethod):
    """A vocabulary head; SGLang asks it because its name is not one of those it multiplies itself."""

    def apply(self, layer, x, bias=None):
        return linear(x, layer.weight, bias)


_INSTEAD = {UnquantizedLinearMethod: FewRowsLinearMethod, UnquantizedEmbeddingMethod: FewRowsEmbeddingMethod}


def install(model: torch.nn.Module) -> None:
    """Every layer with plain float32 weights; call once they are loaded. A second call changes nothing."""
    for module in model.modules():
        instead = _INSTEAD.get(type(getattr(module, "quant_method", None)))
        if instead is not None and module.weight.dtype == torch.float32:
            module.quant_method = instead()
