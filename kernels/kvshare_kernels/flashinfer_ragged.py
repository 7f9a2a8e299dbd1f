"""Position-masked ragged attention by FlashInfer, with a variant of ours (position_mask.cuh) built by its compiler.

The plain twin is `reference.paged_attention`; the interface is `triton_attention.TritonAttention`'s. Nearly all keys of
a block of neighbouring rows lie before its first row: all its rows see them, and FlashInfer's fastest kernel takes them
without a mask. The few from there to the block's last row need the mask, and the two results are put together by their
log-sum-exp. Few rows take the masked road alone: there FlashInfer splits the keys over the GPU, which its FA3 template
for Hopper does not. Written for version 0.7.2: `jit_args` in the order of its `gen_customize_batch_prefill_module`,
`variant_owns_mask` on its FA2 template (its FA3 template has none).
"""

from importlib import resources

import numpy as np
import torch

from kvshare_kernels.paged_rows import PagedRows

DIMS = (64, 128, 256)
DTYPES = (torch.float16, torch.bfloat16)
_BLOCK = 128  # rows
_ENOUGH = 128  # blocks x heads that keep a GPU busy without splitting keys: the FA3 template takes each pair by itself
_LN2 = float(np.log(2))
_WORKSPACE = 256 << 20  # bytes, for parts of split keys


def variant() -> str:
    """The variant's CUDA text."""
    return resources.files("kvshare_kernels").joinpath("position_mask.cuh").read_text()


def jit_args(dtype: torch.dtype, dim: int, soft_cap: float) -> tuple[list, dict]:
    """Positional and keyword arguments of FlashInfer's module generator, for q, k, v and out of one dtype."""
    capped = "true" if soft_cap > 0 else "false"
    name = f"kvshare_position_mask_{str(dtype).removeprefix('torch.')}_{dim}_{capped}"
    types = [dtype, dtype, dtype, torch.int32, dim, dim]
    extra = [["row_positions"], ["int32_t"], ["sm_scale", "soft_cap"], ["double", "double"]]
    # K and V pools lie alike, so half of the kernels need not be built.
    return [name, *types, *extra, f"PositionMask<{capped}>", variant()], {"paged_kv_stride_mode": "equal"}


