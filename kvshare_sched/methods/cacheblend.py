"""Recompute the tokens that deviate most: CacheBlend and KVShare.

CacheBlend (arXiv 2405.16444, section 4): all rows run up to a check layer; the tokens whose fresh K and V
differ most from the loaded ones are recomputed above it, over three selecting layers with a shrinking share
("gradual filtering"; the schedule is ours, the paper gives none).

KVShare (arXiv 2503.16525, prefill stage of Dual-Stage High Deviation): the value deviation weighted by the
attention a token receives, sum_i |dA_i| <= sum_j alpha_j |dV_j|; one selection.
"""

import torch

from kvshare_sched.methods.base import Check, Evidence, Method, MethodSettings, first_check, one_check

_SPREAD = 0.3  # the first filtering layer keeps 1.3 r, the last 0.7 r
_FILTERS = 3


def gradual_filtering(config: MethodSettings, layers: int) -> tuple[Check, ...]:
    """Nested selections at consecutive layers from the check layer on; the mean share above it is the ratio."""
    first = first_check(config, layers)
    above = layers - 1 - first  # layers that may compute fewer rows
    count = min(_FILTERS, above)
    if config.ratio >= 1 or count < 2:
        return one_check(config, layers)
    steps = [1 - 2 * i / (count - 1) for i in range(count)]  # 1 ... -1
    # The last share serves all the remaining layers, so the filters before it are paid for by lowering it.
    weights = [1 + _SPREAD * s for s in steps]
    mean = (sum(weights) + weights[-1] * (above - count)) / above
    return tuple(Check(first + i, min(1.0, config.ratio * w / mean)) for i, w in enumerate(weights))


def _kv_deviation(evidence: Evidence) -> torch.Tensor:
    return evidence.k_squared + evidence.v_squared


CACHEBLEND = Method("cacheblend", "arXiv 2405.16444, 4.3", checks=gradual_filtering, score=_kv_deviation)
