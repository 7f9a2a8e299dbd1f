"""Audits without an engine: arithmetic, choice, capture, bounded queue and cost, and a planted donor that lies."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeTree, NamedPipeline
from prometheus_client import CollectorRegistry

from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.observe.series import AUDIT_RESULTS
from kvshare_sched.quality.audit import PIECE, POSITIONS, TOP, Auditor
from kvshare_sched.quality.controller import ENOUGH
from kvshare_sched.quality.divergence import compare
from kvshare_sched.records.request import Outcome, Reason, RequestView
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

HERE = Namespace("here")
VOCABULARY = 300


def distributions(seed: int, positions: int, sharpness: float = 4.0) -> torch.Tensor:
    """Log-probabilities [positions, VOCABULARY]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.log_softmax(sharpness * torch.randn(positions, VOCABULARY, generator=generator), -1)


def top(log_q: torch.Tensor, count: int):
    best = log_q.topk(count)
    return best.indices, best.values


def reference_for(ids, log_p: torch.Tensor):
    return [row[list(ids)].tolist() for row in log_p], log_p.argmax(-1).tolist()


# ---- arithmetic ----


def test_with_every_id_the_kl_is_the_textbook_one():
    p, q = distributions(1, 5), distributions(2, 5)
    rows = [top(row, VOCABULARY) for row in q]
    found = compare(rows, *(reference_for(range(VOCABULARY), p)[0], range(VOCABULARY)), p.argmax(-1).tolist())
    truth = (p.exp() * (p - q)).sum(-1).double()
    assert found.kl == pytest.approx(float(truth.mean()), rel=1e-4)
    assert found.kl_first == pytest.approx(float(truth[0]), rel=1e-4)


def test_fewer_ids_give_a_lower_bound_and_equal_distributions_zero():
    p, q = distributions(1, 5), distributions(2, 5)
    found = []
    for count in (2, 16, TOP):
        rows = [top(row, count) for row in q]
        ids = sorted({i for kept, _ in rows for i in kept.tolist()})
        found.append(compare(rows, reference_for(ids, p)[0], ids, p.argmax(-1).tolist()).kl)
    assert 0 < found[0] < found[1] < found[2] < float((p.exp() * (p - q)).sum(-1).mean())
    rows = [top(row, TOP) for row in p]
    ids = sorted({i for kept, _ in rows for i in kept.tolist()})
    same = compare(rows, *(reference_for(ids, p)[0], ids), p.argmax(-1).tolist())
    assert same.kl == pytest.approx(0, abs=1e-6) and same.same == same.same_first == 1


def test_agreement_counts_positions_with_the_same_likeliest_token():
    p = distributions(3, 4)
    rows = [top(row, TOP) for row in p]
    ids = sorted({i for kept, _ in rows for i in kept.tolist()})
    best = p.argmax(-1).tolist()
    best[0] = (best[0] + 1) % VOCABULARY
    found = compare(rows, reference_for(ids, p)[0], ids, best)
    assert (found.same_first, found.same) == (0, 0.75)


def test_log_probabilities_that_are_not_finite_are_refused():
    p = distributions(3, 1)
    ids = sorted(top(p[0], TOP)[0].tolist())
    with pytest.raises(ValueError, match="finite"):
        compare([top(p[0], TOP)], [[float("nan")] * TOP], ids, [0])


# ---- an engine of fakes ----


