"""The published bounds, on the service gap and on what a quiet tenant waits, in the simulated engine: chunks, decoding,
reuse and all."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_sched.scheduling.fairness import OUTPUT_PRICE, Accounts, service_gap
from kvshare_sched.scheduling.queue import Queue
from kvshare_sched.simulator.engine import Engine
from kvshare_sched.simulator.profile import Profile
from kvshare_sched.simulator.traffic import Request

ENGINE = {
    **{"pass_s": 0.05, "row_s": 0.001, "key_s": 0.0, "copy_s": 1e-5, "reuse_s": 0.001, "recompute": 0.18},
    **{"decode_s": ((1, 0.02), (8, 0.05)), "running": 8},
}


@settings(max_examples=40, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(0, 5), st.integers(20, 900)), min_size=120, max_size=120),
    new=st.integers(1, 30),
    quantum=st.sampled_from([100, 800, 4096]),
    weights=st.sampled_from([(1.0, 1.0), (3.0, 1.0), (0.5, 2.0)]),
    chunk=st.sampled_from([256, 1000]),
    capacity=st.sampled_from([3000, 50_000]),
)
def test_two_backlogged_tenants_stay_within_the_gap(prompts, new, quantum, weights, chunk, capacity):
    profile = Profile(chunk=chunk, capacity=capacity, **ENGINE)
    queue = Queue("fair", Accounts(quantum, dict(zip("fg", weights, strict=True))), 8, 0.3)
    engine = Engine(profile, queue)
    requests = [
        Request(0.0, "fg"[n % 2], str(n), 0, ((f"doc{doc}", 150), (f"own{n}", own)), new)
        for n, (doc, own) in enumerate(prompts)
    ]
    left = dict.fromkeys("fg", len(prompts) // 2)
    gaps, most = [0.0], 1
    for done in engine.run(requests):
        left[done.tenant] -= 1
        waiting = {tenant: sum(name == tenant for name in queue.table.accounts) for tenant in "fg"}
        if not all(waiting.values()):
            break  # one of them is not backlogged any longer
        most = max(most, len(queue.running))
        served = queue.accounts.served
        gaps.append(served["f"] / weights[0] - served["g"] / weights[1])
    assert len(gaps) > 1
    bound = service_gap(150 + 900, (most + 1) * new, quantum, min(weights))
    assert max(gaps) - min(gaps) <= bound


# An engine on which a token of work takes the same time whatever it is, so that the bound is one in seconds.
TOKEN_S = 0.001
EVEN = Profile(
    **{"pass_s": 0.0, "row_s": TOKEN_S, "key_s": 0.0, "copy_s": 0.0, "reuse_s": 0.0, "recompute": 0.18},
    decode_s=((1, OUTPUT_PRICE * TOKEN_S), (64, 64 * OUTPUT_PRICE * TOKEN_S)),
    **{"chunk": 512, "capacity": 100_000, "running": 64},
)
QUANTUM, WEIGHTS, DEAREST, NEW = 2000, {"quiet": 2.0, "flood": 1.0}, 900, 8


def quiet_p95(policy: str, *, flooded: bool) -> tuple[float, float]:
    """p95 time to first token of the quiet tenant, and what the others' quanta may add to it, seconds."""
    rng = np.random.default_rng(3)
    asked = [Request(2.0 * n, "quiet", f"q{n}", 0, (("handbook", 200), (f"question{n}", 40)), NEW) for n in range(100)]
    if flooded:  # twice what the engine can do, each text once
        asked += [
            Request(0.45 * n, "flood", f"f{n}", 0, ((f"text{n}", int(rng.integers(500, DEAREST))),), NEW)
            for n in range(440)
        ]
    queue, most = Queue(policy, Accounts(QUANTUM, WEIGHTS), 8, 0.3), 0
    first = []
    for done in Engine(EVEN, queue).run(sorted(asked, key=lambda request: request.at_s)):
        most = max(most, len(queue.running))
        if done.tenant == "quiet":
            first.append(done.first_s - done.due_s)
    assert len(first) == 100
    added = QUANTUM * WEIGHTS["flood"] + DEAREST + OUTPUT_PRICE * NEW * (most + 1)
    return float(np.percentile(first, 95)), added * TOKEN_S


def test_a_flood_of_unique_texts_adds_no_more_to_a_quiet_tenants_p95_than_is_published():
    alone, _ = quiet_p95("fair", flooded=False)
    flooded, added = quiet_p95("fair", flooded=True)
    assert flooded <= alone + added


def test_in_order_of_arrival_the_flood_does_add_more():
    """The control of the test above."""
    alone, _ = quiet_p95("fcfs", flooded=False)
    flooded, added = quiet_p95("fcfs", flooded=True)
    assert flooded > alone + 5 * added
