"""The published bound on the service gap, in the simulated engine: chunks, decoding, reuse and all."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare_sched.scheduling.fairness import Accounts, service_gap
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
    queue = Queue("fair", Accounts(quantum, dict(zip("fg", weights, strict=True))), 8, 50.0, 0.3)
    engine = Engine(profile, queue)
    requests = [
        Request(0.0, "fg"[n % 2], str(n), 0, ((f"doc{doc}", 150), (f"own{n}", own)), new)
        for n, (doc, own) in enumerate(prompts)
    ]
    left = dict.fromkeys("fg", len(prompts) // 2)
    gaps, most = [0.0], 1
    for done in engine.run(requests):
        left[done.tenant] -= 1
        waiting = {tenant: sum(name == tenant for name in queue._accounts) for tenant in "fg"}
        if not all(waiting.values()):
            break  # one of them is not backlogged any longer
        most = max(most, len(queue.running))
        served = queue.accounts.served
        gaps.append(served["f"] / weights[0] - served["g"] / weights[1])
    assert len(gaps) > 1
    bound = service_gap(150 + 900, (most + 1) * new, quantum, min(weights))
    assert max(gaps) - min(gaps) <= bound
