"""Attention of selected rows beside SGLang's own backend: who computes which batch, and what the kernel is told."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sglang.srt.layers.radix_attention import AttentionType
from sglang.srt.model_executor import forward_context

from kvshare_kernels import reference, scattered
from kvshare_sched.engine.sglang import gpu_attention, support
from kvshare_sched.engine.sglang.batches import Batch, SGLangEngine
from kvshare_sched.errors import UnsupportedError

HEADS, GROUPS, DIM, SLOTS = 4, 2, 16, 120


class Kernel:
    """Planned and run as the real ones, computed by the reference."""

    def plan(self, rows):
        self.rows = rows

    def run(self, q, keys, values, scale, *, out):
        found, sums = reference.paged_attention(q, keys, values, self.rows, scale)
        return out.copy_(found), sums


class Ordinary:
    """SGLang's own backend."""

    def __init__(self):
        self.prepared = []

    def init_forward_metadata(self, batch):
        self.prepared.append(batch)

    def forward(self, q, k, v, layer, batch, save_kv_cache=True, **kwargs):
        return "ordinary", save_kv_cache, kwargs


class Pool:
    """Keys and values of one layer, slot by slot."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.keys, self.values = (torch.randn(SLOTS, GROUPS, DIM, generator=generator) for _ in range(2))

    def get_key_buffer(self, layer_id):
        return self.keys

    def get_value_buffer(self, layer_id):
        return self.values

    def set_kv_buffer(self, layer, place, k, v):
        self.keys[place.loc], self.values[place.loc] = k, v


LAYER = SimpleNamespace(layer_id=0, tp_q_head_num=HEADS, qk_head_dim=DIM, scaling=0.3)


@pytest.fixture
def rows():
    table = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(1)).view(3, 40).int()
    runner = SimpleNamespace(
        attn_backend=Ordinary(),
        req_to_token_pool=SimpleNamespace(req_to_token=table),
        token_to_kv_pool=Pool(),
        lora_manager=None,
    )
    return gpu_attention.RowAttention(runner, Kernel())


def batch(rows, sequences):
    """A view as the executor makes it, of (request, prefix, rows) triples; and its rows' slots."""
    requests, prefixes, lengths = (list(x) for x in zip(*sequences, strict=True))
    places = [(r, p + i) for r, p, n in sequences for i in range(n)]
    slots = torch.stack([rows.req_to_token_pool.req_to_token[r, p] for r, p in places]).long()
    return SimpleNamespace(
        extend_seq_lens_cpu=lengths,
        extend_prefix_lens_cpu=prefixes,
        req_pool_indices=torch.tensor(requests),
        out_cache_loc=slots,
    ), places


SCATTERED = [(2, 3, 2), (2, 9, 1), (2, 30, 4), (0, 0, 5), (0, 17, 1)]  # two requests, five runs


def test_scattered_rows_attend_to_their_own_request_up_to_their_position(rows):
    view, places = batch(rows, SCATTERED)
    rows.plan(view, np.array([0, 0, 0, 1, 1]))
    n = len(places)
    q, k, v = (torch.randn(n, h * DIM) for h in (HEADS, GROUPS, GROUPS))
    out = rows.forward(q, k.view(n, GROUPS, DIM), v.view(n, GROUPS, DIM), LAYER, view)
    pool, table = rows.token_to_kv_pool, rows.req_to_token_pool.req_to_token
    assert torch.equal(pool.keys[view.out_cache_loc], k.view(n, GROUPS, DIM))  # written before anybody attends
    for i, (request, position) in enumerate(places):
        slots = table[request, : position + 1].long()
        at = torch.tensor([position])
        query = q[i].view(1, HEADS, DIM)
        wanted = reference.position_masked_attention(query, pool.keys[slots], pool.values[slots], at, 0.3)
        assert torch.allclose(out[i], wanted.flatten(), atol=1e-5), (request, position)
    assert not rows.model_runner.attn_backend.prepared


