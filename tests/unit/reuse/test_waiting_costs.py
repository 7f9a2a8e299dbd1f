"""What waiting requests would cost: bounded looks, memoised, own namespace only, no side effects."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from fakes import FakeTree, NamedPipeline

from kvshare_sched.reuse import waiting_costs
from kvshare_sched.reuse.costs import CostModel
from kvshare_sched.reuse.waiting_costs import Peek, Prompt
from kvshare_sched.settings import KVShareConfig
from radix_ext.records import Namespace

HERE, THERE = Namespace("here"), Namespace("there")
COSTS = CostModel(cell_s=1e-5, copy_s=2e-6, overhead_s=0.0, layers=10)  # a copied token costs 0.02 of a computed one


def text(seed: int, length: int = 600) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 40_000, length)


def prompt(rid: str, tokens: np.ndarray, namespace=HERE, reusable=True) -> Prompt:
    key = SimpleNamespace(token_ids=array("q", np.asarray(tokens, np.int64).tobytes()))
    return Prompt(rid, namespace, len(tokens), key, reusable)


@pytest.fixture
def world():
    tree = FakeTree()
    pipeline = NamedPipeline(KVShareConfig(ratio=0.2, audit_share=0.0), tree, COSTS)
    return SimpleNamespace(tree=tree, pipeline=pipeline, peek=Peek(pipeline))


def test_a_prompt_over_known_text_costs_its_share_and_elsewhere_all_of_it(world):
    world.pipeline.publish("donor", HERE, text(1))
    moved = np.concatenate((text(2, 50), text(1)))
    for rid, namespace, reusable in (("mine", HERE, True), ("theirs", THERE, True), ("opted-out", HERE, False)):
        world.peek.add(prompt(rid, moved, namespace, reusable))
    found = dict(world.peek.updates())
    assert found["mine"].reused == pytest.approx(600, abs=80)
    assert found["mine"].work == pytest.approx(650 - found["mine"].reused * 0.78)
    assert found["theirs"].work == found["opted-out"].work == 650


def test_what_the_tree_has_is_exact(world):
    waiting = prompt("r", text(1))
    world.tree.exact[bytes(waiting.key.token_ids)] = 450
    world.peek.add(waiting)
    assert dict(world.peek.updates())["r"].exact == 450


def test_it_looks_again_only_after_a_change_and_tells_only_news(world):
    world.peek.add(prompt("r", text(1)))
    assert len(list(world.peek.updates())) == 1
    calls = len(world.tree.calls)
    assert list(world.peek.updates()) == [] and len(world.tree.calls) == calls
    world.pipeline.publish("other", HERE, text(5))
    assert list(world.peek.updates()) == [], "another text"
    world.pipeline.publish("donor", HERE, text(1))
    assert dict(world.peek.updates())["r"].reused == 600
    assert list(world.peek.updates()) == []


def test_a_pass_looks_at_a_bounded_number_old_and_new(world, monkeypatch):
    monkeypatch.setattr(waiting_costs, "_NEW_TOKENS", 1000)
    monkeypatch.setattr(waiting_costs, "_AGAIN", 3)
    for n in range(10):
        world.peek.add(prompt(f"r{n}", text(1, 500)))
    passes = [[rid for rid, _ in world.peek.updates()] for _ in range(5)]
    assert passes == [[f"r{n}", f"r{n + 1}"] for n in range(0, 10, 2)]
    world.pipeline.publish("donor", HERE, text(1))
    passes = [[rid for rid, _ in world.peek.updates()] for _ in range(5)]
    assert sorted(sum(passes, [])) == sorted(f"r{n}" for n in range(10)), "each once, none forgotten"
    assert max(map(len, passes)) == 3


def test_who_is_gone_is_not_looked_at(world):
    world.peek.add(prompt("new", text(1)))
    assert world.peek.remove("new") is None
    world.peek.add(prompt("seen", text(1)))
    list(world.peek.updates())
    assert world.peek.remove("seen").rid == "seen"
    world.pipeline.publish("donor", HERE, text(1))
    assert list(world.peek.updates()) == []


def test_missing_text_is_what_no_donor_has_before_a_position(world):
    waiting = prompt("r", np.concatenate((text(1), text(2))))
    world.peek.add(waiting)
    list(world.peek.updates())
    assert world.peek.missing(waiting, 1200) == waiting.texts
    world.pipeline.publish("donor", HERE, text(1))
    left = world.peek.missing(waiting, 1200)
    assert 0 < len(left) < len(waiting.texts) and left == waiting.texts[-len(left) :]
    assert world.peek.missing(waiting, 500) == []


def test_the_exact_prefix_is_asked_again_though_no_other_text_is_known(world):
    waiting, anywhere = prompt("r", text(1)), np.concatenate((text(2, 50), text(1)))
    at = bytes(waiting.key.token_ids)
    world.pipeline.publish("donor", HERE, anywhere)
    world.peek.add(waiting)
    assert dict(world.peek.updates())["r"].exact == 0
    world.tree.exact[at] = 550  # somebody has computed this very prompt
    world.pipeline.publish("that one", HERE, text(3))
    found = dict(world.peek.updates())["r"]
    assert (found.exact, found.work) == (550, pytest.approx(50, abs=40)), "the price of copies falls away, too"
    del world.tree.exact[at]  # and now it is evicted, which the index does not know
    world.pipeline.publish("another", HERE, text(4))
    assert dict(world.peek.updates())["r"].exact == 0


def test_a_prompt_too_short_for_a_fingerprint_learns_that_it_is_cached(world):
    waiting = prompt("r", text(1, 12))
    world.peek.add(waiting)
    assert dict(world.peek.updates())["r"].work == 12
    world.tree.exact[bytes(waiting.key.token_ids)] = 11
    world.pipeline.publish("donor", HERE, text(3))
    assert dict(world.peek.updates())["r"].work == 1


def test_a_tenant_that_is_turned_off_costs_its_full_price(world, monkeypatch):
    world.pipeline.publish("donor", HERE, text(1))
    world.peek.add(prompt("r", np.concatenate((text(2, 50), text(1)))))
    assert dict(world.peek.updates())["r"].reused > 0
    monkeypatch.setattr(world.pipeline.auditor, "refuses", lambda namespace: True)
    world.pipeline.publish("other", HERE, text(3))
    assert dict(world.peek.updates())["r"].work == 650


def test_who_leaves_does_not_keep_others_from_being_looked_at(world, monkeypatch):
    monkeypatch.setattr(waiting_costs, "_AGAIN", 3)
    for n in range(10):
        world.peek.add(prompt(f"r{n}", text(1, 500)))
    list(world.peek.updates())
    world.pipeline.publish("donor", HERE, text(1))
    first = [rid for rid, _ in world.peek.updates()]
    for rid in first:
        world.peek.remove(rid)
    rest = [rid for _ in range(3) for rid, _ in world.peek.updates()]
    assert len(first) == 3 and sorted(first + rest) == [f"r{n}" for n in range(10)]
