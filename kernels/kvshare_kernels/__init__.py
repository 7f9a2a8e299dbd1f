"""Tensor operators of kvshare-sched: no requests, no tenants, no SGLang. `reference` defines their meaning."""

from kvshare_kernels.deviation import attention_column_mass, token_deviation, top_k
from kvshare_kernels.kv_copy import copy_mean, copy_rotate
from kvshare_kernels.ragged_attention import attend_last, attend_rows, plan_rows

__all__ = [
    "attend_last",
    "attend_rows",
    "attention_column_mass",
    "copy_mean",
    "copy_rotate",
    "plan_rows",
    "token_deviation",
    "top_k",
]
