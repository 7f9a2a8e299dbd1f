"""FlashInfer's road: what it is given, checked with a stand-in that computes what was planned; the variant's CUDA text
compiled where there is a compiler; the real thing on a GPU."""

import importlib.util
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from samples import no_host_waits
from test_paged_attention import inputs, mixed, paged

from kvshare_kernels import PagedRows, flashinfer_ragged, reference, scattered
from kvshare_kernels.flashinfer_ragged import FlashInferAttention

pytestmark = pytest.mark.xdist_group("flashinfer")  # its compiler takes all cores and much memory
CUDA = Path(__file__).parent / "cuda"
KERNELS = Path(flashinfer_ragged.__file__).parent


class StandIn:
    """FlashInfer's prefill wrapper as documented for 0.7.2, computed by the reference from what it is given."""

    def __init__(self, workspace, layout, *, backend="auto", jit_args=None, jit_kwargs=None, variant_owns_mask=False):
        assert layout == "NHD" and variant_owns_mask == (jit_args is not None) and (backend == "fa2" or not jit_args)
        assert jit_args is None or len(jit_args) == 13 and "PositionMask" in jit_args[12]
        self.variant = variant_owns_mask

    def plan(
        self, qo_indptr, kv_indptr, kv_indices, last_page, heads, groups, dim, page, *,
        causal=False, custom_mask=None, sm_scale=None, logits_soft_cap=None, q_data_type,
    ):  # fmt: skip
        assert page == 1 and len(last_page) == len(qo_indptr) - 1 and not causal
        self.qo, self.kv, self.indices, self.mask = qo_indptr.numpy(), kv_indptr.numpy(), kv_indices, custom_mask
        # The FA2 template counts keys by the pages, FA3 so: they must agree on a sequence of no keys.
        assert torch.equal((kv_indptr.diff() - 1).clamp(min=0) * page + last_page, kv_indptr.diff())
        self.scale, self.cap = sm_scale, logits_soft_cap or 0.0

    def run(self, q, pages, *extra, q_scale=None, out=None, return_lse):
        assert return_lse and all(p.shape[1] == 1 for p in pages)
        rows, keys = np.diff(self.qo), np.diff(self.kv)
        last = np.repeat(keys, rows) - 1  # without a mask a row sees all keys of its sequence
        scale, cap = None if self.variant else self.scale * q_scale, self.cap
        if self.variant:
            last, scale, cap = extra[0].numpy(), *extra[1:]
        elif self.mask is not None:  # a row sees the keys of its line of the mask
            lines = self.mask.split((rows * keys).tolist())
            last = torch.cat([x.view(n, m).sum(dim=1) - 1 for x, n, m in zip(lines, rows, keys, strict=True)]).numpy()
        k, v = (p[:, 0] for p in pages)
        found, sums = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf)
        for i in np.flatnonzero(keys):
            mine, slots = slice(*self.qo[i : i + 2]), self.indices[slice(*self.kv[i : i + 2])]
            one = PagedRows(last[mine], np.array([0, rows[i]]), np.array([0, keys[i]]), slots)
            found[mine], sums[mine] = reference.paged_attention(q[mine], k, v, one, scale, cap)
        return (found if out is None else out.copy_(found)), sums / np.log(2)


def merge_state_in_place(v, s, v_other, s_other):
    """As documented: sums to base 2, one of the two may be of no keys at all."""
    whole = torch.logaddexp2(s, s_other)
    v.copy_(v.float() * (s - whole).exp2()[..., None] + v_other.float() * (s_other - whole).exp2()[..., None])
    s.copy_(whole)


@pytest.fixture
def stand_in(monkeypatch):
    there = {"BatchPrefillWithPagedKVCacheWrapper": StandIn, "merge_state_in_place": merge_state_in_place}
    monkeypatch.setitem(sys.modules, "flashinfer", types.SimpleNamespace(**there))


@pytest.fixture(params=[0, 10**9], ids=["in two parts", "masked only"])
def road(request, monkeypatch):
    """Whether keys that all rows of a block see go to a kernel without a mask."""
    monkeypatch.setattr(flashinfer_ragged, "_ENOUGH", request.param)
    return request.param == 0


