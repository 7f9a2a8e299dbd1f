"""Audits beside what operators ask, on a scheduler of fakes: whoever has all answers finds the engine idle."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from fakes import FakeTree
from prometheus_client import CollectorRegistry
from sglang.srt.managers import io_struct
from sglang.srt.managers.schedule_batch import FINISH_ABORT, FINISH_LENGTH
from sglang.srt.sampling.sampling_params import SamplingParams
from test_lifecycle import COSTS, HERE

from kvshare_sched.engine.sglang import audit_hooks
from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.quality.audit import PIECE, Audit, Capture
from kvshare_sched.records.request import Reason
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import attach
from kvshare_sched.settings import KVShareConfig

FLUSH = io_struct.FlushCacheReqInput()
OPERATORS = (
    FLUSH,
    io_struct.ReleaseMemoryOccupationReqInput(tags=["kv_cache"]),
    io_struct.UpdateWeightFromDiskReqInput(model_path="/weights"),
    io_struct.UnloadLoRAAdapterReqInput(lora_name="a", lora_id="a"),
    io_struct.PauseGenerationReqInput(mode="in_place"),
)


def generate(rid: str) -> io_struct.TokenizedGenerateReqInput:
    audit = Audit(rid, HERE, range(5), Capture("here", "dhd", 0.1, False, (), 4, 0))
    return audit_hooks.request_of(audit, 3)


def embed(rid: str) -> io_struct.TokenizedEmbeddingReqInput:
    none = dict.fromkeys(("input_text", "mm_inputs", "token_type_ids"))
    return io_struct.TokenizedEmbeddingReqInput(
        rid=rid, input_ids=array("q", [1]), sampling_params=SamplingParams(), **none
    )


CLIENTS = (
    generate("c1"),
    embed("c2"),
    io_struct.BatchTokenizedGenerateReqInput(batch=[generate("c3")]),
    io_struct.BatchTokenizedEmbeddingReqInput(batch=[embed("c4")]),
    io_struct.AbortReq(rid="c5"),
    io_struct.OpenSessionReqInput(capacity_of_str_len=100, session_id="s"),
    io_struct.CloseSessionReqInput(session_id="s"),
)


class Req(SimpleNamespace):
    """SGLang's request, as far as it is asked."""

    def __init__(self, recv_req):
        super().__init__(rid=recv_req.rid, origin_input_ids=recv_req.input_ids, cached_tokens=0, output_ids=[7])
        self.finished_reason = self.finished_output = None
        self.logprob = SimpleNamespace(input_token_ids_logprobs_val=None, input_top_logprobs_idx=None)

    def finished(self) -> bool:
        return self.finished_reason is not None


class Scheduler:
    """Hands on what it is asked, and runs whatever waits for one pass."""

    def __init__(self, prompt_len: int = 600, audits: int = 1):
        self.registry = CollectorRegistry()
        config = KVShareConfig(audit_share=1.0)
        self.pipeline = Pipeline(config, FakeTree(), COSTS, ShareMetrics(registry=self.registry))
        self.auditor = self.pipeline.auditor
        self.auditor.served = 10**6
        for number in range(audits):
            capture = Capture("here", "dhd", 0.1, False, (), prompt_len, 0)
            self.auditor.queue.append(Audit(f"audit {number}", HERE, range(prompt_len + 4), capture))
        self.tree_cache = SimpleNamespace(pipeline=self.pipeline, full_evictable_size=lambda: 0)
        self.token_to_kv_pool_allocator = SimpleNamespace(available_size=lambda: 10_000)
        self.page_size, self.max_req_input_len = 1, 10_000
        self.weight_updater = SimpleNamespace(offload_tags=set())
        self.waiting_queue: list[Req] = []
        self.running: list[Req] = []
        self.last_batch = None
        self.handled: list = []  # what SGLang has come to see, in order
        self.aborted: list[Req] = []  # whose state in the cache was dropped

    # what hooks ask

    def is_fully_idle(self) -> bool:
        return not (self.waiting_queue or self.running or self.last_batch)

    def handle_generate_request(self, recv_req) -> None:
        self.waiting_queue.append(Req(recv_req))

    def _release_aborted_request(self, req) -> None:
        assert req not in self.waiting_queue
        self.aborted.append(req)

    # what happens

    def receive(self, *requests) -> list:
        """These come in; returns what SGLang sees of them, and of earlier ones, now."""
        seen: list = []
        audit_hooks.process_input_requests(lambda _, reqs: seen.extend(reqs), self, list(requests))
        self.handled += seen
        return seen

    def idle(self) -> Req | None:
        """A pass finds nothing to do; returns the piece of an audit that waits behind it."""
        audit_hooks.on_idle(lambda _: None, self)
        return self.auditor.piece

    def run(self) -> None:
        """What waits is admitted and runs."""
        self.running, self.waiting_queue = self.waiting_queue, []
        for req in self.running:
            session = self.pipeline.admit(Reason.OPTED_OUT, req.rid, len(req.origin_input_ids), 0)
            session.audit = self.auditor.owns(req)
            session.partial = session.audit and self.auditor.partial
            attach(req, session)
            self.pipeline.begin(session)
        self.last_batch = SimpleNamespace(reqs=self.running)

    def end(self, reason=None) -> list[Req]:
        """What runs has its token; returns the answers that go out. SGLang forgets the batch a pass later."""
        for req in self.running:
            req.finished_reason = reason or FINISH_LENGTH(1)
        sent: list[Req] = []
        audit_hooks.stream_output(
            lambda _, reqs, *more: sent.extend(reqs), SimpleNamespace(tree_cache=self.tree_cache), self.running, False
        )
        self.running = []
        return sent

    def forget_batch(self) -> None:
        self.last_batch = None

    def dropped(self, result: str, reason: str) -> float:
        return self.registry.get_sample_value("kvshare_audits_total", {"result": result, "reason": reason})


