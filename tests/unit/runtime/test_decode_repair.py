"""Decode batches with repair rows: how they are built, and that the CPU backend attends to the right keys."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.runtime_context import get_parallel

from kvshare_kernels.reference import position_masked_attention
from kvshare_sched.engine.sglang.batches import Batch, SGLangEngine
from kvshare_sched.engine.sglang.cpu.attention import PortableCpuAttention
from kvshare_sched.reuse.repair_queue import RepairQueue
from kvshare_sched.reuse.session import Rids, attach
from kvshare_sched.runtime.decode_repair import DecodeRepair
from kvshare_sched.settings import KVShareConfig

H, G, D, CELLS = 6, 2, 8, 400
REQUEST = [3, 1, 2]  # request slot of each batch row
LENGTH = [40, 90, 25]  # seq_lens


class Pool:
    def __init__(self):
        self.k, self.v = torch.randn(2, CELLS, G, D, generator=torch.Generator().manual_seed(1))

    def get_key_buffer(self, layer):
        return self.k

    def get_value_buffer(self, layer):
        return self.v

    def set_kv_buffer(self, layer, where, k, v):
        self.k[where.loc.long()], self.v[where.loc.long()] = k.view(-1, G, D), v.view(-1, G, D)


@pytest.fixture
def runner():
    table = torch.randperm(CELLS, generator=torch.Generator().manual_seed(2))[: 4 * 100].view(4, 100).int()
    made = SimpleNamespace(
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=Pool(),
        model_config=SimpleNamespace(num_attention_heads=H, get_num_kv_heads=lambda ranks: G),
        dtype=torch.float32,
        lora_manager=None,
        device="cpu",
    )
    with get_parallel().override(attn_tp_size=1):
        made.attn_backend = PortableCpuAttention(made)
    made.model = SimpleNamespace(model=SimpleNamespace(layers=[None] * 4))
    return made


def decode_batch(runner):
    lengths = torch.tensor(LENGTH)
    mode = SimpleNamespace(is_decode=lambda: True, is_decode_or_idle=lambda: True)
    table = runner.req_to_token_pool.req_to_token
    return SimpleNamespace(
        forward_mode=mode,
        batch_size=3,
        rids=["a", "b", "c"],
        input_ids=torch.tensor([7, 8, 9]),
        positions=lengths - 1,
        req_pool_indices=torch.tensor(REQUEST),
        seq_lens=lengths,
        seq_lens_cpu=lengths.clone(),
        seq_lens_sum=sum(LENGTH),
        out_cache_loc=table[REQUEST, lengths - 1],
        orig_seq_lens=None,
    )


def with_rows(runner, batch, chosen):
    tokens = np.concatenate([1000 * row + p for row, p in chosen.items()])
    view = engine_of(runner).extend(Batch(batch.input_ids, batch.positions, batch), chosen, tokens)
    return view.forward, view.rows


def engine_of(runner):
    """SGLang's engine without a model that runs."""
    engine = object.__new__(SGLangEngine)
    engine.runner, engine.model, engine.layers, engine.decode_rows = runner, runner.model, 4, 1 << 30
    return engine


CHOSEN = {0: np.array([5, 6, 20]), 2: np.array([11])}


def test_repair_rows_stand_before_their_request(runner):
    batch = decode_batch(runner)
    view, own = with_rows(runner, batch, CHOSEN)
    assert own.tolist() == [3, 4, 6]
    assert view.batch_size == 7
    assert view.input_ids.tolist() == [5, 6, 20, 7, 8, 2011, 9]
    assert view.positions.tolist() == [5, 6, 20, 39, 89, 11, 24]
    assert view.seq_lens.tolist() == view.seq_lens_cpu.tolist() == [6, 7, 21, 40, 90, 12, 25]
    assert view.seq_lens_sum == int(view.seq_lens.sum())
    assert view.req_pool_indices.tolist() == [3, 3, 3, 3, 1, 2, 2]
    table = runner.req_to_token_pool.req_to_token
    assert view.out_cache_loc.tolist() == table[view.req_pool_indices, view.positions].tolist()
    assert batch.input_ids.tolist() == [7, 8, 9] and batch.seq_lens.tolist() == LENGTH, "the original is untouched"


