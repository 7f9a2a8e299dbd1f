"""What the executor works out before any batch."""

import types

import torch

from kvshare_sched.executor import even_at


def test_attention_costs_what_the_products_cost_at_that_position():
    layer = torch.nn.Sequential(torch.nn.Linear(8, 24, bias=False), torch.nn.LayerNorm(24), torch.nn.Linear(24, 8))
    attention = types.SimpleNamespace(tp_q_head_num=2, qk_head_dim=4)
    products = 2 * (8 * 24 + 24 * 8)  # operations of a row; norms and biases are no products
    a_key = 4 * 2 * 4  # two operations for the score, two for the value, per head and dimension
    assert even_at(layer, attention) == products / a_key
