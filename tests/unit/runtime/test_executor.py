"""What the executor works out before any batch."""

import types

import numpy as np
import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import CaptureHiddenMode

from kvshare_sched.engine.sglang.batches import even_at, read_rows
from kvshare_sched.methods.registry import get
from kvshare_sched.runtime.executor import Executor


def test_attention_costs_what_the_products_cost_at_that_position():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False), torch.nn.LayerNorm(24), torch.nn.Linear(24, 8))
    attention = types.SimpleNamespace(tp_q_head_num=2, qk_head_dim=4)
    products = 2 * (8 * 24 + 24 * 8)  # operations of a row; norms and biases are no products
    a_key = 4 * 2 * 4  # two operations for the score, two for the value, per head and dimension
    assert even_at(layer, attention) == products / a_key


@pytest.mark.parametrize(
    ("scored_from", "capture", "read"),
    [
        (None, CaptureHiddenMode.NULL, [4, 7]),  # two requests of five and three rows: the last of each
        ([3, 3], CaptureHiddenMode.NULL, [3, 4, 7]),  # 3 of 3: nothing of the second prompt is scored
        (None, CaptureHiddenMode.LAST, [0, 3, 4, 7]),
    ],
)
def test_the_last_layer_goes_on_with_the_rows_that_are_read(scored_from, capture, read):
    batch = types.SimpleNamespace(
        extend_seq_lens_cpu=[5, 3],
        return_logprob=scored_from is not None,
        extend_logprob_start_lens_cpu=scored_from,
        capture_hidden_mode=capture,
    )
    assert read_rows(batch, np.array([0, 3, 4, 7])).tolist() == read


def test_requests_of_a_batch_choose_for_themselves_and_the_host_waits_once(monkeypatch):
    """By the spread where nobody was asked, by who is looked at where a first pass ran; rows that must run stay."""
    fetched, fetch = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: fetched.append(len(self)) or fetch(self))

    def chunk(row, start, candidates, budget):
        session = types.SimpleNamespace(method=get("consensus"), config=types.SimpleNamespace(ratio=0.2))
        given = {"session": session, "row": row, "start": start, "candidates": np.array(candidates)}
        return types.SimpleNamespace(**given, budget=lambda share: budget)

    chunks = [chunk(0, 10, [1, 2, 3], 1), chunk(5, 2, [5, 6, 8], 2)]
    spread = {0: torch.tensor([9.0, 1.0, 3.0, 2.0, 9.0]), 5: torch.ones(5)}
    looked = {5: torch.tensor([9.0, 9.0, 0.5, 0.1, 9.0, 0.7, 9.0])}  # by position: rows 5 to 9 stand at 2 to 6
    keep = np.ones(10, bool)
    executor = types.SimpleNamespace(
        engine=types.SimpleNamespace(even_at=1e9), probes=types.SimpleNamespace(over_ranks=lambda sums: sums)
    )
    Executor._choose_by_score(executor, chunks, keep, looked, spread)
    assert np.flatnonzero(keep).tolist() == [0, 2, 4, 5, 7, 8, 9] and fetched == [3]