def test_the_executor_submits_chosen_rows_of_two_requests(rows):
    """Rows picked out of a batch, as the executor picks them, see what their places in the prompts say."""
    whole, places = batch(rows, [(2, 3, 20), (0, 0, 12)])
    n = len(places)
    ids, positions = torch.arange(n), torch.tensor([p for _, p in places])
    whole.seq_lens, whole.extend_seq_lens, whole.extend_prefix_lens = (torch.zeros(2, dtype=torch.int32),) * 3
    engine = SimpleNamespace(row_attention=rows, runner=rows.model_runner)
    chosen = np.array([0, 1, 5, 6, 7, 19, 20, 24, 31])
    view = SGLangEngine.select(engine, Batch(ids, positions, whole), chosen).forward
    assert view.input_ids.tolist() == chosen.tolist() and view.batch_size == 6
    kernel = rows.kernel.rows
    assert kernel.positions.tolist() == [places[i][1] for i in chosen]
    assert kernel.qo_indptr.tolist() == [0, 6, 9] and kernel.kv_indptr.tolist() == [0, 23, 35]
    q = torch.randn(len(chosen), HEADS * DIM)
    out = rows.forward(q, None, None, LAYER, view)
    pool, table = rows.token_to_kv_pool, rows.req_to_token_pool.req_to_token
    for i, row in enumerate(chosen):
        request, position = places[row]
        slots = table[request, : position + 1].long()
        wanted = reference.position_masked_attention(
            q[i].view(1, HEADS, DIM), pool.keys[slots], pool.values[slots], torch.tensor([position]), 0.3
        )
        assert torch.allclose(out[i], wanted.flatten(), atol=1e-5), (request, position)


def test_what_is_not_to_be_saved_is_not(rows):
    view, places = batch(rows, SCATTERED)
    rows.plan(view, np.array([0, 0, 0, 1, 1]))
    before = rows.token_to_kv_pool.keys.clone()
    k = torch.ones(len(places), GROUPS, DIM)
    rows.forward(torch.randn(len(places), HEADS * DIM), k, k, LAYER, view, save_kv_cache=False)
    assert torch.equal(rows.token_to_kv_pool.keys, before)


def test_rows_without_gaps_stay_with_sglangs_backend(rows):
    view, places = batch(rows, [(2, 3, 5), (0, 0, 4)])
    rows.plan(view, np.array([0, 1]))
    assert rows.model_runner.attn_backend.prepared == [view]
    assert rows.forward(None, None, None, LAYER, view, False, sinks=1) == ("ordinary", False, {"sinks": 1})


def test_single_rows_need_no_plan_of_sglangs(rows):
    view, places = batch(rows, [(2, 39, 1), (0, 11, 1)])
    rows.plan(view, np.array([0, 1]))
    assert not rows.model_runner.attn_backend.prepared
    kernel = rows.kernel.rows
    assert kernel.positions.tolist() == [39, 11] and kernel.kv_indptr.tolist() == [0, 40, 52]
    assert kernel.kv_indices[[39, 51]].tolist() == view.out_cache_loc.tolist()


def test_a_batch_of_an_older_plan_is_an_error(rows):
    old, places = batch(rows, SCATTERED)
    rows.plan(old, np.array([0, 0, 0, 1, 1]))
    rows.plan(batch(rows, SCATTERED)[0], np.array([0, 0, 0, 1, 1]))
    with pytest.raises(RuntimeError, match="plan 1, but 2"):
        rows.forward(torch.zeros(len(places), HEADS * DIM), None, None, LAYER, old)


def test_layers_find_it_while_it_serves_and_only_then(rows):
    own = rows.model_runner.attn_backend
    with forward_context.forward_context(forward_context.ForwardContext(attn_backend=own)):
        with rows.serving():
            assert forward_context.get_attn_backend() is rows
            assert forward_context.get_token_to_kv_pool() is rows.token_to_kv_pool
        assert forward_context.get_attn_backend() is own


