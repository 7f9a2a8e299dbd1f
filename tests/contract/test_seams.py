"""SGLang as we know it: every seam, the version, and who imports whom. Look here first after an upgrade."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import pkgutil
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kvshare_sched.engine.sglang import batches, hooks, seams, support
from kvshare_sched.engine.sglang.cache import KVShareRadixCache
from kvshare_sched.engine.sglang.hooks import HOOKS, Hook, When
from kvshare_sched.engine.sglang.seams import SEAMS, Seam
from kvshare_sched.tools import doctor

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.path.removeprefix("sglang.srt."))
def test_seam(seam):
    assert seam.problem() is None


def test_every_place_that_is_overridden_is_in_the_list():
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from kvshare_sched.engine.sglang.cache import KVShareRadixCache

    overridden = {name for name in vars(KVShareRadixCache).keys() & vars(UnifiedRadixCache) if name[0] != "_"}
    assert len(overridden) > 3
    places = {f"sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.{name}" for name in overridden}
    assert places - {seam.path for seam in SEAMS} == set()


# ---- the table of hooks ----


@pytest.mark.parametrize(
    "hook", HOOKS, ids=lambda h: f"{h.body.removeprefix('kvshare_sched.')}@{h.place.split('.')[-1]}"
)
def test_a_hook_has_a_place_and_a_body(hook):
    assert callable(pkgutil.resolve_name(hook.place))
    first, *_ = inspect.signature(pkgutil.resolve_name(hook.body)).parameters
    assert first == "original"


def test_a_place_is_hooked_twice_only_in_a_stated_order_and_on_one_occasion():
    rows = defaultdict(list)
    for hook in HOOKS:
        rows[hook.place].append(hook)
    for place, found in rows.items():
        assert [h.order for h in found] == list(range(1, len(found) + 1)), place
        assert len({h.when for h in found}) == 1, (
            f"{place}: SGLang hooks a place once, so one occasion brings all of it"
        )
    twice = {place.rpartition(".")[2] for place, found in rows.items() if len(found) > 1}
    assert twice == {"add_one_req", "add_chunked_req", "on_idle"}


def test_of_two_bodies_the_first_in_order_is_outermost(monkeypatch):
    def body(name):
        return lambda original, said: original([*said, name])

    for name in ("outer", "inner", "alone"):
        monkeypatch.setitem(globals(), name, body(name))
    rows = (
        Hook("place", f"{__name__}:inner", When.CACHE, order=2),
        Hook("place", f"{__name__}:outer", When.CACHE, order=1),
        Hook("other", f"{__name__}:alone", When.CACHE),
        Hook("elsewhere", f"{__name__}:missing", When.LOAD),
    )
    monkeypatch.setattr(hooks, "HOOKS", rows)
    found = hooks.bodies(When.CACHE)
    assert found.keys() == {"place", "other"}
    assert found["place"](lambda said: said, []) == ["outer", "inner"]
    assert found["other"](lambda said: said, []) == ["alone"]


def test_the_queue_stands_before_reuse_and_audits():
    adder = "sglang.srt.managers.schedule_policy.PrefillAdder"
    for place in (
        f"{adder}.add_one_req",
        f"{adder}.add_chunked_req",
        "sglang.srt.managers.scheduler.Scheduler.on_idle",
    ):
        outer, inner = (h.body.split(":")[0].rpartition(".")[2] for h in HOOKS if h.place == place)
        assert outer == "queue_hooks" and inner in ("admission", "audit_hooks")


# ---- attributes ----

_S = "sglang.srt."
_REQ, _BATCH = _S + "managers.schedule_batch.Req", _S + "model_executor.forward_batch_info.ForwardBatch"
_RUNNING = _S + "managers.schedule_batch.ScheduleBatch"
_SERVER_ARGS = _S + "server_args.ServerArgs"
_SAMPLING = _S + "sampling.sampling_params.SamplingParams"
_TOKENIZER = _S + "managers.tokenizer_manager.TokenizerManager"
_RUNNER = _S + "model_executor.model_runner.ModelRunner"
_LORA = _S + "lora.lora_manager.LoRAManager"
_UPDATER = _S + "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_ASKED, _SENT = _S + "managers.io_struct.GenerateReqInput", _S + "managers.io_struct.TokenizedGenerateReqInput"
_CACHE = _S + "mem_cache.unified_radix_cache.UnifiedRadixCache"
_KV = _S + "mem_cache.memory_pool.MHATokenToKVPool"
_ALLOCATOR = _S + "mem_cache.allocator.base.BaseTokenToKVPoolAllocator"
_MODEL, _MODEL_CONFIG = _S + "models.llama.LlamaForCausalLM", _S + "configs.model_config.ModelConfig"
_ATTENTION = _S + "layers.radix_attention.RadixAttention"
_TREE = _S + "mem_cache.unified_cache.unified_tree_core_interface.UnifiedTreeCoreInterface"
_GROUP = _S + "distributed.parallel_state.GroupCoordinator"
# Last word of what an attribute is read of or written on -> classes of SGLang, by path, and others that the name stands
# for elsewhere.
BOUND = {
    "req": (_REQ,),
    "long": (_REQ,),
    "_long": (_REQ,),
    "kv": (_S + "managers.schedule_batch.ReqKvInfo",),
    "logprob": (_S + "managers.schedule_batch.ReqLogprob",),
    "sampling_params": (_SAMPLING,),
    "sampling": (_SAMPLING,),
    "params": (_SAMPLING, _S + "mem_cache.cache_init_params.CacheInitParams", dict),
    "time_stats": (_S + "observability.req_time_stats.ReqTimeStatsBase",),
    "context": (_S + "observability.trace.TraceReqContext",),
    "adder": (_S + "managers.schedule_policy.PrefillAdder",),
    "memory_budget": (_S + "mem_cache.prefill_budget.PrefillBudget",),
    "running_batch": (_RUNNING,),
    "last_batch": (_RUNNING,),
    "policy": (_S + "managers.schedule_policy.SchedulePolicy",),
    "scheduler": (_S + "managers.scheduler.Scheduler",),
    "weight_updater": (_UPDATER,),
    "streamer": (_S + "managers.scheduler_components.output_streamer.SchedulerOutputStreamer",),
    "recv_req": (_SENT, _S + "managers.io_struct.UnloadLoRAAdapterReqInput"),
    "allocator": (_ALLOCATOR,),
    "token_to_kv_pool_allocator": (_ALLOCATOR,),
    "cache": (_CACHE, KVShareRadixCache),
    "_cache": (_CACHE,),
    "tree_cache": (_CACHE, KVShareRadixCache),
    "tree_core": (_TREE,),
    "ctx": (_S + "mem_cache.registry.TreeCacheBuildContext",),
    "tp_worker": (_S + "managers.tp_worker.TpModelWorker",),
    "runner": (_RUNNER,),
    "model_runner": (_RUNNER,),
    "attn_backend": (_S + "layers.attention.base_attn_backend.AttentionBackend",),
    "req_to_token_pool": (_S + "mem_cache.memory_pool.ReqToTokenPool",),
    "token_to_kv_pool": (_KV,),
    "pool": (_KV,),
    "lora_manager": (_LORA,),
    "manager": (_TOKENIZER, _LORA, _UPDATER),
    "model_config": (_MODEL_CONFIG,),
    "model": (_MODEL, _MODEL_CONFIG, _S + "models.llama.LlamaModel", torch.nn.Module),
    "layer": (_ATTENTION, torch.nn.Linear),
    "module": (_ATTENTION, _S + "layers.linear.LinearBase", torch.nn.Linear, str),
    "m": (_ATTENTION, torch.nn.Module),
    "rotary": (_S + "layers.rotary_embedding.base.RotaryEmbedding",),
    "group": (_GROUP,),
    "ranks": (_GROUP,),
    "batch": (_BATCH, _RUNNING, batches.Batch),
    "view": (_BATCH, batches.View),
    "made": (_BATCH, batches.View),
    "forward": (_BATCH,),
    "forward_batch": (_BATCH,),
    "told": (_BATCH,),
    "forward_mode": (_S + "model_executor.forward_batch_info.ForwardMode",),
    "server_args": (_SERVER_ARGS,),
    "settings": (_SERVER_ARGS,),
    "cuda_graph_config": (_S + "model_executor.cuda_graph_config.CudaGraphConfig",),
    "prefill": (_S + "model_executor.cuda_graph_config.PhaseConfig",),
    "decode": (_S + "model_executor.cuda_graph_config.PhaseConfig",),
    "obj": (_ASKED,),
    "tokenized": (_SENT,),
}


def unlisted(source: str) -> tuple[set[str], set[str]]:
    """("name.attribute" that a source reads or writes of SGLang's objects, those of them that no seam lists)."""
    read = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            read.add((ast.unparse(node.value).rpartition(".")[2], node.attr))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            owner, name, *_ = node.args
            if isinstance(name, ast.Constant):
                read.add((ast.unparse(owner).rpartition(".")[2], name.value))
    read = {(owner, name) for owner, name in read if owner in BOUND}
    listed = {seam.path for seam in SEAMS} | {f"{s.path}.{n}" for s in SEAMS if s.kind == "members" for n in s.names}

    def known(owner: str, name: str) -> bool:
        return any(
            f"{cls}.{name}" in listed
            if isinstance(cls, str)
            else name in {*dir(cls), *getattr(cls, "__annotations__", ())}
            for cls in BOUND[owner]
        )

    return {".".join(pair) for pair in read}, {".".join(pair) for pair in read if not known(*pair)}


def scanned() -> list[Path]:
    """The files that meet SGLang's objects."""
    return [*(ROOT / "kvshare_sched/engine/sglang").rglob("*.py"), *(ROOT / "kvshare_sched/runtime").glob("*.py")]


def test_every_attribute_that_we_read_or_write_is_in_the_list():
    pairs = zip(*(unlisted(file.read_text()) for file in scanned()), strict=True)
    read, missing = (set().union(*found) for found in pairs)
    assert len(read) > 150
    assert not missing, f"{len(missing)} of {len(read)} attributes are in no seam: {', '.join(sorted(missing))}"


def test_an_attribute_that_is_not_listed_is_found():
    source = "req.rid, req.brand_new\nself.adder.fresh = 1\ngetattr(policy, 'odd', None)\nother.thing"
    assert unlisted(source)[1] == {"req.brand_new", "adder.fresh", "policy.odd"}


def test_what_a_hook_is_given_is_looked_at():
    """A parameter of a body is either scanned above, or nothing of its own is read of it."""
    plain = {"original", "args", "kwargs", "more", "rest", "cls", "key", "budget", "page_size", "has_chunked_req"}
    plain |= {"waiting_queue", "chunked_req", "recv_reqs", "reqs"}  # lists, and what is handed on
    plain |= {"meta_info", "customized_info", "index", "finish_reason", "state"}  # dictionaries; marks of ours
    plain |= {"handler", "request", "ret", "created", "app"}  # web handlers
    plain |= {"tokenizer_manager", "template_manager", "port_args", "scheduler_infos"}
    for hook in HOOKS:
        given = set(inspect.signature(pkgutil.resolve_name(hook.body)).parameters)
        assert given <= plain | BOUND.keys(), hook.body


def test_attributes_are_found_where_a_method_assigns_them():
    from sglang.srt.managers.schedule_policy import PrefillAdder

    seam = Seam("sglang.srt.managers.schedule_policy.PrefillAdder", ("rem_chunk_tokens", "no_such_thing"), "members")
    assert not hasattr(PrefillAdder, "rem_chunk_tokens")
    assert seam.problem().endswith("PrefillAdder: without no_such_thing")


def test_a_missing_seam_is_told_readably():
    assert "not found" in Seam("sglang.srt.no_such_module.thing").problem()
    assert "without no_such_parameter" in Seam("sglang.srt.plugins.load_plugins", ("no_such_parameter",)).problem()


def test_the_scheduler_waits_for_whole_prefill_passes():
    """Requests' tables of slots are read until a reuse batch ends; a backend that lets the scheduler write them as soon
    as its own plan is made must not be accepted. Their source is read, since FA3's cannot be imported without a GPU."""
    from sglang.srt.layers.attention import base_attn_backend
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    ends = base_attn_backend.AttentionBackend.shared_read_ends(None, ForwardMode.EXTEND)
    assert ends is base_attn_backend.SharedReadEnds.UNKNOWN
    files = {"fa3": "flashattention_backend", "flashinfer": "flashinfer_backend", "triton": "triton_backend"}
    assert set(support._GPU_BACKENDS) == set(files)
    for file in files.values():
        tree = ast.parse(Path(base_attn_backend.__file__).with_name(f"{file}.py").read_text())
        defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert "init_forward_metadata" in defined
        assert not defined & {"shared_read_ends", "_snapshot_prefill_shared_reads", "resolve_prefill_shared_read_ends"}


def test_another_sglang_version_is_refused_by_name(monkeypatch):
    assert support.version_refusal() is None
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.5.24")
    line = support.version_refusal()
    assert "0.5.24" in line and support.SGLANG_VERSION in line and "Install" in line


@pytest.mark.parametrize("version", [support.SGLANG_VERSION, "0.5.24"])
def test_doctor_tells_every_place_that_breaks_line_by_line(version, monkeypatch, capsys):
    from sglang.srt.distributed.parallel_state import GroupCoordinator
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    monkeypatch.delattr(GroupCoordinator, "broadcast_object")
    monkeypatch.delattr(Req, "output_ids_through_stop")
    monkeypatch.delattr(ForwardMode, "is_decode")
    assigned = seams._assigned
    monkeypatch.setattr(seams, "_assigned", lambda cls: assigned(cls) - {"rem_chunk_tokens"})
    monkeypatch.setattr(support.importlib.metadata, "version", lambda name: version)
    monkeypatch.setattr(doctor, "_server", lambda arguments: pytest.fail("nothing is started"))
    assert doctor.examine([]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("REFUSED")]
    if version != support.SGLANG_VERSION:
        assert version in lines.pop(0)
    assert len(lines) == len(seams.problems()) >= 4 and not any(version in line for line in lines)
    for name in ("broadcast_object", "output_ids_through_stop", "is_decode", "rem_chunk_tokens"):
        assert any(name in line for line in lines)


def test_doctor_tells_of_another_version_that_has_all_we_need(monkeypatch, capsys):
    monkeypatch.setattr(support.importlib.metadata, "version", lambda name: "0.5.24")
    monkeypatch.setattr(doctor, "_server", lambda arguments: [support.version_refusal()])
    assert doctor.examine([]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("REFUSED"))
    assert "0.5.24" in line


def test_every_setting_we_refuse_is_one_of_sglangs_and_its_default_is_not_refused():
    """A setting that SGLang renames would be let in without a word."""
    from sglang.srt.server_args import ServerArgs

    defaults = ServerArgs(model_path="none")
    for name, (fine, _) in (support.SETTINGS | support.TENANT_SETTINGS).items():
        value = getattr(defaults, name)
        assert value is None or value in (fine if isinstance(fine, tuple) else (fine,)), f"{name}={value}"


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({"KVSHARE_STRATEGY": "cachblend"}, ("cachblend", "cacheblend", "KVSHARE_STRATEGY")),
        ({"KVSHARE_RATIO": "1.5"}, ("1.5", "0.0 <= ratio <= 1.0")),
        ({"KVSHARE_WINDOWS": "3"}, ("KVSHARE_WINDOWS", "window")),
    ],
)
def test_wrong_configuration_is_one_line(environment, named, monkeypatch):
    """What the launcher then prints is in e2e/test_untouched.py."""
    from sglang.srt.arg_groups import model_override_base

    monkeypatch.setattr(model_override_base, "resolved_view", lambda args: args)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        support.check_server_args(lambda args: None, SimpleNamespace(radix_cache_backend="kvshare"))
    (line,) = str(ended.value).splitlines()
    assert line.startswith("kvshare: ") and all(word in line for word in named)


def test_entry_points_are_installed():
    groups = {
        g: {e.name for e in importlib.metadata.entry_points(group=g)}
        for g in ("sglang.srt.plugins", "sglang.srt.platforms")
    }
    assert {"kvshare", "kvshare_cpu"} <= groups["sglang.srt.plugins"]
    assert "kvshare_cpu" in groups["sglang.srt.platforms"]


def test_kernels_is_still_somebody_elses_name():
    assert not (ROOT / "kernels" / "__init__.py").exists()
