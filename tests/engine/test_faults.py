"""Faults that were found in the core, each as the smallest traffic that shows it."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from bench import Bench, Ticket, running
from checker import Checker, living
from models import HIDDEN, VOCABULARY, Reference

EAGER = {"audit_share": 1.0}


def text(seed: int, length: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY - 2, length).tolist()


class Watched:
    """An engine under the checker; `run` checks every pass, and all books when nothing is left to do."""

    def __init__(self, bench: Bench, checker: Checker):
        self.bench, self.checker, self.send = bench, checker, bench.send

    def step(self, passes: int = 1) -> None:
        for _ in range(passes):
            self.bench.step()
            self.checker.after_pass()

    def until(self, true, limit: int = 300) -> None:
        for _ in range(limit):
            if true():
                return
            self.step()
        raise AssertionError(f"never came true; {self.bench.describe()}")

    def answers(self, *tickets: Ticket) -> None:
        """Run until these are answered, and one pass longer: SGLang is not idle before. An audit may have begun."""
        self.until(lambda: all(ticket.finished is not None for ticket in tickets))
        self.step()

    def run(self) -> None:
        self.until(lambda: self.bench.idle, 2000)
        self.step(2)
        self.until(lambda: self.bench.idle, 2000)
        self.checker.when_idle()

    def ask(self, request):
        """Send what an operator asks, and run until it is answered."""
        before = len(self.bench.answers)
        self.bench.control(request)
        self.until(lambda: len(self.bench.answers) > before, 60)
        return self.bench.answers[-1]


@contextlib.contextmanager
def watched(folder, *, flat: bool = False, **options):
    with running(folder, **options) as bench:
        checker = Checker(bench, Reference(folder), flat=flat)
        try:
            yield Watched(bench, checker)
        finally:
            checker.close()


loops = pytest.mark.parametrize("loop", ["normal", "overlap"])


# ---- 3: a request is known by its object, never by its id ----


@loops
def test_two_requests_with_one_id_do_not_share_what_is_approximate(deep, loop):
    document = text(1)
    with watched(deep, loop=loop, settings={"audit_share": 0}) as engine:
        engine.send(text(2, 5) + document)
        engine.run()
        prompt = text(3, 60) + document + text(4, 90)
        engine.send(prompt, rid="same", tokens=30)
        engine.step(2)
        engine.send(text(5, 80), rid="same", tokens=2)
        engine.run()
        exact = engine.send(prompt, custom={"kvshare": "off"})
        engine.run()
        assert exact.report["outcome"] == "ordinary" and exact.report["exact"] <= 60


@loops
@pytest.mark.parametrize("rid", ["kvshare-audit-1", "kvshare-audit-2"])
def test_a_client_that_names_its_request_like_an_audit_disturbs_none(deep, loop, rid):
    document = text(1)
    with watched(deep, loop=loop, settings=EAGER) as engine:
        engine.send(text(2, 5) + document)
        engine.run()
        for seed in (3, 4):
            engine.answers(engine.send(text(seed, 60) + document + text(10 + seed, 90), tokens=3))
            engine.step(1)  # a piece of the audit is in the engine
            client = engine.send(text(20 + seed, 30) + document + text(seed, 40), rid=rid, tokens=20)
            engine.run()
            assert len(client.output) == 20 and client.report["outcome"] == "reused"
        assert engine.bench.pipeline.auditor.tokens > 0, "audits have run"


# ---- 5: what another client brings beside its tokens ----


@pytest.mark.parametrize("custom", [None, {"kvshare": {"repair_rows": 8}}])
def test_embeddings_of_another_request_in_the_batch_are_kept(deep, custom):
    from sglang.srt.managers.embed_types import PositionalEmbeds

    def override():
        return PositionalEmbeds(embeds=torch.full((1, HIDDEN), 3.0), positions=[5])

    document, prompt = text(1), text(2, 40)
    with watched(deep, chunk=1024) as engine:
        engine.send(text(3, 5) + document)
        engine.run()

        def beside(other: list[int] | None, key: str) -> Ticket:
            if other is not None:
                engine.send(other, tokens=3, custom=custom)
            ticket = engine.send(
                prompt, extra_key=key, positional_embed_overrides=override(), return_logprob=True, tokens=1
            )
            engine.run()
            return ticket

        alone = beside(None, "a")
        with_reuse = beside(text(4, 60) + document + text(5, 20), "b")
        plain = engine.send(prompt, extra_key="c", return_logprob=True, tokens=1)
        engine.run()
        assert with_reuse.output == alone.output
        assert with_reuse.output_logprobs == pytest.approx(alone.output_logprobs, abs=1e-4)
        assert plain.output_logprobs != pytest.approx(alone.output_logprobs, abs=1e-2), "they change the answer"


def test_a_request_beside_embeddings_says_why_it_did_not_reuse(deep):
    from sglang.srt.managers.embed_types import PositionalEmbeds

    override = PositionalEmbeds(embeds=torch.full((1, HIDDEN), 3.0), positions=[5])
    document = text(1)
    with watched(deep, chunk=1024) as engine:
        engine.send(text(3, 5) + document)
        engine.run()
        reusing = engine.send(text(4, 60) + document + text(5, 20))
        engine.send(text(2, 40), positional_embed_overrides=override)
        engine.run()
        assert (reusing.report["outcome"], reusing.report["reason"]) == ("ordinary", "mixed_input")


# ---- 7, and what an operator asks ----


@loops
def test_memory_can_be_released_directly_after_an_audited_answer(deep, loop):
    from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput, ResumeMemoryOccupationReqInput

    document = text(1)
    for passes in range(4):  # the audit waits, runs, has run
        with watched(deep, loop=loop, settings=EAGER) as engine:
            engine.send(text(2, 5) + document)
            engine.run()
            engine.answers(engine.send(text(3, 60) + document + text(4, 400), tokens=2))
            engine.step(passes)
            engine.ask(ReleaseMemoryOccupationReqInput(tags=["kv_cache"]))
            engine.step(5)
            assert engine.bench.pipeline.auditor.piece is None, "an engine without memory computes nothing"
            engine.ask(ResumeMemoryOccupationReqInput(tags=["kv_cache"]))
            again = engine.send(text(3, 60) + document + text(4, 400), tokens=2)
            engine.run()
            assert again.report["reason"] == "no_match"


@loops
@pytest.mark.parametrize("flush", [True, False])
def test_replaced_weights_leave_nothing_to_borrow_and_nothing_to_compare(deep, other, loop, flush):
    from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

    document = text(1)
    for passes in range(4):
        with watched(deep, loop=loop, settings=EAGER) as engine:
            engine.send(text(2, 5) + document)
            engine.run()
            engine.answers(*(engine.send(text(3 + i, 60) + document + text(40 + i), tokens=2) for i in range(3)))
            engine.step(passes)
            update = UpdateWeightFromDiskReqInput(model_path=str(other), load_format="auto", flush_cache=flush)
            answer = engine.ask(update)
            assert answer.success, answer.message
            auditor = engine.bench.pipeline.auditor
            assert not auditor.queue and auditor.running is None
            engine.checker.use(Reference(other))
            engine.checker.stale = not flush
            new = engine.send(text(8, 60) + document + text(9, 40))
            engine.run()
            assert new.report["reused"] == 0, "KV of other weights"
            # What is computed from now on may be borrowed.
            engine.send(text(10, 5) + text(11))
            engine.run()
            known = engine.send(text(12, 60) + text(11) + text(13, 40))
            engine.run()
            assert known.report["reused"] > 150


def test_text_behind_the_exact_prefix_of_old_weights_becomes_no_donor(deep, other):
    """SGLang keeps its tree when it is told to; what stands behind its old KV was computed from it."""
    from sglang.srt.managers.io_struct import FlushCacheReqInput, UpdateWeightFromDiskReqInput

    head, tail = text(1, 120), text(2, 150)
    with watched(deep) as engine:
        engine.send(head)
        engine.run()
        engine.ask(UpdateWeightFromDiskReqInput(model_path=str(other), load_format="auto", flush_cache=False))
        engine.checker.stale = True
        behind = engine.send(head + tail)
        engine.run()
        assert behind.report["exact"] >= 100
        borrower = engine.send(text(3, 50) + tail + text(4, 10))
        engine.run()
        assert borrower.report["reused"] == 0
        assert engine.ask(FlushCacheReqInput()).success
        engine.send(head + tail)
        engine.run()
        borrower = engine.send(text(5, 50) + tail + text(4, 10))
        engine.run()
        assert borrower.report["reused"] > 100


@loops
def test_a_request_that_runs_over_new_weights_enters_no_tree(deep, other, loop):
    from sglang.srt.managers.io_struct import (
        ContinueGenerationReqInput,
        PauseGenerationReqInput,
        UpdateWeightFromDiskReqInput,
    )

    prompt = text(1, 300)
    with watched(deep, loop=loop, chunk=128) as engine:
        first = engine.send(prompt, tokens=20)
        engine.step(2)  # one chunk has run
        engine.bench.control(PauseGenerationReqInput(mode="in_place"))
        engine.step(1)
        engine.ask(UpdateWeightFromDiskReqInput(model_path=str(other), load_format="auto", flush_cache=False))
        engine.checker.stale = True
        engine.bench.control(ContinueGenerationReqInput(torch_empty_cache=False))
        engine.run()
        assert len(first.output) == 20
        assert len(engine.bench.pipeline.index) == 0
        again = engine.send(prompt)
        engine.run()
        assert again.report["exact"] <= 256, "nothing of it has entered since"


@loops
def test_whoever_has_all_answers_finds_the_engine_idle(deep, loop):
    from sglang.srt.managers.io_struct import FlushCacheReqInput

    document = text(1)
    with watched(deep, loop=loop, settings=EAGER) as engine:
        for passes in range(5):
            engine.send(text(2, 5) + document)
            engine.run()
            engine.answers(engine.send(text(3, 60) + document + text(4, 400), tokens=2))
            engine.step(passes)
            assert engine.ask(FlushCacheReqInput()).success
        assert engine.bench.pipeline.auditor.tokens > 0


@loops
def test_requests_behind_what_an_operator_asks_keep_their_order(deep, loop):
    from sglang.srt.managers.io_struct import FlushCacheReqInput

    document = text(1)
    with watched(deep, loop=loop, settings=EAGER) as engine:
        engine.send(text(2, 5) + document)
        engine.run()
        engine.answers(engine.send(text(3, 60) + document + text(4, 600), tokens=2))
        engine.until(lambda: engine.bench.pipeline.auditor.piece is not None)
        engine.step(1)
        engine.bench.control(FlushCacheReqInput())
        behind = engine.send(text(5, 60) + document)
        engine.run()
        assert engine.bench.answers[-1].success and behind.report["exact"] + behind.report["reused"] == 0


# ---- 8: nothing of an ended request is kept ----


@loops
def test_turns_of_a_streaming_session_leave_nothing_behind(deep, loop):
    from sglang.srt.managers.io_struct import CloseSessionReqInput, OpenSessionReqInput, SessionParams

    from kvshare_sched.reuse.session import Session

    with watched(deep, loop=loop, arguments=["--enable-streaming-session"]) as engine:
        before = living(Session).total()
        engine.bench.control(OpenSessionReqInput(capacity_of_str_len=4000, session_id="s", streaming=True))
        last = None
        for turn in range(5):
            params = SessionParams(id="s", rid=last)
            ticket = engine.send(text(turn, 60), session_params=params, session_id="s", tokens=3)
            engine.answers(ticket)
            last = ticket.rid
        engine.step(2)
        assert not engine.bench.queue._running and not engine.bench.queue.queue.running, "a turn pays when it ends"
        engine.bench.control(CloseSessionReqInput(session_id="s"))
        engine.run()
        engine.send(text(9, 40))  # the engine forgets its last batch
        engine.run()
        assert living(Session).total() - before <= 1


@loops
def test_an_aborted_prompt_is_no_longer_under_audit(deep, loop):
    document = text(1)
    with watched(deep, loop=loop, chunk=64, settings=EAGER) as engine:
        engine.send(text(2, 5) + document)
        engine.run()
        cut = engine.send(text(3, 200) + document + text(4, 300), tokens=2)
        engine.until(lambda: engine.bench.scheduler.chunked_req is not None)
        engine.bench.abort(cut.rid)
        engine.run()
        assert cut.aborted and not engine.bench.pipeline.auditor.queue


# ---- 11: every answer has a report ----


@loops
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("tokens", [0, 1])
def test_an_answer_of_no_token_carries_its_report(deep, loop, stream, tokens):
    document = text(1)
    with watched(deep, loop=loop) as engine:
        first = engine.send(text(2, 5) + document, tokens=tokens, stream=stream)
        engine.run()
        assert first.report["reason"] == "no_match"
        second = engine.send(text(3, 60) + document + text(4, 20), tokens=tokens, stream=stream)
        engine.run()
        assert second.report["outcome"] == "reused" and len(second.output) == tokens


# ---- what a GPU's memory is kept for ----


@loops
@pytest.mark.parametrize("logprobs", [False, True])
def test_a_batch_that_fails_is_computed_in_pieces_that_sglang_has_kept_memory_for(deep, loop, logprobs, monkeypatch):
    from kvshare_sched.engine.sglang.batches import SGLangEngine
    from kvshare_sched.runtime.assembly import Assembly

    chunk, document = 64, text(1, 300)
    with watched(deep, loop=loop, chunk=chunk, settings={"audit_share": 0}) as engine:
        for part in range(0, 300, 60):
            engine.send(text(2, 5) + document[: part + 60])
            engine.run()
        engine.send(text(2, 5) + document)
        engine.run()

        def broken(*_):
            raise RuntimeError("out of memory")

        ran, ordinary = [], SGLangEngine.run
        monkeypatch.setattr(Assembly, "copy", broken)
        monkeypatch.setattr(
            SGLangEngine,
            "run",
            lambda self, view, *layers: ran.append(len(view.forward.input_ids)) or ordinary(self, view, *layers),
        )
        engine.checker.injected = 1
        failed = engine.send(text(3, 20) + document + text(4, 5))
        if logprobs:  # rows whose output SGLang reads, in the same batch
            scored = {"return_logprob": True, "logprob_start_len": 0, "custom": {"kvshare": "off"}}
            engine.send(text(5, 60), tokens=1, **scored)
        engine.run()
        assert failed.report["reason"] == "error" and len(failed.output) == 4
        assert ran and max(ran) <= chunk, ran


def test_repair_rows_leave_a_gpus_tables_their_size(deep):
    """As many sequences as SGLang runs at once, whatever requests ask for."""
    document = text(1, 300)
    with watched(deep, settings={"audit_share": 0}) as engine:
        engine.send(text(2, 5) + document)
        engine.run()
        batches = engine.bench.runner.model.forward.__self__
        batches.decode_rows, sizes = 16, []
        make = batches.extend

        def seen(*args):
            view = make(*args)
            sizes.append(view.forward.batch_size)
            return view

        batches.extend = seen
        custom = {"kvshare": {"repair_rows": 40}}
        for seed in (3, 4):
            engine.send(text(seed, 60) + document + text(seed, 20), custom=custom, tokens=40)
        engine.run()
        assert sizes and max(sizes) <= 16


@loops
def test_the_fence_on_shared_tables_covers_what_a_reuse_batch_reads_in_its_layers(deep, loop):
    document = text(1)
    with watched(deep, loop=loop, settings={"audit_share": 0}) as engine:
        engine.send(text(2, 5) + document)
        engine.run()
        runner, fences = engine.bench.runner, []
        inner = runner.model.forward

        def forward(*args, **kwargs):
            runner.shared_read_done_event = "SGLang's, before the layers"
            output = inner(*args, **kwargs)
            fences.append((args[2].forward_mode.is_extend(), runner.shared_read_done_event))
            runner.shared_read_done_event = None
            return output

        runner.model.forward = forward
        engine.send(text(3, 60) + document + text(4, 20))
        engine.run()
        assert fences[0] == (True, None) and fences[-1] == (False, "SGLang's, before the layers")
