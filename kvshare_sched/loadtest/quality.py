"""How far the answers under load are from full prefill: KL on a few prompts that the server has just reused for."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from kvshare_sched.client.http import kl_divergence
from kvshare_sched.loadtest.runner import Player
from kvshare_sched.loadtest.traces import Request

_ANSWER_TOKENS = 16


def divergence(player: Player, requests: Sequence[Request]) -> dict:
    """KL(full || as served) in nats, teacher forced over full prefill's greedy answer, one prompt at a time.

    The reference is the same server, opted out, in a namespace of its own.
    """
    found, reused = [], 0
    for number, request in enumerate(requests):
        prompt, reference = player.prompt(request), f"quality/{request.tenant}/{number}"
        client = player.client
        full = client.generate(prompt, new_tokens=_ANSWER_TOKENS, namespace=reference, reuse=False)
        ids = client.likely_ids(prompt, full.token_ids, reference)
        rows = [
            client.log_probabilities(prompt, full.token_ids, ids, namespace, reuse=reuse)
            for namespace, reuse in ((reference, False), (request.tenant, True))
        ]
        found.append(kl_divergence(rows[0][0], rows[1][0]))
        reused += rows[1][1].get("outcome") == "reused"
    return {
        "prompts": len(found),
        "reused_prompts": reused,
        "kl_mean": round(statistics.fmean(found), 6),
        "kl_max": round(max(found), 6),
    }
