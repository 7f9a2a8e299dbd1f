"""Audits: they see what a client would measure, change no answer, leave exact KV, and count no client's token."""

from __future__ import annotations

import time

import pytest
from harness import SYSTEMS, chat, sections, settled

from kvshare_sched.client.http import kl_divergence

# CacheBlend chooses by deviation alone, so a request that carries the answer too recomputes the same tokens.
# Every second approximate request of a tenant is audited, the first of them too.
ENVIRONMENT = {"KVSHARE_AUDIT_SHARE": "0.5", "KVSHARE_STRATEGY": "cacheblend"}
DOCS = sections()
DONE = 'kvshare_audits_total{reason="none",result="done"}'


def moved(server, *order) -> list[int]:
    return server.tokenize(chat(SYSTEMS[1], [DOCS[i] for i in order], "Which section is about names?"))


def wait_for_audits(server, count: float) -> dict[str, float]:
    """The metrics as soon as so many audits are done."""
    deadline = time.monotonic() + 60
    while (found := server.metrics())[DONE] < count and time.monotonic() < deadline:
        time.sleep(0.2)
    assert found[DONE] == count, {k: v for k, v in found.items() if "audit" in k and v}
    return server.metrics()  # once more: one scrape reads several files, and may miss what another just got


def kl_of(found: dict[str, float], tenant: str, span: str) -> float:
    label = f'{{span="{span}",tenant="{tenant}"}}'
    assert found[f"kvshare_tenant_audit_kl_nats_count{label}"] == 1
    return found[f"kvshare_tenant_audit_kl_nats_sum{label}"]


@pytest.fixture
def tenant(server):
    """A namespace whose tree holds one prompt over DOCS[0:4]."""
    return with_donor(server)


def with_donor(server) -> str:
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[0], DOCS[:4]), new_tokens=2, namespace=namespace)
    return namespace


def test_an_audit_finds_what_the_client_measures(server, tenant):
    prompt, before = moved(server, 2, 0, 3, 1), server.metrics()[DONE]
    warm = server.generate(prompt, new_tokens=16, namespace=tenant)
    assert settled(warm)["outcome"] == "reused"
    found = wait_for_audits(server, before + 1)

    cold, other = server.namespace(), with_donor(server)
    ids = server.likely_ids(prompt, warm.token_ids, cold)
    reference, _ = server.log_probabilities(prompt, warm.token_ids, ids, cold, reuse=False)
    ours, told = server.log_probabilities(prompt, warm.token_ids, ids, other, reuse=True)
    assert told["recomputed"] == warm.report["recomputed"]
    # Both are lower bounds of one divergence: the audit compares the 128 likeliest ids of each approximate
    # distribution one by one, the client those of all positions of the reference, some ten times as many; what
    # is left is one bucket. The coarser buckets hide some of the divergence (6 % here).
    assert kl_of(found, tenant, "sent") == pytest.approx(kl_divergence(reference, ours), rel=0.15)
    assert kl_of(found, tenant, "first") == pytest.approx(kl_divergence(reference[:1], ours[:1]), rel=0.15, abs=1e-4)
    wait_for_audits(server, before + 2)  # the request just measured was the first of its tenant


def test_the_answer_is_the_one_without_an_audit(server):
    prompt, before = moved(server, 3, 2, 1, 0), server.metrics()[DONE]
    tenant = server.namespace()

    def ask(salt: str) -> dict:
        body = server._body(chat(SYSTEMS[0], DOCS[:4]), 2, tenant, True, cache_salt=salt)
        server.post("/generate", body)
        return server.post("/generate", server._body(prompt, 16, tenant, True, cache_salt=salt)).json()

    audited, ordinary = ask("one"), ask("two")  # the same tenant twice: only its first request is audited
    for answer in (audited, ordinary):
        assert answer["meta_info"]["kvshare"]["outcome"] == "reused"
    assert audited["output_ids"] == ordinary["output_ids"]
    server.assert_idle_and_clean()
    wait_for_audits(server, before + 1)


def test_an_audited_text_becomes_an_exact_donor_and_counts_no_client_token(server, tenant):
    prompt, before, served = moved(server, 1, 3, 0, 2), server.metrics()[DONE], server.origins()
    warm = server.generate(prompt, new_tokens=4, namespace=tenant)
    assert settled(warm)["reused"] > 0.8 * len(prompt)
    found = wait_for_audits(server, before + 1)
    assert {o: n - served[o] for o, n in server.origins().items()} == {o: warm.report[o] for o in served}
    assert found["kvshare_audit_tokens_total"] >= len(prompt) + 4
    again = server.generate(prompt, new_tokens=4, namespace=tenant)
    assert settled(again)["exact"] >= len(prompt) - 1
    # The same text behind other words is now borrowed from the audit, as one run.
    behind = server.tokenize(chat(SYSTEMS[2], [DOCS[i] for i in (1, 3, 0, 2)]))
    assert settled(server.generate(behind, new_tokens=1, namespace=tenant))["donors"] == 1


def test_requests_that_share_nothing_are_not_audited(server):
    before = server.metrics()
    namespace = server.namespace()
    server.generate(chat(SYSTEMS[2], DOCS[8:10]), new_tokens=2, namespace=namespace)
    server.generate(chat(SYSTEMS[2], DOCS[8:10]), new_tokens=2, namespace=namespace, reuse=False)
    server.assert_idle_and_clean()
    after = server.metrics()
    assert {k: v for k, v in after.items() if "audit" in k} == {k: v for k, v in before.items() if "audit" in k}
