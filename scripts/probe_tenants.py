#!/usr/bin/env python
"""What an attacker learns by the clock and from the order of answers. Writes benchmarks/probe.json.

    python scripts/probe_tenants.py

- `stranger`: the victim sends a secret text of 8, 64 or 512 tokens; another tenant asks with it and with a text that
  nobody has sent, in turn, under salts of its own so that it never finds itself. ROC AUC of its time to first token.
- `owner`, the control: the same from the victim's own key.
- `order`: while the engine is busy two prompts are sent together, one of which the victim has cached; the share in
  which that one is answered first. One request runs at a time, so there is an order. Control: the victim's own key.
- `member`: a document of the library against a text of its length, from its group; faster, as intended. `hidden`: a
  member of the group with hide_reuse.

0.5 is no better than chance. Needs a quiet machine; each part ends when its share of --seconds is over.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests

from kvshare_sched.client import launch, model
from kvshare_sched.client.http import Client
from kvshare_sched.tenants.identity import hash_of

SIZES = (8, 64, 512)
ASKED = 4  # times an attacker asks about one secret
TAIL = 32  # tokens behind the text in question, new in every prompt
IN_ORDER, BUSY = 256, 600  # tokens of a prompt whose place is probed, and of the one that keeps the engine busy
HIDE_REUSE = 2.0
SERVER = ("--max-running-requests", "1", *launch.SMALL_POOL)
# (share of the time, most rounds): what they are told apart by grows with the text, and so does what a round costs
PACE = {
    **{"stranger 8": (0.09, 40), "stranger 64": (0.13, 40), "stranger 512": (0.36, 40)},
    **{"owner 8": (0.01, 15), "owner 64": (0.02, 15), "owner 512": (0.06, 15)},
    **{"order": (0.16, 40), "order, owner": (0.05, 12), "member": (0.04, 15), "hidden": (0.08, 40)},
}
FILE = f"""
unknown = "reject"
[operators]
keys = ["{hash_of("key-of-root")}"]
[library]
tokens = 1000
[groups.handbook]
{{tenants}}
[tenants.member]
keys = ["{hash_of("key-of-member")}"]
groups = ["handbook"]
[tenants.hidden]
keys = ["{hash_of("key-of-hidden")}"]
groups = ["handbook"]
hide_reuse = {HIDE_REUSE}
""".format(tenants="\n".join(f'[tenants.{n}]\nkeys = ["{hash_of(f"key-of-{n}")}"]' for n in ("victim", "attacker")))


class Probe:
    """One server and everybody who asks it."""

    def __init__(self, url: str, seconds: float):
        self.url, self.seconds, self.rng = url, seconds, np.random.default_rng(0)
        self.clients = {name: Client(url) for name in ("victim", "attacker", "member", "hidden")}
        for name, client in self.clients.items():
            client._http.headers["Authorization"] = f"Bearer key-of-{name}"
        self.salts = 0

    def text(self, tokens: int) -> list[int]:
        """Ids that no other text has."""
        return self.rng.integers(200, 40_000, tokens).tolist()

    def ttft(self, name: str, tokens: list[int], salt: str = "") -> float:
        return self.clients[name].generate(tokens, new_tokens=1, namespace=salt).ttft_s

    def salt(self) -> str:
        """One that nobody has used."""
        self.salts += 1
        return f"salt {self.salts}"

    def rounds(self, part: str) -> Iterator[int]:
        """0, 1, ... until the part's time is over or it has enough; two at least."""
        share, most = PACE[part]
        started = time.perf_counter()
        for n in range(most):
            if n >= 2 and time.perf_counter() - started > share * self.seconds:
                return
            yield n

    # ---- times ----

    def about(self, name: str, known: list[int], times: dict[bool, list[float]], own: bool = False) -> None:
        """Ask once with a known text and once with another of its length, either first, in turn."""
        first = len(times[True]) % 2 == 0
        for cached in (first, not first):
            tokens = known if cached else self.text(len(known))
            times[cached].append(self.ttft(name, [*tokens, *self.text(TAIL)], "" if own else self.salt()))

    def stranger(self, size: int) -> dict:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in self.rounds(f"stranger {size}"):
            secret = self.text(size)
            self.ttft("victim", secret)
            for _ in range(ASKED):
                self.about("attacker", secret, times)
        return figures(times)

    def owner(self, size: int) -> dict:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in self.rounds(f"owner {size}"):
            secret = self.text(size)
            self.ttft("victim", secret)
            self.about("victim", secret, times, own=True)
        return figures(times)

    def library(self, name: str, document: list[int]) -> dict:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in self.rounds(name):
            self.about(name, [*self.text(16), *document], times)
        return figures(times)

    def document(self) -> list[int]:
        """A document of the group, as it stands in prompts."""
        text = " ".join(f"item {n} costs {3 * n + 7} euros." for n in self.rng.permutation(1000)[:30])
        body = {"group": "handbook", "name": "prices", "text": text}
        headers = {"Authorization": "Bearer key-of-root"}
        requests.post(f"{self.url}/kvshare/documents", json=body, headers=headers, timeout=300).raise_for_status()
        return self.clients["member"].tokenize(text)

    # ---- order ----

    def order(self, part: str, name: str) -> dict:
        first = asked = 0

        def ended(tokens: list[int]) -> float:
            client = Client(self.url)
            client._http.headers["Authorization"] = f"Bearer key-of-{name}"
            client.generate(tokens, new_tokens=1, namespace="")
            return time.perf_counter()

        for n in self.rounds(part):
            cached, fresh = self.text(IN_ORDER), self.text(IN_ORDER)
            self.ttft("victim", cached)
            pair = (cached, fresh) if n % 2 else (fresh, cached)  # whoever comes first is not always the same
            with ThreadPoolExecutor(3) as pool:
                pool.submit(self.ttft, "member", self.text(BUSY))
                time.sleep(0.1)
                times = [sent.result() for sent in [pool.submit(ended, [*tokens, 7]) for tokens in pair]]
            first += (times[0] < times[1]) == bool(n % 2)
            asked += 1
        return {"share": first / asked, "asked": asked, "standard_error": 0.5 / math.sqrt(asked)}