class _Turns:
    """Two of FlashInfer's wrappers in turns: a plan travels through pinned memory, which must not be written before it
    has been read."""

    def __init__(self, workspace: torch.Tensor, **options):
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper

        self.wrappers = [BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", **options) for _ in range(2)]
        self.events = [torch.cuda.Event() for _ in range(2)] if workspace.is_cuda else None

    def plan(self, *args, **kwargs) -> None:
        self.wrappers.reverse()
        if self.events:
            self.events.reverse()
            self.events[0].synchronize()  # recorded two plans ago: passed long since
        self.wrappers[0].plan(*args, **kwargs)
        if self.events:
            self.events[0].record()

    def run(self, *args, **kwargs):
        return self.wrappers[0].run(*args, return_lse=True, **kwargs)


class FlashInferAttention:
    """Planned once a batch, run once a layer. Building the kernels takes a minute, once on a machine.

    packed_mask: FlashInfer's stored mask of bits instead of the variant, where nothing can be built.
    Raises what FlashInfer raises when it cannot be imported or built, ValueError for shapes it does not serve.
    """

    def __init__(self, heads, groups, dim, *, soft_cap=0.0, dtype=torch.bfloat16, device="cuda", packed_mask=False):
        if heads % groups or dim not in DIMS or dtype not in DTYPES:
            raise ValueError(
                f"{heads} query heads, {groups} KV heads of {dim}, {dtype}: give a multiple, one of {DIMS} and half "
                "precision"
            )
        self.heads, self.groups, self.dim, self.soft_cap, self.dtype = heads, groups, dim, soft_cap, dtype
        self.packed_mask = packed_mask
        workspace = torch.empty(_WORKSPACE, dtype=torch.uint8, device=device)
        options = {}
        if not packed_mask:
            args, kwargs = jit_args(dtype, dim, soft_cap)
            options = {"jit_args": args, "jit_kwargs": kwargs, "variant_owns_mask": True}
        self.shared, self.span = _Turns(workspace), _Turns(workspace, backend="fa2", **options)

    def plan(self, rows: PagedRows) -> None:
        """Cut the rows into blocks and let FlashInfer lay out its work; it stands until the next plan."""
        cut = rows.cut(_BLOCK)
        self.sharing = len(cut.shared_indices) > 0 and (len(cut.span.qo_indptr) - 1) * self.heads >= _ENOUGH
        span = cut.span if self.sharing else rows
        count, shared = len(span.qo_indptr), cut.shared_indptr if self.sharing else 0 * span.qo_indptr
        # Keys in a sequence's last page, 0 where it has no key: the FA3 template would take a 1 for one that is there.
        last, shared_last = np.ones(count - 1, np.int64), np.minimum(np.diff(shared), 1)
        host = (span.qo_indptr, shared, span.kv_indptr, last, shared_last, span.positions)
        host = torch.from_numpy(np.concatenate(host).astype(np.int32))
        host = host.pin_memory() if rows.kv_indices.is_cuda else host
        sizes = [count] * 3 + [count - 1] * 2 + [len(span.positions)]
        qo, shared, inner, last, shared_last, positions = host.split(sizes)
        self.positions = positions.to(rows.kv_indices.device, non_blocking=True)
        shape = self.heads, self.groups, self.dim, 1
        # The scale comes with each layer; `plan` takes it too, but only once.
        plain = {"q_data_type": self.dtype, "sm_scale": 1.0, "logits_soft_cap": self.soft_cap or None}
        if self.sharing:
            self.shared.plan(qo, shared, cut.shared_indices, shared_last, *shape, causal=False, **plain)
        masked = (
            plain | {"custom_mask": _mask(span, self.positions)} if self.packed_mask else {"q_data_type": self.dtype}
        )
        self.span.plan(qo, inner, span.kv_indices, last, *shape, **masked)

    def run(self, q, k_buffer, v_buffer, scale: float, *, out: torch.Tensor | None = None):
        """(out [n, H, D] in q's dtype, natural log-sum-exp float32 [n, H]); q [n, H, D], buffers [slots, G, D]."""
        if q.shape != (len(self.positions), self.heads, self.dim) or {q.dtype, k_buffer.dtype} != {self.dtype}:
            raise ValueError(
                f"q {tuple(q.shape)} {q.dtype}, keys {k_buffer.dtype}: planned for "
                f"[{len(self.positions)}, {self.heads}, {self.dim}] in {self.dtype}"
            )
        pages = k_buffer.unsqueeze(1), v_buffer.unsqueeze(1)  # a slot is a page of one
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out  # FlashInfer's own is zeroed
        if self.packed_mask:
            out, sums = self.span.run(q, pages, q_scale=float(scale), out=out)
        else:
            out, sums = self.span.run(q, pages, self.positions, float(scale), float(self.soft_cap), out=out)
        if self.sharing:
            from flashinfer import merge_state_in_place

            shared = self.shared.run(q, pages, q_scale=float(scale), out=torch.empty_like(out))
            merge_state_in_place(out, sums, *shared)
        return out, sums * _LN2  # FlashInfer's are to base 2


def _mask(rows: PagedRows, positions: torch.Tensor) -> torch.Tensor:
    """The mask of rows x keys, sequence by sequence, flat; bool."""
    sequences = zip(positions.split(np.diff(rows.qo_indptr).tolist()), np.diff(rows.kv_indptr).tolist(), strict=True)
    return torch.cat([(torch.arange(m, device=p.device) <= p[:, None]).flatten() for p, m in sequences])