def module(**changes):
    shape = {"tp_q_head_num": 4, "tp_k_head_num": 2, "qk_head_dim": 64, "v_head_dim": 64, "logit_cap": 0.0}
    return SimpleNamespace(**(shape | {"attn_type": AttentionType.DECODER, "sliding_window_size": -1} | changes))


def runner(dtype=torch.bfloat16, shape=(8, 2, 64)):
    pool = SimpleNamespace(get_key_buffer=lambda layer: torch.empty(shape, dtype=dtype))
    return SimpleNamespace(dtype=torch.bfloat16, token_to_kv_pool=pool, req_to_token_pool=None)


@pytest.mark.parametrize(
    ("layers", "given", "says"),
    [
        ([module(), module(sliding_window_size=128)], {}, "2 shapes"),
        ([module(sliding_window_size=128)], {}, "window 128"),
        ([module(v_head_dim=128)], {}, "64/128"),
        ([module(attn_type=AttentionType.ENCODER_ONLY)], {}, "full causal"),
        ([module()], {"dtype": torch.float8_e4m3fn}, "kv-cache-dtype"),
        ([module()], {"shape": (8, 2, 16, 64)}, "SGLANG_USE_HND_KVCACHE"),
        ([module(qk_head_dim=80, v_head_dim=80)], {"shape": (8, 2, 80)}, "power of two"),
    ],
)
def test_what_no_kernel_serves_is_refused_by_name(layers, given, says):
    with pytest.raises(UnsupportedError, match=says):
        gpu_attention.create(runner(**given), dict(enumerate(layers)))


class Right(Kernel):
    def __init__(self, *shape, **options):
        self.heads, self.groups, self.dim, self.soft_cap = *shape, options["soft_cap"]

    def run(self, q, keys, values, scale):
        return reference.paged_attention(q, keys, values, self.rows, scale, self.soft_cap)


class Misaligned(Right):
    """Counts rows back from the last key, as a plain causal kernel would."""

    def plan(self, rows):
        last, counts = rows.positions[rows.qo_indptr[1:] - 1], np.diff(rows.qo_indptr)
        positions = [np.arange(m + 1 - n, m + 1) for m, n in zip(last, counts, strict=True)]
        self.rows = rows._replace(positions=np.concatenate(positions))


class Absent:
    def __init__(self, *shape, **options):
        raise ImportError("not here")


@pytest.mark.parametrize(
    ("flashinfer", "triton", "chosen"),
    [(Right, Absent, Right), (Misaligned, Right, Right), (Absent, Right, Right), (Absent, Misaligned, None)],
)
@pytest.mark.parametrize("soft_cap", [0.0, 30.0])
def test_the_first_kernel_that_computes_rightly_serves(flashinfer, triton, chosen, soft_cap, monkeypatch, caplog):
    monkeypatch.setattr(scattered, "FlashInferAttention", flashinfer)
    monkeypatch.setattr(scattered, "_triton", triton)
    layers = {0: module(logit_cap=soft_cap), 1: module(logit_cap=soft_cap)}
    if chosen is None:
        with pytest.raises(UnsupportedError, match="not here.*triton .off by"):
            gpu_attention.create(runner(), layers)
    else:
        kernel = gpu_attention.create(runner(), layers).kernel
        assert type(kernel) is chosen and kernel.soft_cap == soft_cap


def test_backends_and_models_that_would_go_wrong_on_a_gpu_are_refused():
    from sglang.srt.models import llama, qwen3_moe

    def refused(module, dtype, backend):
        model = type("Model", (), {"__module__": module.__name__})()
        return "\n".join(support._gpu_refusals(model, SimpleNamespace(dtype=dtype), backend))

    for backend in ("flashinfer", "fa3", "triton"):
        assert not refused(llama, torch.bfloat16, backend)
    assert "trtllm_mha" in refused(llama, torch.bfloat16, "trtllm_mha")
    assert "--dtype float16" in refused(qwen3_moe, torch.bfloat16, "fa3")
    assert not refused(qwen3_moe, torch.float16, "fa3")
