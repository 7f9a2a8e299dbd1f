"""The order of the waiting queue on a real server: in force, nobody lost, nobody charged for nothing."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

from harness import SMALL_CHUNKS, chat, sections, settled

ARGUMENTS, ENVIRONMENT = SMALL_CHUNKS
DOCS = sections()
SERVICE = 'kvshare_tenant_service_tokens{tenant="gone"}'


def busy(server, pool, seed: int):
    """A prompt of several chunks that is being computed; returns its future."""
    prompt = [(seed * 7919 + 31 * n * n) % 40_000 + 200 for n in range(1800)]
    running = pool.submit(server.generate, prompt, new_tokens=1, namespace=server.namespace())
    time.sleep(0.4)
    return running


def test_two_hundred_mixed_requests_all_get_their_answers(server):
    for n in range(4):
        server.generate(chat("Read.", DOCS[n : n + 1]), new_tokens=1, namespace=f"t{n % 3}")

    def ask(n: int):
        parts = DOCS[n % 4 : n % 4 + 1] if n % 50 else DOCS[8:14]
        tenant = ("t0", "t1", "t2", "gold")[n % 4]
        return server.generate(chat("Read.", parts, f"{n}?"), new_tokens=1 + n % 3, namespace=tenant)

    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(ask, range(200)))
    assert [len(a.token_ids) for a in answers] == [1 + n % 3 for n in range(200)]
    assert all(settled(a) for a in answers)
    found = server.metrics()
    assert found['kvshare_order_passes_total{result="failed"}'] == 0
    assert found['kvshare_order_passes_total{result="sorted"}'] > 10
    assert found["kvshare_order_rounds_total"] > 0, "tenants have spent their quanta and got new ones"
    assert found['kvshare_tenant_service_tokens{tenant="gold"}'] > 0


def test_a_short_prompt_overtakes_a_long_one_that_came_before(server):
    ended = []

    def ask(name: str, prompt) -> None:
        server.generate(prompt, new_tokens=1, namespace=server.namespace())
        ended.append(name)

    with ThreadPoolExecutor(3) as pool:
        busy(server, pool, 1)
        waiting = [pool.submit(ask, "long", chat("Long.", DOCS[14:20]))]
        time.sleep(0.1)  # so that the long one comes first; which ends first does not hang on it
        waiting.append(pool.submit(ask, "short", "Short."))
        for future in waiting:
            future.result()
    assert ended == ["short", "long"]


def test_an_abort_while_waiting_costs_its_tenant_nothing(server):
    with ThreadPoolExecutor(2) as pool:
        blocker = busy(server, pool, 2)
        body = server._body([*range(300, 1500)], 4, "gone", True) | {"rid": "abort-me"}
        waiting = pool.submit(server.post, "/generate", body)
        deadline = time.monotonic() + 30
        while SERVICE not in server.metrics() and time.monotonic() < deadline:
            time.sleep(0.02)  # until a pass has seen it wait
        server.post("/abort_request", {"rid": "abort-me"})
        assert waiting.exception() is not None or waiting.result().json()["meta_info"]["completion_tokens"] == 0
        blocker.result()
    server.generate("Look again.", new_tokens=1, namespace="anybody")
    assert server.metrics()[SERVICE] == 0
