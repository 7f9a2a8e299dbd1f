"""SGLang's HTTP process as the tenants' edge knows it: its routes, and what it does with a stamped body."""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
from sglang.srt.entrypoints import http_server
from sglang.srt.managers.io_struct import GenerateReqInput, TokenizedGenerateReqInput
from sglang.srt.managers.schedule_batch import Req as Req_
from sglang.srt.managers.schedule_policy import AddReqResult
from sglang.srt.managers.scheduler import Scheduler as Scheduler_
from sglang.srt.managers.tokenizer_manager import ReqState, TokenizerManager
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats, SchedulerReqTimeStats
from sglang.srt.sampling.sampling_params import SamplingParams
from test_queue_adapter import COSTS, Adder, FakeTree, NamedPipeline, Req, World

from kvshare_sched.engine.sglang import admission
from kvshare_sched.engine.sglang.http import identity as http_identity
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.tenants import middleware, seal
from kvshare_sched.tenants.delayed_answers import DELAY, without_traces
from kvshare_sched.tenants.file import parse
from kvshare_sched.tenants.identity import Caller
from kvshare_sched.tenants.namespaces import name_of, namespace
from kvshare_sched.tenants.policy import STAMP_KEY, Lender, Stamp, read
from kvshare_sched.tenants.stamp_request import requests_in, stamp_document, stamp_request

TENANTS = parse("unknown = 'reject'\n[groups.handbook]\n[tenants.acme]\ngroups = ['handbook']\nweight = 2", "f")
OWN = name_of("mark", "tenant", "acme")
ROUTES = {getattr(route, "path", "") for route in http_server.app.routes}


def test_every_path_a_tenant_may_call_exists():
    assert middleware.SERVED | middleware.HEALTH <= ROUTES


OPERATORS_ONLY = """
/ /api/show /docs /docs/oauth2-redirect /openapi.json /redoc /server_info /get_server_info /v1/models/{model:path}
/abort_request /open_session /close_session /configure_logging /continue_generation /pause_generation /slow_down
/flush_cache /freeze_gc /release_memory_occupation /resume_memory_occupation /set_internal_state /set_trace_level
/add_external_corpus /list_external_corpora /remove_external_corpus /pd_role_switch /weights_checker
/hicache/storage-backend /hicache/storage-backend/clear /get_hicache_l3_cache_layout
/load_lora_adapter /load_lora_adapter_from_tensors /unload_lora_adapter
/begin_weight_update /end_weight_update /update_weight_version /update_weights_from_disk
/update_weights_from_distributed
/update_weights_from_ipc /update_weights_from_tensor /get_weights_by_name /init_weights_update_group
/destroy_weights_update_group /init_weights_send_group_for_remote_instance /send_weights_to_remote_instance
/get_remote_instance_transfer_engine_info /remote_instance_transfer_engine_info
/start_profile /stop_profile /start_expert_distribution_record /stop_expert_distribution_record
/dump_expert_distribution_record /parse_function_call /separate_reasoning
/v1/audio/transcriptions /v1/decisions /v1/systemone /v1/realtime
/v1/responses/{response_id} /v1/responses/{response_id}/cancel
"""


def test_every_path_of_sglangs_is_known_to_be_the_tenants_or_the_operators():
    """A path that a later SGLang adds is listed here by whoever has looked at what it does."""
    known = middleware.SERVED | middleware.HEALTH
    managing = set(OPERATORS_ONLY.split())
    assert sorted(ROUTES - known - {""}) == sorted(managing) and not known & managing


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


