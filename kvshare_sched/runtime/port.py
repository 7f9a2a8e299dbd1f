"""What the executor asks of an engine. `engine.sglang.batches` fulfils it; a test may fulfil it with plain tensors.

A *batch* is the engine's own object and stays opaque here. A *view* is what layers run over: some rows of a batch.
Rows are numbered as in the batch; positions count from the start of a request's prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from kvshare_sched.reuse.session import Session

# Called with (layer, q, k, v): q [rows, query heads, D], k and v [rows, KV heads, D] of the rows that run.
LayerHook = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class BatchRows:
    """One request's rows in a prefill batch."""

    session: Session | None  # None: it was not admitted by us
    row: int  # first row
    start: int  # prompt position of that row
    end: int


class KVPool(Protocol):
    """The engine's KV pool: one buffer of keys and one of values a layer, [slots, KV heads, D]."""

    def get_key_buffer(self, layer: int) -> torch.Tensor: ...

    def get_value_buffer(self, layer: int) -> torch.Tensor: ...


class Ranks(Protocol):
    """The tensor-parallel group of this rank."""

    world_size: int

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor: ...


class View(Protocol):
    """Rows that layers run over."""

    rows: np.ndarray | None  # int64, ascending, the batch's row of each row; None: all of them
    positions: torch.Tensor  # int64 [rows]
    slots: torch.Tensor  # int64 [rows], where each row's K and V are written


class Engine(Protocol):
    """One rank's model with its KV pool."""

    layers: int
    decode_rows: int  # rows that a view of `extend` may have, at most
    pool: KVPool
    ranks: Ranks
    even_at: float  # position at which a row's attention costs as many operations as its products with the weights
    scaling: Mapping[int, float]  # factor of the attention scores, by layer

    def requests(self, batch: Any) -> list[BatchRows]:
        """The requests of a prefill batch, in its order; empty for any other batch."""

    def decoding(self, batch: Any) -> Sequence[Session | None]:
        """The sessions of a decode batch, a row each; empty for any other batch."""

    def whole(self, batch: Any) -> View:
        """All rows, with the attention plan that the engine made for them."""

    def select(self, batch: Any, rows: np.ndarray) -> View:
        """Some rows (int64, ascending), attention planned and adapters routed; replaces the plan before it."""

    def narrow(self, batch: Any, view: View, rows: np.ndarray, layer: int) -> View:
        """`select` between two layers: hidden state and residual of the rows still kept go along to `layer`."""

    def extend(self, batch: Any, extra: Mapping[int, np.ndarray], tokens: np.ndarray) -> View:
        """A decode batch with repair rows. extra: batch row -> prompt positions, rows ascending; tokens: their ids."""

    def run(self, view: View, start: int, end: int) -> Any:
        """Run layers [start, end); the last one also gives the engine's output."""

    def finish(self, batch: Any, view: View, layer: int) -> Any:
        """Run the layers from `layer` on; the output is that of the batch as the engine made it."""

    def decode(self, batch: Any, view: View) -> Any:
        """The whole model over a view of `extend`; the output is that of the batch as the engine made it."""

    def ahead(self, batch: Any) -> AbstractContextManager[View]:
        """A view of a decode batch whose first layers run before the batch itself; leaves no state behind."""

    def table(self, view: View, row: int, end: int | None = None) -> torch.Tensor:
        """Slots of the positions [0, end) of the request that a row of the view belongs to, int64 [end].

        None: all up to a decode row's own position.
        """

    def watching(
        self, layers: Sequence[int], *, before: LayerHook | None = None, after: LayerHook | None = None
    ) -> AbstractContextManager[None]:
        """Inside the block `before` runs before a layer attends, its K and V not yet written; `after` runs after."""

    def ordinary(self, batch: Any) -> Any:
        """The engine's own forward, of a batch that nothing has been done to."""

    def restore(self, batch: Any) -> None:
        """Make the batch again what the engine has made of it, after a failure."""

    def all_rows(self, batch: Any) -> Any:
        """The engine's own forward over a batch that was to reuse, in pieces where it holds more rows than usual."""

    def fence(self) -> None:
        """The tables of slots have been read until here: the engine's scheduler must not write them before."""
