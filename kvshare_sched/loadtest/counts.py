"""What a server counts on /metrics during a run.

Prompt tokens: they must agree with what this client sent and with what the answers report. Waits in tokens of service,
which no client can know.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import requests as http

from kvshare_sched.loadtest.statistics import answered
from kvshare_sched.observe.series import ORIGINS, PREFIX
from kvshare_sched.observe.server_state import Samples, State, samples_in


def scraped(url: str) -> Samples:
    """What /metrics of a server shows right now; nothing where there is none, or none of ours."""
    answer = http.get(f"{url}/metrics", timeout=60)
    return samples_in(answer.text) if answer.ok else {}


def sources(rows: Sequence[dict], before: Samples, after: Samples) -> dict:
    """Prompt tokens of the answered requests by each source; `metrics` is None without our series.

    rows: of `runner.Player`; before, after: `scraped` around the run.
    """
    done = answered(rows)
    state = State(after, before)
    known = "kvshare_prompt_tokens_total" in after
    return {
        "failed": len(rows) - len(done),
        "sent": sum(r["sent_tokens"] for r in done),
        "answers": {o: sum(r[o] for r in done) for o in ORIGINS},
        "metrics": {o: round(state.grown("prompt_tokens", origin=o)) for o in ORIGINS} if known else None,
    }


def longest_waits(before: Samples, after: Samples) -> dict[str, float | None]:
    """Tenant -> tokens of service that none of its requests waited longer for: a bucket's edge, None beyond the last.

    Empty for a server without our order.
    """
    then = _waits(before)
    longest: dict[str, float | None] = {}
    for tenant, now in _waits(after).items():
        grown = {edge: count - then.get(tenant, {}).get(edge, 0) for edge, count in now.items()}
        if most := max(grown.values()):
            edge = min(edge for edge, count in grown.items() if count == most)
            longest[tenant] = edge if math.isfinite(edge) else None
    return longest


def _waits(samples: Samples) -> dict[str, dict[float, float]]:
    """Tenant -> edge -> requests that waited no longer."""
    found: dict[str, dict[float, float]] = {}
    for labels, count in samples.get(f"{PREFIX}tenant_wait_tokens_bucket", ()):
        found.setdefault(labels["tenant"], {})[float(labels["le"])] = count
    return found


def agree(found: dict) -> bool:
    """Whether all three say the same, origin by origin."""
    return found["answers"] == found["metrics"] and sum(found["answers"].values()) == found["sent"]


def line(workload: str, found: dict) -> str:
    """The three in words."""

    def words(origins: dict | None) -> str:
        if origins is None:
            return "nothing (no kvshare_ series)"
        return f"{' + '.join(f'{origins[o]} {o}' for o in ORIGINS)} = {sum(origins.values())}"

    verdict = "they agree" if agree(found) else "THEY DIFFER: somebody else used the server, or a count is wrong"
    failed = f"; {found['failed']} requests failed and count on /metrics alone, if at all" if found["failed"] else ""
    return (
        f"{workload}: {found['sent']} prompt tokens sent; by the answers {words(found['answers'])}; "
        f"by /metrics {words(found['metrics'])}: {verdict}{failed}"
    )
