"""Which requests one pass takes, and how much of them: SGLang's own limits hold, whatever reuse saves.

Prompts are made of `text(seed, length)`: ids that no other text has.
"""

from __future__ import annotations

import contextlib

import bench
import invariants
import numpy as np
import pytest
from models import VOCABULARY, Reference
from sglang.srt.managers.schedule_batch import ScheduleBatch

CHUNK = 256

loops = pytest.mark.parametrize("loop", ["normal", "overlap"])


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY - 2, length).tolist()


class Passes:
    """The prefill passes of one engine, each checked against what our hooks lean on."""

    def __init__(self, scheduler, decodes: bool):
        """decodes: answers may go on between two chunks of a prompt."""
        self.scheduler, self.decodes = scheduler, decodes
        self.ran: list[list[tuple[str, int, int]]] = []  # (id, from, to) of every prompt
        self._adder, self._make = None, scheduler.get_prefill_adder_class()
        scheduler.get_prefill_adder_class = lambda: self._made

    def _made(self, *args, **kwargs):
        self._adder = self._make(*args, **kwargs)
        return self._adder

    def check(self, batch) -> None:
        """Before memory is taken for a batch."""
        self.ran.append([(req.rid, req.prefix_len, req.extend_end) for req in invariants.prompts(batch)])
        invariants.cut_prompts(batch)
        invariants.waiting_chunk(self.scheduler, batch)
        invariants.pieces(batch)
        invariants.budget(self._adder)
        invariants.rows(batch, CHUNK)
        invariants.memory(batch)
        if not self.decodes:
            invariants.memory_of_the_rest(batch)

    def of(self, rid: str) -> list[tuple[int, int]]:
        """The pieces in which a prompt ran."""
        return [(start, end) for ran in self.ran for name, start, end in ran if name == rid]


@pytest.fixture
def engine(monkeypatch):
    """Start an engine whose prefill passes are checked; see `bench.running`."""

    @contextlib.contextmanager
    def start(model, *, settings=None, arguments=(), decodes=False, **more):
        settings, words = {"audit_share": 0.0} | (settings or {}), ["--context-length", "8192", *arguments]
        with bench.running(model, chunk=CHUNK, settings=settings, arguments=words, **more) as b:
            passes, prepare = Passes(b.scheduler, decodes), ScheduleBatch.prepare_for_extend
            with monkeypatch.context() as patch:
                patch.setattr(ScheduleBatch, "prepare_for_extend", lambda batch: (passes.check(batch), prepare(batch)))
                yield b, passes

    return start


def know(b, *documents: list[int]) -> None:
    """Compute texts, so that they can be borrowed."""
    for document in documents:
        b.send(document, tokens=1)
        b.run()


def answers(model, *tickets) -> None:
    """All are answered in full, each token as the reference would."""
    reference = Reference(model)
    for ticket in tickets:
        assert len(ticket.output) == ticket.sent["tokens"], f"{ticket.rid}: {ticket.finished}"
        log_p = reference(ticket.prompt + ticket.output).log_p[len(ticket.prompt) - 1 : -1]
        behind = log_p.max(axis=1) - log_p[np.arange(len(log_p)), ticket.output]
        assert behind.max() < 1e-3, f"{ticket.rid}: not the best token at {np.flatnonzero(behind >= 1e-3)}"


# ---- one cut prompt ----


@loops
@pytest.mark.parametrize("scheduler", ["fair", "off"])
def test_one_prompt_is_cut_in_a_pass(flat, engine, scheduler, loop):
    one, two, three = (text(n, 300) for n in range(3))
    with engine(flat, loop=loop, page=16, settings={"scheduler": scheduler}) as (b, passes):
        know(b, one, two, three)
        tickets = [b.send(one[40:246] + text(4, 40), rid="small"), b.send(text(5, 310), rid="fresh", tokens=40)]
        b.send(two[3:] + three + (one + two + three) * 2 + text(6, 20), rid="long")
        b.run()
        assert len(passes.of("fresh")) == 2, "the test's point: it is cut"
        answers(flat, *tickets)


def test_one_prompt_is_cut_in_a_pass_where_cuts_are_aligned(flat, engine):
    one, two, three = (text(n, 300) for n in range(3))
    with engine(flat, settings={"scheduler": "off"}) as (b, passes):
        know(b, one, two, three)
        b.scheduler.truncation_align_size = 64  # with --enable-deterministic-inference it is 4,096
        tickets = [b.send(text(4, 30), rid="small"), b.send(text(5, 310), rid="fresh", tokens=40)]
        tickets.append(b.send(two[3:] + three + one + text(6, 20), rid="long"))
        b.run()
        assert passes.of("fresh") == [(0, 192), (192, 310)], "the test's point: it is cut, and 34 tokens are left"
        answers(flat, *tickets)
