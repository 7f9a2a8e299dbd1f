"""Which report goes with which answer, in the process that talks HTTP."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import pytest

from kvshare_sched.engine.sglang.http import reports as http_reports
from kvshare_sched.engine.sglang.reports import WHOLE_KEY
from kvshare_sched.engine.sglang.requests import REPORT_KEY
from kvshare_sched.tenants.delayed_answers import HOLD_KEY


@pytest.fixture(autouse=True)
def nothing_remembered():
    http_reports._recent.clear()


class Answer:
    """One answer, which SGLang tells of as often as it has tokens to send."""

    def __init__(self, rid: str = "r"):
        self.rid, self.state = rid, SimpleNamespace()

    def goes_on(self, *told: dict, key: str = REPORT_KEY) -> dict:
        """The `meta_info` of another chunk; told: what came with it, at most one object."""
        meta, info = {"id": self.rid}, {"a client's": [[1]]} | ({key: [list(told)]} if told else {})
        passed: list = []
        http_reports.update_request_meta_info(
            lambda *given: passed.append(given), None, meta, self.state, info, 0, None
        )
        assert passed[0][3] == {"a client's": [[1]]}
        return meta


def last_chunk(rid: str = "r") -> dict | None:
    """What the stream's last chunk carries of ours."""

    async def sglang(handler):
        yield f'data: {{"id":"{rid}","choices":[{{"index":0,"finish_reason":"stop"}}]}}\n\n'

    async def read() -> list[str]:
        return [chunk async for chunk in http_reports.stream(sglang, None)]

    [chunk] = asyncio.run(read())
    return json.loads(chunk.removeprefix("data: ")).get("metadata")


def test_a_report_goes_with_every_chunk_and_with_the_streams_last():
    answer = Answer()
    assert answer.goes_on({"reused": 5})["kvshare"] == {"reused": 5}
    assert answer.goes_on()["kvshare"] == {"reused": 5}
    assert last_chunk() == {"kvshare": [{"reused": 5}]}
    assert last_chunk("another") is None


def test_an_answer_of_no_token_has_its_report_too():
    assert Answer().goes_on({"reused": 5}, key=WHOLE_KEY)["kvshare"] == {"reused": 5}
    assert last_chunk() == {"kvshare": [{"reused": 5}]}


def test_an_answer_without_a_report_does_not_find_that_of_an_earlier_one_with_its_id():
    Answer().goes_on({"reused": 5})
    assert last_chunk() is not None, "the control"
    assert "kvshare" not in Answer().goes_on()
    assert last_chunk() is None


def test_an_answer_that_hides_its_reuse_does_not_show_that_of_an_earlier_one_with_its_id():
    Answer().goes_on({"reused": 5})
    assert "kvshare" not in Answer().goes_on({HOLD_KEY: (0.0, 1.0, 0.5)})
    assert last_chunk() is None


def test_an_answer_with_a_report_shows_its_own():
    Answer().goes_on({"reused": 5})
    Answer().goes_on({"reused": 0})
    assert last_chunk() == {"kvshare": [{"reused": 0}]}


def test_the_answers_that_spoke_last_are_remembered(monkeypatch):
    monkeypatch.setattr(http_reports, "_RECENT", 3)
    answers = [Answer(str(number)) for number in range(4)]
    for answer in answers[:3]:
        answer.goes_on({"reused": 5})
    answers[0].goes_on()  # it is still streaming
    answers[3].goes_on({"reused": 5})
    assert [last_chunk(answer.rid) is not None for answer in answers] == [True, False, True, True]
