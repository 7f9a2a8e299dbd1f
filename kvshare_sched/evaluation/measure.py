"""One case on a running server: donors, the full-prefill reference, every method over the same donors, controls.

What keeps the comparison fair: a request that reused enters neither the exact tree nor the donors, so one
namespace serves all methods; a full prefill would enter both, so the reference has a namespace of its own. Two
throwaway requests come first, and the reference's namespace gets the same exact head, so that nobody finds
more exact prefix than another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvshare_sched.client.http import Answer, Client, kl_divergence
from kvshare_sched.evaluation.cases import Case, Prompt
from kvshare_sched.evaluation.methods import Method

ANSWER_TOKENS = 24
_UNSCORED_TOKENS = 2  # generated where only the closeness of the reference's answer counts
_EXACT_TAIL = 48  # tokens behind the exact prefix of that control: fewer than `min_suffix`
_PROBE = {"strategy": "naive"}


@dataclass(frozen=True, slots=True)
class Reference:
    """Full prefill of one case."""

    prompt: list[int]
    answer: Answer
    ids: list[int]  # compared ids
    rows: list[list[float]]  # log p of `ids` at every answer token


class Bench:
    """Drives one server; `render` turns a prompt into token ids."""

    def __init__(self, client: Client, render: Callable[[Prompt], list[int]]):
        self.client = client
        self.render = render
        self._used = 0

    def run(self, case: Case, methods: Sequence[Method]) -> dict:
        """The case's row of the report: `methods` maps a name to its measures."""
        prompt = self.render(case.target)
        namespace, exact = self._donors(case, prompt)
        reference = self._reference(prompt, exact)
        found = {"full": _measures(case, reference, reference.rows, reference.answer)}
        found["noise_floor"] = self._noise_floor(case, reference)
        for method in methods:
            found[method.name] = self._method(case, reference, namespace, method)
            if found[method.name]["outcome"] != "reused":  # it ran in full: now an exact prefix of its own prompt
                namespace, _ = self._donors(case, prompt)
        found["exact_prefix"] = self._exact_prefix(case, reference, namespace)
        found["no_context"] = self._no_context(case)
        return {
            "name": case.name,
            "task": case.task,
            "donor_kind": case.donor_kind,
            "prompt_tokens": len(prompt),
            "answer_tokens": len(reference.answer.token_ids),
            "expected": list(case.expected),
            "methods": found,
        }

    def _namespace(self, purpose: str) -> str:
        self._used += 1
        return f"eval/{self._used}/{purpose}"

    def _donors(self, case: Case, prompt: list[int]) -> tuple[str, int]:
        """A namespace with the case's donors, and how much of the prompt is an exact prefix there."""
        namespace = self._namespace("donors")
        for earlier in case.donors:  # opted out: a donor is a prompt computed in full
            self.client.generate(self.render(earlier), new_tokens=1, namespace=namespace, reuse=False)
        for _ in range(2):  # the first publishes the head of the prompt, the second finds it
            probe = self.client.generate(prompt, new_tokens=1, namespace=namespace, reuse=_PROBE)
        return namespace, probe.report["exact"] if probe.report["outcome"] == "reused" else 0

    def _reference(self, prompt: list[int], exact: int) -> Reference:
        namespace = self._namespace("reference")
        if exact:
            self.client.generate(prompt[:exact], new_tokens=1, namespace=namespace, reuse=False)
        answer = self.client.generate(prompt, new_tokens=ANSWER_TOKENS, namespace=namespace, reuse=False)
        ids = self.client.likely_ids(prompt, answer.token_ids, namespace)
        rows, _ = self.client.log_probabilities(prompt, answer.token_ids, ids, namespace, reuse=False)
        return Reference(prompt, answer, ids, rows)

    def _method(self, case: Case, reference: Reference, namespace: str, method: Method) -> dict:
        prompt, ids = reference.prompt, reference.ids
        answer = self._answer(case, prompt, namespace, method.reuse)
        rows, _ = self.client.log_probabilities(prompt, reference.answer.token_ids, ids, namespace, reuse=method.reuse)
        first, _ = self.client.first_log_probabilities(prompt, ids, namespace, reuse=method.reuse)
        measures = _measures(case, reference, rows, answer)
        return measures | {"kl_first": kl_divergence(reference.rows[:1], [first])}

    def _answer(self, case: Case, prompt: list[int], namespace: str, reuse: bool | dict) -> Answer:
        tokens = ANSWER_TOKENS if case.expected else _UNSCORED_TOKENS
        return self.client.generate(prompt, new_tokens=tokens, namespace=namespace, reuse=reuse)

    def _noise_floor(self, case: Case, reference: Reference) -> dict:
        """A second full prefill in other chunks: what two exact runs differ by."""
        namespace, prompt = self._namespace("noise"), reference.prompt
        self.client.generate(prompt[: len(prompt) // 3], new_tokens=1, namespace=namespace, reuse=False)
        return self._exact_run(case, reference, namespace, False)

    def _exact_prefix(self, case: Case, reference: Reference, namespace: str) -> dict:
        """All but the prompt's last words become an exact prefix, among donors that could lend the same text."""
        head = reference.prompt[:-_EXACT_TAIL]
        self.client.generate(head, new_tokens=1, namespace=namespace, reuse=False)
        return self._exact_run(case, reference, namespace, True)

    def _exact_run(self, case: Case, reference: Reference, namespace: str, reuse: bool) -> dict:
        prompt, said = reference.prompt, reference.answer.token_ids
        answer = self._answer(case, prompt, namespace, reuse)
        rows, _ = self.client.log_probabilities(prompt, said, reference.ids, namespace, reuse=reuse)
        return _measures(case, reference, rows, answer) | {"ttft_s": None}  # part of the work was done before

    def _no_context(self, case: Case) -> dict | None:
        """The question without the documents; None where no answer is right or wrong."""
        if not case.expected:
            return None
        prompt, namespace = self.render(case.without_context), self._namespace("no-context")
        answer = self.client.generate(prompt, new_tokens=ANSWER_TOKENS, namespace=namespace, reuse=False)
        return {"task_score": case.score(answer.text), "swapped": case.swapped(answer.text), "text": answer.text}


def _measures(case: Case, reference: Reference, rows: list[list[float]], answer: Answer) -> dict:
    """Everything about one method in one case, in JSON types."""
    report, said = answer.report, reference.answer.token_ids
    likeliest = (reference.ids[max(range(len(row)), key=row.__getitem__)] for row in rows)
    return {
        "kl": kl_divergence(reference.rows, rows),
        "first_token_agreement": float(answer.token_ids[0] == said[0]),
        "greedy_agreement": sum(a == b for a, b in zip(likeliest, said, strict=True)) / len(said),
        "task_score": case.score(answer.text),
        "swapped": case.swapped(answer.text),
        "ttft_s": answer.ttft_s,
        "tpot_s": answer.tpot_s,
        "computed_cells": computed_share(report),
        "text": answer.text,
        **{k: report[k] for k in ("outcome", "reason", "exact", "reused", "recomputed", "fresh", "donors", "layers")},
        "cells": report["computed_cells"],
    }


def computed_share(report: dict) -> float:
    """Computed cells of the reused tokens over all of their cells; 1 when nothing was reused."""
    if not report["reused"]:
        return 1.0
    return (report["computed_cells"] - report["fresh"] * report["layers"]) / (report["reused"] * report["layers"])
