"""SGLang's real scheduler, tree, pools, hooks and model runner in this process, stepped by the test.

The event loop that SGLang would run, normal or overlap, runs in a thread of its own and waits at the place where it
would read its socket until the test lets it go on: only one of the two ever runs. Nothing else of SGLang is replaced,
apart from the prices of the tiny model, which would say that reuse is not worth its overhead.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import os
import threading
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import zmq

_LAYER_PRICES = {"cell_s": 1e-3, "copy_s": 1e-5, "overhead_s": 1e-3}


class Died(Exception):
    """The scheduler's loop has ended with an exception: SGLang would end the whole server."""


@dataclass
class Ticket:
    """One request that was sent, and what has come back."""

    rid: str
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    report: dict | None = None
    finished: dict | None = None  # SGLang's reason
    input_logprobs: list[float] = field(default_factory=list)
    output_logprobs: list[float] = field(default_factory=list)
    output_top_logprobs: list = field(default_factory=list)  # a list of values for each output token
    sent: dict = field(default_factory=dict)  # what the request asked for

    @property
    def aborted(self) -> bool:
        return self.finished is not None and self.finished["type"] == "abort"


class Bench:
    """One engine. Use `running`."""

    def __init__(self, scheduler, loop: str):
        self.scheduler = scheduler
        self.cache = scheduler.tree_cache
        self.pipeline = self.cache.pipeline
        self.queue = self.cache.queue
        self.runner = scheduler.tp_worker.model_runner
        self.loop = loop
        self.tickets: list[Ticket] = []  # in the order sent
        self.answers: list = []  # to control requests
        self.passes = self.tokens = 0  # made; sent to clients
        self._inbox: list = []
        self._numbers = itertools.count()
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._error: BaseException | None = None
        self._ended = False

    # ---- what the test does ----

    def send(self, prompt: Sequence[int], *, rid: str | None = None, tokens: int = 4, custom=None, **fields) -> Ticket:
        """A request for `tokens` greedy tokens; custom: its `custom_params`; fields: of TokenizedGenerateReqInput."""
        from sglang.srt.managers.io_struct import TokenizedGenerateReqInput
        from sglang.srt.sampling.sampling_params import SamplingParams

        rid = f"r{next(self._numbers)}" if rid is None else rid
        sent = {"tokens": tokens, "custom": custom} | fields
        sampling = SamplingParams(
            max_new_tokens=tokens, temperature=0.0, custom_params=custom, ignore_eos=fields.pop("ignore_eos", True)
        )
        sampling.normalize(None)
        asked = {
            "input_text": None,
            "input_embeds": None,
            "mm_inputs": None,
            "token_type_ids": None,
            "return_logprob": False,
            "logprob_start_len": -1,
            "top_logprobs_num": 0,
            "token_ids_logprob": None,
            "stream": True,
        } | fields
        ticket = Ticket(rid, list(prompt), sent=sent)
        # Two requests may carry one id. SGLang sends this address, of one of several HTTP processes, back with each.
        request = TokenizedGenerateReqInput(rid=rid, input_ids=array("q", prompt), sampling_params=sampling, **asked)
        request.http_worker_ipc = str(len(self.tickets))
        self.tickets.append(ticket)
        self._inbox.append(request)
        return ticket

    def abort(self, rid: str) -> None:
        """A client gives up."""
        from sglang.srt.managers.io_struct import AbortReq

        self._inbox.append(AbortReq(rid=rid))

    def control(self, request) -> None:
        """Anything else that SGLang's HTTP process may send: flush, weights, memory, pause, sessions."""
        self._inbox.append(request)

    def step(self, passes: int = 1) -> None:
        """Let the loop make so many passes. Raises Died when it ends."""
        for _ in range(passes):
            if self._ended:
                raise Died("the loop has ended before")
            self.passes += 1
            self._go.release()
            self._done.acquire()
            if self._error is not None:
                raise Died(f"{type(self._error).__name__}: {self._error}") from self._error

    def run(self, limit: int = 2000) -> None:
        """Pass after pass until everything sent is answered and nothing runs, audits included."""
        for _ in range(limit):
            self.step()
            if self.idle:
                self.step(2)
                if self.idle:
                    return
        raise AssertionError(f"not idle after {limit} passes: {self.describe()}")

    @property
    def idle(self) -> bool:
        auditor = self.pipeline.auditor  # which may keep audits for when clients have paid for them
        return not self._inbox and not auditor.held_back and self.scheduler.is_fully_idle() and not auditor.running

    def describe(self) -> str:
        s = self.scheduler
        running = [req.rid for req in s.running_batch.reqs]
        cut = s.chunked_req and s.chunked_req.rid
        return f"waiting {[req.rid for req in s.waiting_queue]}, running {running}, cut {cut}"

    @property
    def open_tickets(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.finished is None]

    # ---- the loop's side ----

    def recv_requests(self, local_reqs=None) -> list:
        """In place of SGLang's socket."""
        self._done.release()
        self._go.acquire()
        found, self._inbox = self._inbox, []
        return [*(local_reqs or ()), *found]

    def output(self, payload, recv_obj=None) -> None:
        """In place of the socket to the HTTP process."""
        from sglang.srt.managers.io_struct import AbortReq, BatchTokenIDOutput

        if isinstance(payload, BatchTokenIDOutput):
            self._answers(payload)
        elif isinstance(payload, AbortReq):
            self.tickets[int(recv_obj.http_worker_ipc)].finished = payload.finished_reason or {"type": "abort"}
        else:
            self.answers.append(payload)

    def _answers(self, payload) -> None:
        custom = payload.customized_info
        custom = custom.unwrap() if hasattr(custom, "unwrap") else custom
        for at, address in enumerate(payload.http_worker_ipcs):
            ticket = self.tickets[int(address)]
            ticket.output += list(payload.output_ids[at])
            self.tokens += len(payload.output_ids[at]) + (payload.finished_reasons[at] is not None)
            for key in ("kvshare", "kvshare_whole"):
                for report in (custom or {}).get(key, [()] * len(payload.rids))[at] or ():
                    ticket.report = report if report is not None else ticket.report
            if payload.input_token_logprobs_val and payload.input_token_logprobs_val[at] is not None:
                ticket.input_logprobs += list(payload.input_token_logprobs_val[at])
            if payload.output_token_logprobs_val and payload.output_token_logprobs_val[at] is not None:
                ticket.output_logprobs += list(payload.output_token_logprobs_val[at])
            if payload.output_top_logprobs_val and payload.output_top_logprobs_val[at] is not None:
                ticket.output_top_logprobs += list(payload.output_top_logprobs_val[at])
            ticket.finished = payload.finished_reasons[at]

    def _loop(self) -> None:
        torch.set_num_threads(1)
        try:
            self.scheduler.run_event_loop()  # normal or overlap, as SGLang chooses
        except BaseException as error:
            self._error = error
        self._ended = True
        self._done.release()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._loop, daemon=True)
        self._thread.start()
        self._done.acquire()  # it waits for its first requests

    def _stop(self) -> None:
        self.scheduler.gracefully_exit = True
        while not self._ended:
            self._go.release()
            self._done.acquire()
        self._thread.join()