@pytest.mark.parametrize("packed_mask", [False, True])
@pytest.mark.parametrize("soft_cap", [0.0, 2.0])
def test_what_flashinfer_is_given_says_what_is_meant(packed_mask, soft_cap, road, stand_in):
    options = {"soft_cap": soft_cap, "dtype": torch.bfloat16, "device": "cpu", "packed_mask": packed_mask}
    attention = FlashInferAttention(8, 2, 64, **options)
    for rows in (mixed("cpu"), paged([900], [np.arange(3, 900, 3)], "cpu")):
        q, k, v = inputs(rows, (8, 2), 64, torch.bfloat16, "cpu")
        attention.plan(rows)
        out = torch.empty_like(q)
        found, sums = attention.run(q, k, v, 0.5, out=out)
        wanted, wanted_sums = reference.paged_attention(q, k, v, rows, 0.5, soft_cap)
        assert found is out and attention.sharing is road
        assert torch.allclose(out.float(), wanted.float(), atol=2e-2)
        assert torch.allclose(sums, wanted_sums, atol=1e-3)


def test_self_test_takes_both_roads(stand_in, monkeypatch):
    """What it does not run would be built, or found wrong, in front of a user."""
    roads, plan = [], FlashInferAttention.plan
    monkeypatch.setattr(FlashInferAttention, "plan", lambda a, rows: (plan(a, rows), roads.append(a.sharing)))
    _, kernel = next(scattered.kernels(8, 2, 64, dtype=torch.bfloat16, device="cpu"))
    assert isinstance(kernel, FlashInferAttention) and roads == [False, True]


def test_self_test_finds_a_key_too_many(stand_in, monkeypatch):
    plan = FlashInferAttention.plan

    def generous(attention, rows):
        last = np.repeat(np.diff(rows.kv_indptr) - 1, np.diff(rows.qo_indptr))
        plan(attention, rows._replace(positions=np.minimum(rows.positions + 1, last)))

    monkeypatch.setattr(FlashInferAttention, "plan", generous)
    name, why = next(scattered.kernels(8, 2, 64, dtype=torch.bfloat16, device="cpu"))
    assert name == "flashinfer" and "off by" in why


def test_shapes_it_does_not_serve_are_refused(stand_in):
    for wrong in ({"dtype": torch.float32}, {"dim": 96}, {"groups": 3}):
        given = {"heads": 8, "groups": 2, "dim": 64, "device": "cpu"} | wrong
        with pytest.raises(ValueError, match="give a multiple"):
            FlashInferAttention(**given)
    attention = FlashInferAttention(8, 2, 64, device="cpu")
    rows = mixed("cpu")
    attention.plan(rows)
    q, k, v = inputs(rows, (8, 2), 64, torch.bfloat16, "cpu")
    for wrong in ((q[1:], k, v), (q, k.float(), v)):
        with pytest.raises(ValueError, match="planned for"):
            attention.run(*wrong, 0.1)


