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


# ---- memory for the rest of a cut prompt, and rows of a pass ----


@loops
@pytest.mark.parametrize("strategy", ["consensus", "epic"])
@pytest.mark.parametrize(("scheduler", "page", "fresh"), [("fair", 1, 20), ("off", 16, 1)])
def test_memory_is_kept_for_the_rest_of_a_cut_prompt(flat, engine, strategy, scheduler, page, fresh, loop):
    """With SGLang's own order part of a page is left beside it: enough for a text of which all but a token is known."""
    settings = {"strategy": strategy, "scheduler": scheduler, "pool_keep": 0.0}
    one, two, three = (text(n, 620) for n in range(3))
    with engine(flat, loop=loop, page=page, pool=7200, settings=settings) as (b, passes):
        know(b, one, two, three)
        long = b.send((one + two + three) * 3 + text(4, 30), rid="long")  # 341 tokens less than the pool has
        b.step(1 if scheduler == "fair" else 0)  # which puts the short one first
        wish = {"kvshare": {"strategy": "naive"}}
        short = b.send(three[100:481] + text(5, fresh), rid="short", tokens=1200, custom=wish)
        b.run()
        assert long.report["outcome"] == short.report["outcome"] == "reused" and len(passes.of("long")) > 2
        assert len(short.output) == 1200 and len(long.output) == 4


def test_a_pass_holds_a_bounded_number_of_rows(flat, engine):
    one, two, three = (text(n, 620) for n in range(3))
    with engine(flat, pool=8000, settings={"strategy": "naive"}) as (b, passes):
        know(b, one, two, three)
        long = b.send((one + two + three) * 3 + text(4, 30), rid="long")
        b.run()
        assert passes.of("long") == [(620, 2668), (2668, 4716), (4716, 5610)]
        assert long.report["reused"] == 4960


@pytest.mark.parametrize(("page", "loop"), [(1, "normal"), (16, "overlap")])
def test_a_cut_prompt_waits_while_answers_that_grew_have_its_memory(flat, engine, page, loop):
    """SGLang guesses a hundredth of what these answers will take, and lets them go on between two chunks."""
    arguments = ["--prefill-decode-interval", "4", "--schedule-conservativeness", "0.01"]
    with engine(flat, loop=loop, page=page, pool=3472, arguments=arguments, decodes=True) as (b, passes):
        tickets = [b.send(text(n, 20), rid=f"r{n}", tokens=150, ignore_eos=False) for n in range(10)]
        b.step(12)
        tickets.append(b.send(text(99, 3000), rid="long"))
        b.run()
        assert passes.of("long")[-1][1] == 3000
        answers(flat, *tickets)


@pytest.mark.parametrize(
    ("seed", "page", "loop", "arguments"),
    [
        (27, 1, "overlap", []),
        (2, 16, "normal", ["--enable-mixed-chunk"]),
        (3, 4, "normal", ["--enable-priority-scheduling"]),
    ],
)
def test_everybody_is_answered_in_a_pool_hardly_larger_than_a_prompt(flat, engine, seed, page, loop, arguments):
    draw = np.random.default_rng(seed)
    documents = [text(100 * seed + n, int(draw.integers(180, 300))) for n in range(3)]
    known = sum(documents, [])
    longest = len(known) * 4 + 60
    pool = (longest + int(draw.integers(40, 400))) // page * page
    settings, mixed = {"pool_keep": 0.0}, "--enable-mixed-chunk" in arguments
    more = {"priority": 1} if "--enable-priority-scheduling" in arguments else {}

    def send(prompt, tokens, **fields):
        wish = {"kvshare": {"strategy": "naive"}} if draw.random() < 0.5 else None
        return b.send(prompt, tokens=tokens, custom=wish, ignore_eos=False, **more, **fields)

    def short(n: int):
        start, some = int(draw.integers(0, 60)), documents[int(draw.integers(3))]
        tokens = int(draw.choice([2, 20, 200, 500]))
        return send((some + known)[start : start + 400] + text(7000 + n, int(draw.integers(2, 20))), tokens)

    with engine(flat, loop=loop, page=page, pool=pool, settings=settings, arguments=arguments, decodes=mixed) as (b, _):
        know(b, *documents)
        tickets = [short(n) for n in range(int(draw.integers(0, 2)))]
        b.step(int(draw.integers(1, 12)))
        tickets.append(send(known * 4 + text(8000 + seed, int(draw.integers(5, 50))), 5, rid="long"))
        b.step(int(draw.integers(1, 4)))
        for n in range(10, 17):
            tickets.append(short(n))
            b.step(int(draw.integers(0, 2)))
        b.run(8000)
        answers(flat, *tickets)


def test_nobody_loses_its_memory_to_a_request_that_does_not_fit_beside_a_cut_prompt(flat, engine):
    arguments = ["--enable-priority-scheduling", "--max-running-requests", "2"]
    with engine(flat, arguments=arguments) as (b, passes):
        tickets = [b.send(text(0, 30), rid="running", tokens=60, priority=0)]
        b.step(3)
        tickets.append(b.send(text(1, 2000), rid="long", priority=0))
        b.step(2)
        tickets.append(b.send(text(2, 310), rid="urgent", priority=50))
        tickets.append(b.send(text(3, 60), rid="short", priority=0))  # room is left for it
        b.step()
        while (cut := b.scheduler.chunked_req) is not None and cut.rid == "long":
            assert "running" not in [req.rid for req in b.scheduler.waiting_queue], passes.ran[-1]
            b.step()
        b.run()
        answers(flat, *tickets)


# ---- room beside a cut prompt ----


@loops
def test_room_is_left_once_for_a_request_that_costs_more_than_was_thought(flat, engine, loop):
    one, two, three = (text(n, 620) for n in range(3))
    with engine(flat, loop=loop, pool=9000, settings={"pool_keep": 0.0}) as (b, passes):
        know(b, one, two, three)
        tickets = [b.send((one + two + three) * 3 + text(4, 30), rid="long")]
        b.step()
        check = {"dhd": {"strategy": "dhd"}}  # of half the layers it runs all rows
        tickets.append(b.send(three[100:481] + text(5, 20), rid="short", custom=check))
        b.step()
        tickets.append(b.send(text(6, 30), rid="small"))
        b.run()
        (small,) = [at for at, ran in enumerate(passes.ran) if "small" in [rid for rid, *_ in ran]]
        assert "long" in [rid for rid, *_ in passes.ran[small]], "room is left for whoever fits"
        pieces = [end - start for start, end in passes.of("long")]
        assert pieces[1] < 0.8 * pieces[0], "the test's point: room was left for the first short one"
        assert all(piece > 0.8 * pieces[0] for piece in pieces[2:-1]), pieces


def test_no_room_is_left_while_as_many_requests_run_as_may(flat, engine):
    with engine(flat, arguments=["--max-running-requests", "2"]) as (b, passes):
        b.send(text(0, 30), rid="running", tokens=60)
        b.step(3)
        b.send(text(1, 2000), rid="long")
        b.step(2)
        b.send(text(2, 60), rid="short")
        b.run()
        pieces = [end - start for start, end in passes.of("long")]
        assert pieces.count(CHUNK) >= 6, f"{pieces}: one pass to find out"
