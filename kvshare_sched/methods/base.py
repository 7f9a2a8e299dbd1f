"""What a reuse method is: when it chooses rows, and by which score.

A method is a named, frozen instance of `Method`. Its `schedule` says which rows run at which layer; the schedule is
made once for a request and rides on the plan, so price, charge, execution and report read the same one. The executor
runs the layers in spans; at each check layer it hands the method the evidence gathered there and keeps the reused rows
with the highest scores for the layers above. A method without check layers chooses before layer 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class MethodSettings(Protocol):
    """What a method may know of the settings of a request."""

    @property
    def ratio(self) -> float:
        """Share of the reused tokens that may be recomputed."""

    @property
    def check_layer(self) -> int: ...

    @property
    def forced_head(self) -> int:
        """First tokens of a segment that are always recomputed."""


class Work(Protocol):
    """What a stretch of a prompt consists of, in tokens; `records.plan.Counts` is one."""

    @property
    def reused(self) -> int: ...

    @property
    def forced(self) -> int:
        """Of the reused tokens, those recomputed whatever the score says."""

    @property
    def doubtful(self) -> float:
        """The reused tokens, each weighted by how much of its left context is foreign."""

    @property
    def lone(self) -> int:
        """Positive where most reused text has a single donor."""


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
class Span:
    """Consecutive layers in which the same rows run: fresh ones, forced ones and a share of the reused ones."""

    layers: range
    share: float | None = None  # of the reused tokens, in [0, 1]; None: all rows
    of_doubtful: bool = False  # the share is of the doubtful tokens


@dataclass(frozen=True, slots=True)
class Schedule:
    """Which rows run at which layer. `rows` is the only interpreter: prices, charges and reports come from it."""

    spans: tuple[Span, ...]  # of all layers, in order
    first_pass: int = 0  # layers that the fresh rows run through once before, in text with a single donor

    @property
    def layers(self) -> int:
        return self.spans[-1].layers.stop

    @property
    def recompute_all(self) -> bool:
        """Every row runs at every layer: the reference, and what a ratio of 1 means."""
        return all(span.share is None for span in self.spans)

    @property
    def checks(self) -> tuple[Check, ...]:
        """The layers after which rows are chosen by what they have shown."""
        pairs = zip(self.spans, self.spans[1:], strict=False)
        return tuple(Check(span.layers.stop - 1, above.share) for span, above in pairs)

    def rows(self, count: int, work: Work) -> list[int]:
        """Rows expected at each layer of a chunk of `count` tokens, before scores are known; O(layers)."""
        fresh, per_layer = count - work.reused, []
        again = fresh if work.lone > 0 else 0
        for span in self.spans:
            chosen = count
            if span.share is not None:
                basis = work.doubtful if span.of_doubtful else work.reused
                chosen = fresh + max(work.forced, math.ceil(span.share * basis))
            per_layer += [min(count, chosen + (again if layer < self.first_pass else 0)) for layer in span.layers]
        return per_layer

    def mean_share(self) -> float:
        """Share of the reused tokens' (layer x token) cells that are computed, 0..1; forced ones not counted."""
        return sum(len(s.layers) * (1.0 if s.share is None else s.share) for s in self.spans) / self.layers


@dataclass(frozen=True, slots=True)
class Method:
    """One reuse method."""

    name: str
    source: str
    checks: Callable[[MethodSettings, int], tuple[Check, ...]]  # (config, number of layers) -> schedule
    score: Callable[[Evidence], torch.Tensor] | None = None  # higher = recompute first; <= 0 = never
    # (reused positions int64 [n] ascending, budget in rows) -> those to recompute, for a strategy without checks
    upfront: Callable[[torch.Tensor, int], torch.Tensor] | None = None
    forced_head: Callable[[MethodSettings], int] = lambda config: config.forced_head
    needs_alpha: bool = False
    donors: int = 1  # donors of one text that stand in together
    # number of layers -> those on which donors are compared
    compared: Callable[[int], range] = lambda layers: range(0)
    # number of layers -> those where a first pass of the fresh rows shows who is looked at in text with one donor
    first_pass: Callable[[int], range] | None = None
    by_doubt: bool = False  # the budget is a share of the tokens whose left context is foreign, not of all reused ones
    reference: bool = False  # asked for to compare with, so neither priced nor promoted; every row runs
    budget: bool = True  # spends the ratio; False: recomputes nothing beside the forced rows

    def schedule(self, settings: MethodSettings, layers: int) -> Schedule:
        """The schedule of a request with these settings, in a model of `layers` layers."""
        share = settings.ratio if self.budget else 0.0
        if self.reference or share >= 1:
            return Schedule((Span(range(layers)),))
        first_pass = self.first_pass(layers).stop if self.first_pass else 0
        start, current, spans = 0, None, []
        if self.upfront is not None or self.first_pass is not None:  # chooses before layer 0
            return Schedule((Span(range(layers), share, self.by_doubt),), first_pass)
        checks = self.checks(settings, layers)  # none in a model that is too shallow: all rows run
        for check in checks:
            spans.append(Span(range(start, check.layer + 1), current))
            start, current = check.layer + 1, check.share
        return Schedule((*spans, Span(range(start, layers), current)), first_pass)


def no_checks(config: MethodSettings, layers: int) -> tuple[Check, ...]:
    """Choose before layer 0."""
    return ()


def first_check(config: MethodSettings, layers: int) -> int:
    """The configured check layer, or the highest that leaves a layer above it; negative in a model of one layer.

    After the last layer SGLang makes the logits at once and drops the residual stream: nothing is left to select for.
    A model of two layers is checked at layer 0, which shows no deviation, so only the forced rows are computed.
    """
    return min(config.check_layer, layers - 2)


def one_check(config: MethodSettings, layers: int) -> tuple[Check, ...]:
    """One selection, after the check layer; none in a model of one layer, where all rows run."""
    at = first_check(config, layers)
    return (Check(at, config.ratio),) if at >= 0 else ()
