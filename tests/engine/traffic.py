"""Random traffic on the bench: a Hypothesis state machine over everything that reaches a scheduler.

Few documents of few tokens, so that requests repeat each other often; small pools and chunks, so that everything that
can be cut, evicted, retracted or refused is. Every pass is checked (`checker`).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from bench import Bench, Ticket, running
from checker import Checker
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from models import HIDDEN, VOCABULARY, Reference

_STRATEGIES = ("consensus", "consensus", "dhd", "cacheblend", "epic", "naive", "random", "full")
STOCK = False  # the same traffic with all of ours off: whose fault is it?
_ABORT_RIDS = ("r1", "r2", "same", "kvshare-audit", "nobody")


@dataclass(frozen=True)
class SetUp:
    """One engine's configuration."""

    flat: bool
    loop: str
    core: str
    page: int
    pool: int
    chunk: int
    mixed: bool
    scheduler: str
    preempt: bool
    strategy: str
    repair_rows: int
    repair_order: str
    audit_share: float
    running: int
    adapters: bool

    @property
    def settings(self) -> dict[str, object]:
        if STOCK:
            return {"mode": "off", "scheduler": "off", "audit_share": 0}
        names = ("scheduler", "strategy", "repair_rows", "repair_order", "audit_share")
        return {name: getattr(self, name) for name in names} | {"min_suffix": 32, "index_tokens": 6000}

    @property
    def arguments(self) -> list[str]:
        words = ["--max-running-requests", str(self.running), "--enable-streaming-session"]
        words += ["--enable-mixed-chunk"] if self.mixed else []
        words += ["--enable-lora", "--max-lora-rank", "4", "--max-loras-per-batch", "2"] if self.adapters else []
        return words + (["--enable-priority-scheduling"] if self.preempt else [])


set_ups = st.builds(
    SetUp,
    flat=st.booleans(),
    loop=st.sampled_from(["normal", "overlap"]),
    core=st.sampled_from(["rust", "python"]),
    page=st.sampled_from([1, 1, 4, 16]),
    pool=st.sampled_from([1200, 1600, 2400, 4096]),
    chunk=st.sampled_from([64, 128, 256, 512]),
    mixed=st.sampled_from([False, False, True]),
    scheduler=st.sampled_from(["fair", "fair", "fair", "fcfs", "lpm", "off"]),
    preempt=st.sampled_from([False, False, False, True]),
    strategy=st.sampled_from(_STRATEGIES),
    repair_rows=st.sampled_from([0, 0, 0, 3, 17]),
    repair_order=st.sampled_from(["fifo", "lagged", "attention"]),
    audit_share=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
    running=st.sampled_from([4, 8, 16]),
    adapters=st.sampled_from([False, False, False, True]),
)


@functools.cache
def reference(folder: Path, adapter: Path | None = None) -> Reference:
    """One for all engines: it remembers what it has computed."""
    return Reference(folder, adapter)


class Texts:
    """Documents and prompts made of them; the same for the same seed."""

    def __init__(self, seed: int):
        self.draw = random.Random(seed)
        self.documents = [self._ids(self.draw.randint(24, 200)) for _ in range(9)]
        self.documents.append([7] * 90)  # text that repeats itself
        self.documents.append(self._ids(5) * 20)

    def _ids(self, count: int) -> list[int]:
        return [self.draw.randrange(VOCABULARY - 2) for _ in range(count)]

    def prompt(self, draw: random.Random, longest: int) -> list[int]:
        found = [draw.randrange(VOCABULARY - 2) for _ in range(draw.choice((0, 1, 12, 40)))]
        for _ in range(draw.choice((0, 1, 2, 2, 3, 3, 5))):
            document = draw.choice(self.documents)
            if draw.random() < 0.2:
                document = document[draw.randrange(len(document)) :]
            found += document
            found += [draw.randrange(VOCABULARY - 2) for _ in range(draw.choice((0, 0, 2, 20)))]
        found += [draw.randrange(VOCABULARY - 2) for _ in range(draw.choice((1, 3, 15)))]
        return found[:longest]


