"""Who waits for whose text, and for how long."""

from __future__ import annotations

from kvshare_sched.scheduling.duplicates import Duplicates, Texts, Wanted

DOC = tuple((("ns", n), 50) for n in range(10))  # 500 tokens nobody has yet
OWN = tuple((("own", n), 50) for n in range(10))


def test_the_first_of_several_runs_and_the_others_wait():
    wait = Duplicates(bound=8)
    wait.begin_pass()
    assert [wait.holds(rid, Texts(DOC, 10), 500) for rid in "abc"] == [False, True, True]


def test_who_cannot_use_it_does_not_wait_for_it():
    wait = Duplicates(bound=8)
    wait.begin_pass()
    assert [wait.holds(rid, Texts(DOC, 10, takes=rid == "a"), 500) for rid in "abc"] == [False] * 3


def test_while_the_first_runs_the_others_wait_within_the_bound():
    wait = Duplicates(bound=3)
    wait.computing("a", Texts(DOC, 10).given)
    answers = []
    for _ in range(5):
        wait.begin_pass()
        answers.append(wait.holds("b", Texts(DOC, 10), 500))
    assert answers == [True, True, True, False, False]


def test_behind_a_request_that_only_waits_nobody_loses_patience():
    wait = Duplicates(bound=1)
    for _ in range(5):
        wait.begin_pass()
        assert not wait.holds("a", Texts(DOC, 10), 500)
        assert wait.holds("b", Texts(DOC, 10), 500)


def test_nobody_waits_once_the_first_is_done():
    wait = Duplicates(bound=8)
    wait.computing("a", Texts(DOC, 10).given)
    wait.computing("a", [])
    wait.begin_pass()
    assert not wait.holds("b", Texts(DOC, 10), 500)


def test_only_what_enters_the_tree_is_worth_waiting_for():
    wait = Duplicates(bound=8)
    wait.computing("a", Texts(DOC, 2).given)  # the rest stands behind approximate tokens
    wait.begin_pass()
    assert not wait.holds("b", Texts(DOC, 10), 500)


def test_a_small_overlap_is_not_worth_waiting_for():
    wait = Duplicates(bound=8)
    wait.computing("a", Texts(DOC, 10).given)
    wait.begin_pass()
    assert not wait.holds("b", Texts(DOC[:4] + OWN, 14), 700)
    assert not wait.holds("c", Texts(DOC[:1], 1), 50)


def test_two_who_compute_the_same_are_counted_and_bound_zero_holds_nobody():
    wait = Duplicates(bound=8)
    wait.computing("a", Texts(DOC, 10).given)
    wait.computing("b", Texts(DOC, 10).given)
    wait.done("a")
    wait.begin_pass()
    assert wait.holds("c", Texts(DOC, 10), 500)
    wait.done("b")
    assert not wait.holds("c", Texts(DOC, 10), 500)
    never = Duplicates(bound=0)
    never.computing("a", Texts(DOC, 10).given)
    assert not never.holds("b", Texts(DOC, 10), 500)


def test_a_text_that_several_lack_is_paid_by_all_of_them_if_it_is_given():
    wanted = Wanted()
    first, behind = Texts(DOC, 10), Texts(DOC, 0)  # the second would not publish it
    wanted.add(first)
    assert wanted.shared(first) == 0
    wanted.add(behind)
    wanted.add(behind)
    assert round(wanted.shared(first)) == round(500 * 2 / 3) and wanted.shared(behind) == 0
    wanted.remove(behind)
    wanted.remove(behind)
    assert wanted.shared(first) == 0
