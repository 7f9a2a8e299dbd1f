"""The queue: events in, order out."""

from __future__ import annotations

import pytest

from kvshare_sched.scheduling.duplicates import Texts
from kvshare_sched.scheduling.fairness import HELD, Accounts
from kvshare_sched.scheduling.order import KEYS, Waiting
from kvshare_sched.scheduling.queue import LIMIT, Queue


def queue(policy="fair", quantum=1000.0, weights=None, wait=8) -> Queue:
    return Queue(policy, Accounts(quantum, weights), wait)


def add(q, rid, tenant="t", work=100.0, texts=None, **more):
    arrival = len(q) + len(q.running)
    q.add(Waiting(rid, tenant, arrival, 1000, work, since=q.clock, **more), texts or Texts())


def start_all(q, budget=float("inf"), room=0.0) -> list[str]:
    """What SGLang does in one pass with so many tokens."""
    started = []
    for rid in q.order(room).ready:
        work = q.work(rid)
        if budget <= 0 or not q.may_start(rid):
            break
        q.start(rid, work)
        started.append(rid)
        budget -= work
    return started


@pytest.mark.parametrize("policy", KEYS)
def test_everybody_is_in_the_order_once(policy):
    q = queue(policy)
    for n in range(700):
        add(q, f"r{n}", f"t{n % 7}", work=n % 13 * 100)
    for n in range(0, 700, 3):
        q.remove(f"r{n}")
    order = q.order()
    assert sorted(q.table.rids[row] for row in order.rows) == sorted(f"r{n}" for n in range(700) if n % 3)
    assert tuple(q.table.rids[row] for row in order.rows)[: len(order.ready)] == order.ready
    assert len(order.ready) <= LIMIT or policy != "fair"


def test_an_unchanged_queue_is_not_sorted_again_and_a_changed_one_is():
    q = queue()
    add(q, "a", work=500)
    add(q, "b", work=50)
    first = q.order()
    assert first.ready == ("b", "a") and q.order() is first and q.sorts == 1
    q.revise("a", work=500, exact=0, reused=0, texts=Texts())
    assert q.order() is first
    q.revise("a", work=5, exact=0, reused=900, texts=Texts())
    assert q.order().ready == ("a", "b")
    add(q, "c", work=1)
    assert q.order().ready == ("c", "a", "b"), "nobody has waited yet: by work"


def test_a_debt_that_grows_by_a_round_makes_another_order():
    q = Queue("fair", Accounts(300.0), 0)
    for tenant, debt in (("a", 450.0), ("d", 320.0)):
        q.add(Waiting(f"{tenant}0", tenant, 0, 10, 10))
        q.start(f"{tenant}0", debt)
    for rid, tenant in (("a1", "a"), ("d1", "d")):
        q.add(Waiting(rid, tenant, 1, 100, 10 if tenant == "a" else 90, since=q.clock))
    assert q.order().ready == ("a1", "d1"), "both owe one round"
    q.generated("a0", 100)
    assert q.order().ready[0] == "d1" and q.may_start("d1")


def test_waiting_times_are_looked_at_again_once_the_engine_has_worked():
    q = queue()
    add(q, "running")
    q.start("running", 0)
    add(q, "dear", work=1000)
    q.charge("running", 9000)
    add(q, "cheap", work=100)
    assert q.order().ready == ("dear", "cheap")
    q.charge("running", 900)
    assert q.order().ready == ("dear", "cheap")
    q.charge("running", 900)
    assert q.order().ready == ("cheap", "dear"), "18 times its work against 10.8"


def test_a_hot_tenant_stops_when_its_quantum_is_spent():
    q = queue(quantum=1000)
    for n in range(50):
        add(q, f"hot{n}", "hot", work=100)
    assert len(start_all(q, budget=950)) == 10
    add(q, "cold", "cold", work=3000)
    assert start_all(q)[0] == "cold", "dearer, but the hot tenant owes"


