"""The prices the server measures at start-up, on a stand-in for a model runner."""

import time
from types import SimpleNamespace

import pytest
import torch

import kvshare_kernels
from kvshare_sched.engine.sglang.measure_costs import measure_costs

LAYERS = 3


def runner():
    layer = torch.nn.Module()
    layer.product = torch.nn.Linear(64, 128, bias=False)
    buffer = torch.zeros(300, 2, 32)
    pool = SimpleNamespace(get_key_buffer=lambda _: buffer, get_value_buffer=lambda _: buffer)
    model = SimpleNamespace(model=SimpleNamespace(layers=[layer] * LAYERS))
    return SimpleNamespace(model=model, token_to_kv_pool=pool)


@pytest.mark.parametrize(("token_s", "capped"), [(1e-7, False), (1e-3, True)], ids=["quick", "crawls"])
def test_a_copy_keeps_its_price_up_to_that_of_a_computed_cell(token_s, capped, monkeypatch):
    """What is dearer was measured on a machine that others hold."""
    now = [0.0]

    def clock():  # every piece of work takes a millisecond, and a copied token its time on top
        now[0] += 1e-3
        return now[0]

    def copies(keys, values, runs, cos_sin, neox):
        now[0] += token_s * len(runs[0][0])

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(kvshare_kernels, "copy_rotate", copies)
    costs = measure_costs(runner(), torch.zeros(300, 32), True)
    assert costs.layers == LAYERS and costs.cell_s > token_s * (not capped) and costs.overhead_s > 0
    assert costs.pass_rows > 0 and costs.copy_s == pytest.approx(costs.cell_s if capped else token_s, rel=0.01)


def test_quantised_weights_have_a_price_too(monkeypatch):
    """On a GPU torch has no plain product of FP8 or packed numbers; a cell then costs what moving its bytes does."""

    def refuse(a, b):
        raise RuntimeError("addmm_cuda not implemented for Float8_e4m3fn")

    monkeypatch.setattr(torch.Tensor, "__matmul__", refuse)
    costs = measure_costs(runner(), torch.zeros(300, 32), True)
    assert costs.cell_s > 0 and 0 <= costs.copy_s <= costs.cell_s and costs.overhead_s > 0 and costs.pass_rows == 0
