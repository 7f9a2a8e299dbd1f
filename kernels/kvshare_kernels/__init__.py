"""Tensor operators of kvshare-sched: no requests, no tenants, no SGLang. `reference` defines their meaning."""

from kvshare_kernels.consensus import Donors, blend, fit, key_spread
from kvshare_kernels.deviation import attention_column_mass, token_deviation, top_k
from kvshare_kernels.few_rows import linear
from kvshare_kernels.kv_copy import copy_rotate, rotation_rows
from kvshare_kernels.ragged_attention import attend_last, attend_rows, plan_rows

__all__ = [
    "Donors",
    "attend_last",
    "attend_rows",
    "attention_column_mass",
    "blend",
    "copy_rotate",
    "fit",
    "key_spread",
    "linear",
    "plan_rows",
    "rotation_rows",
    "token_deviation",
    "top_k",
]
