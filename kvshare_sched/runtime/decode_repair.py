"""Repair rows ride in the decode step: prompt positions computed again, in their own slots, beside the new token.

Every layer writes the K and V of all rows before it attends, so a new token sees the repaired values in the very
step that repairs them. The logits processor gets the original batch and the original rows: sampling, penalties,
log-probabilities and stop conditions never meet a repair row.

A decode step that replays a CUDA graph does not come here; a server with `repair_rows` set is refused with such
graphs (`engine/sglang/support.py`), and a single request's wish for repair is not heeded there.
"""

from __future__ import annotations

import contextlib
import logging
import time

import numpy as np
import torch

from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import Session
from kvshare_sched.runtime.port import Engine, View
from kvshare_sched.runtime.probes import Probes

logger = logging.getLogger(__name__)


class DecodeRepair:
    """Decode batches of one rank's model."""

    def __init__(self, pipeline: Pipeline, engine: Engine, probes: Probes):
        self.pipeline, self.engine, self.probes = pipeline, engine, probes
        self.check_layer = min(pipeline.config.check_layer, engine.layers - 1)

    def waiting(self, batch) -> dict[int, Session]:
        """Batch row -> session, for the requests of a decode batch that have something to repair."""
        return {row: s for row, s in enumerate(self.engine.decoding(batch)) if s is not None and s.to_repair}

    def forward(self, waiting: dict[int, Session], batch):
        """The model's forward with repair rows; a failure ends these requests' repair and leaves plain decode."""
        try:
            with torch.no_grad():
                output = self._run(waiting, batch)
            self.engine.fence()
            return output
        except Exception:
            logger.exception("kvshare: repair failed for a batch of %d; plain decode", len(batch))
            for session in waiting.values():
                session.stop_repair()
            self.engine.restore(batch)
            return self.engine.ordinary(batch)

    def _run(self, waiting: dict[int, Session], batch):
        started = time.perf_counter()
        self._look_ahead(waiting, batch)
        chosen, free = {}, self.engine.decode_rows - len(batch)
        for row, session in waiting.items():
            chosen[row] = session.repair.next(session.approximate_from)[: max(0, free)]
            free -= len(chosen[row])
        chosen = {row: positions for row, positions in chosen.items() if len(positions)}
        if not chosen:
            return self.engine.ordinary(batch)
        tokens = np.concatenate([waiting[row].repair.tokens[p] for row, p in chosen.items()])
        view = self.engine.extend(batch, chosen, tokens)
        prepared = time.perf_counter() - started
        lagged = {int(view.rows[row]): s for row, s in waiting.items() if s.repair.order == "lagged"}
        with self._noting_attention(view, lagged):
            output = self.engine.decode(batch, view)
        for row, repaired in chosen.items():
            self.pipeline.repaired(waiting[row], repaired, prepared / len(chosen))
        return output

    def _look_ahead(self, waiting: dict[int, Session], batch) -> None:
        """Order `attention` wants this step's attention: the plain rows run up to the check layer first."""
        wanted = {row: s for row, s in waiting.items() if s.repair.order == "attention"}
        if not wanted:
            return
        with self.engine.ahead(batch) as view, self._noting_attention(view, wanted):
            self.engine.run(view, 0, self.check_layer + 1)

    @contextlib.contextmanager
    def _noting_attention(self, view: View, sessions: dict[int, Session]):
        """While the model runs inside the block, the sessions learn what their rows of `view` attend to."""
        if not sessions:
            yield
            return
        with self.probes.attention_paid(self.check_layer, view, list(sessions)) as found:
            yield
        for session, attention in zip(sessions.values(), found, strict=True):
            session.repair.attention = attention[: session.prompt_len].cpu().numpy()
