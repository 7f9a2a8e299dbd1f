"""SGLang as we know it: every seam, the version, and who imports whom. Look here first after an upgrade."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvshare_sched import support
from kvshare_sched.seams import SEAMS, Seam

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"kvshare_sched": ROOT / "kvshare_sched", "radix_ext": ROOT / "radix_ext"}
PACKAGES["kvshare_kernels"] = ROOT / "kernels" / "kvshare_kernels"

# Layer of each module, low to high; a module may import only what is lower or equal. (style: arrows point down)
LAYERS = (
    {"kvshare_sched.errors", "kvshare_sched", "radix_ext"},
    {"kvshare_sched.types"},
    {"kvshare_kernels"},
    {"radix_ext.hashing", "kvshare_sched.config", "kvshare_sched.strategies", "kvshare_sched.tenants.namespaces"},
    {"kvshare_sched.tenants.file"},
    {"kvshare_sched.tenants.identity", "kvshare_sched.tenants.quotas", "kvshare_sched.tenants.reload"},
    {"kvshare_sched.tenants.policy"},
    {"kvshare_sched.tenants.gate"},
    {
        "kvshare_sched.tenants.hold",
        "kvshare_sched.tenants.log",
        "kvshare_sched.tenants.stamping",
        "kvshare_sched.tenants.library",
    },
    {"kvshare_sched.tenants.desk", "kvshare_sched.tenants.edge"},
    {"kvshare_sched.tenants.librarian"},
    {"kvshare_sched.tenants.admin"},
    {"kvshare_sched.tenants.hooks"},
    {"radix_ext.segment_index", "radix_ext.matcher", "kvshare_sched.strategies.base"},
    {
        "radix_ext.donors",
        "kvshare_sched.planner",
        "kvshare_sched.series",
        "kvshare_sched.metrics",
        "kvshare_sched.controller",
        "kvshare_sched.divergence",
    },
    {"kvshare_sched.audit", "kvshare_sched.tenants.told"},
    {"kvshare_sched.scheduling.order", "kvshare_sched.scheduling.fairness", "kvshare_sched.scheduling.duplicates"},
    {"kvshare_sched.scheduling.table", "kvshare_sched.scheduling.estimate"},
    {"kvshare_sched.scheduling.queue"},
    {"kvshare_sched.simulator.profile", "kvshare_sched.simulator.traffic"},
    {"kvshare_sched.simulator.cache"},
    {"kvshare_sched.simulator.engine"},
    {"kvshare_sched.simulator.report"},
    {"kvshare_sched.strategies.blend", "kvshare_sched.strategies.consensus", "kvshare_sched.strategies.controls"},
    {"kvshare_sched.repair"},
    {"kvshare_sched.session", "kvshare_sched.lending"},
    {"kvshare_sched.pipeline"},
    {"kvshare_sched.peek"},
    {"kvshare_sched.evidence", "kvshare_sched.adapters"},
    {"kvshare_sched.decode_repair", "kvshare_sched.assembly", "kvshare_sched.gpu.attention"},
    {
        "kvshare_sched.executor",
        "kvshare_sched.support",
        "kvshare_sched.explain",
        "kvshare_sched.tracing",
        "kvshare_sched.recent",
        "kvshare_sched.live",
        "kvshare_sched.show",
    },
    {"kvshare_sched.pages"},
    {"kvshare_sched.client_report"},
    {"kvshare_sched.sglang_adapter", "kvshare_sched.audit_adapter"},
    {"kvshare_sched.server_queue"},
    {"kvshare_sched.queue_adapter"},
    {"kvshare_sched.wiring"},
    {"radix_ext.backend"},
    {"kvshare_sched.plugin", "kvshare_sched.cpu"},
)
# Only these may name SGLang.
TOUCHES_SGLANG = {
    "kvshare_sched.plugin",
    "kvshare_sched.tenants.hooks",
    "kvshare_sched.tenants.librarian",
    "kvshare_sched.sglang_adapter",
    "kvshare_sched.audit_adapter",
    "kvshare_sched.queue_adapter",
    "kvshare_sched.server_queue",
    "kvshare_sched.wiring",
    "kvshare_sched.executor",
    "kvshare_sched.decode_repair",
    "kvshare_sched.evidence",
    "kvshare_sched.support",
    "kvshare_sched.pages",
    "kvshare_sched.seams",
    "kvshare_sched.doctor",
    "kvshare_sched.demo",
    "kvshare_sched.evaluation.forced",
    "kvshare_sched.cpu",
    "kvshare_sched.cpu.platform",
    "kvshare_sched.cpu.attention",
    "kvshare_sched.cpu.products",
    "kvshare_sched.cpu.pinning",
    "kvshare_sched.gpu.attention",
    "radix_ext.backend",
    "radix_ext.donors",
}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


def imports_of(path: Path, *, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else ast.walk(tree)
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("seam", SEAMS, ids=lambda s: s.path.removeprefix("sglang.srt."))
def test_seam(seam):
    assert seam.problem() is None


def test_every_place_that_is_hooked_or_overridden_is_in_the_list():
    from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

    from kvshare_sched import audit_adapter, client_report, pages, queue_adapter, sglang_adapter
    from kvshare_sched.tenants import gate
    from kvshare_sched.tenants import hooks as tenant_hooks
    from radix_ext.backend import KVShareRadixCache

    ours = (audit_adapter, client_report, gate, pages, queue_adapter, support, tenant_hooks)
    places = set().union(sglang_adapter.scheduler_hooks(), *(module.hooks() for module in ours))
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


def test_imports_point_down():
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    for module, path in modules().items():
        if module not in rank:
            continue
        for name in imports_of(path, top_level_only=True):
            target = name if name in rank else name.rsplit(".", 1)[0]
            if target in rank and target != module:
                assert rank[target] <= rank[module], f"{module} imports {name}, which is above it"


def test_few_modules_touch_sglang():
    for module, path in modules().items():
        named = {n for n in imports_of(path, top_level_only=False) if n.split(".")[0] == "sglang"}
        assert not named or module in TOUCHES_SGLANG, f"{module} imports {sorted(named)}"


def test_importing_the_packages_is_instant():
    code = (
        "import sys, kvshare_sched, kvshare_sched.config, kvshare_sched.simulator.report; "  # the queue comes with it
        "sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
