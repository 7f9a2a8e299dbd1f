"""A small client of SGLang's /generate: time to first token, token origins, and how close two answers are."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import dataclass

import numpy as np
import requests

from kvshare_sched.quality.divergence import bucketed_kl

_TOP = 128  # ids of each reference position whose probabilities are compared one by one


@dataclass(frozen=True, slots=True)
class Answer:
    """One streamed answer."""

    ttft_s: float  # request sent -> first token received
    token_ids: tuple[int, ...]
    text: str  # empty from a server without a tokenizer
    report: dict  # meta_info["kvshare"], empty when the server has none
    prompt_tokens: int
    tpot_s: float | None = None  # mean time between two tokens after the first; None for one token


class Client:
    """One server; `namespace` keeps requests apart exactly as tenants are.

    `reuse`: True for the server's settings, False to opt out, or a dictionary of settings for this request.
    """

    def __init__(self, url: str):
        self.url = url
        self._http = requests.Session()

    def post(self, path: str, body: dict, **kwargs) -> requests.Response:
        """POST json; raises with the server's own words when it refuses."""
        response = self._http.post(self.url + path, json=body, timeout=900, **kwargs)
        if response.status_code != 200:
            raise RuntimeError(f"{path} answered {response.status_code}: {response.text[:500]}")
        return response

    def _body(self, prompt, new_tokens, namespace, reuse, **extra) -> dict:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens}
        if reuse is not True:
            sampling["custom_params"] = {"kvshare": reuse or "off"}
        key = "text" if isinstance(prompt, str) else "input_ids"
        return {key: prompt, "sampling_params": sampling, "extra_key": namespace, **extra}

    def generate(self, prompt, *, new_tokens: int, namespace: str, reuse: bool | dict = True) -> Answer:
        """Greedy answer, streamed. prompt: text or token ids."""
        body = self._body(prompt, new_tokens, namespace, reuse, stream=True)
        started, first, latest, last = time.perf_counter(), None, 0.0, {}
        with self.post("/generate", body, stream=True) as response:
            for line in response.iter_lines():
                if line.startswith(b"data: {"):
                    latest = time.perf_counter()
                    first = first or latest
                    last = json.loads(line[6:])
        meta, count = last["meta_info"], len(last["output_ids"])
        return Answer(
            first - started,
            tuple(last["output_ids"]),
            last.get("text", ""),
            meta.get("kvshare", {}),
            meta["prompt_tokens"],
            (latest - first) / (count - 1) if count > 1 else None,
        )

    def tokenize(self, prompt: str) -> list[int]:
        """Token ids as the server sees them."""
        return self.post("/tokenize", {"prompt": prompt, "model": "any"}).json()["tokens"]

    def context_length(self) -> int:
        """Tokens a request may have, prompt and answer together."""
        response = self._http.get(f"{self.url}/v1/models", timeout=60)
        response.raise_for_status()
        return response.json()["data"][0]["max_model_len"]

    def _teacher_forced(self, prompt: list[int], answer, namespace, reuse, **wanted) -> dict:
        body = self._body(
            [*prompt, *answer],
            1,
            namespace,
            reuse,
            return_logprob=True,
            logprob_start_len=len(prompt) - 1,
            **wanted,
        )
        return self.post("/generate", body).json()["meta_info"]

    def likely_ids(self, prompt: list[int], answer, namespace: str) -> list[int]:
        """Ids among the likeliest at any position of a reference answer."""
        meta = self._teacher_forced(prompt, answer, namespace, False, top_logprobs_num=_TOP)
        rows = [row for row in meta["input_top_logprobs"] if row]
        return sorted({entry[1] for row in rows for entry in row})

    def log_probabilities(
        self, prompt: list[int], answer, ids: list[int], namespace: str, *, reuse: bool | dict
    ) -> tuple[list[list[float]], dict]:
        """log p of each of `ids` at every answer token, and the report of that request."""
        meta = self._teacher_forced(prompt, answer, namespace, reuse, token_ids_logprob=ids)
        rows = [[entry[0] for entry in row] for row in meta["input_token_ids_logprobs"] if row]
        return rows, meta.get("kvshare", {})

    def first_log_probabilities(
        self, prompt: list[int], ids: list[int], namespace: str, *, reuse: bool | dict
    ) -> tuple[list[float], dict]:
        """log p of each of `ids` as the token after the prompt, and the report; the request holds no answer."""
        body = self._body(prompt, 1, namespace, reuse, return_logprob=True, token_ids_logprob=ids)
        meta = self.post("/generate", body).json()["meta_info"]
        return [entry[0] for entry in meta["output_token_ids_logprobs"][0]], meta.get("kvshare", {})


def kl_divergence(reference: list[list[float]], other: list[list[float]]) -> float:
    """Mean KL(reference || other) in nats over positions; ids beyond the compared ones form one bucket."""
    pairs = zip(np.asarray(reference, np.float64), np.asarray(other, np.float64), strict=True)
    return statistics.fmean(bucketed_kl(p, q) for p, q in pairs)
