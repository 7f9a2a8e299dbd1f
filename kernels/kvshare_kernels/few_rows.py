"""The linear layer of a decode step on a CPU: a few rows against weights that no cache holds.

torch gives float32 products to MKL, which leaves most of the memory's bandwidth unused when rows are few: on 2 AVX512
cores of an AMD processor the weights of SmolLM2-135M's layers take 26 ms for 1 row and 37 ms for 4. oneDNN, which torch
ships as well, takes 14.5 ms and 16.2 ms at the same precision. Half precision goes to oneDNN in any case. Larger
products stay with torch, as in stock SGLang, though oneDNN was twice as fast there too on this processor (308 rows 5.8
against 12.8 ms a layer, 1,900 rows 34 against 76): attention, which goes to MKL as well, should move along with them.

The plain twin is `reference.linear`.
"""

import torch
import torch.nn.functional as F

FEW = 64  # rows; more of them are a prefill's


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [n, in], weight [out, in], bias [out] or None; returns [n, out] in x's dtype. No gradients."""
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.shape[0] <= FEW
        and torch.backends.mkldnn.is_available()
    ):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)
