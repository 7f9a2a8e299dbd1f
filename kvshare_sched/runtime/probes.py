"""What a check layer shows: how far each reused token's K and V deviate, and how much attention it receives.

The layer's attention module is asked just before it runs: its q, k, v are fresh, the KV pool still holds the
donors' copies in the very slots the layer is about to write.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from kvshare_kernels import attention_column_mass, on_device, token_deviation
from kvshare_sched.methods.base import Evidence
from kvshare_sched.runtime.chunk import Chunk
from kvshare_sched.runtime.port import Engine, View

_VOICES = 16  # last fresh rows whose attention counts; measured, all of them were no better
# Deviation below this share of the value's own norm is arithmetic noise: such a token is not worth a row.
_NOISE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


class Probes:
    """Measures what the layers of one rank's model show while they run."""

    def __init__(self, engine: Engine):
        self.engine = engine

    @contextlib.contextmanager
    def scores(self, layer: int, view: View, chunks: list[Chunk], keep: np.ndarray) -> Iterator[list[torch.Tensor]]:
        """While `layer` runs inside the block, the list fills with one score tensor a chunk.

        view: the rows the layer sees; keep: bool, rows of the batch still running. Scores follow the chunk's running
        candidates, ascending.
        """
        found: list[torch.Tensor] = []

        def measure(_, q, k, v):
            evidence = self._evidence(layer, q, k, v, view, chunks, keep)
            found.extend(c.session.method.score(e) for c, e in zip(chunks, evidence, strict=True))

        with self.engine.watching([layer], before=measure):
            yield found

    def _evidence(self, layer, q, k, v, view: View, chunks: list[Chunk], keep) -> Iterator[Evidence]:
        """q, k, v [rows of the view, heads, D] as the layer is about to use them; the pool holds the donors' copies."""
        pool = self.engine.pool
        keys, values = pool.get_key_buffer(layer), pool.get_value_buffer(layer)
        for chunk in chunks:
            running = chunk.candidates[keep[chunk.candidates]]
            local = running if view.rows is None else np.searchsorted(view.rows, running)
            index = on_device(local, q)
            slots = view.slots[index].long()
            cached_v = values[slots].to(v.dtype)
            _, k_squared = token_deviation(k[index], keys[slots].to(k.dtype))
            v_absolute, v_squared = token_deviation(v[index], cached_v)
            size = cached_v.float().abs().flatten(1).sum(dim=1)
            alpha = torch.zeros_like(v_absolute)
            if chunk.session.method.needs_alpha and len(local):
                alpha = self._alpha(layer, chunk, index, q, k, view)
            sums = self.over_ranks(torch.stack((k_squared, v_squared, v_absolute, alpha, size)))
            k_squared, v_squared, v_absolute, alpha, size = sums.unbind()
            noise = v_absolute <= _NOISE.get(q.dtype, 3e-2) * size
            where = running - chunk.row + chunk.start
            if chunk.session.repair is not None:
                chunk.session.repair.deviation[where] = v_absolute.cpu().numpy()
            positions = on_device(where, q)
            deviation = (x.masked_fill(noise, 0) for x in (k_squared, v_squared, v_absolute))
            yield Evidence(positions, *deviation, alpha=alpha)

    def _alpha(self, layer: int, chunk: Chunk, index, q, k, view: View) -> torch.Tensor:
        """Attention each candidate receives: mean over all heads, this rank's part of it (KVShare 4.4)."""
        low, high = chunk.row, chunk.row + len(chunk.reused)
        local = (low, high) if view.rows is None else tuple(np.searchsorted(view.rows, (low, high)).tolist())
        share, scaling = 1 / self.engine.ranks.world_size, self.engine.scaling[layer]
        if chunk.session.config.alpha == "one_query":
            # The next-to-last row of the chunk looks at the candidates only; none of them stands after it.
            query = q[max(local[0], local[1] - 2)][None]
            last = torch.full((1,), len(index) - 1, dtype=torch.int64, device=q.device)
            return attention_column_mass(query, k[index], last, scaling) * share
        before = self.engine.table(view, local[0], chunk.start)
        prefix = self.engine.pool.get_key_buffer(layer)[before].to(k.dtype)
        mine = slice(*local)
        mass = attention_column_mass(q[mine], torch.cat((prefix, k[mine])), view.positions[mine].long(), scaling)
        return mass[chunk.start + index - local[0]] * share

    @contextlib.contextmanager
    def attention_of_fresh_rows(self, layers: range, view: View, chunks: list[Chunk]) -> Iterator[list[torch.Tensor]]:
        """While the asking rows pass through `layers` inside the block, each chunk's tensor fills with the attention
        that its positions [0, end) receive from the last of them: mean over heads, sum over rows and layers,
        float32 [end]. The last rows are the question and the turn to answer.

        view: the chunks' asking rows, in the chunks' order.
        """
        mass = [torch.zeros(c.end, dtype=torch.float32, device=view.positions.device) for c in chunks]
        edges = np.cumsum([0, *(len(c.asking) for c in chunks)]).tolist()
        slots = [self.engine.table(view, low, c.end) for low, c in zip(edges[:-1], chunks, strict=True)]

        def measure(layer, q, k, v):
            # The layer has run: the pool holds the keys of the fresh rows, too.
            keys = self.engine.pool.get_key_buffer(layer)
            for i in range(len(chunks)):
                rows = slice(max(edges[i], edges[i + 1] - _VOICES), edges[i + 1])
                positions = view.positions[rows].long()
                k = keys[slots[i]].to(q.dtype)
                mass[i][: len(k)] += attention_column_mass(q[rows], k, positions, self.engine.scaling[layer])

        with self.engine.watching(layers, after=measure):
            yield mass
            for i, found in enumerate(mass):
                mass[i] = self.over_ranks(found) / self.engine.ranks.world_size

    @contextlib.contextmanager
    def attention_paid(self, layer: int, view: View, rows: list[int]) -> Iterator[list[torch.Tensor]]:
        """While `layer` runs inside the block, the list fills: what each of these decode rows attends to.

        One float32 [seq_len] tensor a row of `view`, mean over the heads of all ranks.
        """
        found: list[torch.Tensor] = []

        def measure(_, q, k, v):  # after the layer, so that the pool holds this step's keys
            keys = self.engine.pool.get_key_buffer(layer)
            for row in rows:
                slots = self.engine.table(view, row)
                last = torch.full((1,), len(slots) - 1, dtype=torch.int64, device=slots.device)
                mass = attention_column_mass(q[row : row + 1], keys[slots], last, self.engine.scaling[layer])
                found.append(self.over_ranks(mass / self.engine.ranks.world_size))

        with self.engine.watching([layer], after=measure):
            yield found

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Scores are summed over the tensor-parallel ranks before any rank chooses, so that all choose the same."""
        return self.engine.ranks.all_reduce(sums) if self.engine.ranks.world_size > 1 else sums