@pytest.mark.parametrize("target", [80, 90])
def test_variant_compiles(target, tmp_path):
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if compiler is None:
        pytest.skip("needs nvcc")
    include = ["-I", str(KERNELS), "-I", str(CUDA)]
    if (found := importlib.util.find_spec("flashinfer")) and found.origin:
        include += ["-DWITH_FLASHINFER", "-I", str(Path(found.origin).parent / "data" / "include")]
    command = [compiler, "-std=c++17", *include, f"-gencode=arch=compute_{target},code=sm_{target}"]
    done = subprocess.run(
        [*command, "-c", str(CUDA / "position_mask.cu"), "-o", str(tmp_path / "out.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_variant_hides_what_stands_behind_a_row_and_scales_as_the_reference(tmp_path):
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / "on_host"
    command = [
        compiler,
        "-std=c++17",
        "-I",
        str(KERNELS),
        "-I",
        str(CUDA),
        str(CUDA / "on_host.cpp"),
        "-o",
        str(program),
    ]
    subprocess.run(command, check=True)
    lines = subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()
    positions, seen_by_capped = {0: [1, 4, 5], 1: [0, 2]}, len(lines) // 2
    assert len(lines) == 2 * (5 * 7 + 4 * 3)
    for number, line in enumerate(lines):
        *place, score = line.split()
        sequence, row, key, seen = map(int, place)
        mine = positions[sequence]
        assert seen == (row < len(mine) and key <= mine[row]), line
        scaled = 0.5 * 0.25 * (key - 3)
        wanted = 2.0 * np.tanh(scaled / 2.0) if number >= seen_by_capped else scaled
        assert float(score) == pytest.approx(wanted / np.log(2), abs=1e-5)  # FlashInfer's softmax is to base 2


# ---- on a GPU ----


@pytest.fixture(scope="module")
def flashinfer():
    return pytest.importorskip("flashinfer")


# Every dtype, head dimension and mask is minutes of compiling where FlashInfer comes without its built kernels.
@pytest.mark.gpu
@pytest.mark.parametrize("packed_mask", [False, True])
@pytest.mark.parametrize("heads", [(32, 8), (28, 4), (9, 3)], ids=str)
def test_flashinfer_equals_the_reference(flashinfer, packed_mask, heads, road, device):
    check(flashinfer, heads, 128, torch.bfloat16, device, packed_mask=packed_mask)


@pytest.mark.gpu
def test_flashinfer_at_another_size(flashinfer, device):
    check(flashinfer, (9, 3), 64, torch.float16, device)


def check(flashinfer, heads, dim, dtype, device, **options):
    attention = FlashInferAttention(*heads, dim, dtype=dtype, device=device, **options)
    for rows in (mixed(device), paged([900], [np.arange(3, 900, 3)], device), paged([900], [np.array([899])], device)):
        q, k, v = inputs(rows, heads, dim, dtype, device)
        attention.plan(rows)
        out, sums = attention.run(q, k, v, dim**-0.5)
        wanted, wanted_sums = reference.paged_attention(q, k, v, rows, dim**-0.5)
        assert torch.allclose(out.float(), wanted.float(), rtol=1.6e-2, atol=1.6e-2)
        assert torch.allclose(sums, wanted_sums, rtol=1e-3, atol=2e-3)


@pytest.mark.gpu
def test_the_host_does_not_wait_for_flashinfer(flashinfer, road, device):
    attention = FlashInferAttention(32, 8, 128, device=device)
    rows = mixed(device)
    q, k, v = inputs(rows, (32, 8), 128, torch.bfloat16, device)

    def work():
        attention.plan(rows)
        attention.run(q, k, v, 0.1)

    work()  # built
    with no_host_waits():
        work()


@pytest.mark.gpu
def test_flashinfer_with_a_soft_cap(flashinfer, device):
    rows = mixed(device)
    attention = FlashInferAttention(8, 2, 64, soft_cap=2.0, dtype=torch.float16, device=device)
    attention.plan(rows)
    assert not attention.sharing  # else one more kernel to build
    q, k, v = (x * 2 for x in inputs(rows, (8, 2), 64, torch.float16, device))
    wanted, _ = reference.paged_attention(q, k, v, rows, 0.5, 2.0)
    assert torch.allclose(attention.run(q, k, v, 0.5)[0].float(), wanted.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_flashinfers_causal_mask_fails_this_comparison(flashinfer, device):
    """Its ordinary causal prefill counts rows back from the last key: right without gaps, wrong with them."""
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    wrapper = BatchPrefillWithPagedKVCacheWrapper(torch.empty(128 << 20, dtype=torch.uint8, device=device), "NHD")
    for positions, right in ((np.arange(50, 115), True), (np.arange(3, 198, 3), False)):
        rows = paged([int(positions[-1]) + 1], [positions], device)
        q, k, v = inputs(rows, (8, 2), 128, torch.bfloat16, device)
        qo, kv = (torch.tensor(x.astype(np.int32)) for x in (rows.qo_indptr, rows.kv_indptr))
        last, dtype = torch.ones(1, dtype=torch.int32), torch.bfloat16
        wrapper.plan(qo, kv, rows.kv_indices, last, 8, 2, 128, 1, causal=True, q_data_type=dtype)
        found = wrapper.run(q, (k.unsqueeze(1), v.unsqueeze(1)))
        wanted, _ = reference.paged_attention(q, k, v, rows, 128**-0.5)
        assert torch.allclose(found.float(), wanted.float(), rtol=1.6e-2, atol=1.6e-2) is right


def test_a_mask_of_rows_and_keys_is_what_the_positions_say():
    rows = PagedRows.checked([1, 3, 0], [0, 2, 3], [0, 4, 6], torch.zeros(6, dtype=torch.int32))
    mask = flashinfer_ragged._mask(rows, torch.from_numpy(rows.positions))
    assert mask.int().tolist() == [1, 1, 0, 0, 1, 1, 1, 1, 1, 0]