class World:
    """An auditor, its metrics, and requests that go through it."""

    def __init__(self, **settings):
        self.registry, self.shut = CollectorRegistry(), []
        self.config = KVShareConfig(**{"audit_share": 1.0} | settings)
        self.metrics = ShareMetrics(registry=self.registry)
        self.auditor = Auditor(self.config, self.shut.append, self.metrics.audits)
        self.count = 0

    def begin(self, tenant="here", *, prompt_len=100, donors=(7,), outcome=Outcome.REUSED, wished=False, **more):
        """The session of a request that is admitted."""
        self.count += 1
        rid = f"r{self.count}"
        ratio = self.auditor.controller.ratio(tenant)
        session = SimpleNamespace(
            rid=rid,
            prompt_len=prompt_len,
            exact_len=0,
            namespace=Namespace(tenant),
            outcome=outcome,
            reason=Reason.NONE,
            config=replace(self.config, ratio=ratio),
            leases=dict.fromkeys(donors),
            wished=wished,
            audit=False,
            capture=None,
        )
        for name, value in more.items():
            setattr(session, name, value)
        self.auditor.begun(session)
        return session

    def forward(self, session, length: int, log_q: torch.Tensor) -> None:
        """One forward pass that ends at `length` tokens and gives these logits."""
        batch = SimpleNamespace(seq_lens_cpu=torch.tensor([3, length]))
        output = SimpleNamespace(next_token_logits=torch.stack((log_q * 0, log_q + 5)))
        self.auditor.observe([None, session], batch, output)

    def finish(self, session, q: torch.Tensor, *, prompt_len=100, tenant="here") -> None:
        for i, row in enumerate(q):
            self.forward(session, prompt_len + i, row)
        if session.capture is not None:
            self.auditor.finished(session, Namespace(tenant), range(prompt_len), list(range(len(q))))

    def start(self, room=10_000):
        """The engine is idle: it takes the next piece of an audit."""
        audit = self.auditor.start(room)
        if audit is not None:
            self.auditor.sent(object())
        return audit

    def run(self, p: torch.Tensor, room=10_000):
        """The engine is idle: run the next audit, all of its pieces, against a reference that says p."""
        audit = self.start(room)
        if audit is not None:
            while self.auditor.partial:
                self.auditor.went_on(PIECE)
                assert self.start(room) is audit
            self.auditor.settle(*reference_for(audit.ids, p[: len(audit.capture.rows)]))
        return audit

    def results(self) -> dict:
        return {
            pair: n
            for pair in AUDIT_RESULTS
            if (n := self.value("kvshare_audits_total", result=pair[0], reason=pair[1]))
        }

    def value(self, name: str, **labels) -> float:
        return self.registry.get_sample_value(name, labels)


P, Q = distributions(1, 30), distributions(2, 30)


@pytest.mark.parametrize(("share", "chosen"), [(0.0, []), (0.25, [0, 4, 8]), (0.5, [0, 2, 4, 6, 8]), (1.0, range(10))])
def test_the_first_of_a_tenant_and_then_every_few(share, chosen):
    world = World(audit_share=share)
    for tenant in ("a", "b"):
        sessions = [world.begin(tenant) for _ in range(10)]
        assert [i for i, session in enumerate(sessions) if session.capture is not None] == list(chosen)


def test_only_requests_that_reused_are_chosen():
    world = World()
    for outcome in (Outcome.ORDINARY, Outcome.DISCOVERED):
        assert world.begin(outcome=outcome).capture is None


def test_an_audit_measures_what_the_model_gave():
    world = World()
    session = world.begin()
    for end in (40, 80):  # chunks that are not the last say nothing about the answer
        world.forward(session, end, Q[-1])
    world.finish(session, Q[:6])
    audit = world.run(P)
    assert audit.namespace == HERE and list(audit.tokens) == [*range(100), *range(6)]
    truth = compare([top(row, TOP) for row in Q[:6]], *(reference_for(audit.ids, P[:6])[0], audit.ids), [0] * 6).kl
    labels = {"strategy": KVShareConfig().strategy, "span": "sent"}
    assert world.value("kvshare_audit_kl_nats_sum", **labels) == pytest.approx(truth, rel=1e-3)  # float32 of logits
    mine = world.value("kvshare_tenant_audit_kl_nats_sum", tenant="here", span="sent")
    assert mine == pytest.approx(truth, rel=1e-3)
    assert world.results() == {("done", "none"): 1}
    assert world.value("kvshare_audit_tokens_total") == 106


def test_a_full_prefill_shows_how_far_the_cost_model_is_off():
    world = World()
    auditor = world.auditor = Auditor(
        world.config, world.shut.append, world.metrics.audits, prefill_s=lambda tokens: 0.01 * tokens
    )
    auditor.started_s = 50.0
    auditor.timed(51.5, 100)
    auditor.timed(49.0, 0)  # a clock that was set back
    assert world.value("kvshare_audit_prefill_seconds_total", by="clock") == 1.5
    assert world.value("kvshare_audit_prefill_seconds_total", by="model") == pytest.approx(1.0)


