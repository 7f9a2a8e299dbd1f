"""What one request computes, finds and leaves: against the float64 reference, on the engine's own paths."""

from __future__ import annotations

import numpy as np
import pytest
from bench import running
from models import VOCABULARY, Reference
from prometheus_client import CollectorRegistry
from sglang.srt.environ import envs

from kvshare_sched.observe.metrics import ShareMetrics
from kvshare_sched.observe.series import ORIGINS

QUIET = {"audit_share": 0}
SCORED = {"return_logprob": True}
CLOSE = 1e-3  # nats: float32 against float64


def text(seed: int, length: int = 200) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY - 2, length).tolist()


def wish(**settings) -> dict:
    return {"kvshare": settings}


def settled(ticket) -> dict:
    """The report of an answer, with its sum checked."""
    report = ticket.report
    assert report["exact"] + report["reused"] + report["fresh"] == len(ticket.prompt)
    assert 0 <= report["recomputed"] <= report["reused"]
    return report


def off_by(reference: Reference, ticket) -> float:
    """Largest difference of an output token's log-probability from the reference's, nats."""
    log_p = reference(ticket.prompt + ticket.output).log_p[len(ticket.prompt) - 1 : -1]
    expected = log_p[np.arange(len(ticket.output)), ticket.output]
    assert (log_p.max(axis=1) - expected).max() < CLOSE, "each token is the likeliest one"
    return float(np.abs(expected - ticket.output_logprobs).max())


class Counted:
    """What /metrics would count from now on."""

    def __init__(self, engine):
        self._registry = CollectorRegistry()
        engine.pipeline.metrics = ShareMetrics(registry=self._registry)

    @property
    def origins(self) -> dict[str, float]:
        return {o: self._registry.get_sample_value("kvshare_prompt_tokens_total", {"origin": o}) for o in ORIGINS}


def told(tickets) -> dict[str, int]:
    """What the answers' reports say together."""
    return {o: sum(ticket.report[o] for ticket in tickets) for o in ORIGINS}


@pytest.fixture
def ask():
    """Send one request and run until it is answered."""

    def send(engine, prompt, **fields):
        ticket = engine.send(prompt, **fields)
        engine.run()
        return ticket

    return send


# ---- the anchor of all numerics ----


@pytest.mark.parametrize("loop", ["normal", "overlap"])
def test_every_cell_recomputed_is_full_prefill(deep, ask, loop):
    reference, parts = Reference(deep), [text(n) for n in range(4)]
    with running(deep, loop=loop, settings=QUIET) as engine:
        for n, order in enumerate(((2, 0, 3, 1), (3, 2, 1, 0))):
            key = {"extra_key": f"{n}"}
            ask(engine, text(10) + sum(parts, []), tokens=1, **key)
            prompt = text(11 + n, 30) + sum((parts[i] for i in order), []) + text(20, 9)
            asked = {"tokens": 24, "custom": wish(ratio=1.0)} | SCORED | key
            warm = ask(engine, prompt, **asked)
            full = ask(engine, prompt, tokens=24, custom={"kvshare": "off"}, extra_key=f"cold {n}", **SCORED)
            report = settled(warm)
            assert report["outcome"] == "reused" and report["recomputed"] == report["reused"] > 600
            assert report["computed_cells"] == (report["reused"] + report["fresh"]) * report["layers"]
            assert warm.output == full.output and settled(full)["reused"] == 0
            assert off_by(reference, warm) < CLOSE and off_by(reference, full) < CLOSE


@pytest.mark.parametrize("strategy", ["consensus", "dhd", "cacheblend"])
def test_a_donor_with_the_same_left_context_has_no_deviation(deep, ask, strategy):
    """SGLang's tree is kept from answering, so the donor is the very same prompt."""
    reference, prompt = Reference(deep), text(1, 700)
    with envs.SGLANG_RADIX_FORCE_MISS.override(True), running(deep, chunk=1024, settings=QUIET) as engine:
        full = ask(engine, prompt, tokens=24, **SCORED)
        assert settled(full)["outcome"] == "ordinary"
        warm = ask(engine, prompt, tokens=24, custom=wish(strategy=strategy), **SCORED)
        report = settled(warm)
        assert report["outcome"] == "reused"
        assert report["reused"] == len(prompt) - 1 and report["exact"] == 0
        # Deviation 0 at the check layer, no foreign context: only the forced first tokens of the run run again.
        assert report["recomputed"] == 8
        assert warm.output == full.output
        assert off_by(reference, warm) < CLOSE


