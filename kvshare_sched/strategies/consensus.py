"""Consensus: several donors' mean stands in; what the fresh rows look at and the donors disagree on is recomputed.

Ours, built from what was measured (benchmarks/README.md): (1) the mean of two donors, weighted by how well their left
context agrees, is mostly closer to full prefill than one of them, and safer than the mean of four; (2) how far the
donors are apart tells which tokens depend on their context, before the request comes; (3) a token nobody looks at
does no harm, and the rows that will look are the fresh ones: a first pass of them over the assembled KV costs their
own cells once more and no check layer.
"""

import torch

from kvshare_sched.strategies.base import Evidence, Strategy, no_checks


def late_layers(layers: int) -> range:
    """Every other layer of the span where stale keys do the harm: from half the depth to five sixths of it.

    None in a model of fewer than three layers, where a first pass would be the whole model.
    """
    return range(layers // 2, layers * 5 // 6, 2) if layers > 2 else range(0)


def _looked_at_and_uncertain(evidence: Evidence) -> torch.Tensor:
    # The root: what the question looks at is a hint of what the answer will look at, not the whole of it.
    return evidence.alpha.sqrt() * evidence.spread


CONSENSUS = Strategy(
    "consensus",
    "ours; KVCOMM (arXiv 2510.12872) for the mean over donors",
    checks=no_checks,
    score=_looked_at_and_uncertain,
    donors=2,
    first_pass=late_layers,
    by_doubt=True,
)
