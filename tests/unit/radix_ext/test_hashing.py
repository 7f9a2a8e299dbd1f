"""Window hashes equal their definition; winnowing keeps its promise."""

import numpy as np
import pytest

from radix_ext.hashing import beginning_hashes, window_hashes, winnow

_BASE, _RING = 0x9E3779B97F4A7C15, 1 << 64


def naive_mix(token: int) -> int:
    """splitmix64's finaliser on Python integers."""
    x = (token + 0x9E3779B97F4A7C15) % _RING
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % _RING
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % _RING
    return x ^ (x >> 31)


def naive_hashes(tokens, window: int) -> list[int]:
    inverse = pow(_BASE, -1, _RING)
    return [
        sum(naive_mix(int(t)) * pow(inverse, k, _RING) for k, t in enumerate(tokens[i : i + window])) % _RING
        for i in range(len(tokens) - window + 1)
    ]


def naive_winnow(hashes, span: int) -> list[int]:
    if len(hashes) <= span:
        return [min(range(len(hashes)), key=lambda i: (hashes[i], i))] if len(hashes) else []
    groups = range(len(hashes) - span + 1)
    least = sorted({min(range(g, g + span), key=lambda i: (hashes[i], i)) for g in groups})
    between = {
        at
        for left, at, right in zip(least, least[1:], least[2:], strict=False)
        if hashes[left] == hashes[at] == hashes[right] and right - left <= span
    }
    return [at for at in least if at not in between]


def random_tokens(length, *, high=50_000, seed=0, dtype=np.int64):
    return np.random.default_rng(seed).integers(0, high, length).astype(dtype)


@pytest.mark.parametrize("window", [1, 2, 3, 16, 31])
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 64, 257])
def test_hashes_equal_the_definition(window, length):
    tokens = random_tokens(length, seed=length)
    hashes = window_hashes(tokens, window)
    assert hashes.dtype == np.uint64 and hashes.tolist() == naive_hashes(tokens, window)


@pytest.mark.parametrize("token", [0, 1, 2**31 - 1, 2**31, 2**62])
def test_extreme_ids(token):
    tokens = np.array([token, 0, token, token], np.int64)
    assert window_hashes(tokens, 2).tolist() == naive_hashes(tokens, 2)


def test_index_and_prompt_hash_alike_whatever_their_integer_type():
    tokens = random_tokens(40)
    assert window_hashes(tokens.astype(np.int32), 16).tolist() == window_hashes(tokens, 16).tolist()


def test_hash_depends_on_the_window_alone():
    text = random_tokens(20, seed=1)
    moved = np.concatenate((random_tokens(333, seed=2), text))
    assert window_hashes(moved, 16)[-5:].tolist() == window_hashes(text, 16).tolist()


def test_order_of_tokens_matters():
    tokens = random_tokens(16)
    assert window_hashes(tokens, 16)[0] != window_hashes(tokens[::-1].copy(), 16)[0]


def test_different_windows_do_not_collide():
    hashes = window_hashes(random_tokens(20_000, high=100), 8)
    assert len(np.unique(hashes)) == len(hashes)


@pytest.mark.parametrize("span", [1, 2, 5, 17])
@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 17, 18, 200])
@pytest.mark.parametrize("values", [1, 3, 2**63])
def test_winnow_equals_the_definition(span, count, values):
    hashes = np.random.default_rng(count).integers(0, values, count).astype(np.uint64)
    assert winnow(hashes, span).tolist() == naive_winnow(hashes.tolist(), span)


def test_span_of_one_keeps_everything():
    assert winnow(np.array([3, 1, 2], np.uint64), 1).tolist() == [0, 1, 2]


@pytest.mark.parametrize(("window", "span"), [(4, 3), (16, 17), (16, 1), (8, 25)])
@pytest.mark.parametrize("high", [1, 2, 50_000])
def test_texts_that_share_enough_share_a_fingerprint(window, span, high):
    """And at the same place of what they share, unless that repeats itself."""
    for seed in range(40):
        rng = np.random.default_rng(seed)
        common = rng.integers(0, high, window + span - 1)
        kept, prints = [], []
        for before, after in rng.integers(0, 60, (2, 2)):
            text = np.concatenate((rng.integers(0, high, before), common, rng.integers(0, high, after)))
            hashes = window_hashes(text, window)
            chosen = winnow(hashes, span)
            inside = chosen[(chosen >= before) & (chosen < before + span)]
            kept.append(set((inside - before).tolist()))
            prints.append(set(hashes[chosen].tolist()))
        hashes = window_hashes(common, window).tolist()
        assert prints[0] & prints[1] & set(hashes), seed
        assert kept[0] & kept[1] or hashes.count(min(hashes)) > 1, (seed, kept)


@pytest.mark.parametrize("values", [2, 5, 40])
@pytest.mark.parametrize("span", [2, 3, 8, 17])
def test_a_minimum_that_stands_alone_in_a_span_is_kept(span, values):
    for seed in range(60):
        hashes = np.random.default_rng(seed).integers(0, values, 4 * span).astype(np.uint64)
        kept = set(winnow(hashes, span).tolist())
        for start in range(len(hashes) - span + 1):
            part = hashes[start : start + span]
            assert (part == part.min()).sum() > 1 or start + int(part.argmin()) in kept


@pytest.mark.parametrize("period", range(1, 9))
def test_text_that_repeats_a_few_tokens_keeps_the_ends_of_the_stretch(period):
    repeated = np.resize(random_tokens(period, seed=period), 20_000)
    assert len(winnow(window_hashes(repeated, 16), 17)) == 2
    between = np.concatenate((random_tokens(500, seed=1), repeated, random_tokens(500, seed=2)))
    assert len(winnow(window_hashes(between, 16), 17)) < 2 * 1000 * 2 / 18


@pytest.mark.parametrize("period", [9, 12, 20, 300])
def test_text_that_repeats_more_is_as_any_other(period):
    kept = winnow(window_hashes(np.resize(random_tokens(period, seed=period), 20_000), 16), 17)
    assert 1 / 17 <= len(kept) / 20_000 <= 4 / 18


def test_density_is_about_two_over_span_plus_one():
    kept = winnow(window_hashes(random_tokens(20_000), 16), 17)
    assert len(kept) / 20_000 == pytest.approx(2 / 18, rel=0.1)


def test_a_beginning_has_one_hash_whatever_follows():
    tokens = np.random.default_rng(3).integers(0, 50_000, 100)
    hashes = beginning_hashes(tokens)
    assert len(hashes) == 101 and len(set(hashes.tolist())) == 101
    for length in (0, 1, 57, 100):
        assert hashes[length] == beginning_hashes(tokens[:length])[-1]
    assert hashes[57] != beginning_hashes(tokens[1:])[56], "where it stands counts"
