"""`kvshare bench`: which traces, against which servers; then the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.loadtest import compare, report, traces, workloads
from kvshare_sched.loadtest.statistics import Slo
from kvshare_sched.loadtest.traces import Trace


def run(
    *,
    url: str | None,
    setups: Sequence[str],
    names: Sequence[str],
    requests: int | None,
    arrivals: str,
    rate: float | None,
    loads: Sequence[float],
    seconds: float,
    repeats: int,
    sockets: int,
    slo: Slo,
    model_path: str | None,
    out: str,
    server_arguments: Sequence[str],
) -> int:
    """Measure and write `raw/`, `report.json`, `report.md` and the pictures into `out`; returns the exit code.

    url: a server that is running, else `setups` are started one after the other (`compare.setup`). names: workloads
    or trace files. An interruption reports what was measured. Raises ConfigError for what does not exist, SetupError
    when a server does not come up.
    """
    if url and server_arguments:
        raise ConfigError(f"{' '.join(server_arguments)}: not known, and a server that is running takes no arguments.")
    chosen, folder = [load_trace(name, requests, arrivals) for name in names], Path(out)
    try:
        if url:
            compare.against(url.rstrip("/"), chosen, rate=rate, sockets=sockets, slo=slo, out=folder)
        else:
            compare.compare(
                setups,
                chosen,
                loads=loads,
                seconds=seconds,
                repeats=repeats,
                sockets=sockets,
                slo=slo,
                out=folder,
                model_path=model_path,
                server_arguments=server_arguments,
            )
    finally:
        if any((folder / "raw").glob("*.jsonl")):
            print(report.write_all(folder))
    return 0


def load_trace(name: str, requests: int | None, arrivals: str) -> Trace:
    """A workload of that name, drawn anew, or a trace file."""
    if name in workloads.WORKLOADS:
        return workloads.build(name, requests or workloads.REQUESTS, arrivals=arrivals)
    return traces.read(name, requests)