def test_the_pass_ends_before_a_tenant_in_debt_while_others_may_go_on():
    q = queue(quantum=1000)
    for rid, tenant, work in (("a1", "a", 100), ("a2", "a", 200), ("b1", "b", 300)):
        add(q, rid, tenant, work=work)
    assert q.order().ready == ("a1", "a2", "b1")
    q.start("a1", 5000)  # dearer than was thought
    assert not q.may_start("a2"), "b1 waits and b is above zero"
    assert q.may_start("b1")


def test_a_tier_is_served_before_the_next_even_by_a_tenant_in_debt():
    q = queue(quantum=100)
    add(q, "low", "b", tier=1.0)
    for n in range(4):
        add(q, f"high{n}", "a", tier=0.0)
    assert q.order().ready == ("high0", "high1", "high2", "high3", "low")
    assert start_all(q) == ["high0", "high1", "high2", "high3", "low"]


def test_beside_a_long_prompt_those_that_fit_come_first_but_not_on_others_turns():
    q = queue(quantum=100)
    add(q, "spent", "small")
    q.start("spent", 5000)
    add(q, "short", "small", work=150)
    add(q, "long", "other", work=5000)
    assert q.order(room=500).ready == ("short", "long")
    assert not q.may_start("short"), "or a tenant of short prompts would run beside all long ones, whatever it owes"
    q.order(room=500)
    assert q.chunk(9000, 1000) == 1000, "so no room is left for it"
    q.start("long", 200)
    assert q.order(room=500).ready == ("short",) and q.chunk(9000, 1000) == 850 and q.may_start("short")


def test_a_long_prompt_leaves_half_of_its_chunk_to_short_ones_and_no_more():
    q = queue()
    assert q.chunk(9000, 1000) == 1000
    for n in range(8):
        add(q, f"s{n}", work=90)
    q.order(room=500)
    assert q.chunk(9000, 1000) == 550
    assert q.chunk(9000, 1000, page=16) % 16 == 0
    assert q.chunk(1000, 1000) == 1000, "the last chunk is not held up"
    add(q, "big", work=600)
    q.order(room=500)
    assert q.chunk(9000, 1000) == 550


def test_room_is_reserved_no_more_for_a_request_that_was_refused_beside_the_long_prompt():
    q = queue()
    add(q, "wrong", work=90)
    add(q, "right", work=200)
    assert q.order(room=500).ready == ("wrong", "right") and q.chunk(9000, 1000) == 710
    q.refused("wrong")
    assert q.order(room=500).ready == ("right", "wrong") and q.chunk(9000, 1000) == 800
    q.refused("right")
    assert q.order(room=500).ready == ("wrong", "right"), "both fit no more: the cheaper first"
    assert q.chunk(9000, 1000) == 1000
    assert q.order().ready == ("wrong", "right"), "that prompt is through"
    q.order(room=500)
    assert q.chunk(9000, 1000) == 710
    q.refused("right")
    q.remove("right")
    add(q, "right", work=200)
    q.order(room=500)
    assert q.chunk(9000, 1000) == 710, "another request of that name"


def test_duplicates_wait_until_the_first_is_through():
    q = queue()
    doc = Texts(tuple((("doc", n), 100) for n in range(10)), 10)
    for rid in ("first", "second", "third"):
        add(q, rid, work=1000, texts=doc)
    add(q, "other", work=1000)
    order = q.order()
    assert order.ready == ("first", "other") and order.held == 2
    q.start("first", 1000, doc.given)
    assert not q.may_start("second")
    assert q.order().ready == ("other",)
    q.duplicates.done("first")
    q.revise("second", work=200, exact=0, reused=1000, texts=Texts())
    assert q.order().ready[0] == "second"


def test_a_flood_over_one_text_is_not_walked_to_its_end_in_every_pass_and_stops_no_other_tenant(monkeypatch):
    q = queue(quantum=1e9)
    doc = Texts(tuple((("doc", n), 100) for n in range(10)), 10)
    for n in range(2000):
        add(q, f"same{n:04}", "flood", work=1000, texts=doc)
    add(q, "other", work=5000)
    asked, holds = [], q.duplicates.holds
    monkeypatch.setattr(q.duplicates, "holds", lambda rid, *rest: asked.append(rid) or holds(rid, *rest))
    order = q.order()
    assert len(order.ready) == 2 and order.ready[1] == "other" and len(order.rows) == 2001
    assert order.held == HELD and len(asked) == HELD + 2