def test_sglang_waits_for_every_answer_where_hidden_ones_are_held():
    """Its own code between the engine's output and the endpoints: what it has at once, the hook gives later."""
    from test_delayed_answers import Clock

    obj = GenerateReqInput(text="x")
    hidden = parse("unknown = 'reject'\n[tenants.acme]\nhide_reuse = 2", "f")
    stamp_request(obj, Caller(hidden.tenants["acme"]), hidden, "mark", 7)
    obj.normalize_batch_and_arguments()
    manager = SimpleNamespace(incremental_streaming_output=False)
    manager.request_logger = SimpleNamespace(log_finished_request=lambda *a, **k: None)
    manager.request_metrics_exporter_manager = SimpleNamespace(exporter_enabled=lambda: False)

    @functools.wraps(TokenizerManager._stream_one_response)
    def held(self, **kwargs):
        return http_identity.stream_one(TokenizerManager._stream_one_response, self, **kwargs)

    manager._stream_one_response = functools.partial(held, manager)

    async def ask():
        answer = {"text": "hi", "output_ids": [2], "meta_info": {"id": "x", "cached_tokens": 9, "finish_reason": None}}
        times = APIServerReqTimeStats()
        state = ReqState([answer], True, asyncio.Event(), obj, times)
        state.event.set()
        setattr(state, DELAY, 3.0)
        manager.rid_to_state = {obj.rid: state}
        found = [one async for one in TokenizerManager._wait_one_response(manager, obj)]
        return asyncio.get_running_loop().time(), found

    http_identity._edge = "in force"
    try:
        with asyncio.Runner(loop_factory=Clock) as runner:
            at, [found] = runner.run(ask())
    finally:
        http_identity._edge = None
    assert at == 3.0 and found["meta_info"] == {"id": "x", "cached_tokens": 0, "finish_reason": None}


def test_every_time_that_sglang_tells_is_kept_from_hidden_tenants():
    times = APIServerReqTimeStats()
    for name in times.__dataclass_fields__:
        if name.endswith("_time"):
            setattr(times, name, 2.0 if name == "created_time" else 3.0)
    scheduler = SchedulerReqTimeStats(storage_prefetch_wait_s=1.0, storage_staging_wait_s=1.0)
    scheduler.forward_entry_time = scheduler.prefill_finished_time = 3.0
    meta = times.convert_to_output_meta_info(scheduler, 5) | scheduler.convert_to_output_meta_info()
    assert len(meta) > 5 and without_traces({"meta_info": meta}) == {"meta_info": {}}


def test_a_hidden_tenants_requests_wait_and_pay_at_their_full_price():
    world = World(tenants_file="f", quantum=1000)
    donor = Req("donor", 600, tenant=OWN)
    world.publish(donor)
    custom = {STAMP_KEY: Stamp("acme", hide_reuse=2.0).to_text()}

    def owed(custom_params) -> tuple[float, float]:
        """The price at which a prompt of 600 tokens waits, 500 of them in the tree, and what it leaves of a quantum."""
        world.queue._accounts.deficits.clear()
        req = Req(f"again {bool(custom_params)}", donor.origin_input_ids, tenant=OWN)
        req.sampling_params.custom_params, req.prefix_len = custom_params, 500
        req.retracted_stain, req.return_logprob, req.customized_info = False, False, None
        world.waiting = [req]
        world.order()
        price = world.queue.queue.work(world.name(req.rid))
        stamp = admission.stamp_of(req, world.pipeline.config)
        view = admission.view_of(req, stamp)
        world.begin(req, world.pipeline.admit(view, req.rid, 600, 500, stamp))
        world.go()
        return price, world.queue._accounts.deficits["acme"]

    shown, hidden = owed(None), owed(custom)
    assert hidden == (600, 1000 - 600) and shown[0] < 600 and shown[1] >= 1000 - 100
    assert world.queue.failures == 0


def test_the_order_of_the_queue_uses_the_weight_in_the_stamp():
    world = World(tenants_file="f")
    req = Req("r", tenant=OWN)
    obj = GenerateReqInput(text="x")
    stamp_request(obj, Caller(TENANTS.tenants["acme"]), TENANTS, "mark", 7)
    req.sampling_params.custom_params = obj.sampling_params["custom_params"]
    world.waiting = [req]
    world.order()
    assert world.queue._accounts.weights == {"acme": 2.0} and world.queue.failures == 0


# ---- the scheduler believes nothing that is not sealed ----


class Scheduler:
    """Stops where SGLang would make a request of what it was handed."""

    def __init__(self):
        self.came = []

    def handle(self, recv_req, *, mm_input_error=None):
        self.came.append((mm_input_error, recv_req.extra_key, recv_req.sampling_params.custom_params))