@contextlib.contextmanager
def running(
    model: Path,
    *,
    loop: str = "normal",
    page: int = 1,
    pool: int = 4096,
    chunk: int = 256,
    settings: Mapping[str, object] | None = None,
    arguments: Sequence[str] = (),
) -> Iterator[Bench]:
    """A started engine on the model in a folder. settings: KVSHARE_* without the prefix, in lower case.

    However it ends, and if it never starts: sockets, process groups and logging are as they were.
    """
    from sglang.srt.arg_groups.lora_hook import check_lora_server_args
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.plugins import load_plugins
    from sglang.srt.runtime_context import SpawnRanks, publish, reset_context
    from sglang.srt.server_args import PortArgs, prepare_server_args

    from kvshare_sched.engine.sglang import wiring
    from kvshare_sched.reuse.costs import CostModel

    load_plugins()
    words = ["--model-path", str(model), "--skip-tokenizer-init", "--device", "cpu", "--dtype", "float32"]
    words += ["--attention-backend", "kvshare_cpu", "--radix-cache-backend", "kvshare"]
    words += ["--max-total-tokens", str(pool), "--chunked-prefill-size", str(chunk), "--page-size", str(page)]
    words += [
        "--log-level",
        "error",
        "--max-running-requests",
        "16",
        "--context-length",
        "4096",
        "--random-seed",
        "0",
        *arguments,
    ]
    words += ["--disable-overlap-schedule"] if loop == "normal" else []
    environment = {f"KVSHARE_{name.upper()}": str(value) for name, value in (settings or {}).items()}

    def prices(runner, cos_sin, neox) -> CostModel:
        return CostModel(**_LAYER_PRICES, layers=len(runner.model.model.layers), pass_rows=1.0)

    with (
        _logging_kept(),
        _sockets() as sockets,
        mock.patch.dict(os.environ, environment),
        mock.patch.object(wiring, "measure_costs", prices),
    ):
        server_args = prepare_server_args(words)
        check_lora_server_args(server_args)
        try:
            publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=0, gpu_id=0))
            scheduler = Scheduler(server_args, PortArgs.init_new(server_args))
            bench = Bench(scheduler, loop)
            scheduler.request_receiver = bench
            for sender in (scheduler.ipc_channels.send_to_detokenizer, scheduler.ipc_channels.send_to_tokenizer):
                sender.send_output = bench.output
            bench._start()
            gc.freeze()  # SGLang collects at every flush, which takes half a second with torch loaded
            try:
                yield bench
            finally:
                gc.unfreeze()
                bench._stop()
        finally:
            _end(sockets)
            reset_context()


@contextlib.contextmanager
def _sockets() -> Iterator[list[zmq.Socket]]:
    """Every socket opened meanwhile: an engine that refuses to start has some, and nobody else knows them."""
    opened, ordinary = [], zmq.Context.socket

    def noted(context, *args, **kwargs):
        opened.append(ordinary(context, *args, **kwargs))
        return opened[-1]

    with mock.patch.object(zmq.Context, "socket", noted):
        yield opened


@contextlib.contextmanager
def _logging_kept() -> Iterator[None]:
    """SGLang sets up logging for a process of its own; here it is the process of all tests."""
    root = logging.root
    loggers = [logger for logger in root.manager.loggerDict.values() if isinstance(logger, logging.Logger)]
    levels = [(logger, logger.level) for logger in (root, *loggers)]
    handlers, disabled = list(root.handlers), root.manager.disable
    try:
        yield
    finally:
        for logger, level in levels:
            logger.setLevel(level)
        root.handlers[:] = handlers
        logging.disable(disabled)


def _end(sockets: Sequence[zmq.Socket]) -> None:
    """Give back what the next engine in this process needs: process groups and sockets."""
    from sglang.srt.distributed.parallel_state import destroy_distributed_environment, destroy_model_parallel

    for socket in sockets:
        socket.close(linger=0)  # an open one holds up whoever collects its context, for ever
    destroy_model_parallel()
    destroy_distributed_environment()
