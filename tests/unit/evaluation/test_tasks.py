"""Cases: the same for the same seed, answerable from the prompt, donors that hold what they should."""

import random
import re

import pytest

from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation import run, tasks, texts
from kvshare_sched.evaluation.cases import KINDS, Case, Prompt, contains, earlier_prompts

LIBRARY = tuple(
    tuple(f"Passage {p} says in sentence {s} that word{p}x{s} stands here." for s in range(6)) for p in range(40)
)
EVERY = [(task, number) for task in tasks.TASKS for number in range(6)]


def build(task, number, donors=3):
    return tasks.build(task, number, donors=donors, passages=LIBRARY)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_equal_seeds_equal_cases_other_numbers_other_cases(task):
    assert build(task, 3) == build(task, 3)
    assert build(task, 3).target != build(task, 5).target


@pytest.mark.parametrize(("task", "number"), EVERY)
def test_what_is_expected_stands_in_the_documents_and_not_in_the_question(task, number):
    case = build(task, number)
    documents = "\n".join(case.target.documents)
    asked = f"{case.target.question} {case.target.answer_start} {case.target.before}"
    for value in case.expected:
        assert contains(documents.lower(), value.lower()) and not contains(asked.lower(), value.lower())
    assert bool(case.expected) == (task != "continuation")


@pytest.mark.parametrize(("task", "number"), EVERY)
def test_every_document_occurs_in_as_many_earlier_prompts_as_asked(task, number):
    case = build(task, number, donors=3)
    lent = {d for p in case.donors for d in p.documents}
    shared = lent & set(case.target.documents)
    for document in shared:
        assert sum(document in p.documents for p in case.donors) == 3
    assert len(shared) == len(case.target.documents) - (2 if task == "twins" else 0)
    assert len({p.system for p in case.donors}) == 3


@pytest.mark.parametrize("task", tasks.TASKS)
def test_kinds_alternate_and_mean_what_they_say(task):
    foreign, standalone = build(task, 0), build(task, 1)
    assert (foreign.donor_kind, standalone.donor_kind) == KINDS
    assert all(len(p.documents) == 1 and not p.question for p in standalone.donors)
    for prompt in foreign.donors:
        assert prompt.documents[0] not in foreign.target.documents, "an unrelated text comes first"
        assert prompt.system != foreign.target.system


def test_the_targets_neighbours_are_apart_in_foreign_donors():
    documents = [f"document {i}" for i in range(5)]
    wanted = set(zip(documents, documents[1:], strict=False))
    for seed in range(30):
        for prompt in earlier_prompts(documents, ["filler"], "foreign", 7, random.Random(seed)):
            assert sorted(prompt.documents[1:]) == documents
            assert not wanted & set(zip(prompt.documents[1:], prompt.documents[2:], strict=False))


@pytest.mark.parametrize("number", range(6))
def test_twins_differ_in_their_entities_only(number):
    case = build("twins", number)
    mine = case.target.documents
    lent = {d for p in case.donors for d in p.documents}
    twins = [d for d in mine if d not in lent]
    assert len(twins) == 2
    value = r"(led by )\w+ \w+\.|(cost )\d+|(ended on )\d+ \w+\."
    blank = {re.sub(value, "_", d) for d in lent}
    for document in twins:
        assert re.sub(value, "_", document) in blank and re.sub(value, "_", document) != document
    assert len(case.donor_only) == 6
    for entity in case.donor_only:
        assert any(contains(d, entity) for d in lent)
        assert not contains(f"{case.target.system} {case.target.user} {case.target.answer_start}", entity)


def test_planted_facts_follow_their_order_and_no_passage_is_lost():
    draw = tasks._Draw(random.Random(1), [LIBRARY[0]], 0, "foreign", 1)
    text = draw.planted("Fact one.", "Fact two.")
    assert text.index("Fact one.") < text.index("Fact two.") and text.startswith(LIBRARY[0][0])
    assert text.replace("Fact one. ", "").replace("Fact two.", "").split() == " ".join(LIBRARY[0]).split()


def scored(expected, donor_only=(), scoring="parts"):
    target = Prompt("s", ("d",), "q")
    return Case("c", "t", "foreign", (), target, tuple(expected), tuple(donor_only), scoring)


def test_swaps_are_entities_of_the_donors_only():
    case = scored(["Ann Doe"], ["Max Roe", "471"])
    assert case.swapped("It was Max Roe.") and case.swapped("471 dollars")
    assert not case.swapped("It was Ann Doe, for 4711 dollars, says Maxim Roe.")


@pytest.mark.parametrize(
    ("expected", "answer", "score"),
    [
        (["4711"], " 4711.", 1),
        (["4711"], "47110", 0),
        (["AMBER"], "amber", 0.5),
        (["AMBER"], "It is AMBER", 1),
        (["Ann Doe", "4711"], "Ann Doe has 4712", 0.5),
        (["red", "blue", "grey"], "Red, blue", 0.5),
        ([], "anything", None),
    ],
)
def test_scores_of_parts(expected, answer, score):
    assert scored(expected).score(answer) == score


def test_f1_takes_the_best_alternative():
    case = scored(["the old harbour", "Rotterdam"], scoring="f1")
    assert case.score("Rotterdam!") == 1
    assert case.score("old harbour town") == pytest.approx(2 * 2 / (3 + 3))
    assert case.score("nothing") == 0


def test_the_control_without_context_keeps_everything_but_the_documents():
    case = build("instruction", 0)
    bare = case.without_context
    assert bare.documents == () and bare.question == case.target.question and bare.before == case.target.before
    assert not any(contains(bare.user.lower(), e.lower()) for e in case.expected)


def test_cases_are_dealt_in_turn():
    dealt = run.deal(["fact", "twins"], 5, 1)
    assert [c.name for c in dealt] == ["fact/0", "twins/0", "fact/1", "twins/1", "fact/2"]


def test_one_kind_of_donors_may_be_asked_for():
    dealt = run.deal(["fact", "twins"], 5, 1, ["standalone"])
    assert [c.name for c in dealt] == ["fact/1", "twins/1", "fact/3", "twins/3", "fact/5"]
    assert {c.donor_kind for c in dealt} == {"standalone"}
    for wrong in ([], ["foreing"]):
        with pytest.raises(ConfigError, match="foreign, standalone"):
            run.deal(["fact"], 5, 1, wrong)


def test_the_library_is_prose_of_passage_length():
    library = texts.library()
    assert len(library) > 100 and len(set(library)) == len(library)
    assert all(105 <= sum(len(s.split()) for s in passage) <= 135 for passage in library)
    assert texts.digest(library) != texts.digest(library[1:])


def test_sentences_leave_markup_and_code_out():
    text = (
        "A first sentence of plain words stands here.\n\n   x = f(a, b)[0]; y |= 1\n\n| a | table | of |\n\n"
        "Another one\nis broken over two lines of text. Too short."
    )
    assert texts.sentences(text) == [
        "A first sentence of plain words stands here.",
        "Another one is broken over two lines of text.",
    ]
