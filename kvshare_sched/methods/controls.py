"""Rules that choose before layer 0: EPIC, and the controls every figure is read against.

`epic`: the first tokens of every reused run (LegoLink, arXiv 2410.15332), as many as the ratio buys.
`naive`: nothing but the fresh rows, positions corrected. `random`: a seeded choice. `full`: every row.
"""

import torch

from kvshare_sched.methods.base import Method, no_checks

_SEED = 20260730


def _run_heads(positions: torch.Tensor, budget: int) -> torch.Tensor:
    """The same number of first tokens from every run of consecutive positions, within the budget."""
    if len(positions) == 0:
        return positions
    starts = torch.ones_like(positions, dtype=torch.bool)
    starts[1:] = positions[1:] != positions[:-1] + 1
    first = torch.nonzero(starts).flatten()
    run = torch.cumsum(starts.long(), 0) - 1
    into_run = torch.arange(len(positions)) - first[run]
    per_run = budget // len(first)
    return positions[into_run < per_run]


def _random(positions: torch.Tensor, budget: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(_SEED + len(positions))
    return positions[torch.randperm(len(positions), generator=generator)[:budget]].sort().values


ALL = (
    Method("epic", "arXiv 2410.15332 (LegoLink)", checks=no_checks, upfront=_run_heads),
    Method("random", "control", checks=no_checks, upfront=_random),
    Method(
        "naive",
        "control: reuse without recompute",
        checks=no_checks,
        upfront=lambda positions, budget: positions[:0],
        budget=False,
        forced_head=lambda config: 0,
    ),
    Method(
        "full",
        "reference: recompute everything",
        checks=no_checks,
        upfront=lambda positions, budget: positions,
        reference=True,
    ),
)