def test_the_logits_are_copied_because_samplers_write_into_them():
    world = World()
    session = world.begin()
    logits = torch.stack((Q[0], Q[0].clone()))
    batch = SimpleNamespace(seq_lens_cpu=torch.tensor([9, 100]))
    world.auditor.observe([None, session], batch, SimpleNamespace(next_token_logits=logits))
    logits.fill_(-1)
    world.auditor.finished(session, HERE, range(100), [5])
    (ids, log_q) = world.start(10_000).capture.rows[0]
    assert torch.equal(ids, top(Q[0], TOP)[0]) and torch.allclose(log_q, top(Q[0], TOP)[1], atol=1e-5)


def test_no_more_positions_than_agreed():
    world = World()
    world.finish(world.begin(), Q)
    assert len(world.start(10_000).capture.rows) == POSITIONS < len(Q)


def test_a_retracted_request_drops_its_audit():
    world = World()
    session = world.begin()
    world.auditor.released(session, finished=False)
    world.finish(session, Q[:2])
    assert world.run(P) is None and world.results() == {("dropped", "retracted"): 1}


def test_the_oldest_gives_way_when_the_queue_is_full():
    world = World()
    sessions = []
    for _ in range(66):
        session = world.begin()
        sessions.append(session.capture)
        world.finish(session, Q[:1])
    assert world.results() == {("dropped", "queue_full"): 2} and len(world.auditor.queue) == 64
    assert world.run(P).capture is sessions[2]


def test_a_flood_of_one_tenant_leaves_the_others_their_audits():
    world = World()
    world.finish(world.begin("quiet"), Q[:1])
    for _ in range(70):
        world.finish(world.begin("flood"), Q[:1])
    tenants = [audit.capture.tenant for audit in world.auditor.queue]
    assert tenants == ["quiet"] + ["flood"] * 63


def test_what_does_not_fit_is_dropped_and_the_next_one_runs():
    world = World()
    world.finish(world.begin(prompt_len=500), Q[:1], prompt_len=500)
    world.finish(world.begin(), Q[:1])
    assert len(world.run(P, room=400).tokens) == 101
    assert world.results() == {("dropped", "no_room"): 1, ("done", "none"): 1}


def test_a_long_audit_runs_in_pieces_whenever_the_engine_is_idle():
    world = World()
    world.finish(world.begin(prompt_len=600), Q[:4], prompt_len=600)
    world.finish(world.begin("other"), Q[:1])
    auditor, ends = world.auditor, []
    while (audit := world.start(10_000)).capture.tenant == "here":
        ends.append((auditor.upto, auditor.partial))
        if auditor.partial:
            auditor.went_on(PIECE)
        else:
            auditor.settle(*reference_for(audit.ids, P[:4]))
    assert ends == [(PIECE, True), (2 * PIECE, True), (604, False)], "the prompt's last token and the answer together"
    assert world.results() == {("done", "none"): 1}
    assert world.value("kvshare_audit_tokens_total") == 604 + 101 and auditor.upto == 101


def test_an_answer_is_compared_in_one_piece_whatever_the_prompt_is_long():
    for length in range(2 * PIECE - 30, 2 * PIECE + 30):
        world, upto = World(), [0]
        world.finish(world.begin(prompt_len=length), Q[:20], prompt_len=length)
        while world.start(10_000) and upto.append(world.auditor.upto) is None and upto[-1] < length + 20:
            world.auditor.went_on(PIECE)
        assert upto[-2] < length and upto[-1] == length + 20
        assert max(np.diff(upto)) <= PIECE + 20


def test_a_piece_that_was_lost_or_has_no_room_ends_its_audit():
    world = World()
    for _ in range(3):
        world.finish(world.begin(prompt_len=600), Q[:4], prompt_len=600)
    first = world.start(10_000)
    world.auditor.went_on(PIECE)
    world.start(10_000)  # aborted while it waits
    assert world.start(10_000) is not first
    world.auditor.went_on(PIECE)
    assert world.start(500) is None
    assert world.results() == {("dropped", "lost"): 1, ("dropped", "no_room"): 2}


def test_an_audit_whose_pieces_do_not_stay_in_the_tree_ends():
    world = World()
    world.finish(world.begin(prompt_len=2000), Q[:4], prompt_len=2000)
    for computed in (PIECE, PIECE, 3 * PIECE):
        world.start(10_000)
        world.auditor.went_on(computed)
    assert world.start(10_000) is None and world.results() == {("dropped", "no_room"): 1}
    assert world.value("kvshare_audit_tokens_total") == 2004 + 2 * PIECE


