"""Stage `prefill`: the time to the first token of a decoder in plain torch around our operators, reuse off and on.

It needs no SGLang: it says what the operators and the schedule of spans are worth at a model's shape before an engine's
own costs come in. Weights are random numbers of the real size. Off: all rows through all layers, torch's causal
attention. On: what the executor does for a text with one donor under `consensus`: copies, a first pass of the fresh
rows, the choice (the one wait for the device), then the chosen rows, the last layer going on with the last row alone.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from kvshare_kernels import PagedRows, attention_column_mass, copy_rotate, on_device, top_k
from kvshare_sched.methods.consensus import early_layers

from .kernels import attentions, causal, rotary
from .results import Results, seconds
from .shapes import SHAPES, Shape

_VOICES = 16  # as in the executor


class Decoder:
    """Random weights, a KV pool of 2 x `tokens` slots: the first half is the donor's."""

    def __init__(self, shape: Shape, tokens: int, device: str, dtype=torch.bfloat16):
        self.shape, self.tokens, self.device, self.dtype = shape, tokens, device, dtype
        width = shape.heads * shape.dim

        def matrix(out, into):
            return torch.empty(out, into, device=device, dtype=dtype).normal_(std=into**-0.5)

        qkv = (shape.heads + 2 * shape.groups) * shape.dim
        sizes = ((qkv, shape.hidden), (shape.hidden, width), (2 * shape.inner, shape.hidden))
        self.layers = [
            (*(matrix(*size) for size in sizes), matrix(shape.hidden, shape.inner)) for _ in range(shape.layers)
        ]
        self.head = matrix(shape.vocabulary, shape.hidden)
        self.norm = torch.ones(shape.hidden, device=device, dtype=dtype)
        self.embedded = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        self.table = rotary(shape, 2 * tokens, device)
        size = (2 * tokens, shape.groups, shape.dim)
        self.keys, self.values = (
            [torch.randn(size, device=device, dtype=dtype) for _ in range(shape.layers)] for _ in range(2)
        )
        self.own = torch.arange(tokens, 2 * tokens, device=device)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        cos, sin = self.table[positions].to(self.dtype).chunk(2, dim=-1)
        cos, sin = cos[:, None], sin[:, None]
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def layer(self, i: int, hidden: torch.Tensor, positions: torch.Tensor, attend, going_on=None) -> torch.Tensor:
        """One layer over rows [n, hidden] at `positions`; attend(q, i) reads the pool. going_on: rows that leave it."""
        shape = self.shape
        qkv, out, up, down = self.layers[i]
        mixed = F.linear(F.rms_norm(hidden, (shape.hidden,), self.norm), qkv).view(len(hidden), -1, shape.dim)
        q, k, v = mixed.split((shape.heads, shape.groups, shape.groups), dim=1)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        self.keys[i].index_copy_(0, self.own[positions], k)
        self.values[i].index_copy_(0, self.own[positions], v)
        if going_on is not None:
            q, hidden = q[going_on], hidden[going_on]
        hidden = hidden + F.linear(attend(q, i).reshape(len(hidden), -1), out)
        gate, value = F.linear(F.rms_norm(hidden, (shape.hidden,), self.norm), up).chunk(2, dim=-1)
        return hidden + F.linear(F.silu(gate) * value, down)

    def _answered(self, hidden: torch.Tensor) -> torch.Tensor:
        logits = F.linear(F.rms_norm(hidden[-1:], (self.shape.hidden,), self.norm), self.head)
        logits.argmax().cpu()
        return logits

    def off(self) -> torch.Tensor:
        """Full prefill; the host waits for the logits' likeliest token. Returns the logits."""
        positions = torch.arange(self.tokens, device=self.device)

        def attend(q, i):
            k, v = self.keys[i][self.tokens :], self.values[i][self.tokens :]
            q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            return causal(q, k, v)[0].transpose(0, 1)

        hidden = self.embedded
        for i in range(self.shape.layers):
            hidden = self.layer(i, hidden, positions, attend)
        return self._answered(hidden)

    def on(self, kernel, fresh: np.ndarray, share: float) -> tuple[torch.Tensor, int]:
        """The same with all but the `fresh` rows reused, a share of those computed anew; and the cells computed."""
        depth, scale = self.shape.layers, self.shape.dim**-0.5
        runs = [(old, new, 1 - 2 * (i % 2)) for i, (old, new) in enumerate(self._runs())]
        copy_rotate(self.keys, self.values, runs, self.table, neox=True)

        def attend(q, i):
            return kernel.run(q, self.keys[i], self.values[i], scale)[0]

        heard = []

        def attend_and_hear(q, i):
            heard.append(q[-_VOICES:])
            return attend(q, i)

        mass = torch.zeros(self.tokens, device=self.device)
        rows, positions = self._plan(kernel, fresh)
        hidden, looking = self.embedded[positions], early_layers(depth)
        for i in range(looking.stop):
            hidden = self.layer(i, hidden, positions, attend_and_hear)
            if i in looking:
                keys = self.keys[i][self.tokens :]
                mass += attention_column_mass(heard[-1], keys, positions[-_VOICES:], scale)
        mass[positions] = 0
        (chosen,) = top_k([mass], [int(share * (self.tokens - len(fresh)))])
        rows, positions = self._plan(kernel, np.union1d(fresh, chosen))
        hidden = self.embedded[positions]
        for i in range(depth - 1):
            hidden = self.layer(i, hidden, positions, attend)
        last = torch.tensor([len(positions) - 1])
        self._plan(kernel, rows[-1:])
        hidden = self.layer(depth - 1, hidden, positions, attend, on_device(last.numpy(), positions))
        return self._answered(hidden), len(rows) * depth + len(fresh) * looking.stop

    def _runs(self):
        """Donor and own slots of documents of 1,024 tokens."""
        size = min(1024, self.tokens // 2)
        return zip((self.own - self.tokens).split(size), self.own.split(size), strict=True)

    def _plan(self, kernel, rows: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
        seen = int(rows[-1]) + 1
        slots = self.own[:seen].int()
        kernel.plan(PagedRows.checked(rows, [0, len(rows)], [0, seen], slots))
        return rows, on_device(rows, self.own)


def run(results: Results, shapes: list[str], lengths: list[int], shares: list[float], device: str) -> None:
    """Every shape at every length; the ratio without reuse is measured once."""
    for name in shapes:
        shape = SHAPES[name]
        kernels = attentions(shape, device)
        chosen = next(iter(kernels))  # as the engine chooses
        for tokens in lengths:
            model, end = Decoder(shape, tokens, device), min(64, tokens // 8)
            fresh = np.concatenate((np.arange(end // 2), np.arange(tokens - end, tokens)))
            with torch.inference_mode():
                off = seconds(model.off, device=device, repeats=3)
                for share in shares:
                    reused = partial(model.on, kernels[chosen], fresh, share)
                    on = seconds(reused, device=device, repeats=5)
                    computed = reused()[1] / (tokens * shape.layers)
                    results.add(
                        model_shape=name, engine="plain torch", attention=chosen, prompt_tokens=tokens,
                        ratio=share, ttft_off_s=off, ttft_on_s=on, ttft_ratio=off / on, computed_cells=computed,
                        share_of_limit=off * computed / on,
                    )  # fmt: skip
            del model, reused
            if device != "cpu":
                torch.cuda.empty_cache()
