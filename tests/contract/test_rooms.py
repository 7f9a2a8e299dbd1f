"""The structure of the code: who imports whom, where SGLang is touched, and how large things may get."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from kvshare_sched.methods.registry import names

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {
    "kvshare_kernels": ROOT / "kernels" / "kvshare_kernels",
    "radix_ext": ROOT / "radix_ext",
    "kvshare_sched": ROOT / "kvshare_sched",
}
# A module belongs to the longest name that it begins with, and imports from its own line and earlier ones only.
FLOORS = (
    "kvshare_kernels",
    "radix_ext",
    "kvshare_sched",  # the package itself: a version, no imports
    "kvshare_sched.errors",
    "kvshare_sched.methods",
    "kvshare_sched.settings",
    "kvshare_sched.records",
    "kvshare_sched.scheduling",
    "kvshare_sched.tenants",
    "kvshare_sched.quality",
    "kvshare_sched.observe",
    "kvshare_sched.reuse",
    "kvshare_sched.runtime",
    "kvshare_sched.client",
    "kvshare_sched.engine.sglang",
    "kvshare_sched.plugin",
    "kvshare_sched.evaluation",
    "kvshare_sched.loadtest",
    "kvshare_sched.simulator",
    "kvshare_sched.tools",
)
ENGINES = {"sglang": "kvshare_sched.engine.sglang"}


def modules() -> dict[str, Path]:
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join((package, *(p for p in parts if p != "__init__")))] = path
    return found


MODULES = modules()


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, anywhere in it; `from a import b` names a.b where that is a module of ours."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                names.add(whole if whole in MODULES else node.module)
    return names


IMPORTS = {module: imports_of(path) for module, path in MODULES.items()}


def floor_of(module: str) -> int:
    """Raises ValueError for a module that is on no floor."""
    if module == "kvshare_sched":
        return FLOORS.index(module)
    names = [f for f in FLOORS if f != "kvshare_sched" and (module == f or module.startswith(f + "."))]
    if module == "kvshare_sched.engine":
        names = ["kvshare_sched.engine.sglang"]
    if not names:
        raise ValueError(f"{module} is on no floor: put it into a folder of FLOORS, or add one")
    return FLOORS.index(max(names, key=len))


def test_every_module_is_on_a_floor():
    assert all(floor_of(module) >= 0 for module in MODULES)
    with pytest.raises(ValueError, match="on no floor"):
        floor_of("kvshare_sched.elsewhere")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    ours = [name for name in IMPORTS[module] if name in MODULES]
    upward = sorted(name for name in ours if floor_of(name) > floor_of(module))
    assert not upward, f"{module} imports {upward}, from a floor above it"


def test_no_module_imports_itself_by_way_of_others():
    left = {m: {n for n in names if n in MODULES and n != m} for m, names in IMPORTS.items()}
    while free := [m for m, names in left.items() if not names & left.keys()]:
        for module in free:
            del left[module]
    assert not left, f"import circles among {sorted(left)}"


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_is_imported_in_its_room_only(engine):
    touching = {m for m, names in IMPORTS.items() if any(n.split(".")[0] == engine for n in names)}
    assert {m for m in touching if not m.startswith(ENGINES[engine])} <= OUTSIDE
    assert len(touching) > 5


# SGLang's entry point registers names with it.
OUTSIDE = {"kvshare_sched.plugin"}


def test_importing_the_packages_is_instant():
    code = (
        "import sys, kvshare_sched, kvshare_sched.settings, kvshare_sched.simulator.report; "  # the queue comes with it
        "sys.exit('torch' in sys.modules or 'sglang' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- words and sizes ----

METHOD_NAMES = set(names())
FUNCTION, PARAMETERS, MODULE, SIBLINGS = 60, 7, 400, 20  # lines, count, lines, count
KERNELS_WITH_MANY_POINTERS = "kernels/kvshare_kernels/triton_"
# Larger than that today, and not to grow: name -> lines or parameters.
LARGE = {
    "kvshare_sched.engine.sglang.waiting_queue": 415,
    "kvshare_sched.loadtest.run.run": 65,
    "kvshare_sched.tenants.file.parse": 64,
}
MANY_PARAMETERS = {
    "kvshare_sched.loadtest.run.run": 16,
    "kvshare_sched.loadtest.compare.compare": 12,
    "kvshare_sched.evaluation.run.run": 9,
}


def functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_no_module_outside_methods_compares_the_name_of_one():
    for module, path in MODULES.items():
        if module.startswith(
            ("kvshare_sched.methods", "kvshare_sched.evaluation")
        ):  # an evaluation is asked for by name
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                compared = {c.value for c in ast.walk(node) if isinstance(c, ast.Constant) and isinstance(c.value, str)}
                assert not compared & METHOD_NAMES, f"{module}:{node.lineno} compares {compared & METHOD_NAMES}"


def test_the_runtime_assigns_nothing_to_a_session():
    for module, path in MODULES.items():
        if not module.startswith(
            ("kvshare_sched.runtime", "kvshare_sched.methods", "kvshare_sched.engine.sglang.batches")
        ):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                owner = ast.unparse(node.value)
                assert owner.rsplit(".", 1)[-1] != "session", f"{module}:{node.lineno} assigns to {owner}.{node.attr}"


@pytest.mark.parametrize("module", MODULES)
def test_sizes(module):
    path = MODULES[module]
    lines = len(path.read_text().splitlines())
    assert lines <= LARGE.get(module, MODULE), f"{module} has {lines} lines"
    for node in functions(path):
        length = node.end_lineno - node.lineno + 1
        name = f"{module}.{node.name}"
        assert length <= LARGE.get(name, FUNCTION), f"{name} has {length} lines"
        if str(path.relative_to(ROOT)).startswith(KERNELS_WITH_MANY_POINTERS):
            continue
        args = node.args
        count = sum(a.arg not in ("self", "cls") for a in (*args.posonlyargs, *args.args, *args.kwonlyargs))
        assert count <= MANY_PARAMETERS.get(name, PARAMETERS), f"{name} has {count} parameters"


def test_folders_are_small():
    folders = {path.parent for path in MODULES.values()}
    for folder in folders:
        modules_in = [p for p in folder.glob("*.py") if p.name != "__init__.py"]
        assert len(modules_in) <= SIBLINGS, f"{folder} has {len(modules_in)} modules"
