"""The Triton kernels compile for Ampere and Hopper, without a GPU too, and the copy moves 16 bytes at a time."""

import pytest

triton = pytest.importorskip("triton")
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.cpu  # on a GPU they are compiled to run
TARGETS = [80, 90]


def compiled(kernel, target: int, types: dict[str, str], constants: dict, options: dict | None = None):
    """The kernel's binaries; types: of the arguments that are no constants, pointers and strides divisible by 16."""
    assert set(types) | set(constants) == set(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    at = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    divisible = [name for name, kind in types.items() if kind[0] == "*" or name.endswith(("_stride", "_slot", "_row"))]
    source = ASTSource(
        kernel,
        signature,
        constexprs={at[name]: value for name, value in constants.items()},
        attrs={at[name]: [["tt.divisibility", 16]] for name in divisible},
    )
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options).asm


def scalars(*names: str, kind: str = "i32") -> dict[str, str]:
    return dict.fromkeys(names, kind)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("dim", "dtype"), [(64, "fp32"), (64, "fp16"), (128, "bf16")])
def test_attention(target, dim, dtype):
    from kvshare_kernels import triton_attention

    types = scalars("q", "keys", "values", "out", kind=f"*{dtype}") | {"sums": "*fp32"}
    types |= scalars("positions", "block_row", "block_rows", "block_key", "kv_indices", kind="*i32")
    types |= scalars("rows", "chunk", "q_row", "q_head", "k_slot", "k_head", "v_slot", "v_head")
    types |= scalars("scale", "cap", kind="fp32")
    block = triton_attention._SMALL if dtype == "fp32" else triton_attention._LARGE
    constants = {"HEADS": 28, "GROUP": 7, "DIM": dim, "CAPPED": True, "IEEE": dtype == "fp32"}
    constants |= {"M": block.rows, "N": block.keys}
    options = {"num_warps": block.warps, "num_stages": block.stages}
    assert compiled(triton_attention._attend, target, types, constants, options)["cubin"]


@pytest.mark.parametrize("target", TARGETS)
def test_attention_mass(target):
    from kvshare_kernels.triton_attention import _received

    types = scalars("q", "keys", kind="*bf16") | scalars("sums", "mass", kind="*fp32") | {"positions": "*i32"}
    types |= scalars("rows", "length", "q_row", "q_head", "k_row", "k_head") | {"scale": "fp32"}
    constants = {"HEADS": 32, "GROUP": 4, "DIM": 128, "IEEE": False, "M": 64, "N": 64}
    assert compiled(_received, target, types, constants)["cubin"]


@pytest.mark.parametrize("target", TARGETS)
def test_deviation(target):
    from kvshare_kernels.triton_deviation import _deviation

    types = scalars("fresh", "cached", kind="*bf16") | scalars("absolute", "squared", kind="*fp32")
    types |= scalars("tokens", "width", "fresh_stride", "cached_stride")
    assert compiled(_deviation, target, types, {"TOKENS": 1, "LANES": 1024})["cubin"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("neox", "pairs"), [(True, 64), (False, 64), (True, 16)])
def test_copy_and_rotate(target, neox, pairs):
    import triton.language as tl

    from kvshare_kernels.triton_copy import _copy_rotate

    types = {"addresses": "*i64", "source": "*i64", "target": "*i64", "shift": "*i32", "cos_sin": "*fp32"}
    types |= scalars("tokens", "layers", "k_stride", "v_stride")
    constants = {"HEADS": 8, "DIM": 128, "PAIRS": pairs, "NEOX": neox, "DTYPE": tl.bfloat16, "TOKENS": 4}
    constants |= {"LANES": 8 * pairs, "REST": 1 if pairs == 64 else 1024, "VALUES": 1024, "V_WIDTH": 1024}
    binaries = compiled(_copy_rotate, target, types, constants)
    assert binaries["cubin"]
    if neox and pairs == 64:  # interleaved pairs lie two apart
        assert ".global.v4" in binaries["ptx"] and ".global.b16" not in binaries["ptx"]
