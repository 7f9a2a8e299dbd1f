"""A logit processor that makes the server say a given answer and writes down what it would have said."""

from __future__ import annotations

import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


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
