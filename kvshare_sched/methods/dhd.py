"""Dual-stage high deviation (KVShare, arXiv 2503.16525, prefill stage): one selection after a check layer.

The score is the value deviation weighted by the attention a token receives, sum_i |dA_i| <= sum_j alpha_j |dV_j|.
"""

from __future__ import annotations

import torch

from kvshare_sched.methods.base import Evidence, Method, one_check


def _attention_weighted(evidence: Evidence) -> torch.Tensor:
    return evidence.alpha * evidence.v_absolute


DHD = Method("dhd", "arXiv 2503.16525, prefill DHD", checks=one_check, score=_attention_weighted, needs_alpha=True)
