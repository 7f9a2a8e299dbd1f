"""SGLang's own app and handlers in front of a tokenizer manager that only looks: no endpoint gets past identity."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang.srt.entrypoints import http_server
from sglang.srt.entrypoints.anthropic.serving import AnthropicServing
from sglang.srt.entrypoints.ollama.serving import OllamaServing
from sglang.srt.entrypoints.openai.serving_chat import OpenAIServingChat
from sglang.srt.entrypoints.openai.serving_completions import OpenAIServingCompletion
from sglang.srt.entrypoints.openai.serving_responses import OpenAIServingResponses
from sglang.srt.parser.template_manager import TemplateManager
from sglang.srt.runtime_context import publish
from sglang.srt.server_args import ServerArgs
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvshare_sched.engine.sglang.http import identity as http_identity
from kvshare_sched.tenants.file import Tenant
from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tenants.middleware import Edge, Middleware
from kvshare_sched.tenants.namespaces import name_of
from kvshare_sched.tenants.policy import read
from kvshare_sched.tenants.quotas import OverQuota
from kvshare_sched.tenants.reload import TenantsFile

FILE = f"""
unknown = "anonymous"
[operators]
keys = ["{hash_of("root")}"]
[tenants.globex]
keys = ["{hash_of("other")}"]
[tenants.hidden]
keys = ["{hash_of("hidden")}"]
hide_reuse = 1.5
[tenants.acme]
keys = ["{hash_of("key")}"]
requests = 2
"""
CACHED = 7171717  # what the engine says it had of every prompt
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    **{"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 8},
}
MESSAGES = [{"role": "user", "content": "a"}]
CHAT, TEXT = {"model": "m", "messages": MESSAGES}, {"model": "m", "prompt": "a"}
BODIES = [
    ("/generate", {"text": "a"}),
    ("/generate", {"text": ["a", "b"]}),
    ("/generate", {"input_ids": [1], "sampling_params": {"n": 2}}),
    ("/generate", {"text": "a", "stream": True}),
    ("/v1/completions", TEXT),
    ("/v1/completions", {"model": "m", "prompt": ["a", "b"]}),
    ("/v1/completions", TEXT | {"stream": True}),
    ("/v1/chat/completions", CHAT),
    ("/v1/chat/completions", CHAT | {"n": 2}),
    ("/v1/chat/completions", CHAT | {"stream": True}),
    ("/v1/responses", {"model": "m", "input": "a"}),
    ("/v1/responses", {"model": "m", "input": "a", "stream": True}),
    ("/v1/messages", CHAT | {"max_tokens": 1}),
    ("/v1/messages", CHAT | {"max_tokens": 1, "stream": True}),
    ("/api/chat", CHAT | {"stream": False}),
    ("/api/chat", CHAT | {"stream": True}),
    ("/api/generate", TEXT | {"stream": False}),
    ("/invocations", CHAT),
]
FORGED = {
    "extra_key": name_of("mark", "tenant", "globex"),
    "cache_salt": "s",
    "custom_params": {"kvshare_tenant": "forged"},
}


class Manager:
    """What the handlers need of a tokenizer manager; answers `hi` and keeps what the hook let through."""

    server_args, processor, is_generation = None, None, True
    model_path = served_model_name = "m"
    context_len, max_req_input_len, num_reserved_tokens = 4096, 4000, 0
    request_logger = SimpleNamespace(log_requests=False, log_requests_level=0)
    model_config = SimpleNamespace(
        hf_config=SimpleNamespace(model_type="llama", architectures=CONFIG["architectures"]),
        is_multimodal=False,
        context_len=4096,
        get_default_sampling_params=dict,
    )

    def __init__(self):
        words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "hi": 2, "?": 3}, unk_token="?"))
        words.pre_tokenizer = pre_tokenizers.Whitespace()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
        self.tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
        self.seen = []

    def config_value(self, name):
        return None

    def create_abort_task(self, obj):
        return None

    async def answer(self, obj, request):
        obj.normalize_batch_and_arguments()
        self.seen.append(obj)
        single = obj.is_single or obj.stream
        part = obj if obj.is_single else obj[0]
        one = await anext(
            http_identity.stream_one(Manager.part, self, obj=part, state=SimpleNamespace(), request=request)
        )
        yield one if single else [dict(one) for _ in range(obj.batch_size * obj.parallel_sample_num)]

    async def part(self, obj, state, request=None):
        meta = {"id": "x", "prompt_tokens": 10**7, "completion_tokens": 1, "reasoning_tokens": 0, "weight_version": "1"}
        meta |= {"finish_reason": {"type": "stop", "matched": None}, "cached_tokens": CACHED, "e2e_latency": 0.5}
        meta |= {"cached_tokens_details": {"device": CACHED}}
        yield {"text": "hi", "output_ids": [2], "meta_info": meta, "index": 0}

    def generate_request(self, obj, request=None):
        return http_identity.generate_request(Manager.answer, self, obj, request)


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tenants.toml").write_text(FILE)
    args = ServerArgs(model_path=str(folder), device="cpu", enable_cache_report=True)
    args.resolve_once()
    publish(args, role="tokenizer")
    manager, templates = Manager(), TemplateManager()
    templates.initialize_templates(
        tokenizer_manager=manager, model_path=str(folder), chat_template=None, completion_template=None
    )
    state = http_server._GlobalState(tokenizer_manager=manager, template_manager=templates, scheduler_info={})
    http_server.set_global_state(state)
    served = http_server.app.state
    served.openai_serving_chat = OpenAIServingChat(manager, templates)
    served.openai_serving_completion = OpenAIServingCompletion(manager, templates)
    served.openai_serving_responses = OpenAIServingResponses(manager, templates)
    served.anthropic_serving = AnthropicServing(served.openai_serving_chat)
    served.ollama_serving = OllamaServing(manager)
    manager.edge = http_identity._edge = Edge(TenantsFile(str(folder / "tenants.toml"), 10_000, 10_000), lambda: "mark")
    yield manager
    http_identity._edge = None


def post(engine, path, body, **headers):
    engine.seen.clear()

    async def send():
        door = httpx.ASGITransport(app=Middleware(http_server.app, engine.edge))
        async with httpx.AsyncClient(transport=door, base_url="http://test") as client:
            return await client.post(path, json=body, headers=headers)

    answer = asyncio.run(send())
    assert not engine.edge.flights.requests, "a request in flight was not counted back"
    return answer


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[f"{p}{' stream' * bool(b.get('stream'))}" for p, b in BODIES])
def test_every_endpoint_runs_as_the_caller_whatever_the_body_says(engine, path, body):
    answer = post(engine, path, body | FORGED, authorization="Bearer key")
    assert answer.status_code == 200 and engine.seen
    for obj in engine.seen:
        parts = [obj] if obj.is_single else [obj[i] for i in range(obj.batch_size)]
        for part in parts:
            assert part.extra_key == name_of("mark", "tenant", "acme")
            assert read(part.sampling_params["custom_params"]).tenant == "acme"
    assert "globex" not in answer.text and "kvshare" not in answer.text
    assert post(engine, path, body).status_code == 200
    assert engine.seen and name_of("mark", "tenant", "anonymous") in (
        engine.seen[0].extra_key,
        *engine.seen[0].extra_key,
    )


@pytest.mark.parametrize(("path", "body"), BODIES, ids=[f"{p}{' stream' * bool(b.get('stream'))}" for p, b in BODIES])
def test_no_endpoint_tells_a_hidden_tenant_what_was_cached(engine, path, body):
    body = body | {"stream_options": {"include_usage": True}, "return_cached_tokens_details": True}
    hidden = post(engine, path, body, authorization="Bearer hidden")
    shown = post(engine, path, body, authorization="Bearer key")
    assert hidden.status_code == shown.status_code == 200 and str(CACHED) not in hidden.text
    assert "e2e_latency" not in hidden.text
    if path not in ("/api/chat", "/api/generate", "/v1/responses"):  # which have no number for it
        assert str(CACHED) in shown.text, "the control"


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "HEAD"])
def test_metrics_are_no_tenants_whatever_the_method(engine, method, monkeypatch, tmp_path):
    """SGLang mounts them, and a mount does not look at the method."""
    from fastapi import FastAPI
    from sglang.srt.utils.common import add_prometheus_middleware

    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    app = FastAPI()
    add_prometheus_middleware(app)

    async def ask(key):
        door = httpx.ASGITransport(app=Middleware(app, engine.edge))
        async with httpx.AsyncClient(transport=door, base_url="http://test") as client:
            return (await client.request(method, "/metrics", headers={"x-api-key": key})).status_code

    assert asyncio.run(ask("key")) == asyncio.run(ask("")) == 403
    assert asyncio.run(ask("root")) == 200


@pytest.mark.parametrize(("path", "body"), [("/generate", {"text": ["a"] * 3}), ("/v1/completions", TEXT | {"n": 3})])
def test_more_than_a_quota_in_one_body_is_the_clients_fault(engine, path, body):
    answer = post(engine, path, body, authorization="Bearer key")
    assert 400 <= answer.status_code < 500 and not engine.seen
    assert post(engine, path, body, authorization="Bearer other").status_code == 200, "without a quota it runs"


@pytest.mark.parametrize("more", [{"priority": "high"}, {"sampling_params": {"beam_width": 4}}])
def test_a_path_that_checks_no_types_lets_nothing_else_through(engine, more):
    body = {"instances": [{"text": "a"}], "parameters": more}
    assert post(engine, "/vertex_generate", body, authorization="Bearer other").status_code == 400 and not engine.seen
    body["parameters"] = {"priority": 1, "sampling_params": {"max_new_tokens": 1}}
    assert post(engine, "/vertex_generate", body, authorization="Bearer other").status_code == 200


@pytest.mark.parametrize("path", sorted({path for path, _ in BODIES}))
@pytest.mark.parametrize("body", [{}, {"text": 3}, {"messages": "x", "model": 3}, {"session_params": {"id": "s"}}])
def test_nonsense_is_the_clients_fault(engine, path, body):
    assert 400 <= post(engine, path, body, authorization="Bearer key").status_code < 500 and not engine.seen


_ANY = st.none() | st.booleans() | st.integers(-9, 9) | st.text(max_size=5) | st.sampled_from([[], {}, [None], ["a"]])
_OURS = {  # what the edge reads of a body, or writes into it
    **dict.fromkeys(("extra_key", "cache_salt", "rid", "session_params", "session_id"), _ANY),
    "priority": _ANY | st.sampled_from([2**70, -(2**70)]),
    "sampling_params": _ANY
    | st.fixed_dictionaries({}, optional={"n": _ANY, "custom_params": _ANY, "max_new_tokens": _ANY}),
    "stream": st.booleans(),
}


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.fixed_dictionaries({"text": st.sampled_from(["a", ["a", "b"]])}, optional=_OURS))
def test_any_value_where_we_look_runs_as_its_sender_or_is_the_clients_fault(engine, body):
    answer = post(engine, "/generate", body, authorization="Bearer other")
    assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
    for obj in engine.seen:
        keys = obj.extra_key if isinstance(obj.extra_key, list) else [obj.extra_key]
        assert set(keys) == {name_of("mark", "tenant", "globex")}


# ---- how it is put in place ----


@pytest.fixture
def starting(engine, tmp_path, monkeypatch):
    """What SGLang holds when it starts its HTTP server; returns (server arguments, manager, middlewares added)."""
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    for name in ("generate_request", "_stream_one_response", "_send_one_request", "_send_batch_request"):
        monkeypatch.setattr(getattr(TokenizerManager, name), "__wrapped__", None, raising=False)
    added = []
    app = SimpleNamespace(add_middleware=lambda kind, **more: added.append((kind, more)))
    monkeypatch.setattr(http_server, "app", app)
    monkeypatch.setattr(http_identity, "_edge", None)
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", str(tmp_path / "tenants.toml"))
    (tmp_path / "tenants.toml").write_text(FILE + "[tenants.hooli]\nguaranteed_donor_tokens = 1000")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def args(backend, **more):
        made = ServerArgs(model_path=str(tmp_path), device="cpu", radix_cache_backend=backend, **more)
        made.resolve_once()
        return made

    manager = SimpleNamespace(
        model_config=ModelConfig.from_server_args(args("kvshare")),
        context_len=2048,
        server_status=None,
        config_value=lambda name: {"weight_version": "1"}[name],
    )
    return args, manager, added


def run(args, manager, pool=8192):
    return http_identity.run_http_server(
        lambda *a, **k: "served", args, manager, None, None, [{"max_total_num_tokens": pool}]
    )


def test_the_middleware_goes_around_the_app_before_it_serves(starting, monkeypatch, tmp_path):
    args, manager, added = starting
    monkeypatch.setenv("KVSHARE_LIBRARY", str(tmp_path / "library"))
    assert run(args("kvshare"), manager) == "served"
    [(kind, more)] = added
    assert kind is Middleware and more["admin"] is not None and more["background"] is not None
    edge = more["edge"]
    assert edge.sign == 0 and not edge.starting() and len(edge.mark) == 16
    first = edge.mark
    manager.config_value = lambda name: "2"
    assert edge.mark != first, "other weights, other namespaces"


def test_refusals_and_documents_are_counted_where_metrics_are_on(starting, monkeypatch, tmp_path):
    args, manager, added = starting
    told = []
    metrics = SimpleNamespace(refused=lambda *refused: told.append(refused), library=told.append)
    monkeypatch.setattr("kvshare_sched.observe.metrics.EdgeMetrics", lambda: metrics)
    monkeypatch.setenv("KVSHARE_LIBRARY", str(tmp_path / "library"))
    run(args("kvshare"), manager)
    assert told == []
    run(args("kvshare", enable_metrics=True), manager)
    assert told == [[]], "the empty library is shown"
    flights = added[1][1]["edge"].flights
    with pytest.raises(OverQuota):
        flights.start(Tenant("acme", requests=2), 3)
    assert told[1:] == [("acme", "requests")]


def test_nothing_happens_with_another_backend(starting):
    args, manager, added = starting
    assert run(args(None), manager) == "served" and not added and http_identity._edge is None


def test_a_server_that_could_not_tell_tenants_apart_does_not_start(starting, monkeypatch):
    from sglang.srt.managers.tokenizer_manager import TokenizerManager

    args, manager, added = starting
    with pytest.raises(SystemExit, match="sum up to 1000"):
        run(args("kvshare"), manager, pool=1500)
    monkeypatch.delattr(TokenizerManager.generate_request, "__wrapped__")
    with pytest.raises(SystemExit, match="generate_request is not hooked"):
        run(args("kvshare"), manager)
    assert not added
