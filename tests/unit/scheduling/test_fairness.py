"""Deficits: who may go on, what a round gives, what idle and invented tenants gain (nothing)."""

from __future__ import annotations

import pytest

from kvshare_sched.scheduling.fairness import OVERFLOW, Accounts, rounds_owed, sequence, service_gap


def accounts(*tenants, quantum=100.0, weights=None, unknown=256) -> Accounts:
    made = Accounts(quantum, weights, unknown)
    for tenant in tenants:
        made.enter(tenant)
    return made


def test_a_new_tenant_may_start_at_once_and_a_spent_one_not_before_the_others():
    books = accounts("a", "b")
    assert books.may_start("a", ("a", "b"))
    books.charge("a", 150)
    assert not books.may_start("a", ("a", "b")) and books.refills == 0
    assert books.may_start("b", ("a", "b"))


def test_a_round_comes_when_nobody_is_above_zero_and_gives_by_weight():
    books = accounts("a", "b", weights={"a": 1.0, "b": 3.0})
    books.charge("a", 100)
    books.charge("b", 300)
    assert books.may_start("a", ("a", "b")) and books.refills == 1
    assert books.deficits == {"a": 100, "b": 300}


def test_as_many_rounds_as_it_takes_and_only_for_those_in_debt():
    books = accounts("a", "b", "c")
    books.charge("a", 450)
    books.charge("b", 350)
    books.charge("c", 20)
    assert books.may_start("b", ("a", "b")), "c waits too, but may not run in this pass"
    assert books.refills == 3
    assert books.deficits == {"a": -50, "b": 50, "c": 80}
    assert not books.may_start("a", ("a", "b"))


def test_zero_is_not_above_zero():
    assert [rounds_owed(d, 100) for d in (1, 0, -99, -100, -101)] == [0, 1, 1, 2, 2]


def test_idle_tenants_bank_nothing_but_their_debt_is_forgotten_as_rounds_pass():
    books = accounts("idle", "busy")
    books.leave("idle")
    for _ in range(50):
        books.charge("busy", 100)
        assert books.may_start("busy", ("busy",))
    books.wait("idle")
    assert books.deficits["idle"] == 100, "one quantum, not fifty"
    books.charge("idle", 950)
    books.leave("idle")
    for _ in range(4):
        books.charge("busy", 100)
        assert books.may_start("busy", ("busy",))
    books.wait("idle")
    assert books.deficits["idle"] == -450


def test_what_is_given_back_counts_for_nobody():
    books = accounts("a")
    books.charge("a", 70)
    books.charge("a", -70)
    assert books.deficits["a"] == 100 and books.served["a"] == 0


def test_unknown_tenants_beyond_the_cap_share_one_account():
    books = Accounts(100.0, {"known": 2.0}, unknown=3)
    names = [books.enter(f"u{n}") for n in range(5)]
    assert names == ["u0", "u1", "u2", OVERFLOW, OVERFLOW]
    assert books.enter("known") == "known"


def test_an_account_is_free_again_when_its_tenant_is_gone_and_its_debt_would_be_paid():
    books = Accounts(100.0, unknown=1)
    books.enter("first")
    books.charge("first", 250)
    books.leave("first")
    books.close("first")
    assert books.enter("second") == OVERFLOW
    for _ in range(2):  # 250 spent out of 100: two rounds
        books.charge(OVERFLOW, 100)
        assert books.may_start(OVERFLOW, (OVERFLOW,))
        books.enter(f"guest{books.refills}")
        assert books.deficits.keys() == ({"first", OVERFLOW} if books.refills < 2 else {"guest2", OVERFLOW})


def test_idle_tenants_with_a_weight_keep_no_name_from_being_forgotten():
    weights = {f"w{n}": 2.0 for n in range(9)}
    books = Accounts(100.0, weights, unknown=2)
    for name in (*weights, "u0", "u1"):
        books.enter(name), books.leave(name), books.close(name)
    books.enter("busy-weighted-tenant-that-makes-a-round")
    books.charge(OVERFLOW, 200)
    assert books.may_start(OVERFLOW, ())
    assert books.enter("u2") == "u2" and "u0" not in books.deficits


def test_after_a_failure_the_books_are_kept_and_nobody_is_open():
    books = Accounts(100.0)
    books.enter("a")
    books.charge("a", 30)
    books.forget_requests()
    assert books.deficits == {"a": 70} and books.enter("a") == "a"
    books.leave("a"), books.close("a")


def test_the_bound_counts_what_may_be_charged_after_the_deficit_is_gone():
    assert service_gap(max_work=1000, max_output=50, quantum=400) == 2 * (1000 + 2 * 50 + 400)
    assert service_gap(1000, 50, 400, least_weight=0.5) == 2 * (2 * 1100 + 400)


def by(tenants) -> dict[str, list[int]]:
    """Places of each, best last."""
    return {name: [p for p, t in enumerate(tenants) if t == name][::-1] for name in tenants}


class TestSequence:
    def run(self, work, tenants, credit, limit=99, held=lambda row: False, quantum=100.0):
        return sequence(by(tenants), work.__getitem__, dict(credit), lambda account: quantum, limit, held)

    def test_a_tenant_in_debt_comes_after_all_that_others_may_still_start(self):
        started, kept = self.run([50, 50, 50, 50], ["a", "a", "b", "b"], {"a": -1, "b": 100})
        assert started[:2] == [2, 3] and kept == 0

    def test_deficits_are_spent_on_the_way(self):
        started, _ = self.run([60] * 6, ["a", "a", "a", "b", "b", "b"], {"a": 100, "b": 100})
        assert started == [0, 1, 3, 4, 2, 5]

    def test_every_row_once_whatever_the_debts(self):
        started, _ = self.run([30, 1000, 5, 70, 70], ["a", "b", "c", "b", "a"], {"a": -500, "b": 3, "c": -2.5})
        assert sorted(started) == list(range(5))

    def test_no_more_than_asked_for_and_held_rows_spend_nothing(self):
        started, kept = self.run([100] * 5, list("aaaaa"), {"a": 100}, limit=2, held=lambda row: row % 2 == 0)
        assert started == [1, 3] and kept == 2

    def test_heavier_tenants_start_more(self):
        grants = {"a": 100.0, "b": 300.0}
        rows = [name for name in "ab" for _ in range(80)]
        started, _ = sequence(by(rows), lambda row: 50.0, dict(grants), grants.get, 80, lambda row: False)
        assert sum(rows[r] == "b" for r in started) == pytest.approx(60, abs=3)
