"""Consensus: what several donors agree on stands; what they disagree on is recomputed, and tells whom to trust.

Ours, built from what was measured (benchmarks/README.md): (1) how far a text's donors are apart tells which tokens
depend on their context, before the request comes; (2) on every layer the rows computed anew show which donors come
closest to this request's context, and the rest of the text follows that mixture (a ridge regression of a few
unknowns; KVCOMM, arXiv 2510.12872, blends by likeness of the prompts instead); (3) where a text has one donor there is
nothing to compare: then a first pass of the fresh rows shows who is looked at, because a token nobody looks at does
no harm. It costs the fresh rows' own cells once more on the lower third of the layers. Tokens are ranked by what they
are worth per unit of work, since a late row attends to more keys.
"""

import torch

from kvshare_sched.methods.base import Evidence, Method, no_checks


def late_layers(layers: int) -> range:
    """Where donors are compared: every other layer of the span in which stale keys do the harm, half to five sixths."""
    return range(layers // 2, layers * 5 // 6, 2) if layers > 2 else range(layers)


def early_layers(layers: int) -> range:
    """Where a first pass sees who is looked at: between a fifth and a third of the depth.

    Deeper layers show no more (measured) and cost more. None in a model of fewer than three layers, where a first pass
    would be half of the model.
    """
    return range(layers // 5, max(layers // 3, layers // 5 + 1), 2) if layers > 2 else range(0)


def _looked_at_and_uncertain(evidence: Evidence) -> torch.Tensor:
    # The root: what the question looks at is a hint of what the answer will look at, not the whole of it.
    return evidence.alpha.sqrt() * evidence.spread / evidence.work


CONSENSUS = Method(
    "consensus",
    "ours; KVCOMM (arXiv 2510.12872) for several donors standing in together",
    checks=no_checks,
    score=_looked_at_and_uncertain,
    donors=4,
    compared=late_layers,
    first_pass=early_layers,
    by_doubt=True,
)
