"""`kvshare bench`: which traces, against which servers; then the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.loadtest import compare, counts, report, traces, workloads
from kvshare_sched.loadtest.statistics import Slo
from kvshare_sched.loadtest.traces import Trace

SHORTEST_TURN_S = 1.0  # some passes; in less an engine hardly gets going


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
    interleave_s: float | None,
    sockets: int,
    slo: Slo,
    check_counts: bool,
    model_path: str | None,
    out: str,
    server_arguments: Sequence[str],
) -> int:
    """Measure and write `raw/`, `report.json`, `report.md` and the pictures into `out`; returns the exit code.

    url: a server that is running, else `setups` are started one after the other (`compare.setup`), or all of them
    to take turns of `interleave_s`. names: workloads or trace files. rate: requests a second; without it the pace
    of the trace, or `loads`. An interruption reports what was measured. check_counts: with a `url`, the exit code
    is 1 unless the prompt tokens sent, those the answers report and those on /metrics are the same. Raises
    ConfigError for what does not exist, SetupError when a server does not come up.
    """
    if check_counts and not url:
        raise ConfigError("--check-counts needs --url: the counts compared are those of one server that is running.")
    if url and server_arguments:
        raise ConfigError(f"{' '.join(server_arguments)}: not known, and a server that is running takes no arguments.")
    if len(set(setups)) < len(setups):
        raise ConfigError(f"--compare {','.join(setups)}: the same name twice; their files would overwrite each other.")
    if interleave_s is not None and (url or len(setups) < 2 or not interleave_s >= SHORTEST_TURN_S):
        against = "--url" if url else f"--compare {','.join(setups)}"
        raise ConfigError(
            f"--interleave {interleave_s:g} with {against}: two or more set-ups take turns of "
            f"{SHORTEST_TURN_S:g} second or longer."
        )
    chosen, folder = [load_trace(name, requests, arrivals) for name in names], Path(out)
    found: dict[str, dict] = {}
    try:
        if url:
            found = compare.against(url.rstrip("/"), chosen, rate=rate, sockets=sockets, slo=slo, out=folder)
        else:
            compare.compare(
                setups,
                chosen,
                rate=rate,
                loads=[1.0] if rate else loads,
                seconds=seconds,
                repeats=repeats,
                interleave_s=interleave_s,
                sockets=sockets,
                slo=slo,
                out=folder,
                model_path=model_path,
                server_arguments=server_arguments,
            )
    finally:
        if any((folder / "raw").glob("*.jsonl")):
            print(report.write_all(folder))
    for name, sources in found.items():
        print(counts.line(name, sources))
    return int(check_counts and not all(map(counts.agree, found.values())))


def load_trace(name: str, requests: int | None, arrivals: str) -> Trace:
    """A workload of that name, drawn anew, or a trace file."""
    if name in workloads.WORKLOADS:
        return workloads.build(name, requests or workloads.REQUESTS, arrivals=arrivals)
    return traces.read(name, requests)