@pytest.mark.parametrize("chosen", [CHOSEN, {1: np.arange(64)}, {0: np.array([0]), 1: np.array([80])}])
def test_every_row_sees_the_keys_up_to_its_own_position(runner, chosen):
    view, own = with_rows(runner, decode_batch(runner), chosen)
    check_attention(runner, view)


@pytest.mark.parametrize("few", [89, 90])
def test_short_requests_share_a_product_and_long_ones_do_not(runner, few, monkeypatch):
    monkeypatch.setattr("kvshare_sched.engine.sglang.cpu.attention._FEW_KEYS", few)
    batch = decode_batch(runner)
    runner.attn_backend.init_forward_metadata(batch)
    assert (runner.attn_backend.decode is None) == (max(LENGTH) > few)
    check_attention(runner, batch)


def check_attention(runner, view):
    rows = view.batch_size
    generator = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(rows, heads * D, generator=generator) for heads in (H, G, G))
    layer = SimpleNamespace(
        is_cross_attention=False,
        attn_type=AttentionType.DECODER,
        sliding_window_size=-1,
        logit_cap=0,
        qk_head_dim=D,
        v_head_dim=D,
        layer_id=0,
        tp_q_head_num=H,
        scaling=D**-0.5,
    )
    got = runner.attn_backend.forward_decode(q, k, v, layer, view).view(rows, H, D)
    pool, table = runner.token_to_kv_pool, runner.req_to_token_pool.req_to_token
    assert torch.equal(pool.k[view.out_cache_loc.long()], k.view(-1, G, D)), "repaired cells are written"
    for i in range(rows):
        slots = table[view.req_pool_indices[i], : view.seq_lens[i]].long()
        expected = position_masked_attention(
            q.view(rows, H, D)[i : i + 1], pool.k[slots], pool.v[slots], view.positions[i : i + 1], D**-0.5
        )
        torch.testing.assert_close(got[i : i + 1], expected, rtol=1e-4, atol=1e-5)


def rids(*sessions) -> Rids:
    """Of requests that all carry one id."""
    reqs = [SimpleNamespace(rid="same") for _ in sessions]
    for req, its in zip(reqs, sessions, strict=True):
        if its is not None:
            attach(req, its)
    return Rids(reqs)


def session(**changes):
    busy = SimpleNamespace(to_repair=True, approximate_from=5, repair=RepairQueue(np.arange(30), 2, "fifo"), **changes)
    busy.stop_repair = lambda: setattr(busy, "repair", None)
    return busy


def test_only_decode_batches_with_something_to_repair_take_rows(runner):
    batch, busy = decode_batch(runner), session()
    repair = DecodeRepair(SimpleNamespace(config=KVShareConfig()), engine_of(runner), None)
    given = Batch(batch.input_ids, batch.positions, batch)
    assert repair.waiting(given) == {}, "a batch that no scheduler has made"
    batch.rids = rids(None, busy, SimpleNamespace(to_repair=False))
    assert repair.waiting(given) == {1: busy}
    batch.forward_mode = SimpleNamespace(is_decode=lambda: False)
    assert repair.waiting(given) == {}


def test_a_failure_ends_repair_and_leaves_plain_decode(runner):
    batch, busy, calls = decode_batch(runner), session(), []
    runner.model.logits_processor = torch.nn.Identity()

    def ordinary(input_ids, positions, given):
        calls.append(given)
        if given is not batch:
            raise RuntimeError("no such luck")
        return "plain"

    engine = engine_of(runner)
    engine._forward = ordinary
    repair = DecodeRepair(SimpleNamespace(config=KVShareConfig()), engine, None)
    assert repair.forward({1: busy}, Batch(batch.input_ids, batch.positions, batch)) == "plain"
    assert len(calls) == 2 and calls[0].batch_size == 5
    assert busy.repair is None
    assert not runner.model.logits_processor._forward_pre_hooks
