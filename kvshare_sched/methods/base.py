"""What a strategy is: when to choose, and by which score.

A strategy is a named, frozen instance of `Strategy`. The executor runs the layers in spans; at each check
layer it hands the strategy the evidence gathered there and keeps the best-scored reused rows for the layers
above. A strategy without check layers chooses before layer 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvshare_sched.settings import KVShareConfig


@dataclass(frozen=True, slots=True)
class Evidence:
    """What is known about the candidate rows of one request, all float32 [n], row order = position order.

    Sums over this rank's heads are already summed over all tensor-parallel ranks.
    """

    positions: torch.Tensor  # int64 [n], reused positions still in the running
    k_squared: torch.Tensor | None = None  # squared L2 norm of the key deviation at the check layer
    v_squared: torch.Tensor | None = None
    v_absolute: torch.Tensor | None = None  # L1 norm of the value deviation
    alpha: torch.Tensor | None = None  # attention received, mean over heads
    # how far the donors' keys are apart, relative; with one donor, how far it may be off
    spread: torch.Tensor | None = None
    work: torch.Tensor | None = None  # what the row costs, relative to the prompt's first


@dataclass(frozen=True, slots=True)
class Check:
    """Select after this layer: keep `share` of the reused tokens for the layers above."""

    layer: int  # 0-based; below the last layer, since there must be one to compute fewer rows in
    share: float  # of the request's reused tokens in the batch, not only of those still in the running


@dataclass(frozen=True, slots=True)
class Strategy:
    """One selection rule."""

    name: str
    source: str
    checks: Callable[[KVShareConfig, int], tuple[Check, ...]]  # (config, number of layers) -> schedule
    score: Callable[[Evidence], torch.Tensor] | None = None  # higher = recompute first; <= 0 = never
    # (reused positions int64 [n] ascending, budget in rows) -> those to recompute, for a strategy without checks
    upfront: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    forced_head: Callable[[KVShareConfig], int] = lambda config: config.forced_head
    needs_alpha: bool = False
    donors: int = 1  # donors of one text that stand in together
    # number of layers -> those on which donors are compared
    compared: Callable[[int], range] = lambda layers: range(0)
    # number of layers -> those where a first pass of the fresh rows shows who is looked at in text with one donor
    first_pass: Callable[[int], range] | None = None
    by_doubt: bool = False  # the budget is a share of the tokens whose left context is foreign, not of all reused ones


def no_checks(config: KVShareConfig, layers: int) -> tuple[Check, ...]:
    """Choose before layer 0."""
    return ()


def first_check(config: KVShareConfig, layers: int) -> int:
    """The configured check layer, or the highest that leaves a layer above it; negative in a model of one layer.

    After the last layer SGLang makes the logits at once and drops the residual stream: nothing is left to select for.
    A model of two layers is checked at layer 0, which shows no deviation, so only the forced rows are computed.
    """
    return min(config.check_layer, layers - 2)


def one_check(config: KVShareConfig, layers: int) -> tuple[Check, ...]:
    """One selection, after the check layer; none in a model of one layer, where all rows run."""
    at = first_check(config, layers)
    return (Check(at, config.ratio),) if at >= 0 else ()
