"""Weights that are replaced: nothing of the old ones is lent, compared or published; what is new is, at once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeTree
from test_lifecycle import COSTS, HERE, text
from test_session import World, borrowing

from kvshare_sched.engine.sglang import admission
from kvshare_sched.records.request import Outcome, Reason
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants.namespaces import owner_of
from kvshare_sched.tenants.policy import Stamp


@pytest.fixture
def world():
    made = World(audit_share=1.0)
    yield made
    made.pipeline.index._check()


def test_nothing_of_the_old_weights_is_lent(world):
    world.compute(text(1))
    assert world.begin(borrowing(1)).outcome is Outcome.REUSED, "the control"
    world.pipeline.weights_change()
    assert len(world.pipeline.index) == 0
    assert world.begin(borrowing(1)).reason is Reason.NO_MATCH


def test_waiting_audits_are_dropped_also_one_between_two_pieces(world):
    world.compute(text(1))
    auditor = world.pipeline.auditor
    for head in (9, 10, 11):
        world.say(session := world.begin(borrowing(1, head)))
        world.answered(session)
    assert auditor.start(10_000) is auditor.running and len(auditor.queue) == 2
    world.pipeline.weights_change()
    assert not auditor.queue and auditor.running is None and auditor.start(10_000) is None
    assert world.audits() == {("dropped", "weights"): 3}


def test_a_request_of_earlier_weights_enters_the_tree_no_further_and_becomes_no_donor(world):
    whole = text(3, 200)
    growing, new = world.begin(whole), world.begin(text(4, 200))
    world.pipeline.publish(growing, HERE, whole[:80])
    assert len(world.pipeline.index) == 1
    world.pipeline.weights_change()
    for session, tokens, entered in ((growing, whole, 80), (new, text(4, 200), 0)):
        assert world.pipeline.exact_up_to(session, entered) == entered
        world.pipeline.publish(session, HERE, tokens)
        assert len(world.pipeline.index) == 0
    world.pipeline.release(growing)
    assert world.begin(np.append(whole, 5)).reason is Reason.NO_MATCH


def test_what_has_entered_of_a_borrower_stays_where_it_ended(world):
    """Its exact prefix alone; not the text that it has borrowed, however long that is."""
    world.compute(text(1))
    borrower = world.begin(borrowing(1))
    borrower.approximate_from = borrower.plan.approximate_from
    world.pipeline.weights_change()
    assert world.pipeline.exact_up_to(borrower, 7) == 7


def test_what_is_computed_wholly_by_the_new_weights_is_lent(world):
    world.pipeline.weights_change()
    assert world.compute(text(1)).donor_id is not None
    assert world.begin(borrowing(1)).plan.reused_len == 100
    assert world.pipeline.exact_up_to(world.begin(text(3)), 0) > 10**9


def test_what_stands_behind_kv_of_nobody_knows_which_weights_is_lent_after_a_flush(world):
    world.pipeline.weights_change()
    assert world.compute(text(1), exact_len=20).donor_id is None
    assert world.begin(borrowing(1)).reason is Reason.NO_MATCH
    world.pipeline.flush()
    assert world.compute(text(1), exact_len=20).donor_id is not None
    assert world.begin(borrowing(1)).plan.reused_len == 100


def test_a_flush_does_not_make_earlier_weights_good(world):
    old = world.begin(text(3, 200))
    world.pipeline.weights_change()
    world.pipeline.flush()
    world.pipeline.publish(old, HERE, text(3, 200))
    assert len(world.pipeline.index) == 0 and world.pipeline.exact_up_to(old, 50) == 50


def test_every_change_counts(world):
    world.pipeline.weights_change()
    between = world.begin(text(3, 200))
    world.pipeline.weights_change()
    world.pipeline.publish(between, HERE, text(3, 200))
    assert len(world.pipeline.index) == 0
    assert world.compute(text(1)).donor_id is not None


def test_what_a_prompt_has_paid_counts_no_longer(world):
    """Whoever borrows the same again and again computes it exactly, once: by the old weights."""
    for change, reason in ((False, Reason.PROMOTED), (True, Reason.NONE)):
        world.compute(text(1))
        assert world.begin(borrowing(1)).reason is Reason.NONE
        if change:
            world.pipeline.weights_change()
            world.compute(text(1))
        assert world.begin(borrowing(1)).reason is reason


def test_donors_that_a_tenant_was_promised_are_held_no_longer():
    pipeline = Pipeline(KVShareConfig(audit_share=0.0), FakeTree(), COSTS)
    owner = owner_of(HERE.extra_key)
    pipeline.desk.learn(Stamp(owner, guaranteed=600), pipeline.tree)
    session = pipeline.admit(Reason.OPTED_OUT, "r", 200, 0)
    pipeline.begin(session)
    pipeline.publish(session, HERE, text(3, 200))
    assert pipeline.desk.held_tokens == 200 and pipeline.tree.held
    pipeline.weights_change()
    assert pipeline.desk.held_tokens == 0 and not pipeline.tree.held


def test_everything_is_forgotten_before_sglang_replaces_the_weights(world):
    """It may fail half way, and flushes its tree behind the change, or not at all."""
    world.compute(text(1))
    seen = []
    manager = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=SimpleNamespace(pipeline=world.pipeline)))

    def original(manager, recv_req):
        seen.append((len(world.pipeline.index), recv_req))
        return "answer"

    assert admission.change_weights(original, manager, "request") == "answer"
    assert seen == [(0, "request")] and world.pipeline.weights == 1


def test_an_engine_without_reuse_replaces_its_weights_as_ever():
    manager = SimpleNamespace(scheduler=SimpleNamespace(tree_cache=object()))
    assert admission.change_weights(lambda *given: given, manager, "request") == (manager, "request")