class Traffic(RuleBasedStateMachine):
    """Subclass with `models`: kind ("flat", "deep") -> folders of two sets of weights; and `adapters`: two folders."""

    models: dict[str, list[Path]]
    adapters: list[Path]
    numbers: Counter[str] = Counter()  # requests, engines, passes; reports by reason; tokens and answers compared

    def __init__(self):
        super().__init__()
        self.open = contextlib.ExitStack()
        self.bench: Bench | None = None
        self.checker: Checker | None = None
        self.paused = self.released = False
        self.session: tuple[str, Ticket | None] | None = None
        self.counter = itertools.count()

    # ---- set-up ----

    @initialize(set_up=set_ups, seed=st.integers(0, 2**32 - 1))
    def begin(self, set_up: SetUp, seed: int) -> None:
        from sglang.srt.environ import envs

        self.set_up, self.draw, self.texts = set_up, random.Random(seed), Texts(seed)
        kind = "flat" if set_up.flat else "deep"
        self.folders = list(self.models[kind])
        loras = ["--lora-paths", *(f"{n}={path}" for n, path in enumerate(self.adapters))] if set_up.adapters else []
        self.open.enter_context(envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override(set_up.core))
        self.open.enter_context(envs.SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_IDLE.override(True))
        self.bench = self.open.enter_context(
            running(
                self.folders[0],
                loop=set_up.loop,
                page=set_up.page,
                pool=set_up.pool,
                chunk=set_up.chunk,
                settings=set_up.settings,
                arguments=set_up.arguments + loras,
            )
        )
        self.lora_ids = self._lora_ids() if set_up.adapters else {}
        self.checker = Checker(self.bench, *self._references(), flat=set_up.flat)
        self.open.callback(self.checker.close)
        self.longest = min(560, set_up.pool // 2 - 120)
        self.numbers["engines"] += 1

    def _lora_ids(self) -> dict[str, Path]:
        refs = self.bench.runner.lora_manager.lora_refs.values()
        return {ref.lora_id: self.adapters[int(ref.lora_name)] for ref in refs}

    def _references(self) -> tuple[Reference, dict[str, Reference]]:
        """Of the weights in force."""
        return reference(self.folders[0]), {i: reference(self.folders[0], path) for i, path in self.lora_ids.items()}

    # ---- requests ----

    def _send(self, prompt: list[int], draw: random.Random, **fields) -> Ticket:
        self.numbers["requests"] += 1
        fields.setdefault("extra_key", draw.choice((None, None, None, None, None, None, "a")))
        if self.lora_ids and "session_params" not in fields:
            fields.setdefault("lora_id", draw.choice((None, *self.lora_ids)))
        if self.set_up.preempt:
            fields.setdefault("priority", draw.choice((0, 0, 1, 20)))
        fields.setdefault("tokens", draw.choice((1, 1, 2, 2, 4, 4, 9, 24, 70)))
        fields.setdefault("stream", draw.random() < 0.7)
        return self.bench.send(prompt, **fields)

    def _custom(self, draw: random.Random):
        if draw.random() < 0.6:
            return None
        if draw.random() < 0.25:
            return {"kvshare": draw.choice(("off", {"ratio": 7}, {"nonsense": 1}, ["x"]))}
        wish: dict[str, object] = {"strategy": draw.choice(_STRATEGIES)}
        if draw.random() < 0.5:
            wish["ratio"] = draw.choice((0.0, 0.1, 0.5, 1.0))
        if draw.random() < 0.3:
            wish |= {
                "repair_rows": draw.choice((1, 8, 40)),
                "repair_order": draw.choice(("fifo", "lagged", "attention")),
            }
        return {"kvshare": wish}

    @precondition(lambda self: not self.released)
    @rule(seed=st.integers(0, 2**32 - 1), count=st.sampled_from([1, 2, 4]))
    def send(self, seed: int, count: int) -> None:
        draw = random.Random(seed)
        for _ in range(count):
            if draw.random() < 0.03:
                self._embeddings(draw)
            fields: dict[str, object] = {"custom": self._custom(draw)}
            prompt = self.texts.prompt(draw, self.longest)
            if draw.random() < 0.12:
                start = draw.choice((-1, 0, len(prompt) // 2, len(prompt) - 1))
                fields |= {"return_logprob": True, "logprob_start_len": start}
            if draw.random() < 0.04:
                fields["cache_salt"] = "salt"
            if draw.random() < 0.08:
                fields["tokens"] = 0
            if draw.random() < 0.1:
                fields["rid"] = draw.choice(("same", "kvshare-audit-1", "kvshare-audit-2"))
            if draw.random() < 0.1:
                fields["ignore_eos"] = False
            self._send(prompt, draw, **fields)

    @precondition(lambda self: not self.released)
    @rule(seed=st.integers(0, 2**32 - 1), passes=st.integers(0, 4))
    def send_and_run(self, seed: int, passes: int) -> None:
        self.send(seed, 8)
        self.run_passes(passes)

    @precondition(lambda self: not self.released)
    @rule(seed=st.integers(0, 2**32 - 1))
    def go_on(self, seed: int) -> None:
        """A conversation sends an answer back."""
        draw = random.Random(seed)
        done = [t for t in self.bench.tickets if t.finished is not None and not t.aborted and t.output]
        done = [t for t in done if not {"session_params", "positional_embed_overrides"} & t.sent.keys()]
        if done:
            ticket = draw.choice(done[-6:])
            prompt = (ticket.prompt + ticket.output + self.texts.prompt(draw, 60))[: self.longest]
            same = {name: ticket.sent.get(name) for name in ("extra_key", "cache_salt", "lora_id")}
            self._send(prompt, draw, **same)

    @precondition(lambda self: not self.released)
    @rule(seed=st.integers(0, 2**32 - 1))
    def several_choices(self, seed: int) -> None:
        """`n` > 1: SGLang fills the cache with a request for no token, then sends the choices."""
        draw = random.Random(seed)
        prompt = self.texts.prompt(draw, self.longest)
        same = {"extra_key": draw.choice((None, "a")), "lora_id": draw.choice((None, *self.lora_ids))}
        self._send(prompt, draw, tokens=0, **same)
        self.run_passes(draw.randint(0, 3))
        for _ in range(draw.randint(2, 3)):
            self._send(prompt, draw, custom=self._custom(draw), **same)

    def _embeddings(self, draw: random.Random) -> None:
        """Another client's request that puts embeddings of its own in place of some tokens."""
        from sglang.srt.managers.embed_types import PositionalEmbeds

        prompt = self.texts.prompt(draw, 120)
        made = torch.full((1, HIDDEN), draw.random())
        override = PositionalEmbeds(embeds=made, positions=[draw.randrange(len(prompt))])
        # In a namespace of its own: SGLang keeps its KV out of nobody's tree.
        key = f"embeds-{next(self.counter)}"
        self._send(prompt, draw, positional_embed_overrides=override, extra_key=key, tokens=draw.choice((1, 3)))

    # Not with preemption: SGLang's own scheduler counts the rows of sessions wrongly then.
    @precondition(lambda self: not self.released and not self.paused and not self.set_up.preempt)
    @rule(seed=st.integers(0, 2**32 - 1), close=st.sampled_from([False, False, True]))
    def streaming_session(self, seed: int, close: bool) -> None:
        if self.session is None:
            self.open_session()
        self.close_session() if close else self.session_turn(seed)

    def open_session(self) -> None:
        from sglang.srt.managers.io_struct import OpenSessionReqInput

        name = f"session-{next(self.counter)}"
        self.bench.control(OpenSessionReqInput(capacity_of_str_len=4000, session_id=name, streaming=True))
        self.session = (name, None)

    def session_turn(self, seed: int) -> None:
        from sglang.srt.managers.io_struct import SessionParams

        name, last = self.session
        if last is not None and (last.finished is None or last.aborted):
            return
        draw = random.Random(seed)
        before = 0 if last is None else last.sent["length"]
        prompt = self.texts.prompt(draw, 90)
        if before + len(prompt) > self.longest // 2:
            return
        params = SessionParams(id=name, rid=last.rid if last is not None else None)
        ticket = self._send(prompt, draw, session_params=params, session_id=name, tokens=draw.choice((1, 5)))
        ticket.sent["length"] = before + len(prompt) + ticket.sent["tokens"]
        self.session = (name, ticket)

    def close_session(self) -> None:
        from sglang.srt.managers.io_struct import CloseSessionReqInput

        name, last = self.session
        if last is not None and last.finished is None:
            return
        self.bench.control(CloseSessionReqInput(session_id=name))
        self.session = None

    # ---- passes and ends ----

    @rule(passes=st.integers(1, 7))
    def run_passes(self, passes: int) -> None:
        for _ in range(passes):
            self.bench.step()
            self.numbers["passes"] += 1
            self.checker.after_pass()

    @rule(seed=st.integers(0, 2**32 - 1))
    def abort(self, seed: int) -> None:
        draw = random.Random(seed)
        waiting = self.bench.open_tickets
        rid = draw.choice(waiting).rid if waiting and draw.random() < 0.8 else draw.choice(_ABORT_RIDS)
        self.bench.abort(rid)

    @precondition(lambda self: not self.paused and not self.released)
    @rule()
    def settle(self) -> None:
        """Everything is answered; then all books must be closed."""
        quiet = 0
        while not self.bench.idle:
            before = self.bench.tokens, self.bench.pipeline.auditor.upto, self.bench.pipeline.auditor.tokens
            self.run_passes(1)
            after = self.bench.tokens, self.bench.pipeline.auditor.upto, self.bench.pipeline.auditor.tokens
            quiet = 0 if after != before else quiet + 1
            assert quiet < 150, f"nobody gets anything: {self.bench.describe()}"
        self.run_passes(2)
        if self.bench.idle and self.session is None:
            self.checker.when_idle()

    # ---- operators ----

    def _answered(self) -> bool:
        """Clients have all their answers; a piece of an audit may run."""
        return not self.bench.open_tickets and not self.bench._inbox and self.session is None and not self.paused

    def _control(self, request):
        """Send it, and run until it is answered."""
        count = len(self.bench.answers)
        self.bench.control(request)
        for _ in range(60):
            self.run_passes(1)
            if len(self.bench.answers) > count:
                return self.bench.answers[-1]
        raise AssertionError(f"{type(request).__name__} was never answered")

    @precondition(lambda self: self._answered() and not self.released)
    @rule(what=st.sampled_from(["flush", "update_weights", "update_weights", "release_memory"]))
    def operator(self, what: str) -> None:
        getattr(self, what)()

    def flush(self) -> None:
        from sglang.srt.managers.io_struct import FlushCacheReqInput

        answer = self._control(FlushCacheReqInput())
        assert answer.success, "every client has its answer, and the flush was refused"
        assert not len(self.bench.pipeline.index), "the index outlives the tree"

    def update_weights(self) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput

        self.folders.reverse()
        answer = self._control(UpdateWeightFromDiskReqInput(model_path=str(self.folders[0]), load_format="auto"))
        assert answer.success, answer.message
        self.checker.use(*self._references())

    def release_memory(self) -> None:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        self._control(ReleaseMemoryOccupationReqInput(tags=["kv_cache"]))
        self.released = True

    @precondition(lambda self: self.released)
    @rule()
    def resume_memory(self) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        self._control(ResumeMemoryOccupationReqInput(tags=["kv_cache"]))
        self.released = False

    @precondition(lambda self: not self.paused and not self.released and self.session is None)
    @rule(mode=st.sampled_from(["retract", "in_place"]))
    def pause(self, mode: str) -> None:
        from sglang.srt.managers.io_struct import PauseGenerationReqInput

        self.bench.control(PauseGenerationReqInput(mode=mode))
        self.run_passes(1)
        self.paused = True

    @precondition(lambda self: self.paused)
    @rule()
    def unpause(self) -> None:
        from sglang.srt.managers.io_struct import ContinueGenerationReqInput

        self.bench.control(ContinueGenerationReqInput(torch_empty_cache=False))
        self.run_passes(1)
        self.paused = False

    # ---- failures of ours ----

    @rule(
        where=st.sampled_from(
            [
                "match",
                "lease",
                "index",
                "copy",
                "select",
                "narrow",
                "finish",
                "repair",
                "ledger",
                "report",
                "peek",
                "order",
            ]
        ),
        skip=st.integers(0, 2),
    )
    def fail_once(self, where: str, skip: int) -> None:
        """One of our steps raises, once, at its next use but `skip`; the engine must serve on."""
        pipeline, batches, queue = self.bench.pipeline, self.bench.runner.model.forward, self.bench.queue
        while hasattr(batches, "__closure__") and not hasattr(batches, "__self__"):
            batches = next(c.cell_contents for c in batches.__closure__ if callable(c.cell_contents))
        batches = batches.__self__
        executor = batches._instead.__self__
        target = {
            "match": (pipeline.lending, "match"),
            "lease": (pipeline.lending, "lease"),
            "index": (pipeline.index, "add"),
            "copy": (executor.assembly, "copy"),
            "select": (batches, "select"),
            "narrow": (batches, "narrow"),
            "finish": (batches, "finish"),
            "repair": (batches, "extend"),
            "ledger": (pipeline.ledger, "bill"),
            "report": (pipeline, "_for_client"),
            "peek": (queue and queue._peek, "_look"),
            "order": (queue and queue.queue, "order"),
        }[where]
        if target[0] is None or where == "report":  # a request without a report is told apart by nobody
            return
        self.checker.injected += 1
        self._break(*target, skip)

    def _break(self, owner, name: str, skip: int) -> None:
        original, left = getattr(owner, name), skip

        def broken(*args, **kwargs):
            nonlocal left
            if left:
                left -= 1
                return original(*args, **kwargs)
            with contextlib.suppress(AttributeError):
                delattr(owner, name)
            raise RuntimeError("injected")

        with contextlib.suppress(AttributeError):  # objects with slots stay whole
            setattr(owner, name, broken)

    def teardown(self) -> None:
        try:
            if self.checker is not None and not self.bench._ended and self.bench._error is None:
                self._finish()
        finally:
            self.open.close()

    def _finish(self) -> None:
        if self.released:
            self.resume_memory()
        if self.paused:
            self.unpause()
        if self.session is not None:
            self.settle()
            self.close_session()
            self.session = None
        self.settle()
        for report in (t.report for t in self.bench.tickets if t.report is not None):
            self.numbers["reused" if report["outcome"] == "reused" else report["reason"]] += 1
        self.numbers["tree_tokens_compared"] += self.checker.tree_checked
        self.numbers["answers_compared"] += self.checker.answers_checked
