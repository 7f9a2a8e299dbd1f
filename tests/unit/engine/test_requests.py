"""What the scheduler's hooks read off a request of SGLang's."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
from fakes import FakeTree
from prometheus_client import CollectorRegistry
from sglang.srt.observability import trace
from test_lifecycle import COSTS

from kvshare_sched.engine.sglang import admission
from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.observe.series import ORIGINS
from kvshare_sched.records.request import Reason
from kvshare_sched.reuse.lifecycle import Pipeline
from kvshare_sched.reuse.session import session_of
from kvshare_sched.settings import KVShareConfig


def request(rid: str = "r", prompt: int = 5, wish: object = None, **more) -> SimpleNamespace:
    ids = array("q", range(prompt))
    made = {
        **{"rid": rid, "extra_key": "blue", "cache_salt": None, "lora_id": None, "customized_info": None},
        **{"origin_input_ids": ids, "full_untruncated_fill_ids": ids, "output_ids": array("q"), "prefix_len": 0},
        **{"retracted_stain": False, "input_embeds": None, "multimodal_inputs": None, "session": None},
        **{"positional_embed_overrides": None, "return_hidden_states": False, "return_pooled_hidden_states": False},
        **{"skip_radix_cache_insert": False, "return_logprob": False, "beam_group": None},
        "time_stats": SimpleNamespace(trace_ctx=trace.TraceNullContext()),
        "sampling_params": SimpleNamespace(max_new_tokens=4, custom_params=None if wish is None else {"kvshare": wish}),
    }
    return SimpleNamespace(**made | more)


class Adder:
    """Takes every request; no limits."""

    rem_chunk_tokens = chunked_req_limit = new_chunked_req = None
    rem_input_tokens = 0

    def __init__(self, pipeline):
        self.tree_cache = SimpleNamespace(pipeline=pipeline)
        self.can_run_list = []

    def add_one_req(self, req, has_chunked_req):
        self.can_run_list.append(req)


@pytest.fixture
def world():
    registry = CollectorRegistry()
    pipeline = Pipeline(KVShareConfig(), FakeTree(), COSTS, ShareMetrics(registry=registry))

    def run(req) -> None:
        admission.add_one_req(Adder.add_one_req, Adder(pipeline), req, False)
        pipeline.release(session_of(req))

    def counted() -> tuple[float, float]:
        """(requests, prompt tokens) on /metrics."""
        found = {s.name: 0.0 for f in registry.collect() for s in f.samples}
        for sample in (s for f in registry.collect() for s in f.samples):
            found[sample.name] += sample.value
        return found["kvshare_requests_total"], found["kvshare_prompt_tokens_total"]

    return SimpleNamespace(run=run, counted=counted)


@pytest.mark.parametrize("wish", [None, "off", 3, {"ratio": 0.3}])
def test_tokens_of_a_retracted_request_count_once_whatever_it_asks_for(world, wish):
    world.run(request(wish=wish))
    again = request(wish=wish, retracted_stain=True, output_ids=array("q", [7]))
    assert admission.view_of(again) is Reason.RETRACTED
    world.run(again)
    assert world.counted() == (2, 5)


def test_beam_search_takes_no_part():
    assert not isinstance(admission.view_of(request()), Reason), "the control"
    assert admission.view_of(request(beam_group=object())) is Reason.UNSUPPORTED_INPUT


def test_health_checks_are_no_clients_and_a_borrowed_name_hides_nothing(world):
    probe = request("HEALTH_CHECK_1", 1)
    world.run(probe)
    assert world.counted() == (0, 0)
    assert "details" not in probe.customized_info["kvshare"][0], "no page"
    world.run(request("HEALTH_CHECK_2", 40))
    assert world.counted() == (1, 40)


def test_the_report_carries_what_a_page_needs(world):
    req = request()
    world.run(req)
    (report,) = req.customized_info["kvshare"]
    assert sum(report[o] for o in ORIGINS) == 5 and report["details"]["extra_key"] == "blue"