@pytest.fixture
def scheduler():
    return Scheduler()


@pytest.mark.parametrize("asked", OPERATORS, ids=lambda request: type(request).__name__)
def test_an_operator_waits_for_the_end_of_a_piece_and_so_do_all_behind(scheduler, asked):
    first, behind, later = generate("first"), generate("behind"), generate("later")
    scheduler.idle()
    scheduler.run()
    assert scheduler.receive(first, asked, behind) == [first], "who came before goes on"
    assert scheduler.receive(later) == [], "who comes after waits, too"
    scheduler.end()
    assert scheduler.receive() == [], "SGLang takes the batch for running until the next pass"
    scheduler.forget_batch()
    assert scheduler.receive() == [asked, behind, later]
    assert scheduler.receive() == [] and scheduler.handled == [first, asked, behind, later]


def test_several_operators_keep_their_order(scheduler):
    scheduler.idle()
    scheduler.run()
    for asked in OPERATORS:
        assert scheduler.receive(asked) == []
    scheduler.end()
    scheduler.forget_batch()
    assert scheduler.receive(*CLIENTS) == [*OPERATORS, *CLIENTS]


@pytest.mark.parametrize("request_", CLIENTS, ids=lambda request: type(request).__name__)
def test_clients_do_not_notice_a_piece(scheduler, request_):
    scheduler.idle()
    assert scheduler.receive(request_) == [request_] and scheduler.waiting_queue == [scheduler.auditor.piece]
    scheduler.run()
    assert scheduler.receive(request_) == [request_] and not scheduler.auditor.held_back


@pytest.mark.parametrize("asked", OPERATORS, ids=lambda request: type(request).__name__)
def test_a_piece_that_waits_is_taken_out_of_the_queue_and_nobody_else(scheduler, asked):
    piece = scheduler.idle()
    before, behind = Req(generate(piece.rid)), Req(generate("other"))
    scheduler.waiting_queue = [before, piece, behind]
    client = generate("client")
    assert scheduler.receive(client, asked) == [client, asked], "at once"
    assert scheduler.waiting_queue == [before, behind] and scheduler.aborted == [piece]
    assert not scheduler.auditor.owns(piece)


def test_a_piece_that_was_taken_out_is_asked_for_again(scheduler):
    scheduler.idle()
    scheduler.run()
    scheduler.end()
    scheduler.forget_batch()
    second = scheduler.idle()
    assert len(second.origin_input_ids) == 2 * PIECE
    assert scheduler.receive(FLUSH) == [FLUSH] and scheduler.is_fully_idle()
    again = scheduler.idle()
    assert again is not second and len(again.origin_input_ids) == 2 * PIECE
    for _ in range(2):
        scheduler.run()
        assert scheduler.end() == [], "a reference goes to nobody"
        scheduler.forget_batch()
        scheduler.idle()
    assert scheduler.auditor.running is None
    assert scheduler.dropped("dropped", "lost") == 0 and scheduler.dropped("failed", "reference") == 1, "without logits"


def test_an_operator_that_waits_sees_no_further_piece(scheduler):
    scheduler.idle()
    scheduler.run()
    scheduler.receive(FLUSH)
    scheduler.end()
    scheduler.forget_batch()
    assert scheduler.idle() is None and scheduler.is_fully_idle(), "more of this audit was to come"
    assert scheduler.receive() == [FLUSH]
    assert scheduler.idle() is not None, "and goes on behind it"


def test_operators_of_an_engine_without_a_piece_are_served_at_once(scheduler):
    client = generate("client")
    assert scheduler.receive(FLUSH, client) == [FLUSH, client]
    scheduler.handle_generate_request(client)
    scheduler.run()
    assert scheduler.receive(FLUSH) == [FLUSH], "SGLang refuses it by itself"


def test_an_engine_that_has_given_its_memory_away_computes_no_audit(scheduler):
    scheduler.weight_updater.offload_tags.add("kv_cache")
    assert scheduler.idle() is None
    scheduler.weight_updater.offload_tags.clear()
    assert scheduler.idle() is not None


def test_a_piece_that_a_client_aborts_with_all_others_lets_the_operator_go_on(scheduler):
    scheduler.idle()
    scheduler.run()
    scheduler.receive(FLUSH)
    scheduler.end(FINISH_ABORT("stopped"))
    scheduler.forget_batch()
    assert scheduler.receive() == [FLUSH]
    assert scheduler.auditor.running is None and scheduler.dropped("failed", "reference") == 1


def test_an_answer_over_replaced_weights_is_compared_with_nothing():
    scheduler = Scheduler(audits=0)
    scheduler.handle_generate_request(generate("client"))
    scheduler.run()
    [req] = scheduler.running
    session = audit_hooks.session_of(req)
    session.capture = Capture("here", "dhd", 0.1, False, (), 3, 0, rows=[object()])
    scheduler.pipeline.weights_change()
    assert scheduler.end() == [req]
    assert session.capture is None and not scheduler.auditor.queue
    assert scheduler.dropped("dropped", "weights") == 1


def test_an_engine_without_reuse_sees_what_comes():
    seen, scheduler = [], SimpleNamespace(tree_cache=object())
    audit_hooks.process_input_requests(lambda _, reqs: seen.append(reqs), scheduler, [FLUSH])
    assert seen == [[FLUSH]]
