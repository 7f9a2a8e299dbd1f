"""Teacher forcing that decodes: the server says a given answer, and writes down what it would have said itself.

`Client.log_probabilities` puts the answer into the prompt, where nothing is decoded and nothing can be repaired while
decoding. Here a logit processor of SGLang's own interface takes the sampler's place; the server must run on this
machine, with --enable-custom-logit-processor.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvshare_sched.client.http import Client
from kvshare_sched.engine.sglang.forced_answers import Forced


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
