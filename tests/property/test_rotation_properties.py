"""Rotating cached keys: identity, composition, equality with keys rotated at the target, invariant attention.

Tolerances are relative to the largest raw key: 4e-6 in float32 (two roundings of the angle's sine and
cosine), 2**-6 in bfloat16 (two roundings of the key to 8 bits).
"""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvshare_kernels import reference
from kvshare_kernels.kv_copy import rotate_run, rotation_rows

LONGEST = 2048
TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 2**-6}
shapes = st.tuples(st.integers(1, 9), st.integers(1, 3), st.sampled_from([(8, 8), (64, 64), (32, 16), (12, 4)]))
shifts = st.integers(1 - LONGEST // 2, LONGEST // 2 - 1)
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
seeds = st.integers(0, 2**32)


def angles(rotary_dim: int) -> torch.Tensor:
    """Float64 [LONGEST, R/2]."""
    speeds = 10_000.0 ** (-torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim)
    return torch.arange(LONGEST, dtype=torch.float64)[:, None] * speeds


def table(rotary_dim: int) -> torch.Tensor:
    """SGLang's table: cosines, then sines, float32 [LONGEST, R]."""
    a = angles(rotary_dim)
    return torch.cat((a.cos(), a.sin()), dim=-1).float()


def raw_keys(shape, seed) -> tuple[torch.Tensor, int]:
    n, groups, (dim, rotary_dim) = shape
    values = np.random.default_rng(seed).standard_normal((n, groups, dim))
    return torch.from_numpy(values), rotary_dim


def rotated_at(raw, positions, rotary_dim, neox) -> torch.Tensor:
    """Rotary embedding by its definition on complex numbers, float64; positions int64 [n]."""
    half = rotary_dim // 2
    pair = (slice(0, half), slice(half, rotary_dim)) if neox else (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
    turn = torch.polar(torch.ones(()).double(), angles(rotary_dim)[positions])[:, None]
    turned = torch.complex(raw[..., pair[0]], raw[..., pair[1]]) * turn
    out = raw.clone()
    out[..., pair[0]], out[..., pair[1]] = turned.real, turned.imag
    return out


def by_reference(k, shift, rotary_dim, neox):
    return reference.rotate(k, torch.full((len(k),), shift), table(rotary_dim), neox=neox)


def by_run(k, shift, rotary_dim, neox):
    return rotate_run(k, *rotation_rows(table(rotary_dim), shift), neox=neox)


def close(a, b, dtype, raw):
    limit = TOLERANCE[dtype] * raw.abs().max().item()
    return (a.double() - b.double()).abs().max().item() <= limit


both = pytest.mark.parametrize("rotate", [by_reference, by_run])
neox_or_not = pytest.mark.parametrize("neox", [True, False], ids=["neox", "interleaved"])


@both
@neox_or_not
@given(shape=shapes, dtype=dtypes, seed=seeds)
def test_shift_of_zero_is_the_identity(rotate, neox, shape, dtype, seed):
    raw, rotary_dim = raw_keys(shape, seed)
    k = raw.to(dtype)
    assert torch.equal(rotate(k, 0, rotary_dim, neox), k)


@both
@neox_or_not
@given(shape=shapes, dtype=dtypes, seed=seeds, a=shifts, b=shifts)
def test_shifts_add_up(rotate, neox, shape, dtype, seed, a, b):
    raw, rotary_dim = raw_keys(shape, seed)
    k = raw.to(dtype)
    twice = rotate(rotate(k, a, rotary_dim, neox), b, rotary_dim, neox)
    assert close(twice, rotate(k, a + b, rotary_dim, neox), dtype, raw)
    assert close(rotate(rotate(k, a, rotary_dim, neox), -a, rotary_dim, neox), k, dtype, raw)


@both
@neox_or_not
@given(
    shape=shapes,
    dtype=dtypes,
    seed=seeds,
    here=st.integers(0, LONGEST - 10),
    there=st.integers(0, LONGEST - 10),
)
def test_equals_raw_keys_rotated_at_the_target(rotate, neox, shape, dtype, seed, here, there):
    raw, rotary_dim = raw_keys(shape, seed)
    steps = torch.arange(len(raw))
    cached = rotated_at(raw, here + steps, rotary_dim, neox).to(dtype)
    moved = rotate(cached, there - here, rotary_dim, neox)
    assert moved.dtype == dtype and close(moved, rotated_at(raw, there + steps, rotary_dim, neox), dtype, raw)


@both
@neox_or_not
@given(shape=shapes, dtype=dtypes, seed=seeds, shift=shifts)
def test_norms_and_the_unrotated_part_stay(rotate, neox, shape, dtype, seed, shift):
    raw, rotary_dim = raw_keys(shape, seed)
    k = raw.to(dtype)
    before, moved = k.clone(), rotate(k, shift, rotary_dim, neox)
    assert torch.equal(moved[..., rotary_dim:], k[..., rotary_dim:]) and torch.equal(k, before)
    norms = (k.double().norm(dim=-1), moved.double().norm(dim=-1))
    assert torch.allclose(*norms, rtol=2 * TOLERANCE[dtype])


@neox_or_not
@given(shape=shapes, dtype=dtypes, seed=seeds, data=st.data())
def test_every_key_may_have_its_own_shift(neox, shape, dtype, seed, data):
    raw, rotary_dim = raw_keys(shape, seed)
    k = raw.to(dtype)
    own = data.draw(st.lists(shifts, min_size=len(k), max_size=len(k)))
    together = reference.rotate(k, torch.tensor(own), table(rotary_dim), neox=neox)
    alone = torch.cat([by_run(k[i : i + 1], shift, rotary_dim, neox) for i, shift in enumerate(own)])
    assert close(together, alone, dtype, raw)


@neox_or_not
@given(seed=seeds, shift=st.integers(0, LONGEST // 2), n=st.integers(1, 12))
def test_shifting_all_positions_leaves_attention_unchanged(neox, seed, shift, n):
    rng, dim, heads, groups = np.random.default_rng(seed), 16, 6, 3
    q, k, v = (torch.from_numpy(rng.standard_normal((n, h, dim))) for h in (heads, groups, groups))
    positions = torch.arange(n)

    def attend(queries, keys):
        return reference.position_masked_attention(queries.float(), keys.float(), v.float(), positions, dim**-0.5)

    queries, keys = (rotated_at(x, positions, dim, neox) for x in (q, k))
    moved = by_run(keys.float(), shift, dim, neox)
    here, there = attend(queries, keys), attend(rotated_at(q, positions + shift, dim, neox), moved)
    assert torch.allclose(here, there, atol=2e-5)
    if n > 2:  # moving the queries alone is noticed
        assert not torch.allclose(here, attend(rotated_at(q, positions + 1, dim, neox), keys), atol=2e-5)