def test_an_audit_begins_behind_what_was_exact():
    world = World()
    world.finish(world.begin(prompt_len=2000, exact_len=1200), Q[:4], prompt_len=2000)
    world.start(10_000)
    assert world.auditor.upto == 5 * PIECE


def test_between_two_pieces_no_request_is_ours():
    world = World()
    world.finish(world.begin(prompt_len=2000), Q[:4], prompt_len=2000)
    world.start(10_000)
    piece = world.auditor.piece
    assert world.auditor.owns(piece) and not world.auditor.owns(object()) and world.auditor.partial
    world.auditor.went_on(PIECE)
    assert not world.auditor.owns(piece) and not world.auditor.owns(None)


def test_a_piece_that_is_taken_back_is_asked_for_again():
    world = World()
    world.finish(world.begin(prompt_len=600), Q[:4], prompt_len=600)
    audit = world.start(10_000)
    world.auditor.went_on(PIECE)
    world.start(10_000)
    world.auditor.withdrawn()
    assert world.start(10_000) is audit and world.auditor.upto == 2 * PIECE
    assert world.results() == {}


def test_nobody_can_guess_the_id_of_an_audit():
    world = World()
    for _ in range(2):
        world.finish(world.begin(), Q[:1])
    one, two = (audit.rid.removeprefix("kvshare-audit-") for audit in world.auditor.queue)
    assert one != two and min(len(one), len(two)) >= 32


def test_a_request_that_ends_without_a_token_is_no_longer_under_audit():
    world = World()
    world.auditor.released(session := world.begin(), finished=True)
    assert session.capture is None and world.results() == {("dropped", "no_answer"): 1}


def test_what_cannot_be_compared_any_more_is_dropped():
    world = World()
    for _ in range(3):
        world.finish(world.begin(), Q[:1])
    world.start(10_000)
    world.auditor.withdrawn()
    world.auditor.forget("weights")
    assert world.start(10_000) is None and world.results() == {("dropped", "weights"): 3}


def test_audits_end_with_their_adapter():
    world = World()
    for adapter in ("a", "b", "a", None):
        world.forward(session := world.begin(), 100, Q[0])
        world.auditor.finished(session, Namespace("here", None, adapter), range(100), [1])

    def unload(adapter: str) -> None:
        world.auditor.forget("unloaded", lambda audit: audit.namespace.lora_id == adapter)

    unload("b")
    assert world.auditor.start(10_000).namespace.lora_id == "a", "between two pieces of it"
    unload("c")
    assert world.auditor.running is not None
    unload("a")
    assert world.auditor.running is None
    assert world.run(P).namespace.lora_id is None and not world.auditor.queue
    assert world.results() == {("dropped", "unloaded"): 3, ("done", "none"): 1}


def test_audits_cost_at_most_their_share_of_the_prompts_and_one_more():
    world, spent = World(audit_share=0.1), 0
    for i in range(200):  # every tenant is new, so every request is chosen
        world.finish(world.begin(f"t{i}"), Q[:1], tenant=f"t{i}")
        while (audit := world.run(P)) is not None:
            spent += len(audit.tokens)
        assert spent <= 0.1 * 100 * (i + 1) + 101
    assert spent == world.value("kvshare_audit_tokens_total") > 0.1 * 100 * 199


def test_an_audit_the_engine_lost_is_counted_and_the_next_one_runs():
    world = World()
    for _ in range(2):
        world.finish(world.begin(), Q[:1])
    first = world.start(10_000)
    second = world.start(10_000)
    assert second is not first and second is not None
    assert world.start(10_000) is None and world.results() == {("dropped", "lost"): 2}


@pytest.mark.parametrize("reference", [(None, None), ([[0.5]], [1])])
def test_a_reference_that_cannot_be_used_is_a_failed_audit(reference):
    world = World()
    world.finish(world.begin(), Q[:2])
    world.start(10_000)
    world.auditor.settle(*reference)
    assert world.results() == {("failed", "reference"): 1} and world.auditor.running is None


def test_logits_that_cannot_be_kept_are_a_failed_audit():
    world = World()
    session = world.begin()
    world.auditor.observe([session], SimpleNamespace(seq_lens_cpu=torch.tensor([100])), None)
    world.finish(session, Q[:2])
    assert world.run(P) is None and world.results() == {("failed", "capture"): 1}


