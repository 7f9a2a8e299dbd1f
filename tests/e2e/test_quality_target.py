"""A target nobody can hold, on three tensor-parallel ranks: donors are shut, then the tenant, and nobody hangs."""

from __future__ import annotations

import time

from harness import SYSTEMS, chat, sections, settled

from kvshare_sched.quality.controller import ENOUGH

# The rule that recomputes nothing, at the highest ratio from the start: there is nothing left to raise.
ARGUMENTS = ["--tp-size", "3"]
ENVIRONMENT = {
    "SGLANG_CPU_OMP_THREADS_BIND": "0|1|1",
    "KVSHARE_AUDIT_SHARE": "1",
    "KVSHARE_STRATEGY": "naive",
    "KVSHARE_RATIO": "0.5",
    "KVSHARE_TARGET_KL": "1e-6",
}
DOCS = sections(3, 60)  # short: three ranks share two cores, and every prompt is computed twice


def test_harm_is_found_and_stopped_within_a_few_requests(server):
    tenant = server.namespace()
    off = f'kvshare_controller_off{{tenant="{tenant}"}}'
    server.generate(chat(SYSTEMS[0], DOCS[:3]), new_tokens=1, namespace=tenant)
    answers = []
    for i in range(ENOUGH + 1):  # documents 0 to 2 behind other words each time
        audits = sum(v for k, v in server.metrics().items() if k.startswith("kvshare_audits_total"))
        prompt = chat(f"You are number {i}.", [DOCS[(i + k) % 3] for k in range(3)])
        answers.append(settled(server.generate(prompt, new_tokens=2, namespace=tenant)))
        deadline = time.monotonic() + 60
        while answers[-1]["outcome"] == "reused" and time.monotonic() < deadline:
            found = server.metrics()
            if sum(v for k, v in found.items() if k.startswith("kvshare_audits_total")) > audits:
                break
            time.sleep(0.2)
    assert [a["outcome"] for a in answers] == ["reused"] * ENOUGH + ["ordinary"]
    assert answers[-1]["reason"] == "quality"
    found = server.metrics()
    assert found['kvshare_audits_total{reason="none",result="done"}'] == ENOUGH
    assert found[off] == 1 and found["kvshare_sources_shut_total"] >= 1
    # Whoever brings settings of their own is served, measured, and moves nothing.
    own = server.generate(
        chat("You ask.", DOCS[:3]), new_tokens=2, namespace=tenant, reuse={"strategy": "dhd", "ratio": 0.3}
    )
    assert settled(own)["outcome"] == "reused"
    assert server.metrics()[off] == 1
