#!/usr/bin/env python
"""Five minutes of three tenants on a real server: the boards' pictures, and prompt tokens counted by three sources.

    python scripts/tour.py [--seconds 300]

Stock SGLang with our backend on the embedded model, under a tenants file with a library, a real Prometheus beside it.
Writes `dashboards/pictures/*.png` and `benchmarks/tour.json`; exits with 1 when the prompt tokens sent, those the
answers report and those on /metrics differ, or a panel of a board stayed empty.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import requests
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "dashboards"))
import local_prometheus
import render
from generate import HERE, boards

from kvshare_sched.client import launch, model
from kvshare_sched.evaluation import texts
from kvshare_sched.evaluation.report import made_with
from kvshare_sched.loadtest import counts
from kvshare_sched.observe.series import ORIGINS
from kvshare_sched.tenants.identity import hash_of
from kvshare_sched.tools.demo import prompt_of

TENANTS = {"support": 'groups = ["handbook"]\nweight = 2', "research": 'groups = ["handbook"]', "sales": "requests = 1"}
SHARED, OWN = 6, 4  # passages of the library, and of every tenant
RATE = 0.9  # requests a second, a burst of six every half minute besides
SETTINGS = {"KVSHARE_AUDIT_SHARE": "0.1"}
FILE = Path("benchmarks/tour.json")


def tenants_file() -> str:
    parts = ['unknown = "reject"', f'[operators]\nkeys = ["{hash_of("root")}"]\nopen = ["/metrics", "/v1/loads"]']
    parts.append("[library]\ntokens = 8000\n[groups.handbook]")
    parts += [f'[tenants.{name}]\nkeys = ["{hash_of(name)}"]\n{rest}' for name, rest in TENANTS.items()]
    return "\n".join(parts)


class Visitor:
    """One tenant: asks about passages of the library and of its own, in ever other orders."""

    def __init__(self, url: str, name: str, passages: list[str], encode: Callable[[str], list[int]]):
        self.url, self.name, self.passages, self.encode = url, name, passages, encode
        self.headers = {"Authorization": f"Bearer {name}"}

    def ask(self, number: int) -> dict | None:
        """What was sent and reported, in prompt tokens; None when a quota refused it."""
        draw = random.Random(f"{self.name} {number}")
        prompt = prompt_of(f"You work for {self.name}.", draw.sample(self.passages, 3), f"Question {number}?")
        ids = self.encode(prompt)
        reuse = "off" if number % 10 == 9 else {"repair_rows": 2} if number % 5 == 3 else {}
        sampling = {"temperature": 0, "max_new_tokens": draw.choice([4, 8, 24]), "custom_params": {"kvshare": reuse}}
        body = {"input_ids": ids, "sampling_params": sampling}
        answer = requests.post(f"{self.url}/generate", json=body, headers=self.headers, timeout=600)
        if answer.status_code == 429:
            return None
        answer.raise_for_status()
        return {"sent_tokens": len(ids)} | {o: answer.json()["meta_info"]["kvshare"][o] for o in ORIGINS}


def play(visitors: list[Visitor], seconds: float) -> list[dict | None]:
    """Poisson arrivals of all tenants, with a burst every half minute."""
    draw, started, asked, burst = random.Random(1), time.monotonic(), [], 1
    with ThreadPoolExecutor(32) as pool:
        while (now := time.monotonic() - started) < seconds:
            several = 6 if now > 30 * burst else 1
            burst += several > 1
            asked += [pool.submit(draw.choice(visitors).ask, len(asked) + i) for i in range(several)]
            print(f"\r{now:4.0f} of {seconds:.0f} s, {len(asked)} requests", end="", flush=True)
            time.sleep(draw.expovariate(RATE))
    print()
    return [future.result() for future in asked]


def fill_library(url: str, passages: list[str]) -> None:
    for number, text in enumerate(passages):
        body = {"group": "handbook", "name": f"page-{number}", "text": text}
        headers = {"Authorization": "Bearer root"}
        requests.post(f"{url}/kvshare/documents", json=body, headers=headers, timeout=300).raise_for_status()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=300)
    options = parser.parse_args()
    encode = functools.partial(AutoTokenizer.from_pretrained(model.prepare()).encode, add_special_tokens=False)
    passages = [" ".join(p) for p in texts.library()]
    shared, rest = passages[:SHARED], iter(passages[SHARED:])
    with tempfile.TemporaryDirectory(prefix="kvshare-tour-") as folder:
        file, library = Path(folder) / "tenants.toml", Path(folder) / "library"
        file.write_text(tenants_file())
        environment = SETTINGS | {"KVSHARE_TENANTS_FILE": str(file), "KVSHARE_LIBRARY": str(library)}
        arguments = launch.fill_defaults(["--model-path", str(model.prepare()), *launch.SMALL_POOL])
        with launch.running(arguments, env=environment, log=Path("out/tour-server.log")) as url:
            visitors = [
                Visitor(url, name, [next(rest) for _ in range(OWN)] + shared * ("handbook" in given), encode)
                for name, given in TENANTS.items()
            ]
            target, began = url.removeprefix("http://"), time.time()
            with local_prometheus.scraping([target], Path(folder) / "prometheus") as prometheus:
                time.sleep(3)
                fill_library(url, shared)
                before = counts.scraped(url)
                rows = play(visitors, options.seconds)
                after = counts.scraped(url)
                time.sleep(10)  # an audit or two of the last requests
                empty = [
                    f"{name}: {title}"
                    for name in boards()
                    for title in render.draw(
                        prometheus, name, HERE / "pictures" / f"{name}.png", began, time.time(), "15s"
                    )
                ]
    done = [row for row in rows if row is not None]
    found = counts.sources(done, before, after) | {"refused": len(rows) - len(done)}
    same = counts.agree(found)
    kept = {"seconds": options.seconds, "rate": RATE, "requests": len(rows), "settings": SETTINGS, **made_with()}
    FILE.write_text(json.dumps(kept | {"prompt_tokens": found, "agree": same, "empty_panels": empty}, indent=1) + "\n")
    print(counts.line("tour", found), *(f"no data: {title}" for title in empty), sep="\n")
    return 0 if same and not empty else 1


if __name__ == "__main__":
    sys.exit(main())
