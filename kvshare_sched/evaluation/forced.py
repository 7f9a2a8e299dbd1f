"""Teacher forcing that decodes: the server says a given answer, and writes down what it would have said itself.

`Client.log_probabilities` puts the answer into the prompt, where nothing is decoded and nothing can be repaired while
decoding. Here a logit processor of SGLang's own interface takes the sampler's place; the server must run on this
machine, with --enable-custom-logit-processor.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor

from kvshare_sched.client.http import Client


class Forced(CustomLogitProcessor):
    """Runs in the server. Parameters of a request: `forced`, the token ids to say; `heard`, a file."""

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict]) -> torch.Tensor:
        for row, wish in zip(logits, custom_param_list, strict=True):
            with open(wish["heard"], "ab") as file:
                file.write(row.float().log_softmax(-1).cpu().numpy().tobytes())
            said = wish["forced"][wish["said"]]
            wish["said"] += 1  # the request's own dictionary: it lives as long as the request
            row.fill_(float("-inf"))
            row[said] = 0
        return logits


def decoded(client: Client, prompt: list[int], answer: list[int], namespace: str, reuse, file: Path) -> np.ndarray:
    """Log-probabilities of every id before each token of `answer`, float32 [len(answer), vocabulary].

    `reuse` as `Client.generate` takes it; `file` is written anew. Raises RuntimeError when the server did not reuse
    although asked to.
    """
    file.unlink(missing_ok=True)
    body = {
        "input_ids": prompt,
        "extra_key": namespace,
        "custom_logit_processor": Forced.to_str(),
        "sampling_params": {
            "temperature": 0,
            "max_new_tokens": len(answer),
            "ignore_eos": True,
            "custom_params": {
                "kvshare": reuse or "off",
                "forced": list(answer),
                "heard": str(file.resolve()),
                "said": 0,
            },
        },
    }
    report = client.post("/generate", body).json()["meta_info"].get("kvshare", {})
    if reuse and report.get("outcome") != "reused":
        raise RuntimeError(f"expected an answer with reuse; the server reported {report}")
    return np.fromfile(file, np.float32).reshape(len(answer), -1)