def test_a_text_that_becomes_known_at_the_same_price_changes_who_waits_for_whom():
    q = queue()
    doc = Texts(tuple((("doc", n), 100) for n in range(10)), 10)
    for rid in ("first", "second"):
        add(q, rid, work=1000, texts=doc)
    assert q.order().ready == ("first",)
    q.revise("second", work=1000, exact=0, reused=0, texts=Texts())
    assert q.order().ready == ("first", "second")


def test_what_ran_is_charged_and_a_retraction_gives_the_prompt_back_but_not_the_output():
    q = queue(quantum=1000)
    add(q, "a", "t", work=300)
    came = q.clock
    q.order()
    q.start("a", 200)
    q.charge("a", 100)
    q.generated("a", 5)
    assert q.accounts.deficits["t"] == 1000 - 300 - 10 and q.clock == came + 310
    back = q.retract("a")
    assert q.accounts.deficits["t"] == 1000 - 10 and (back.rid, back.since) == ("a", came)
    q.add(back)
    q.remove("a")
    assert q.accounts.deficits["t"] == 1000 - 10, "nothing was charged for waiting"


def test_a_finished_request_pays_for_what_ran_only():
    q = queue(quantum=1000)
    add(q, "a", "t", work=800)
    q.order()
    q.start("a", 300)
    q.finish("a")  # aborted after one chunk
    assert q.accounts.deficits["t"] == 700 and not q.running


def test_an_id_that_waits_twice_is_refused():
    q = queue()
    add(q, "a")
    with pytest.raises(ValueError, match="waits already"):
        add(q, "a")


@pytest.mark.parametrize("policy", [p for p in KEYS if p != "fair"])
def test_the_published_orders_hold_nobody_back(policy):
    q = queue(policy, quantum=1)
    doc = Texts(tuple((("doc", n), 100) for n in range(10)), 10)
    for n in range(300):
        add(q, f"r{n}", work=1000, texts=doc)
    assert len(start_all(q)) == 300


def test_a_tenant_whose_turn_ends_while_it_decodes_does_not_block_the_others():
    q = queue(quantum=1000)
    add(q, "running", "a", work=995)
    q.order()
    q.start("running", 995)
    add(q, "a1", "a", work=10)
    add(q, "b1", "b", work=500)
    assert q.order().ready == ("a1", "b1")
    q.generated("running", 3)  # far less than what makes the queue look at waiting times again
    assert q.order().ready == ("b1", "a1") and q.may_start("b1")


def test_of_the_pool_as_much_is_kept_as_prompts_have_hit_lately():
    q = Queue("fair", Accounts(1e9), 8, keep=0.5)
    assert q.has_room(9000, 1000, 10_000)
    for n in range(6):  # three texts, each hit twice
        add(q, f"r{n}", exact=1000)
        q.start(f"r{n}", 100, hits=[(("text", n % 3), 1000)])
    assert q.has_room(6000, 1000, 10_000) and not q.has_room(6001, 1000, 10_000)
    for n in range(9):
        add(q, f"more{n}", exact=1000)
        q.start(f"more{n}", 100, hits=[(("more", n), 1000)])
    assert q.has_room(4000, 1000, 10_000) and not q.has_room(4001, 1000, 10_000), "`keep` at most"
    for n in range(21):  # more than two pools of prompts that hit nothing
        add(q, f"new{n}")
        q.start(f"new{n}", 100)
    assert q.has_room(9000, 1000, 10_000)


def test_who_computes_a_text_for_many_comes_before_a_cheaper_one_that_helps_nobody():
    q = queue(wait=0)
    doc = tuple((("doc", n), 100) for n in range(10))
    add(q, "alone", work=600)
    add(q, "giver", work=1000, texts=Texts(doc, 10))
    assert q.order().ready == ("alone", "giver")
    for n in range(4):
        add(q, f"taker{n}", work=1100, texts=Texts(doc, 0))
    assert q.order().ready[0] == "giver"
    q.start("giver", 1000)
    for n in range(4):
        q.remove(f"taker{n}")
    assert q.order().ready == ("alone",) and not q.table._wanted._count
