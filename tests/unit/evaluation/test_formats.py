"""Readers: small files of the published shapes become cases, anything else is refused with its place."""

import json

import pytest

from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation import formats, run

FILLERS = ("Some other text.", "And another one.")
LONGBENCH = {
    "input": "Who built the mill?",
    "context": "Passage 1:\nThe mill\nAnn Doe built it.\n\nPassage 2:\nThe tower\nMax Roe built it.",
    "answers": ["Ann Doe", "Doe"],
    "length": 18,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "abc123",
}


def write(path, *rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n\n")
    return path


def read(path, donors=2):
    return list(formats.read(path, donors=donors, fillers=FILLERS))


def test_longbench_with_passages(tmp_path):
    (case,) = read(write(tmp_path / "hotpotqa.jsonl", LONGBENCH))
    assert (case.name, case.task, case.scoring) == ("abc123", "hotpotqa", "f1")
    assert case.target.documents == (
        "Passage 1:\nThe mill\nAnn Doe built it.",
        "Passage 2:\nThe tower\nMax Roe built it.",
    )
    assert "Who built the mill?" in case.target.question and case.score("Ann Doe") == 1
    assert {d for p in case.donors for d in p.documents} >= set(case.target.documents)


def test_longbench_with_one_long_text_is_cut_between_paragraphs(tmp_path):
    paragraphs = [" ".join(f"w{i}x{j}" for j in range(80)) for i in range(5)]
    (case,) = read(write(tmp_path / "q.jsonl", LONGBENCH | {"context": "\n\n".join(paragraphs)}))
    assert [d.split("\n") for d in case.target.documents] == [paragraphs[:2], paragraphs[2:4], paragraphs[4:]]


@pytest.mark.parametrize("key", ["contexts", "chunks", "documents", "passages"])
@pytest.mark.parametrize("form", [str, lambda t: {"title": "x", "text": t}, lambda t: {"content": t}])
def test_chunk_lists(tmp_path, key, form):
    row = {"question": "Who?", key: [form("Ann built it."), form("Max broke it.")], "answer": "Ann"}
    (case,) = read(write(tmp_path / "arena.jsonl", row))
    assert case.target.documents == ("Ann built it.", "Max broke it.") and case.expected == ("Ann",)
    assert case.task == "arena" and "Who?" in case.target.user


def test_both_kinds_of_donors_and_the_same_cases_each_time(tmp_path):
    path = write(tmp_path / "q.jsonl", LONGBENCH, LONGBENCH | {"_id": "next"})
    assert read(path) == read(path)
    assert {c.donor_kind for c in read(path)} == {"foreign", "standalone"}


@pytest.mark.parametrize(
    "wrong",
    ["{not json", "[1, 2]", {"context": "c", "answers": ["a"]}, {"input": "q", "answers": ["a"]}, {"input": "q"},
     {"question": "q", "chunks": [{"other": "x"}], "answers": ["a"]}],
)  # fmt: skip
def test_anything_else_is_refused_with_its_place(tmp_path, wrong):
    with pytest.raises(ConfigError, match="question 2 cannot be read"):
        read(write(tmp_path / "q.jsonl", LONGBENCH, wrong))


def test_a_file_stands_beside_tasks_and_gives_its_turn_when_used_up(tmp_path):
    path = write(tmp_path / "q.jsonl", LONGBENCH)
    assert [c.task for c in run.deal([str(path), "fact"], 4, 1)] == ["hotpotqa", "fact", "fact", "fact"]


def test_cases_longer_than_the_model_takes_are_left_out_aloud(tmp_path, capsys):
    long = LONGBENCH | {"context": "word " * 500}
    cases = read(write(tmp_path / "q.jsonl", LONGBENCH, long))

    def render(prompt):
        return prompt.user.split()

    assert run.fitting(cases, render, 200) == cases[:1]
    assert "1 of 2 cases" in capsys.readouterr().out
    assert run.fitting(cases, render, 5000) == cases and not capsys.readouterr().out
    with pytest.raises(ConfigError, match="60 tokens"):
        run.fitting(cases, render, 60)


@pytest.mark.parametrize(("names", "count"), [(["fcat"], 2), (["fact"], 0)])
def test_nothing_to_do_is_said(names, count):
    with pytest.raises(ConfigError):
        run.deal(names, count, 1)
