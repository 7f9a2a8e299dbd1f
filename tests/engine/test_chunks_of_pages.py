"""Page size 16, small chunks, mixed batches, overlap off, the Python tree core."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from bench import running
from models import VOCABULARY, Reference
from sglang.srt.environ import envs

CLOSE = 1e-3  # nats: float32 against float64
OFF = {"kvshare": "off"}
PARTS = [np.random.default_rng(n).integers(0, VOCABULARY - 2, 200).tolist() for n in range(16)]


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(1000 + seed).integers(0, VOCABULARY - 2, length).tolist()


def prompt(seed: int, order) -> list[int]:
    return text(seed, 30) + sum((PARTS[i] for i in order), []) + text(500 + seed, 9)


@contextlib.contextmanager
def paged(model):
    """An engine, and `ask`, which runs until a request is answered."""
    settings = {"strategy": "cacheblend", "ratio": 0.2, "audit_share": 0}
    options = {"page": 16, "chunk": 256, "pool": 12_000, "arguments": ["--enable-mixed-chunk"]}
    with (
        envs.SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND.override("python"),
        running(model, settings=settings, **options) as engine,
    ):

        def ask(*args, **fields):
            ticket = engine.send(*args, return_logprob=True, **fields)
            engine.run()
            return ticket

        yield engine, ask


def off_by(reference: Reference, ticket) -> float:
    """Largest difference of an output token's log-probability from the reference's, nats."""
    log_p = reference(ticket.prompt + ticket.output).log_p[len(ticket.prompt) - 1 : -1]
    return float(np.abs(log_p[np.arange(len(ticket.output)), ticket.output] - ticket.output_logprobs).max())


@pytest.mark.parametrize("kind", ["flat", "deep"])
def test_long_prompts_in_many_chunks(kind, request):
    """Where KV does not depend on context the reused answer is the exact one; elsewhere what is kept must be."""
    model = request.getfixturevalue(kind)
    reference = Reference(model)
    with paged(model) as (_, ask):
        ask(prompt(1, range(8)), tokens=2)
        long = prompt(2, (5, 2, 7, 0, 3, 6, 1, 4))
        assert len(long) > 1500
        warm = ask(long, tokens=12)
        report = warm.report
        assert report["exact"] % 16 == 0
        assert report["outcome"] == "reused" and report["reused"] > 0.9 * len(long)
        if kind == "deep":
            assert report["recomputed"] >= 0.1 * report["reused"]
        else:  # there nothing deviates
            assert off_by(reference, warm) < CLOSE
        full = ask(long, tokens=12, custom=OFF, extra_key="cold")
        honest = ask(long, tokens=12, custom=OFF)
        assert honest.report["exact"] <= report["exact"] + 48
        assert honest.output == full.output and off_by(reference, honest) < CLOSE


def test_prefill_of_long_prompts_beside_running_decodes(deep):
    with paged(deep) as (engine, ask):
        ask(prompt(1, range(6)), tokens=2)
        asks = [prompt(10 + i, range(i % 3, 6)) for i in range(8)]
        found = []
        for one in asks:
            found.append(engine.send(one, tokens=24))
            engine.step(3)
        engine.run()
        assert all(len(ticket.output) == 24 for ticket in found)
        assert sum(ticket.report["outcome"] == "reused" for ticket in found) >= 7
        quiet = ask(asks[0], tokens=24, custom=OFF)
        assert quiet.output == ask(asks[0], tokens=24, custom=OFF, extra_key="cold").output
        assert off_by(Reference(deep), quiet) < CLOSE


def test_a_prompt_repaired_while_decoding_is_published_in_whole_pages(deep):
    with paged(deep) as (_, ask):
        ask(prompt(1, range(4)), tokens=2)
        moved = prompt(2, (3, 1, 2))
        repair = {"kvshare": {"strategy": "naive", "repair_rows": 64}}
        assert ask(moved, tokens=len(moved) // 64 + 4, custom=repair).report["outcome"] == "reused"
        again = ask(moved, tokens=12, custom=OFF)
        assert again.report["exact"] == (len(moved) - 1) // 16 * 16
        assert again.output == ask(moved, tokens=12, custom=OFF, extra_key="cold").output
        assert off_by(Reference(deep), again) < CLOSE


def test_aborted_between_chunks(deep):
    with paged(deep) as (engine, ask):
        ask(prompt(1, range(8, 16)), tokens=1)
        moved = prompt(2, range(15, 7, -1))
        ticket = engine.send(moved, tokens=64)
        while engine.scheduler.chunked_req is None:
            engine.step()
        assert engine.pipeline.tree.active > 0, "the test's point: donors are held"
        engine.abort(ticket.rid)
        engine.run()
        assert ticket.aborted and engine.pipeline.tree.active == 0
        again = ask(moved, tokens=8, custom=OFF)
        assert again.output == ask(moved, tokens=8, custom=OFF, extra_key="cold").output
        assert off_by(Reference(deep), again) < CLOSE
