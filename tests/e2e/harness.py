"""What the end-to-end tests share: the server, prompts from Python's own documentation, and its metrics."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import requests

from kvshare_sched.client import launch, model
from kvshare_sched.client.device import has_nvidia_gpu
from kvshare_sched.client.http import Client
from kvshare_sched.tools.demo import prompt_of

LOGS = Path(__file__).resolve().parents[2] / "out" / "e2e"
CONTEXT = 4096  # tokens; half of the model's, so that a prompt at the limit takes a quarter of the time
SMALL_CHUNKS = (  # a set-up that several modules share, and with it one server
    ["--chunked-prefill-size", "384", "--max-running-requests", "24"],
    {"KVSHARE_TENANT_WEIGHTS": "gold=3", "KVSHARE_QUANTUM": "1000"},
)
SYSTEMS = (
    "You are a helpful assistant.",
    "You answer for the platform team, tersely and in plain words.",
    "Quote the section you use, and nothing else.",
)


@cache
def sections(count: int = 24, words: int = 130) -> tuple[str, ...]:
    """Sections of Python's language reference, about 200 tokens each."""
    from pydoc_data.topics import topics

    long_enough = (t for t in sorted(topics) if len(topics[t].split()) > words)
    texts = (f"## {t}\n{' '.join(topics[t].split()[:words])}" for t in long_enough)
    return tuple(text for text, _ in zip(texts, range(count), strict=False))


def chat(system: str, parts, question: str = "What do these sections say?") -> str:
    """A prompt in the embedded model's template."""
    return prompt_of(system, parts, question)


class Server(Client):
    """A running server and what tests ask of it."""

    def __init__(self, url: str, log: Path):
        super().__init__(url)
        self.log = log
        self.fresh = 0

    def namespace(self) -> str:
        """A namespace nobody has used."""
        self.fresh += 1
        return f"fresh-{self.fresh}"

    def metrics(self) -> dict[str, float]:
        """kvshare_ series and SGLang's pool usage, by their line on /metrics."""
        text = requests.get(f"{self.url}/metrics", timeout=60).text
        lines = (line for line in text.splitlines() if line.startswith(("kvshare_", "sglang:")))
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines}

    def origins(self) -> dict[str, float]:
        """Prompt tokens counted so far, by origin."""
        found = self.metrics()
        return {o: found[f'kvshare_prompt_tokens_total{{origin="{o}"}}'] for o in ("exact", "reused", "fresh")}

    def flush(self) -> None:
        """Empty the cache; the server must be idle."""
        requests.post(f"{self.url}/flush_cache", timeout=60).raise_for_status()

    def assert_idle_and_clean(self) -> None:
        deadline = time.monotonic() + 30
        while True:
            held = self.metrics().get("kvshare_leases_held", 0)
            used = requests.get(f"{self.url}/v1/loads", timeout=60).json()["loads"][0]
            idle = used["num_running_reqs"] == 0 and used["num_waiting_reqs"] == 0
            if (held == 0 and idle) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        assert held == 0, f"{held} donor pins left behind"
        assert idle, f"requests left behind: {used}"
        time.sleep(0.3)  # SGLang checks its memory when idle, and a leak ends the server with a traceback
        text = self.log.read_text(errors="replace")
        complaints = re.findall(
            r".*(?:memory leak|Traceback|kvshare: (?:\w+ failed|no report|request |could not)).*",
            text,
        )
        assert not complaints, complaints[:3]


@contextlib.contextmanager
def start(name: str, arguments, environment) -> Iterator[Server]:
    """Stock SGLang with the kvshare backend on the embedded model; audits only where a module asks for them.

    An audit leaves exact KV of its prompt behind, whenever the server happens to be idle.
    """
    log = LOGS / f"{name}.log"
    base = {"--model-path": str(model.prepare()), "--max-total-tokens": "40000", "--context-length": str(CONTEXT)}
    base = [word for name, value in base.items() if name not in arguments for word in (name, value)]
    full = [*launch.fill_defaults([*base, *arguments])]
    with launch.running(full, env={"KVSHARE_AUDIT_SHARE": "0"} | environment, log=log) as url:
        yield Server(url, log)
        assert requests.get(f"{url}/health", timeout=60).status_code == 200  # generates a token, which takes a second


# Rounding of log-probabilities between two ways to compute the same. On a GPU the model runs in half precision.
ROUNDING = 0.1 if has_nvidia_gpu() else 1e-3


def alike(one, other) -> bool:
    """Whether two greedy answers to one prompt are the same.

    On a GPU half precision rounds differently from batch to batch and from chunk to chunk, and one token that turns
    over turns all that follow: there only the first one counts.
    """
    many = 1 if has_nvidia_gpu() else None
    return one.token_ids[:many] == other.token_ids[:many]


def settled(answer) -> dict:
    """The report of an answer, with its sum checked."""
    report = answer.report
    assert report["exact"] + report["reused"] + report["fresh"] == answer.prompt_tokens
    assert 0 <= report["recomputed"] <= report["reused"]
    return report
