"""SGLang's HTTP process as the tenants' edge knows it: its routes, and what it does with a stamped body."""

from __future__ import annotations

import inspect

import pytest
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput
from sglang.srt.managers.tokenizer_manager import TokenizerManager
from sglang.srt.sampling.sampling_params import SamplingParams
from test_queue_adapter import Req, World

from kvshare_sched.tenants import edge, hooks
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.identity import Caller
from kvshare_sched.tenants.namespaces import name_of
from kvshare_sched.tenants.policy import read
from kvshare_sched.tenants.stamping import requests_in, stamp_request

TENANTS = parse("[groups.handbook]\n[tenants.acme]\ngroups = ['handbook']\nweight = 2", "f")
OWN = name_of("mark", "tenant", "acme")
ROUTES = {getattr(route, "path", "") for route in http_server.app.routes}


def test_every_path_a_tenant_may_call_exists():
    assert edge.SERVED | edge.HEALTH <= ROUTES


def test_whatever_generates_is_served_and_nothing_that_manages():
    generating = {"/generate", "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages"}
    assert generating <= edge.SERVED
    words = ("flush", "update", "session", "abort", "lora")
    managing = {path for path in ROUTES if any(word in path for word in words)}
    assert len(managing) > 10 and not managing & edge.SERVED


@pytest.mark.parametrize(
    "values",
    [
        {"text": "x"},
        {"text": "x", "extra_key": "k", "cache_salt": ""},
        {"input_ids": [1, 2], "sampling_params": {"n": 2}},
        {"text": ["x", "y"]},
        {"text": ["x", "y"], "extra_key": ["a", "b"], "cache_salt": "s"},
        {"text": ["x", "y"], "cache_salt": ["", "s"], "sampling_params": [{}, {"custom_params": {"kvshare": "off"}}]},
        {"input_ids": [[1], [2]], "sampling_params": {"n": 3}},
    ],
)
def test_sglang_hands_every_part_of_a_stamped_body_to_one_tenant(values):
    """As `TokenizerManager.generate_request` does it: normalised, then taken apart."""
    obj = GenerateReqInput(**values)
    count = requests_in(obj)
    stamp_request(obj, Caller(TENANTS.tenants["acme"]), TENANTS, "mark", 7)
    obj.normalize_batch_and_arguments()
    parts = [obj] if obj.is_single else [obj[i] for i in range(obj.batch_size)]
    assert count == len(parts) * obj.parallel_sample_num
    for part in parts:
        assert part.extra_key == OWN
        assert part.cache_salt is None or len(part.cache_salt) == 64
        params = SamplingParams(**{k: v for k, v in part.sampling_params.items() if k != "n"})
        stamp = read(params.custom_params)
        assert stamp.tenant == "acme" and stamp.flight == 7 and stamp.lenders[0].rule == "document"


def test_the_hooked_places_are_what_the_hooks_expect():
    assert inspect.isasyncgenfunction(TokenizerManager.generate_request)
    assert inspect.iscoroutinefunction(TokenizerManager._send_one_request)
    assert inspect.iscoroutinefunction(TokenizerManager._send_batch_request)


def test_the_order_of_the_queue_uses_the_weight_in_the_stamp():
    world = World(tenants_file="f")
    req = Req("r", tenant=OWN)
    obj = GenerateReqInput(text="x")
    stamp_request(obj, Caller(TENANTS.tenants["acme"]), TENANTS, "mark", 7)
    req.sampling_params.custom_params = obj.sampling_params["custom_params"]
    world.waiting = [req]
    world.order()
    assert world.queue._accounts.weights == {"acme": 2.0} and world.queue.failures == 0


@pytest.mark.parametrize("file", ["", "tenants.toml"])
def test_the_edge_is_hooked_only_with_a_tenants_file(file, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from kvshare_sched import plugin

    places = []
    monkeypatch.setattr(HookRegistry, "register", lambda place, hook, kind: places.append(place))
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", file)
    plugin.register()
    assert len(places) > 5 and (hooks.hooks().keys() <= set(places)) == bool(file)
    assert bool(file) or not hooks.hooks().keys() & set(places)


def test_what_would_go_past_the_edge_is_refused(monkeypatch, tmp_path):
    from types import SimpleNamespace

    from sglang.srt.arg_groups import model_override_base

    from kvshare_sched import support

    settings = SimpleNamespace(
        **{"enable_custom_logit_processor": True, "enable_session_radix_cache": True},
        **{"tokenizer_worker_num": 2, "api_key": "secret", "enable_response_store": True, "grpc_port": 1, "dp_size": 1},
        kv_cache_dtype="auto",
        device="cpu",
        enable_torch_compile=False,
        cuda_graph_config=SimpleNamespace(prefill=SimpleNamespace(backend=None)),
    )
    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    monkeypatch.setattr(model_override_base, "model_config_of", lambda args: None)
    monkeypatch.setattr(support, "_model_refusals", lambda model: [])

    def refused() -> str:
        return " ".join(support.refusals(settings))

    named = ("tokenizer_worker_num=2", "api_key", "enable_response_store=True", "grpc_port=1")
    named += ("enable_custom_logit_processor=True", "enable_session_radix_cache=True")
    for name in named:
        assert name not in refused()
    monkeypatch.setenv("KVSHARE_LIBRARY", str(tmp_path))
    assert "Set KVSHARE_TENANTS_FILE" in refused()
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", "f")
    for name in named:
        assert name in refused()
    assert "secret" not in refused()
    settings.dp_size = 2
    assert "dp_size=2" in refused()


def test_a_tenants_file_without_the_backend_is_refused(monkeypatch):
    from types import SimpleNamespace

    from sglang.srt.arg_groups import model_override_base

    from kvshare_sched import support

    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    args = SimpleNamespace(radix_cache_backend=None)
    support.check_server_args(lambda args: None, args)
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", "f")
    with pytest.raises(SystemExit, match="nobody would be identified"):
        support.check_server_args(lambda args: None, args)
