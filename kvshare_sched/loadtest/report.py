"""`raw/` -> `report.json`, `report.md` and one picture a workload. Needs no server: raw rows may be read again."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvshare_sched.errors import ConfigError
from kvshare_sched.evaluation.report import cell, table, write_json
from kvshare_sched.loadtest import pictures
from kvshare_sched.loadtest.runner import read_rows
from kvshare_sched.loadtest.statistics import Slo, agreement, answered, figures, origins, throughput_ratio, ttft_ratio


@dataclass(frozen=True, slots=True)
class Run:
    """One trace, at one load, on one set-up."""

    setup: str
    workload: str
    load: float | None  # in capacities of the first set-up; None: the trace's own pace on a server given by URL
    repeat: int
    rows: list[dict]
    waits: dict | None = None  # tenant -> `counts.longest_waits`


def write_all(folder: Path) -> str:
    """All files out of `folder/raw`; returns what to print. Raises ConfigError when there is nothing to read."""
    try:
        settings = json.loads((folder / "raw" / "settings.json").read_text())
        found = [read_rows(path) for path in sorted((folder / "raw").glob("*.jsonl"))]
        runs = [Run(**about, rows=rows) for about, rows in found]
    except (OSError, ValueError, TypeError) as problem:
        raise ConfigError(
            f"{folder}/raw cannot be read ({problem}); expected what `kvshare bench` left there."
        ) from None
    if not runs:
        raise ConfigError(f"{folder}/raw holds no run; let `kvshare bench` finish at least one.")
    result = assemble(settings, runs)
    write_json(folder, result)
    text = markdown(result)
    (folder / "report.md").write_text(text)
    for workload in result["workloads"]:
        pictures.draw(workload, [r for r in runs if r.workload == workload], folder / f"{workload}.png")
    return f"{text}\nwritten: {folder}/report.json, report.md, pictures"


def assemble(settings: dict, runs: Sequence[Run]) -> dict:
    """The content of `report.json`; `summary` compares the last set-up with the first, workload by workload."""
    slo = Slo(**settings["slo"])
    order = list(settings.get("setups", ())) or ["server"]
    runs = sorted(runs, key=lambda r: (r.workload, r.load or 0, order.index(r.setup), r.repeat))
    measured = [
        {
            **{"setup": r.setup, "workload": r.workload, "load": r.load, "repeat": r.repeat, "waits": r.waits or {}},
            **figures(r.rows, slo),
        }
        for r in runs
    ]
    names = list(dict.fromkeys(r.workload for r in runs))
    comparisons = {
        workload: {
            name: _comparison([r for r in runs if r.workload == workload], order[0], name, settings)
            for name in order[1:]
            if _complete(settings, {(r.setup, r.load) for r in runs if r.workload == workload}, (order[0], name))
        }
        for workload in names
    }
    return {
        "settings": settings,
        "summary": {w: found[order[-1]] for w, found in comparisons.items() if order[-1] in found},
        "comparisons": comparisons,
        "workloads": names,
        "runs": measured,
    }


def _complete(settings: dict, present: set[tuple[str, float]], setups: tuple[str, str]) -> bool:
    """Nothing was interrupted before both had run at the loads that are compared."""
    return all((name, load) in present for name in setups for load in settings["loads"])


def _comparison(runs: Sequence[Run], base: str, other: str, settings: dict) -> dict:
    """`other` against `base` on one workload: TTFT at the lowest load, throughput at the highest."""
    low, high = min(settings["loads"]), max(settings["loads"])

    def pairs(load: float) -> list[tuple[list[dict], list[dict]]]:
        by_repeat = {(r.setup, r.repeat): r.rows for r in runs if r.load == load}
        repeats = sorted(repeat for name, repeat in by_repeat if name == other and (base, repeat) in by_repeat)
        return [(by_repeat[base, i], by_repeat[other, i]) for i in repeats]

    slo = Slo(**settings["slo"])
    at_low = [(figures(a, slo), figures(b, slo)) for a, b in pairs(low)]
    everything = [*pairs(low), *pairs(high)]
    reuse = [origins([row for pair in everything for row in answered(pair[side])]) for side in (0, 1)]
    ttft = [ttft_ratio(a, b) for a, b in pairs(low)]
    throughput = [throughput_ratio(a, b) for a, b in pairs(high)]
    return {
        "ttft_mean_ratio": _mean(t["value"] for t in ttft),
        "ttft_mean_ratio_interval": _interval(ttft),
        "throughput_ratio": _mean(throughput),
        "throughput_ratio_range": [min(throughput), max(throughput)],
        "repeats": len(ttft),
        "reused_share": reuse[1]["reused_share"],
        "exact_share": reuse[1]["exact_share"],
        "exact_share_of_base": reuse[0]["exact_share"],
        "ttft_mean_s": {n: _mean(f[i]["ttft_s"]["mean"] for f in at_low) for i, n in ((0, base), (1, other))},
        "ttft_p95_s": {n: _mean(f[i]["ttft_s"]["p95"] for f in at_low) for i, n in ((0, base), (1, other))},
        "base_capacity_rps": settings["capacity_rps"].get(runs[0].workload),
        "loads": {"ttft": low, "throughput": high},
        "quality": {
            **agreement(everything),
            **_without_prompts(settings["quality"].get(runs[0].workload, {}).get(other)),
        },
    }


def _interval(found: Sequence[dict]) -> list[float]:
    """Of one run its bootstrap interval, of several the range of their values."""
    if len(found) == 1:
        return [found[0]["low"], found[0]["high"]]
    values = [f["value"] for f in found]
    return [min(values), max(values)]


def _without_prompts(measured: dict | None) -> dict:
    return {("kl_prompts" if k == "prompts" else k): v for k, v in (measured or {}).items()}


def _mean(values) -> float:
    return round(statistics.fmean(values), 4)


# ---- words ----


def markdown(result: dict) -> str:
    """`report.md`: what was compared, the ratios, every run."""
    settings = result["settings"]
    parts = [f"# Load test: {settings['model']}"]
    if result["summary"]:
        parts += [_introduction(settings), "## Ratios", _ratios(result), _NOTES]
    parts += ["## Runs", _runs(result["runs"]), "## Tenants", _tenants(result["runs"]), _COLUMNS]
    errors = [f"- {r['setup']} {r['workload']}: {e}" for r in result["runs"] for e in r["errors"]]
    if errors:
        parts += ["## Errors", "\n".join(errors)]
    return "\n\n".join(parts) + "\n"


def _introduction(settings: dict) -> str:
    lines = [f"- `{name}`: `{' '.join(s['arguments'])}`" for name, s in settings["setups"].items()]
    base = next(iter(settings["setups"]))
    capacity = ", ".join(f"{w} {rate:.3f}" for w, rate in settings["capacity_rps"].items())
    pace = (
        f"All are offered {rate:g} requests a second, of which `{base}` completed so many: {capacity}. "
        if (rate := settings.get("rate"))
        else f"Load 1 is what `{base}` completes when swamped (requests a second: {capacity}); the highest load is a "
        "multiple of what it completed of the warm-up, sent at once. "
    )
    turns = settings.get("interleave_s")
    how = f"in turns of {turns:g} s while the others are halted," if turns else "one after the other"
    return (
        f"Set-ups, {how} on the same traces ({settings['machine']}):\n\n" + "\n".join(lines) + "\n\n"
        f"{pace}Arrivals are open loop, {settings['sockets']} sockets, the cache is warm, and warm-up requests do not "
        "count."
    )


def _ratios(result: dict) -> str:
    head = ("workload", "set-up", "TTFT, first / this", "throughput, this / first", "reused", "exact", "exact of first")
    head += ("first token", "KL mean", "KL max")
    body = []
    for workload, found in result["comparisons"].items():
        for name, c in found.items():
            quality = c["quality"]
            body.append(
                (
                    workload,
                    name,
                    "{:.2f} ({:.2f} to {:.2f})".format(c["ttft_mean_ratio"], *c["ttft_mean_ratio_interval"]),
                    "{:.2f} ({:.2f} to {:.2f})".format(c["throughput_ratio"], *c["throughput_ratio_range"]),
                    *(f"{c[key]:.0%}" for key in ("reused_share", "exact_share", "exact_share_of_base")),
                    cell(quality["first_token_agreement"], "{:.0%}"),
                    cell(quality.get("kl_mean"), "{:.4f}"),
                    cell(quality.get("kl_max"), "{:.4f}"),
                )
            )
    return table(head, body)


_NOTES = (
    "TTFT: ratio of the means at the lowest load. Throughput: completed requests over makespan at the highest load. "
    "In brackets the range over the repeats; of a single run, for TTFT, a 95 % block bootstrap over its requests: it "
    "does not contain what the machine does between runs that follow each other. Reused, exact: shares of the prompt "
    "tokens. First token: how often the first answer token is that of the first set-up, for prompts that were the same "
    "on both. KL: full prefill to the answer under reuse, nats, teacher forced over 16 tokens of full prefill's "
    "answer, on a few prompts after the run."
)
_COLUMNS = (
    "Times in seconds; TTFT and end to end count from when a request was due. Goodput: requests a second that met the "
    "SLO. Jain: over the tenants' service rates (tokens for each second in the system), 1 when all are equal. "
    "Waited: none of a tenant's requests waited for more, in tokens of service between arrival and start (the bound in "
    "kvshare_sched/scheduling/README.md is one in these tokens); only where our order is in force."
)


def _runs(runs: Sequence[dict]) -> str:
    head = ("workload", "load", "set-up", "answered", "offered /s", "done /s", "goodput /s")
    head += ("TTFT mean", "p50", "p95", "p99", "TPOT", "end to end", "reused", "exact", "Jain")
    body = []
    for r in runs:
        times = [f"{r['ttft_s'][k]:.2f}" for k in ("mean", "p50", "p95", "p99")]
        body.append(
            (
                r["workload"],
                cell(r["load"], "{:g}"),
                r["setup"],
                f"{r['answered']}/{r['requests']}",
                cell(r["offered_rps"], "{:.3f}"),
                f"{r['throughput_rps']:.3f}",
                f"{r['goodput_rps']:.3f}",
                *times,
                cell(r["tpot_s"] and r["tpot_s"]["mean"], "{:.3f}"),
                f"{r['end_to_end_s']['mean']:.2f}",
                f"{r['origins']['reused_share']:.0%}",
                f"{r['origins']['exact_share']:.0%}",
                f"{r['jain']:.3f}",
            )
        )
    return table(head, body)


def _tenants(runs: Sequence[dict]) -> str:
    head = ("workload", "load", "set-up", "tenant", "requests", "TTFT mean", "p95", "longest", "waited")
    head += ("tokens /s in system", "reused")
    body = [
        (
            r["workload"],
            cell(r["load"], "{:g}"),
            r["setup"],
            name,
            part["requests"],
            f"{part['ttft_s']['mean']:.2f}",
            f"{part['ttft_s']['p95']:.2f}",
            f"{part['ttft_s']['max']:.2f}",
            _waited(r["waits"], name),
            f"{part['service_rate']:.0f}",
            f"{part['origins']['reused_share']:.0%}",
        )
        for r in runs
        if r["repeat"] == 0
        for name, part in list(r["tenants"].items())[:10]
    ]
    return table(head, body)


def _waited(waits: dict, tenant: str) -> str:
    """At most so many tokens of service; nothing where our order is not in force."""
    if tenant not in waits:
        return ""
    return "more" if waits[tenant] is None else f"{waits[tenant]:g}"
