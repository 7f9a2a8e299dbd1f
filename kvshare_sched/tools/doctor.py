"""`kvshare doctor`: what is installed, which seams match, what would be refused and why."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

from kvshare_sched import __version__
from kvshare_sched.errors import ConfigError
from kvshare_sched.settings import KVShareConfig


def examine(arguments: list[str]) -> int:
    """Print the findings; returns the exit code, 0 when a server with these SGLang arguments would start.

    Without `--model-path` the embedded model stands in when it has been prepared.
    """
    trouble: list[str] = []
    _installed()
    try:
        _line("configuration", KVShareConfig.load().describe())
    except ConfigError as problem:
        trouble.append(str(problem))
    trouble += _seams()
    other_version = _version()
    if not trouble:
        trouble += _server(arguments)
    trouble = list(dict.fromkeys([*other_version, *trouble]))
    for line in trouble:
        print(f"REFUSED  {line}")
    print("doctor: " + (f"{len(trouble)} problem(s)" if trouble else "ready to serve"))
    return 1 if trouble else 0


def _line(what: str, found: str) -> None:
    print(f"{what + ':':<15} {found}")


def _installed() -> None:
    from kvshare_sched.client.device import has_nvidia_gpu

    _line("kvshare-sched", f"{__version__}, Python {platform.python_version()}")
    for name in ("sglang", "torch", "numpy", "prometheus-client", "flashinfer-python"):
        try:
            _line(name, importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            _line(name, "not installed")
    _line("device", "NVIDIA GPU" if has_nvidia_gpu() else "CPU (platform kvshare_cpu)")


def _version() -> list[str]:
    """A line when another SGLang is installed than the one we know."""
    try:
        from kvshare_sched.engine.sglang.support import version_refusal
    except ImportError:  # told with the seams
        return []
    return [line] if (line := version_refusal()) else []


def _seams() -> list[str]:
    """A line for every place that this SGLang, whatever its version, does not have as we use it."""
    try:
        from kvshare_sched.engine.sglang.seams import SEAMS, problems

        found = problems()
    except ImportError as error:
        return [f"SGLang cannot be imported: {error}. Run `make setup`."]
    _line("seams", f"{len(SEAMS) - len(found)} of {len(SEAMS)} match")
    return found


def _server(arguments: list[str]) -> list[str]:
    """What the launcher would say to these arguments."""
    from kvshare_sched.client import launch, model
    from kvshare_sched.engine.sglang.support import refusals, server_args_of

    arguments = launch.fill_defaults(arguments)
    if "--model-path" not in arguments:
        if not (model.model_path() / "config.json").exists():
            _line("model", "none named (--model-path) and the embedded one is not prepared (`kvshare model`)")
            return []
        arguments += ["--model-path", str(model.model_path())]
    try:
        server_args = server_args_of(arguments)
    except SystemExit:
        return [f"SGLang does not accept the arguments: {' '.join(arguments)}"]
    except Exception as error:
        return [f"SGLang does not accept the arguments: {error}"]
    _line("model", server_args.model_path)
    sys.stdout.flush()
    return refusals(server_args)