# ---- sizes and numbers ----


def test_two_hundred_short_requests_share_nothing(deep, ask):
    with running(deep, settings=QUIET) as engine:
        for n in range(200):
            assert settled(ask(engine, text(n, 6), tokens=1))["outcome"] == "ordinary"


def test_one_token_and_the_context_limit(deep, ask):
    with running(deep, chunk=4096, pool=10_000, settings=QUIET) as engine:
        assert settled(ask(engine, [42], tokens=1))["fresh"] == 1
        limit = 4096 - 7  # SGLang keeps a few tokens for the answer
        long = (text(1, 2500) * 2)[:limit]
        settled(ask(engine, long, tokens=2))
        again = ask(engine, [7, *long[: limit - 1]], tokens=2)
        assert len(again.prompt) == limit and settled(again)["reused"] > 0.9 * limit


def test_fifty_at_once_over_one_document(deep, ask):
    one, two = text(1), text(2)
    with running(deep, loop="overlap", settings=QUIET, pool=12_000) as engine:
        ask(engine, text(3, 20) + one + two, tokens=1)
        counted = Counted(engine)
        found = [engine.send(text(10 + n, 12) + (two + one)[: 200 * (1 + n % 2)] + text(70 + n, 5)) for n in range(50)]
        engine.run()
        reports = [settled(ticket) for ticket in found]
        assert sum(report["outcome"] == "reused" for report in reports) >= 45
        assert all(len(ticket.output) == 4 for ticket in found)
        assert counted.origins == told(found)
        assert sum(counted.origins.values()) == sum(len(ticket.prompt) for ticket in found)


# ---- a pool too small for the load ----


def test_eviction_and_retraction_lose_nothing(deep, monkeypatch):
    """SGLang takes running requests back every few passes, and donors have to leave."""
    from sglang.srt.managers import scheduler

    monkeypatch.setattr(scheduler, "TEST_RETRACT", True)
    monkeypatch.setattr(scheduler, "TEST_RETRACT_INTERVAL", 17)
    retracted, take_back = [], scheduler.ScheduleBatch.retract_decode

    def counted(batch, *args, **kwargs):
        found = take_back(batch, *args, **kwargs)
        retracted.extend(found[0])
        return found

    monkeypatch.setattr(scheduler.ScheduleBatch, "retract_decode", counted)
    parts = [text(n) for n in range(6)]
    arguments = ["--schedule-conservativeness", "0.1", "--max-running-requests", "6"]
    with running(deep, loop="overlap", pool=3000, settings=QUIET, arguments=arguments) as engine:
        found, counted = [], Counted(engine)
        for i in range(12):
            prompt = text(20 + i, 15) + sum((parts[(i + k) % 6] for k in range(3)), []) + text(40 + i, 9)
            repair = wish(repair_rows=8, repair_order=("fifo", "lagged", "attention")[i % 3])
            found.append(engine.send(prompt, tokens=24, custom=repair if i % 4 != 3 else {"kvshare": "off"}))
        engine.run()
        assert all(len(ticket.output) == 24 for ticket in found)
        assert "reused" in [settled(ticket)["outcome"] for ticket in found]
        assert retracted, "the test's point"
        assert engine.pipeline.tree.active == 0, "no donor is held"
        assert counted.origins == told(found), "who runs again does not count again"


def test_donors_that_left_are_not_used(deep, ask):
    parts = [text(n) for n in range(4)]
    with running(deep, pool=3000, settings=QUIET) as engine:
        ask(engine, text(10, 9) + sum(parts, []), tokens=1)
        for i in range(6):  # push the donors out
            ask(engine, text(100 + i, 850), tokens=1, extra_key=f"{i}")
        prompt = text(11, 9) + sum(parts[::-1], []) + text(12, 9)
        assert settled(ask(engine, prompt, tokens=8))["reused"] < 0.3 * len(prompt)
