"""The prices the server measures at start-up, on a stand-in for a model runner."""

import time
from types import SimpleNamespace

import pytest
import torch

import kvshare_kernels
from kvshare_sched.wiring import _measure_costs

LAYERS = 3


def runner():
    layer = torch.nn.Module()
    layer.product = torch.nn.Linear(64, 128, bias=False)
    buffer = torch.zeros(300, 2, 32)
    pool = SimpleNamespace(get_key_buffer=lambda _: buffer, get_value_buffer=lambda _: buffer)
    model = SimpleNamespace(model=SimpleNamespace(layers=[layer] * LAYERS))
    return SimpleNamespace(model=model, token_to_kv_pool=pool)


def test_prices_are_positive_and_a_copied_token_never_dearer_than_a_computed_cell(monkeypatch):
    def crawls(keys, values, runs, cos_sin, neox):  # a machine that others hold: a copy takes its tokens' time
        time.sleep(2e-5 * len(runs[0][0]))

    monkeypatch.setattr(kvshare_kernels, "copy_rotate", crawls)
    costs = _measure_costs(runner(), torch.zeros(300, 32), True)
    assert costs.layers == LAYERS and costs.cell_s > 0 and costs.overhead_s > 0 and costs.pass_rows > 0
    assert costs.copy_s == costs.cell_s


def test_a_cheap_copy_keeps_its_price(monkeypatch):
    now = [0.0]

    def clock():  # every piece of work takes a millisecond, and a copy 0.1 us a token on top
        now[0] += 1e-3
        return now[0]

    def copies(keys, values, runs, cos_sin, neox):
        now[0] += 1e-7 * len(runs[0][0])

    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(kvshare_kernels, "copy_rotate", copies)
    costs = _measure_costs(runner(), torch.zeros(300, 32), True)
    assert costs.copy_s == pytest.approx(1e-7, rel=0.01) and costs.copy_s < costs.cell_s
