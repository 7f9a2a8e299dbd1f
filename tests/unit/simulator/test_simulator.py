"""The model of the engine: its cache, its costs, its loop, and that it loses nobody."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvshare_sched.errors import ConfigError
from kvshare_sched.scheduling.order import KEYS
from kvshare_sched.settings import KVShareConfig
from kvshare_sched.simulator import profile as profiles
from kvshare_sched.simulator import report, traffic
from kvshare_sched.simulator.cache import Cache
from kvshare_sched.simulator.engine import Engine
from kvshare_sched.simulator.profile import Profile
from kvshare_sched.simulator.traffic import Request

PROFILE = Profile(
    pass_s=0.05,
    row_s=0.001,
    key_s=0.0,
    copy_s=0.0,
    reuse_s=0.0,
    recompute=0.1,
    decode_s=((1, 0.02), (3, 0.04), (5, 0.05)),
    chunk=1000,
    capacity=20_000,
    running=64,
)
A, B, C = ("a", 400), ("b", 400), ("c", 400)


def ask(at_s, *blocks, tenant="t", session=None, step=0, new=1, **more) -> Request:
    return Request(at_s, tenant, session or f"{at_s}", step, blocks, new, **more)


def engine(policy="fcfs", profile=PROFILE, **settings) -> Engine:
    return Engine(profile, report.queue_of(policy, KVShareConfig(**settings), profile))


def ttft(done) -> list[float]:
    return [round(d.first_s - d.due_s, 6) for d in done]


# ---- cache ----


def test_a_prefix_is_exact_other_places_are_reused_and_tenants_are_apart():
    cache = Cache(10_000)
    cache.publish("t", (A, B))
    found = cache.find("t", (A, C, B, ("q", 10)))
    assert (found.exact, found.reused, found.lacks) == (400, 400, (C, ("q", 10)))
    assert found.gives == 1 and found.path == 2, "C stands before the first reused token, q behind it"
    assert cache.find("u", (A,)).lacks == (A,)


def test_short_blocks_and_a_server_without_reuse_reuse_nothing():
    cache = Cache(10_000)
    cache.publish("t", (("tiny", 20), A))
    assert cache.find("t", (B, ("tiny", 20))).reused == 0
    off = Cache(10_000, reuse=False)
    off.publish("t", (A, B))
    assert off.find("t", (B, A)).reused == 0 and off.find("t", (A, C)).exact == 400


def test_the_oldest_ends_of_paths_leave_first_and_touched_donors_stay():
    cache = Cache(10_000)
    for name in "abc":
        cache.publish("t", (("system", 50), (name, 400)))
    cache.touch("t", (("a", 400),))
    cache.shrink(900)
    assert cache.tokens == 850
    assert [cache.find("t", ((name, 400),)).reused for name in "abc"] == [400, 0, 400]
    cache.shrink(0)
    assert cache.tokens == 0 and cache.find("t", (("system", 50),)).exact == 0


# ---- costs ----


def test_decode_steps_lie_on_the_lines_between_what_was_measured():
    assert [PROFILE.decode(n) for n in (1, 2, 3, 4, 5, 7)] == pytest.approx([0.02, 0.03, 0.04, 0.045, 0.05, 0.06])


def test_a_decode_step_pays_for_the_tokens_it_looks_at():
    costs = replace(PROFILE, decode_key_s=1e-5)
    assert costs.decode(3, 5000) == pytest.approx(0.04 + 0.05)
    done = list(engine(profile=costs).run([ask(0.0, A, new=11)]))
    seen = sum(range(401, 411))
    assert done[0].end_s - done[0].first_s == pytest.approx(10 * 0.02 + seen * 1e-5)


def test_a_profile_is_read_as_it_was_written_and_anything_else_is_refused(tmp_path):
    path = tmp_path / "profile.json"
    profiles.write(path, PROFILE)
    assert profiles.read(path) == PROFILE
    path.write_text('{"row_s": 1}')
    with pytest.raises(ConfigError, match="profile_engine"):
        profiles.read(path)
    with pytest.raises(ConfigError, match="decode_s"):
        replace(PROFILE, decode_s=((3, 0.1), (1, 0.1)))


# ---- the loop ----


def test_times_add_up_by_hand():
    done = list(engine().run([ask(1.0, A, new=3), ask(1.1, B, new=1)]))
    assert [d.tenant for d in done] == ["t", "t"]
    by_due = sorted(done, key=lambda d: d.due_s)
    assert by_due[0].first_s == pytest.approx(1.0 + 0.05 + 0.4)
    assert by_due[1].first_s == pytest.approx(1.45 + 0.05 + 0.4), "waited for the first pass, before any decoding"
    assert by_due[0].end_s == pytest.approx(1.9 + 2 * 0.02)


def test_reuse_costs_its_recomputed_share():
    done = list(engine().run([ask(0.0, A, B), ask(10.0, B, A)]))
    assert ttft(done) == [0.85, 0.05 + 0.08]


def test_the_quadratic_part_counts_the_keys_each_row_sees():
    done = list(engine(profile=replace(PROFILE, key_s=1e-5)).run([ask(0.0, A, B)]))
    assert ttft(done) == [pytest.approx(0.05 + 0.8 + 800 * 400 * 1e-5)]


def test_a_long_prompt_is_cut_and_short_ones_run_beside_it_under_our_order():
    load = [ask(0.0, ("long", 3000)), ask(0.1, ("short", 100), tenant="u")]
    ours, theirs = list(engine("fair").run(load)), list(engine("fcfs").run(load))
    assert {d.prompt: round(d.first_s, 2) for d in ours}[100] == pytest.approx(2.1, abs=0.01)
    assert {d.prompt: round(d.first_s, 2) for d in theirs}[100] > 3


def test_a_step_that_quotes_an_answer_waits_for_it_and_finds_it_cached():
    first = ask(0.0, A, session="s", new=50)
    second = ask(0.1, A, ("s:answer/0", 50), ("q", 10), session="s", step=1, needs=(0,))
    done = list(engine().run([first, second]))
    assert done[1].due_s == pytest.approx(done[0].end_s)
    assert done[1].exact == 450


def test_duplicates_wait_and_reuse():
    load = [ask(0.0, A, B, session=str(n)) for n in range(3)]
    done = list(engine("fair").run(load))
    assert sorted(d.exact for d in done) == [0, 800, 800]


def test_what_is_borrowed_again_and_again_is_computed_once():
    """The price, 2 x 400 x 0.9, is paid after nine requests at 2 x 400 x 0.1 and exceeded after ten."""
    load = [ask(0.0, A, B)] + [ask(10.0 * n, B, A, (f"q{n}", 10)) for n in range(1, 14)]
    done = list(engine().run(load))
    assert [d.reused for d in done] == [0] + [800] * 10 + [0] * 3
    assert [d.exact for d in done] == [0] * 12 + [800] * 2


def test_the_second_turn_of_a_conversation_computes_what_the_first_borrowed():
    blocks, load = (B, A, ("q0", 10)), [ask(0.0, A, B)]
    for step in range(3):
        load.append(ask(10.0 + step, *blocks, session="s", step=step, new=40, needs=(step - 1,) if step else ()))
        blocks = (*blocks, (f"s:answer/{step}", 40), (f"q{step + 1}", 10))
    done = list(engine().run(load))[1:]
    assert [(d.exact, d.reused) for d in done] == [(0, 800), (0, 0), (900, 0)]


@pytest.mark.parametrize(("pool", "batches"), [(1250, 1), (1249, 2), (1100, 2), (1000, 3)])
def test_kv_in_the_tree_counts_once_and_stays_while_somebody_stands_on_it(pool, batches):
    """Three prompts of 900 tokens over one text of 800, 50 to come each: 800 + 3 x 150."""
    load = [ask(0.0, A, B), *(ask(10.0, A, B, (f"q{n}", 100), new=50, session=str(n)) for n in range(3))]
    done = list(engine(profile=replace(PROFILE, capacity=pool)).run(load))
    assert len({d.first_s for d in done[1:]}) == batches and [d.exact for d in done[1:]] == [800] * 3


def test_locked_text_is_not_evicted_and_is_free_again_afterwards():
    cache = Cache(10_000)
    cache.publish("t", (A, B))
    cache.publish("t", (A, C))
    for _ in range(2):
        cache.lock("t", (A, B), 1)
    assert cache.locked == 800
    cache.shrink(0)
    assert cache.tokens == 800 and cache.find("t", (A, B)).exact == 800
    cache.lock("t", (A, B), -1)
    assert cache.locked == 800
    cache.lock("t", (A, B), -1)
    cache.shrink(0)
    assert cache.tokens == cache.locked == 0


def test_a_quote_of_an_answer_that_never_comes_is_an_error_and_no_endless_loop():
    with pytest.raises(ConfigError, match="1 requests quote"):
        list(engine().run([ask(0.0, A), ask(0.0, B, session="s", step=1, needs=(0,))]))


@pytest.mark.parametrize("policy", KEYS)
def test_everybody_is_answered_once_in_order_of_time_and_two_runs_are_alike(policy):
    def run():
        return list(engine(policy, quantum=500).run(traffic.library(400, 7, rate=3.0, documents=20)))

    done = run()
    assert len(done) == 400 and done == run()
    assert all(d.due_s < d.first_s <= d.end_s for d in done)
    assert [d.end_s for d in done] == sorted(d.end_s for d in done)


def test_cheap_first_lowers_the_mean_and_nobody_starves():
    load = list(traffic.library(600, 1, rate=1.5, documents=60))
    found = {p: report.summary(engine(p, quantum=1 << 30).run(load))["ttft_s"] for p in ("fcfs", "fair")}
    assert found["fair"]["mean"] < 0.8 * found["fcfs"]["mean"]


# ---- traffic ----


def test_a_trace_of_the_load_test_is_read(tmp_path):
    rows = [
        {"trace": "x", "warm_up": 0},
        {"at_s": 2.0, "tenant": "t", "session": "s", "step": 1, "blocks": [["answer/0", 0], ["q", 9]], "new_tokens": 3},
        {"at_s": 1.0, "tenant": "t", "session": "s", "step": 0, "blocks": [["text/one two", 0]], "new_tokens": 7},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = traffic.read(path, rate=2.0)
    assert (first.at_s, first.prompt, first.needs) == (0.5, 3, ())
    assert (second.at_s, second.blocks, second.needs) == (1.0, (("s:answer/0", 7), ("q", 9)), (0,))
    path.write_text('{"at_s": 1, "blocks": 5}')
    with pytest.raises(ConfigError, match="kvshare bench"):
        list(traffic.read(path))


def test_made_up_traffic_is_seeded_and_arrives_at_its_rate():
    load = list(traffic.library(2000, 50, rate=5.0, seed=3))
    assert load == list(traffic.library(2000, 50, rate=5.0, seed=3)) != list(traffic.library(2000, 50, rate=5.0))
    assert 2000 / load[-1].at_s == pytest.approx(5.0, rel=0.1)
    assert len({r.tenant for r in load}) > 30


def test_the_report_has_means_percentiles_and_fairness():
    found = report.summary(engine().run([ask(0.0, A, new=3), ask(5.0, B, tenant="u")]))
    assert found["requests"] == 2 and found["tenants"] == 2
    assert found["ttft_s"]["mean"] == found["ttft_s"]["p50"] == pytest.approx(0.45)
    assert found["tpot_s"]["mean"] == pytest.approx(0.02)
    assert found["tenant_ttft_jain"] == pytest.approx(1.0)
    with pytest.raises(ConfigError, match="no request"):
        report.summary([])
