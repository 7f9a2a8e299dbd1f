"""Tensor operators of kvshare-sched: no requests, no tenants, no SGLang. `reference` defines their meaning."""

from kvshare_kernels.consensus import Donors, blend, fit, key_spread
from kvshare_kernels.deviation import attention_column_mass, token_deviation, top_k
from kvshare_kernels.device import in_triton, in_use, on_device
from kvshare_kernels.few_rows import linear
from kvshare_kernels.kv_copy import copy_rotate, rotation_rows
from kvshare_kernels.paged_rows import PagedRows, slots_of
from kvshare_kernels.ragged_attention import attend_last, attend_rows, plan_rows

__all__ = [
    "Donors",
    "PagedRows",
    "attend_last",
    "attend_rows",
    "attention_column_mass",
    "blend",
    "copy_rotate",
    "fit",
    "in_triton",
    "in_use",
    "key_spread",
    "linear",
    "on_device",
    "plan_rows",
    "rotation_rows",
    "slots_of",
    "token_deviation",
    "top_k",
]
