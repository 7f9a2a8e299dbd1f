"""A request is known by its object: two that carry one id at the same time share nothing."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fakes import FakeTree
from prometheus_client import CollectorRegistry
from test_lifecycle import COSTS, HERE, SETTINGS, text
from test_requests import Adder, request

from kvshare_sched.engine.sglang import admission
from kvshare_sched.engine.sglang import requests as engine_requests
from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.observe.series import AUDIT_RESULTS
from kvshare_sched.records.request import Outcome, Reason, RequestView
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import Session, attach, session_of, sessions_of
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

ID = "same"


def borrowing(seed: int, head: int = 9) -> np.ndarray:
    """A prompt with text(seed) behind 10 tokens of text(head). One that comes again and again ends as exact."""
    return np.concatenate((text(head, 10), text(seed), text(8, 20)))


class World:
    """A pipeline as it is, and requests whose sessions nobody but the test keeps."""

    def __init__(self, **settings):
        self.registry, self.tree = CollectorRegistry(), FakeTree()
        config = KVShareConfig(**SETTINGS | {"audit_share": 0.0} | settings)
        self.pipeline = Pipeline(config, self.tree, COSTS, ShareMetrics(registry=self.registry))

    def begin(self, tokens: np.ndarray, exact_len: int = 0, rid: str = ID, namespace: Namespace = HERE) -> Session:
        view = RequestView(rid, namespace, tokens, exact_len, len(tokens), {})
        session = self.pipeline.admit(view, rid, len(tokens), exact_len)
        self.pipeline.begin(session)
        return session

    def compute(self, tokens: np.ndarray, exact_len: int = 0) -> Session:
        """A request computes a text, leaves it in the tree and ends."""
        session = self.begin(tokens, exact_len, rid="donor")
        self.pipeline.publish(session, HERE, tokens)
        self.pipeline.release(session)
        return session

    def say(self, *sessions: Session | None) -> None:
        """A forward pass gives the first token of every answer in its batch."""
        lengths = [0 if session is None else session.prompt_len for session in sessions]
        logits = torch.stack([torch.arange(50.0) + 10 * row for row in range(len(sessions))])
        for row in range(len(sessions)):
            logits[row, row] = 100.0  # each has a favourite of its own
        batch = SimpleNamespace(seq_lens_cpu=torch.tensor(lengths))
        self.pipeline.auditor.observe(sessions, batch, SimpleNamespace(next_token_logits=logits))

    def answered(self, session: Session) -> None:
        self.pipeline.auditor.finished(session, HERE, range(session.prompt_len), [1])

    def audits(self) -> dict[tuple[str, str], float]:
        """How many have ended, by result and reason."""
        labels = [{"result": result, "reason": reason} for result, reason in AUDIT_RESULTS]
        counts = [self.registry.get_sample_value("kvshare_audits_total", pair) for pair in labels]
        return {pair: count for pair, count in zip(AUDIT_RESULTS, counts, strict=True) if count}


@pytest.fixture
def world():
    made = World()
    yield made
    made.pipeline.index._check()


# ---- two requests with one id ----


def test_what_is_approximate_is_known_of_each(world):
    world.compute(text(1))
    borrower, other = world.begin(borrowing(1)), world.begin(text(3, 200))
    assert (borrower.outcome, other.outcome) == (Outcome.REUSED, Outcome.ORDINARY)
    borrower.approximate_from = borrower.plan.approximate_from
    assert world.pipeline.exact_up_to(borrower, 0) == 10
    assert world.pipeline.exact_up_to(other, 0) > 10**9
    world.pipeline.release(other)
    assert world.pipeline.exact_up_to(borrower, 0) == 10, "the other has ended"


@pytest.mark.parametrize(("ends", "stays"), [(0, 1), (1, 0)])
def test_each_holds_its_own_pins(world, ends, stays):
    donors = [world.compute(text(seed)).donor_id for seed in (1, 2)]
    sessions = [world.begin(borrowing(seed)) for seed in (1, 2)]
    assert [list(session.leases) for session in sessions] == [[donor] for donor in donors]
    for _ in range(2):  # a second release changes nothing
        world.pipeline.release(sessions[ends])
        assert world.tree.active == 1
    [(segment, lease)] = world.pipeline.copies(sessions[stays], 0, sessions[stays].prompt_len)
    assert (segment.donor_id, lease.donor_id, lease.released) == (donors[stays], donors[stays], False)
    world.pipeline.release(sessions[stays])
    assert world.tree.active == 0


def test_each_grows_a_donor_of_its_own(world):
    texts = text(3, 200), text(4, 200)
    sessions = [world.begin(tokens) for tokens in texts]
    for end in (80, 200):
        for session, tokens in zip(sessions, texts, strict=True):
            world.pipeline.publish(session, HERE, tokens[:end])
    donors = [world.pipeline.index.donors[session.donor_id] for session in sessions]
    assert len(world.pipeline.index) == 2 and [donor.tokens.tolist() for donor in donors] == [t.tolist() for t in texts]
    world.pipeline.release(sessions[0])
    world.pipeline.publish(sessions[1], HERE, np.concatenate((texts[1], text(5))))
    assert len(world.pipeline.index) == 2 and len(donors[1].tokens) == 300


def test_each_is_under_an_audit_of_its_own():
    world = World(audit_share=1.0)
    donors = [world.compute(text(seed)).donor_id for seed in (1, 2)]
    first, second = world.begin(borrowing(1)), world.begin(borrowing(2))
    assert [session.capture.donors for session in (first, second)] == [(donor,) for donor in donors]
    world.say(first, None, second)
    world.answered(first)
    assert first.capture is None and len(second.capture.rows) == 1
    world.answered(second)
    favourites = [[int(ids[0]) for ids, _ in audit.capture.rows] for audit in world.pipeline.auditor.queue]
    assert favourites == [[0], [2]], "the logits of its own row"


def test_one_that_was_retracted_costs_the_other_no_audit():
    world = World(audit_share=1.0)
    world.compute(text(1))
    first, second = world.begin(borrowing(1)), world.begin(borrowing(1, head=10))
    world.say(first, second)
    world.pipeline.release(first, finished=False)
    world.answered(second)
    assert world.audits() == {("dropped", "retracted"): 1} and len(world.pipeline.auditor.queue) == 1


def test_sglangs_requests_carry_their_sessions():
    world = World()
    first, second = request(ID, 5), request(ID, 80)
    assert session_of(first) is None, "it was not admitted"
    for req in (first, second):
        admission.add_one_req(Adder.add_one_req, Adder(world.pipeline), req, False)
    assert [session_of(req).prompt_len for req in (first, second)] == [5, 80]


def test_a_request_that_comes_back_has_its_new_session(world):
    req, before, now = request(ID), world.begin(text(3)), world.begin(text(3))
    attach(req, before)
    attach(req, now)
    assert session_of(req) is now


# ---- batches ----


def test_a_batch_knows_its_requests_in_its_order_also_as_a_copy():
    requests = [SimpleNamespace(rid=ID) for _ in range(3)]
    sessions = [object(), None, object()]
    for req, session in zip(requests, sessions, strict=True):
        if session is not None:
            attach(req, session)
    made = SimpleNamespace(rids=[req.rid for req in requests])
    batch = engine_requests.init_forward_batch(lambda *_: made, None, SimpleNamespace(reqs=requests))
    assert batch.rids == [ID] * 3
    requests.reverse()  # SGLang goes on with its list
    assert sessions_of(batch) == sessions == sessions_of(copy.copy(batch))


@pytest.mark.parametrize("rids", [None, [], [ID]])
def test_a_batch_that_no_scheduler_has_made_has_no_sessions(rids):
    assert sessions_of(SimpleNamespace(rids=rids)) == []


# ---- under audit until it ends ----


def test_a_request_that_gives_its_row_back_without_a_token_is_dropped_from_its_audit():
    world = World(audit_share=1.0)
    world.compute(text(1))
    session = world.begin(borrowing(1))
    assert session.capture is not None
    for _ in range(2):
        world.pipeline.release(session)
        assert session.capture is None and world.audits() == {("dropped", "no_answer"): 1}


def test_a_request_with_tokens_is_under_audit_until_its_answer_goes_out():
    world = World(audit_share=1.0)
    world.compute(text(1))
    world.say(session := world.begin(borrowing(1)))
    world.pipeline.release(session)  # SGLang gives the row back first
    assert session.capture is not None and world.audits() == {}
    world.answered(session)
    assert len(world.pipeline.auditor.queue) == 1


def test_a_retracted_request_is_dropped_from_its_audit_and_chosen_for_none_when_it_comes_back():
    world = World(audit_share=1.0)
    world.compute(text(1))
    world.say(session := world.begin(borrowing(1)))
    world.pipeline.release(session, finished=False)
    assert session.capture is None and world.audits() == {("dropped", "retracted"): 1}
    again = world.pipeline.admit(Reason.RETRACTED, ID, session.prompt_len, 0)
    world.pipeline.begin(again)
    assert again.capture is None