def handed(extra_key=OWN, change=lambda custom: custom):
    """What the scheduler gets of a stamped body, after `change` by somebody on the way."""
    obj = GenerateReqInput(text="x")
    stamp_request(obj, Caller(TENANTS.tenants["acme"]), TENANTS, "mark", 7)
    params = SamplingParams(max_new_tokens=1, custom_params=change(dict(obj.sampling_params["custom_params"])))
    empty = {name: None for name in ("input_embeds", "mm_inputs", "token_type_ids", "input_text")}
    return TokenizedGenerateReqInput(
        **empty | {"rid": "r", "input_ids": array("q", [1, 2]), "sampling_params": params, "stream": False},
        **{"return_logprob": False, "logprob_start_len": -1, "top_logprobs_num": 0, "token_ids_logprob": None},
        extra_key=extra_key,
        session_id="s",
    )


def gated(recv_req) -> tuple:
    scheduler = Scheduler()
    seal.handle_generate_request(Scheduler.handle, scheduler, recv_req)
    return scheduler.came[0]


@functools.wraps(gated)
def hooked(*args):
    """As a place of SGLang with a hook around it."""


UNKNOWN = "the sender of this request is not known"
FORGED = Stamp("acme", (Lender(name_of("mark", "tenant", "globex"), "trusted", "team"),)).to_text()


def test_the_gate_lets_through_what_the_edge_has_stamped(monkeypatch):
    monkeypatch.setenv(seal.SECRET, "secret")
    error, extra_key, custom = gated(handed())
    assert error is None and extra_key == OWN and read(custom).tenant == "acme"


@pytest.mark.parametrize(
    ("extra_key", "change"),
    [
        (name_of("mark", "tenant", "globex"), lambda custom: custom),
        (None, lambda custom: custom),
        (OWN, lambda custom: custom | {STAMP_KEY: FORGED}),
        (OWN, lambda custom: custom | {seal.SEAL_KEY: "0" * 64}),
        (OWN, lambda custom: custom | {seal.SEAL_KEY: "\ud800"}),
        (OWN, lambda custom: {STAMP_KEY: custom[STAMP_KEY]}),
        (OWN, lambda custom: None),
    ],
)
def test_the_gate_refuses_everything_else_and_keeps_nothing_of_it(monkeypatch, extra_key, change):
    monkeypatch.setenv(seal.SECRET, "secret")
    recv_req = handed(extra_key, change)
    assert gated(recv_req) == (UNKNOWN, None, None)
    assert recv_req.session_id is None


def test_without_a_secret_or_with_another_nothing_passes_but_audits(monkeypatch):
    monkeypatch.delenv(seal.SECRET, raising=False)
    unsealed = handed()
    assert gated(unsealed)[0] == UNKNOWN
    monkeypatch.setenv(seal.SECRET, "of an earlier launch")
    earlier = handed()
    monkeypatch.setenv(seal.SECRET, "secret")
    assert gated(earlier)[0] == UNKNOWN
    with seal.ours():
        assert gated(handed(None, lambda custom: None))[0] is None
    assert gated(handed(None, lambda custom: None))[0] == UNKNOWN


def test_a_document_is_sealed_for_its_namespace(monkeypatch):
    monkeypatch.setenv(seal.SECRET, "secret")
    obj, space = GenerateReqInput(input_ids=[1]), name_of("mark", "documents", "handbook")
    stamp_document(obj, space, "label", guaranteed=5, revision=0)
    assert seal.sealed(obj.sampling_params["custom_params"], space)
    assert not seal.sealed(obj.sampling_params["custom_params"], OWN)


def test_an_engine_whose_hooks_were_not_put_in_place_does_not_start():
    from kvshare_sched.engine.sglang import hooks
    from kvshare_sched.engine.sglang.wiring import check_hooked
    from kvshare_sched.errors import UnsupportedError

    places = list(hooks.bodies(hooks.When.CACHE_WITH_TENANTS))
    assert places == ["sglang.srt.managers.scheduler.Scheduler.handle_generate_request"]
    with pytest.raises(UnsupportedError, match="handle_generate_request could not be hooked"):
        check_hooked(places)
    check_hooked(["test_tenants_sglang.hooked"])


def test_sglang_ends_a_refused_request_without_its_tokens():
    """What the gate counts on: an error handed in beside a request ends it before its prompt is computed."""
    source = inspect.getsource(Scheduler_._handle_generate_request)
    assert source.index("if mm_input_error is not None:") < source.index("validate_input_length")
    assert 'array(\n            "q", [0]' in inspect.getsource(Req_.set_finish_with_abort)