def roc_auc(cached: list[float], other: list[float]) -> float:
    """Share of pairs in which the cached one was faster; ties count half."""
    a, b = np.array(cached)[:, None], np.array(other)[None, :]
    return float((a < b).mean() + 0.5 * (a == b).mean())


def figures(times: dict[bool, list[float]]) -> dict:
    """AUC, its standard error if there is nothing to learn, and the medians behind it."""
    n, m = len(times[True]), len(times[False])
    medians = {"cached": 1e3 * float(np.median(times[True])), "other": 1e3 * float(np.median(times[False]))}
    error = math.sqrt((n + m + 1) / (12 * n * m))
    return {"auc": roc_auc(times[True], times[False]), "standard_error": error, "asked": n + m, "median_ms": medians}


def run(probe: Probe) -> dict[str, dict]:
    """Every part, with its line of progress."""
    for size in (*SIZES, IN_ORDER, BUSY):  # first passes of a length are slower
        probe.ttft("attacker", probe.text(size + TAIL))
    document = probe.document()
    parts = {f"{who} {size}": (getattr(probe, who), (size,)) for size in SIZES for who in ("stranger", "owner")}
    parts |= {"order": (probe.order, ("order", "attacker")), "order, owner": (probe.order, ("order, owner", "victim"))}
    parts |= {name: (probe.library, (name, document)) for name in ("member", "hidden")}
    found, started = {}, time.perf_counter()
    for name, (ask, arguments) in parts.items():
        found[name] = ask(*arguments)
        value = found[name].get("auc", found[name].get("share"))
        print(
            f"{time.perf_counter() - started:5.0f} s  {name:14} {value:.3f} "
            f"(standard error {found[name]['standard_error']:.3f}, {found[name]['asked']} asked)",
            flush=True,
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=380, help="of asking; starting the server comes on top")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/probe.json"))
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="kvshare-probe-"))
    (folder / "tenants.toml").write_text(FILE)
    arguments = launch.fill_defaults(["--model-path", str(model.prepare()), *SERVER])
    environment = {
        **{"KVSHARE_TENANTS_FILE": str(folder / "tenants.toml"), "KVSHARE_LIBRARY": str(folder / "library")},
        "KVSHARE_AUDIT_SHARE": "0",
    }
    print("starting the server", flush=True)
    with launch.running(arguments, env=environment, log=Path("out/probe-server.log")) as url:
        found = run(Probe(url, options.seconds))
    settings = {"server": SERVER, "asked_about_one_secret": ASKED, "tail_tokens": TAIL, "order_tokens": IN_ORDER}
    settings |= {"busy_tokens": BUSY, "hide_reuse": HIDE_REUSE, "seconds": options.seconds, "cpu": platform.processor()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"settings": settings, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
