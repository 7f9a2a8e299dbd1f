"""What an attacker learns by the clock: ROC AUC of its time to first token, another tenant's text cached or not.

For 8, 64 and 512 tokens: the victim sends a secret text or, every other time, another one; the attacker then sends the
secret text, and its time to first token is kept. 0.5 is no better than chance. The control plays the victim's own key
against itself and must be well above at 512 tokens. `order`: two prompts sent together while the engine is busy, one
of them cached by the victim; the share in which that one is answered first. Needs a quiet machine; takes minutes.

    python scripts/probe_tenants.py --samples 200 --out out/probe_tenants.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from kvshare_sched import model, server
from kvshare_sched.client import Client
from kvshare_sched.tenants.identity import hash_of

SIZES = (8, 64, 512)


def roc_auc(cached: list[float], not_cached: list[float]) -> float:
    """Share of pairs in which the cached one was faster; ties count half."""
    a, b = np.array(cached)[:, None], np.array(not_cached)[None, :]
    return float((a < b).mean() + 0.5 * (a == b).mean())


def as_tenant(url: str, name: str) -> Client:
    client = Client(url)
    client._http.headers["Authorization"] = f"Bearer key-of-{name}"
    return client


def ttft(client: Client, tokens: list[int]) -> float:
    return client.generate(tokens, new_tokens=1, namespace="").ttft_s


def probe(url: str, attacker: str, size: int, samples: int, rng) -> float:
    """AUC of one attacker against the tenant `victim`."""
    victim, other = as_tenant(url, "victim"), as_tenant(url, attacker)
    times: dict[bool, list[float]] = {True: [], False: []}
    for n in range(2 * samples):
        secret, decoy, tail = (rng.integers(200, 40_000, k).tolist() for k in (size, size, 32))
        cached = bool(n % 2)
        ttft(victim, secret if cached else decoy)
        times[cached].append(ttft(other, [*secret, *tail]))
    return roc_auc(times[True], times[False])


def order(url: str, samples: int, rng) -> float:
    """Share of pairs in which the attacker's prompt that the victim has cached is answered first."""
    victim, busy = as_tenant(url, "victim"), as_tenant(url, "busy")

    def ended(tokens: list[int]) -> float:
        ttft(as_tenant(url, "attacker"), tokens)
        return time.perf_counter()

    first = 0
    for n in range(samples):
        cached, fresh = (rng.integers(200, 40_000, 512).tolist() for _ in range(2))
        ttft(victim, cached)
        with ThreadPoolExecutor(3) as pool:
            pool.submit(ttft, busy, rng.integers(200, 40_000, 1500).tolist())
            time.sleep(0.1)
            pair = [pool.submit(ended, tokens) for tokens in ((cached, fresh) if n % 2 else (fresh, cached))]
            times = [asked.result() for asked in pair]
        first += (times[0] < times[1]) == bool(n % 2)
    return first / samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200, help="of each kind; 200 give a standard error of 0.03")
    parser.add_argument("--out", default="out/probe_tenants.json")
    options = parser.parse_args()
    folder, out = Path(tempfile.mkdtemp()), Path(options.out)
    tables = (f"[tenants.{name}]\nkeys = ['{hash_of(f'key-of-{name}')}']" for name in ("victim", "attacker", "busy"))
    (folder / "tenants.toml").write_text("\n".join(("unknown = 'reject'", *tables)))
    arguments = server.fill_defaults(["--model-path", str(model.prepare()), *server.SMALL_POOL])
    environment = {"KVSHARE_TENANTS_FILE": str(folder / "tenants.toml"), "KVSHARE_AUDIT_SHARE": "0"}
    rng, found = np.random.default_rng(0), {}
    with server.running(arguments, env=environment, log=out.with_suffix(".log")) as url:
        for size in SIZES:
            found[f"auc {size} tokens"] = probe(url, "attacker", size, options.samples, rng)
            found[f"control {size} tokens"] = probe(url, "victim", size, max(10, options.samples // 10), rng)
        found["order"] = order(url, options.samples, rng)
    out.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