def test_the_launcher_makes_a_secret_once_and_nodes_need_a_common_one(monkeypatch, tmp_path):
    from sglang.srt.arg_groups import model_override_base

    from kvshare_sched.engine.sglang import support

    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    monkeypatch.setattr(support, "refusals", lambda args: [])
    monkeypatch.setenv(seal.SECRET, "")
    monkeypatch.delenv(seal.SECRET)
    (tmp_path / "t.toml").write_text('unknown = "reject"')
    args = SimpleNamespace(radix_cache_backend="kvshare", nnodes=2)
    support.check_server_args(lambda args: None, args)
    assert seal.SECRET not in os.environ, "without a tenants file nothing is sealed"
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", str(tmp_path / "t.toml"))
    with pytest.raises(SystemExit, match="nnodes=2"):
        support.check_server_args(lambda args: None, args)
    args.nnodes = 1
    support.check_server_args(lambda args: None, args)
    first = os.environ[seal.SECRET]
    support.check_server_args(lambda args: None, args)
    assert len(first) == 64 and os.environ[seal.SECRET] == first


# ---- memory ----


class Tight(Adder):
    """Takes a request once nothing but so many tokens are pinned, and no leases."""

    def __init__(self, pipeline, pinned, leases):
        super().__init__(SimpleNamespace(pipeline=pipeline))
        self.pipeline, self.pinned, self.leases = pipeline, pinned, leases
        self.rem_chunk_tokens, self.chunked_req_limit, self.rem_input_tokens = None, None, 1 << 30

    def add_one_req(self, req, has_chunked_req=False, truncation_align_size=None):
        tree, desk = self.pipeline.tree, self.pipeline.desk
        if desk.held_tokens > self.pinned or tree.active > self.leases:
            return AddReqResult.NO_TOKEN
        return super().add_one_req(req)


@pytest.mark.parametrize(
    ("pinned", "leases", "held", "reused"),
    [(600, 1, 600, True), (600, 0, 600, False), (0, 0, 0, False)],
    ids=["all fits", "without the plan", "without guarantees"],
)
def test_an_idle_engine_gives_guarantees_up_last(pinned, leases, held, reused):
    text = np.random.default_rng(1).permutation(600)
    pipeline = NamedPipeline(KVShareConfig(audit_share=0.0, strategy="dhd", ratio=0.1), FakeTree(), COSTS)
    pipeline.desk.learn(Stamp("acme", guaranteed=600), pipeline.tree)
    pipeline.publish("donor", namespace(OWN), text)
    assert pipeline.desk.held_tokens == 600
    req = Req("r", tokens=np.concatenate((np.arange(1000, 1050), text, np.arange(2000, 2020))), tenant=OWN)
    req.retracted_stain, req.return_logprob, req.customized_info = False, False, None
    adder = Tight(pipeline, pinned, leases)
    result = admission.add_one_req(Tight.add_one_req, adder, req, False)
    assert result == AddReqResult.CONTINUE and adder.can_run_list == [req]
    assert pipeline.desk.held_tokens == held and (pipeline.sessions["r"].plan is not None) == reused
    pipeline.release("r")
    assert pipeline.tree.active == 0


@pytest.mark.parametrize("file", ["", "tenants.toml"])
def test_the_edge_is_hooked_only_with_a_tenants_file(file, monkeypatch):
    from sglang.srt.plugins.hook_registry import HookRegistry

    from kvshare_sched import plugin
    from kvshare_sched.engine.sglang import hooks

    places = []
    monkeypatch.setattr(HookRegistry, "register", lambda place, hook, kind: places.append(place))
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", file)
    plugin.register()
    edge = {hook.place for hook in hooks.HOOKS if hook.when == hooks.When.LOAD_WITH_TENANTS}
    assert len(places) > 5 and len(edge) > 3 and edge & set(places) == (edge if file else set())


def test_what_would_go_past_the_edge_is_refused(monkeypatch, tmp_path):
    from sglang.srt.arg_groups import model_override_base

    from kvshare_sched.engine.sglang import support

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
    from sglang.srt.arg_groups import model_override_base

    from kvshare_sched.engine.sglang import support

    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    args = SimpleNamespace(radix_cache_backend=None)
    support.check_server_args(lambda args: None, args)
    monkeypatch.setenv("KVSHARE_TENANTS_FILE", "f")
    with pytest.raises(SystemExit, match="nobody would be identified"):
        support.check_server_args(lambda args: None, args)