def test_every_rank_takes_the_measurement_of_the_first():
    world = World(ratio=0.5, target_kl=0.03)
    far = compare([top(row, TOP) for row in Q[:1]], [[-9.0] * VOCABULARY], range(VOCABULARY), [0])
    world.auditor.agree = lambda found: far
    for _ in range(ENOUGH):
        world.finish(world.begin(donors=()), P[:1])
        world.run(P)  # this rank saw no deviation at all
    assert world.auditor.controller.is_off("here")


def test_a_planted_donor_is_shut_within_a_few_requests_and_honest_ones_stay():
    """Donor 13 lies: what is borrowed from it ends far from full prefill; every third request borrows from it."""
    world = World(target_kl=0.03)
    for request in range(1, 10):
        donor = 13 if request % 3 == 0 else request
        if donor in world.shut:
            break
        world.finish(world.begin(donors=(donor,)), (Q if donor == 13 else P)[:4])
        world.run(P)
    assert world.shut == [13] and request <= 9
    assert world.value("kvshare_sources_shut_total") == 1


def test_a_request_with_settings_of_its_own_is_measured_and_moves_nothing():
    world = World(target_kl=0.03)
    for _ in range(10 * ENOUGH):
        world.finish(world.begin(wished=True), Q[:2])
        world.run(P)
    assert world.results() == {("done", "none"): 10 * ENOUGH} and world.shut == []
    assert world.auditor.controller.ratio("here") == world.config.ratio


def test_labels_stay_bounded_however_many_tenants_there_are():
    world = World()
    for i in range(40):
        world.finish(world.begin(f"t{i}"), Q[:1], tenant=f"t{i}")
        world.run(P)
    tenants = {
        s.labels["tenant"] for f in world.registry.collect() for s in f.samples if s.labels.get("tenant") is not None
    }
    assert len(tenants) == 33 and "other" in tenants and "t39" not in tenants


# ---- in the pipeline ----


def text(seed: int, length: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).permutation(1000)[:length] + 1000 * seed


def admit(pipeline: NamedPipeline, rid="r", wishes=None):
    tokens = np.concatenate((text(9, 20), text(1), text(8, 20)))
    view = RequestView(rid, HERE, tokens, 0, len(tokens), wishes or {})
    session = pipeline.admit(view, rid, view.prompt_len, 0)
    pipeline.begin(session)
    pipeline.release(rid)
    return session


@pytest.fixture
def pipeline():
    made = NamedPipeline(
        KVShareConfig(ratio=0.1), FakeTree(), CostModel(cell_s=1e-4, copy_s=1e-7, overhead_s=0.0, layers=4)
    )
    made.publish("donor", HERE, np.concatenate((text(50, 20), text(1))))
    return made


def test_the_tenants_ratio_is_used_unless_the_request_brings_its_own(pipeline):
    assert admit(pipeline).config is pipeline.config
    for _ in range(ENOUGH):
        pipeline.auditor.controller.audited("here", 0.1, 1.0)
    assert admit(pipeline).config.ratio == pytest.approx(0.15)
    assert admit(pipeline, wishes={"ratio": 0.3}).config.ratio == 0.3
    asked = admit(pipeline, wishes={"strategy": "epic"})
    assert (asked.config.strategy, asked.config.ratio, asked.wished) == ("epic", 0.1, True)


def test_a_tenant_that_is_off_is_refused_until_it_has_waited_long_enough(pipeline):
    controller = pipeline.auditor.controller
    while not controller.is_off("here"):
        controller.audited("here", controller.ratio("here"), 1.0)
    outcomes = []
    while (session := admit(pipeline)).outcome is Outcome.ORDINARY:
        assert session.reason is Reason.QUALITY and session.plan is None and pipeline.tree.active == 0
        outcomes.append(session)
    assert len(outcomes) == 64
    assert session.outcome is Outcome.REUSED


def test_settings_of_its_own_are_served_even_when_the_tenant_is_off(pipeline):
    controller = pipeline.auditor.controller
    while not controller.is_off("here"):
        controller.audited("here", controller.ratio("here"), 1.0)
    assert admit(pipeline, wishes={"ratio": 0.3}).outcome is Outcome.REUSED
    assert admit(pipeline).reason is Reason.QUALITY
