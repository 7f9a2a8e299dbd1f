"""Reused KV repaired while decoding: rows ride along, nobody else notices, a finished walk makes the prompt exact."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from bench import running
from models import VOCABULARY, Reference
from prometheus_client import CollectorRegistry

from kvshare_sched.observe.metrics import ShareMetrics

PARTS = [np.random.default_rng(n).integers(0, VOCABULARY - 2, 200).tolist() for n in range(10)]
NAIVE = {"strategy": "naive"}
OFF = "off"
CLOSE = 1e-3  # nats: float32 against float64
loops = pytest.mark.parametrize("loop", ["normal", "overlap"])


def text(seed: int, length: int) -> list[int]:
    return np.random.default_rng(1000 + seed).integers(0, VOCABULARY - 2, length).tolist()


def moved(question: int = 0, parts=(2, 0)) -> list[int]:
    return text(question, 40) + sum((PARTS[i] for i in parts), []) + text(500 + question, 12)


class Repairs:
    """An engine in which tenant "t" has one prompt over PARTS[0:3], and how many tokens it has repaired."""

    def __init__(self, engine):
        self.engine, self._registry = engine, CollectorRegistry()
        engine.pipeline.metrics = ShareMetrics(registry=self._registry)
        self.donor("t")

    def donor(self, key: str) -> None:
        self.ask(text(99, 20) + sum(PARTS[:3], []), 2, key, True)

    def send(self, prompt, tokens, key, reuse, **fields):
        custom = None if reuse is True else {"kvshare": reuse}
        return self.engine.send(prompt, tokens=tokens, extra_key=key, custom=custom, return_logprob=True, **fields)

    def ask(self, *args, **fields):
        ticket = self.send(*args, **fields)
        self.engine.run()
        return ticket

    @property
    def repaired(self) -> float:
        return self._registry.get_sample_value("kvshare_repaired_tokens_total") or 0


@pytest.fixture
def repairs(deep):
    @contextlib.contextmanager
    def start(loop="normal", **options):
        with running(deep, loop=loop, chunk=1024, pool=8000, settings={"audit_share": 0}, **options) as engine:
            yield Repairs(engine)

    return start


def off_by(reference: Reference, ticket) -> float:
    """Largest difference of an output token's log-probability from the reference's, nats."""
    log_p = reference(ticket.prompt + ticket.output).log_p[len(ticket.prompt) - 1 : -1]
    return float(np.abs(log_p[np.arange(len(ticket.output)), ticket.output] - ticket.output_logprobs).max())


def like(one, other) -> bool:
    """The same answer, with the same log-probabilities."""
    return one.output == other.output and one.output_logprobs == pytest.approx(other.output_logprobs, abs=CLOSE)


@loops
def test_no_rows_is_plain_decode(repairs, loop):
    with repairs(loop) as r:
        plain = r.ask(moved(), 24, "t", NAIVE)
        none = r.ask(moved(), 24, "t", NAIVE | {"repair_rows": 0, "repair_order": "attention"})
        assert none.report["outcome"] == "reused" and like(none, plain)
        assert r.repaired == 0


@loops
@pytest.mark.parametrize("rows", [1, 32])
def test_a_finished_walk_makes_the_prompt_exact(deep, repairs, rows, loop):
    reference, prompt = Reference(deep), moved(parts=(2, 0) if rows > 1 else (1,))
    with repairs(loop) as r:
        warm = r.ask(prompt, len(prompt) // rows + 8, "t", NAIVE | {"repair_rows": rows})
        assert (warm.report["outcome"], warm.report["recomputed"]) == ("reused", 0)
        assert warm.report["reused"] < r.repaired <= len(prompt) - warm.report["exact"]
        full = r.ask(prompt, 12, "cold", OFF)
        again = r.ask(prompt, 12, "t", OFF)
        assert again.report["exact"] == len(prompt) - 1 and like(again, full)
        assert off_by(reference, again) < CLOSE
        r.donor("other")  # what the same comparison sees when nothing is repaired
        stale = r.ask(prompt, 12, "other", NAIVE)
        assert stale.report["outcome"] == "reused" and off_by(reference, stale) > 1e-2


def test_an_unfinished_walk_publishes_only_what_it_has_passed(repairs):
    with repairs() as r:
        first = r.ask(moved(), 11, "t", NAIVE | {"repair_rows": 8}).report
        again = r.ask(moved(), 12, "t", OFF)
        assert 80 <= again.report["exact"] <= first["exact"] + 40 + 8 * 11
        assert like(again, r.ask(moved(), 12, "cold", OFF))


@loops
@pytest.mark.parametrize("order", ["lagged", "attention"])
@pytest.mark.parametrize("strategy", ["dhd", "naive"])
def test_other_orders_repair_stale_positions_and_publish_none(repairs, order, strategy, loop):
    with repairs(loop) as r:
        report = r.ask(moved(), 30, "t", {"strategy": strategy, "repair_rows": 64, "repair_order": order}).report
        assert report["outcome"] == "reused"
        assert r.repaired == report["reused"] - report["recomputed"] > 0, "each stale position once"
        again = r.ask(moved(), 12, "t", OFF)
        assert again.report["exact"] <= report["exact"] + 40
        assert like(again, r.ask(moved(), 12, "cold", OFF))


@loops
def test_other_requests_of_the_batch_notice_nothing(repairs, loop):
    with repairs(loop) as r:
        asks = [
            (moved(1), "t", NAIVE | {"repair_rows": 3}),
            (moved(2, (1, 2)), "t", {"repair_rows": 17, "repair_order": "lagged"}),
            (moved(3, (0, 1)), "t", {"repair_rows": 5, "repair_order": "attention"}),
            (moved(4), "t", NAIVE),
            (text(5, 20) + PARTS[9], "stranger", True),
        ]
        alone = r.ask(asks[4][0], 40, "apart", OFF, top_logprobs_num=2)
        stale = r.ask(asks[3][0], 40, *asks[3][1:], top_logprobs_num=2)
        before = r.repaired
        found = [r.send(prompt, 40, *more, top_logprobs_num=2) for prompt, *more in asks]
        r.engine.run()
        assert r.repaired - before > 40 * 3
        assert like(found[4], alone) and like(found[3], stale)
        for ticket in found:
            assert len(ticket.output) == len(ticket.output_logprobs) == len(ticket.output_top_logprobs) == 40
        assert [ticket.report["outcome"] for ticket in found] == ["reused"] * 4 + ["ordinary"]


@loops
def test_an_aborted_repair_leaves_nothing(repairs, loop):
    with repairs(loop) as r:
        walk = r.send(moved(), 400, "t", NAIVE | {"repair_rows": 1})
        while len(walk.output) < 6:
            r.engine.step()
        r.engine.abort(walk.rid)
        r.engine.run()
        assert walk.aborted and r.engine.pipeline.tree.active == 0
        assert 0 < r.repaired < len(walk.prompt)
        assert like(r.ask(moved(), 8, "t", OFF), r.ask(moved(), 8, "cold", OFF))
