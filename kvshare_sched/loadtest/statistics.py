"""Rows of a run -> its figures, and what may be said about two runs of the same trace. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvshare_sched.errors import SetupError

RESAMPLES = 4_000
_BLOCK = 5  # neighbouring requests drawn together: they waited in the same queue
_SEED = 20260730


@dataclass(frozen=True, slots=True)
class Slo:
    """What a user puts up with."""

    ttft_s: float
    tpot_s: float

    def met(self, row: dict) -> bool:
        """Both limits hold for an answered request."""
        spent = tpot(row)
        return ttft(row) <= self.ttft_s and (spent is None or spent <= self.tpot_s)


def ttft(row: dict) -> float:
    """Seconds from when the request was due to its first token."""
    return row["token_s"][0] - row["due_s"]


def end_to_end(row: dict) -> float:
    """Seconds from when the request was due to its last token."""
    return row["token_s"][-1] - row["due_s"]


def tpot(row: dict) -> float | None:
    """Mean seconds between two tokens after the first; None for one token."""
    times = row["token_s"]
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def answered(rows: Sequence[dict]) -> list[dict]:
    """The rows with an answer."""
    return [r for r in rows if "error" not in r]


def jain(values: Sequence[float]) -> float:
    """Jain's index (sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything."""
    x = np.asarray(values, float)
    return float(x.sum() ** 2 / (len(x) * (x**2).sum())) if x.any() else 1.0


def figures(rows: Sequence[dict], slo: Slo) -> dict:
    """Everything about one run. Raises SetupError when no request was answered."""
    done = answered(rows)
    if not done:
        raise SetupError(f"none of {len(rows)} requests was answered; the first said: {rows[0]['error']}")
    makespan = makespan_s(done)
    good = sum(slo.met(r) for r in done)
    arrivals = max(r["due_s"] for r in rows) - min(r["due_s"] for r in rows)
    tenants = {name: [r for r in done if r["tenant"] == name] for name in sorted({r["tenant"] for r in done})}
    return {
        "requests": len(rows),
        "answered": len(done),
        "errors": sorted({r["error"] for r in rows if "error" in r})[:5],
        "offered_rps": _rounded((len(rows) - 1) / arrivals) if arrivals else None,
        "makespan_s": _rounded(makespan),
        "throughput_rps": _rounded(len(done) / makespan),
        "goodput_rps": _rounded(good / makespan),
        "slo": {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "met": _rounded(good / len(rows))},
        "ttft_s": spread([ttft(r) for r in done]),
        "tpot_s": spread([t for r in done if (t := tpot(r)) is not None]),
        "end_to_end_s": spread([end_to_end(r) for r in done]),
        "output_tokens": sum(len(r["token_s"]) for r in done),
        "origins": origins(done),
        "tenants": {
            name: {
                "requests": len(part),
                "ttft_s": spread([ttft(r) for r in part]),
                "service_rate": _rounded(service_rate(part)),
                "origins": origins(part),
            }
            for name, part in tenants.items()
        },
        "jain": _rounded(jain([service_rate(part) for part in tenants.values()])),
    }


def makespan_s(rows: Sequence[dict]) -> float:
    """First request due to last token."""
    return max(r["token_s"][-1] for r in rows) - min(r["due_s"] for r in rows)


def service_rate(rows: Sequence[dict]) -> float:
    """Prompt and output tokens a tenant got for each second one of its requests was in the system.

    Equal for tenants that are treated alike, however much each of them asks for.
    """
    tokens = sum(r["prompt_tokens"] + len(r["token_s"]) for r in rows)
    return tokens / sum(end_to_end(r) for r in rows)


def origins(rows: Sequence[dict]) -> dict:
    """Where the prompt tokens came from, and the share that was reused away from the prefix."""
    total = {k: sum(r[k] for r in rows) for k in ("exact", "reused", "recomputed", "fresh")}
    prompt = total["exact"] + total["reused"] + total["fresh"]
    return total | {
        "reused_share": _rounded(total["reused"] / prompt),
        "exact_share": _rounded(total["exact"] / prompt),
    }


def spread(values: Sequence[float]) -> dict | None:
    """Mean and percentiles; None for no value."""
    if not values:
        return None
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    found = {"mean": np.mean(values), "p50": p50, "p95": p95, "p99": p99, "max": max(values)}
    return {k: _rounded(v) for k, v in found.items()}


def _rounded(value: float) -> float:
    return round(float(value), 4)


# ---- two runs of the same requests ----


def ttft_ratio(base: Sequence[dict], other: Sequence[dict]) -> dict:
    """Mean TTFT of `base` over that of `other`, with a 95 % interval: block bootstrap over paired requests."""
    pairs = _paired(base, other)
    before = np.array([ttft(a) for a, _ in pairs])
    after = np.array([ttft(b) for _, b in pairs])
    picks = _neighbours(len(pairs))
    low, high = np.percentile(before[picks].mean(axis=1) / after[picks].mean(axis=1), (2.5, 97.5))
    value = before.mean() / after.mean()
    return {"value": _rounded(value), "low": _rounded(low), "high": _rounded(high)}


def throughput_ratio(base: Sequence[dict], other: Sequence[dict]) -> float:
    """Completed requests over makespan, `other` over `base`. One number a run: only repeats can show its spread."""
    before, after = (len(done) / makespan_s(done) for done in (answered(base), answered(other)))
    return _rounded(after / before)


def agreement(runs: Sequence[tuple[Sequence[dict], Sequence[dict]]]) -> dict:
    """How alike the answers to the very same prompts are: first token, and share before the first difference.

    runs: pairs of runs of the same requests.
    """
    both = [pair for base, other in runs for pair in _paired(base, other)]
    pairs = [(a["output_ids"], b["output_ids"]) for a, b in both if a["prompt"] == b["prompt"]]
    if not pairs:
        return {"prompts": 0, "first_token_agreement": None, "agreeing_head": None}
    heads = []
    for a, b in pairs:
        same = [x == y for x, y in zip(a, b, strict=False)]
        heads.append((same.index(False) if False in same else len(same)) / len(same))
    return {
        "prompts": len(pairs),
        "first_token_agreement": _rounded(np.mean([a[0] == b[0] for a, b in pairs])),
        "agreeing_head": _rounded(np.mean(heads)),
    }


def _paired(base: Sequence[dict], other: Sequence[dict]) -> list[tuple[dict, dict]]:
    """Requests that both runs answered, in the order they were due."""
    found = {(r["session"], r["step"]): r for r in answered(other)}
    pairs = [(a, found[key]) for a in answered(base) if (key := (a["session"], a["step"])) in found]
    return sorted(pairs, key=lambda p: p[0]["due_s"])


def _neighbours(count: int) -> np.ndarray:
    """Places 0..count-1 drawn in runs of `_BLOCK` neighbours, int64 [RESAMPLES, about count]."""
    draws = -(-count // _BLOCK)
    starts = np.random.default_rng(_SEED).integers(max(1, count - _BLOCK + 1), size=(RESAMPLES, draws))
    return np.minimum(starts[..., None] + np.arange(_BLOCK), count - 1).reshape(RESAMPLES, -1)
