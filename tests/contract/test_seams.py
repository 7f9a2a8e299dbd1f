"""SGLang as we know it: every seam, the version, and who imports whom. Look here first after an upgrade."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvshare_sched.engine.sglang import support
from kvshare_sched.engine.sglang.seams import SEAMS, Seam

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.path.removeprefix("sglang.srt."))
def test_seam(seam):
    assert seam.problem() is None


def test_every_place_that_is_hooked_or_overridden_is_in_the_list():
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from kvshare_sched.engine.sglang import admission, audit_hooks, http_pages, http_reports, queue_hooks
    from kvshare_sched.engine.sglang import http_identity as tenant_hooks
    from kvshare_sched.engine.sglang.cache import KVShareRadixCache
    from kvshare_sched.tenants import seal

    ours = (audit_hooks, http_reports, seal, http_pages, queue_hooks, support, tenant_hooks)
    places = set().union(admission.scheduler_hooks(), *(module.hooks() for module in ours))
    overridden = {name for name in vars(KVShareRadixCache).keys() & vars(UnifiedRadixCache) if name[0] != "_"}
    assert len(places) >= 30 and len(overridden) > 3
    places |= {f"sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache.{name}" for name in overridden}
    assert places - {seam.path for seam in SEAMS} == set()


def test_the_scheduler_has_what_we_read_of_it():
    """Attributes of an instance, so no seam can name them."""
    from sglang.srt.managers.scheduler import Scheduler

    stored = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(Scheduler)))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self"
    }
    in_the_engine = {"waiting_queue", "last_batch", "weight_updater"}
    what_fits = {"tree_cache", "token_to_kv_pool_allocator", "page_size", "max_req_input_len"}
    assert (in_the_engine | what_fits) - stored == set()


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


def test_every_setting_we_refuse_is_one_of_sglangs_and_its_default_is_not_refused():
    """A setting that SGLang renames would be let in without a word."""
    from sglang.srt.server_args import ServerArgs

    defaults = ServerArgs(model_path="none")
    for name, (fine, _) in (support._SETTINGS | support._TENANT_SETTINGS).items():
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
