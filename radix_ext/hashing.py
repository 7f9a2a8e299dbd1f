"""Window hashes of token ids and the winnowing that thins them out.

A polynomial rolling hash modulo 2**64 over mixed token ids, computed for all windows at once. Winnowing
(Schleimer, Wilkerson, Aiken 2003) keeps the smallest hash of every `span` consecutive ones: two texts that
share at least `window + span - 1` tokens are then sure to share a kept hash, at about 2 / (span + 1) of the
memory. Hashes only nominate; token ids are compared after every hit.

A minimum between two equal ones that are at most `span` apart is left out: whoever shares `span` hashes around it
shares one of the two as well. So text that repeats a few tokens keeps the ends of the stretch, not a hash a token.
"""

import numpy as np

_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, hence invertible modulo 2**64
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def _mix(tokens: np.ndarray) -> np.ndarray:
    """Spread token ids over 64 bits (splitmix64's finaliser)."""
    x = tokens.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def beginning_hashes(tokens: np.ndarray) -> np.ndarray:
    """Hash of every beginning, the empty one first: uint64 [len(tokens) + 1], O(len(tokens))."""
    powers = np.full(len(tokens), _INVERSE)
    powers[:1] = 1
    np.multiply.accumulate(powers, out=powers)
    return np.concatenate((np.zeros(1, np.uint64), np.cumsum(_mix(tokens) * powers)))


def window_hashes(tokens: np.ndarray, window: int) -> np.ndarray:
    """Hash of every window of `window` ids: uint64 [max(0, len(tokens) - window + 1)], O(len(tokens)).

    hash(i) = sum over k < window of mix(tokens[i + k]) * base**-k, from the hashes of the beginnings.
    """
    count = len(tokens) - window + 1
    if count <= 0:
        return np.empty(0, np.uint64)
    sums = beginning_hashes(tokens)
    back = np.full(count, _BASE)
    back[0] = 1
    np.multiply.accumulate(back, out=back)
    return (sums[window:] - sums[:-window]) * back


def winnow(hashes: np.ndarray, span: int) -> np.ndarray:
    """Ascending positions of the kept hashes: the leftmost minimum of every `span` consecutive ones, without those
    between two equal ones that are at most `span` apart; int64, O(len(hashes) * log(span) + kept * span).

    Fewer than `span` hashes keep their one minimum.
    """
    if len(hashes) == 0:
        return np.empty(0, np.int64)
    if len(hashes) <= span:
        return np.array([int(np.argmin(hashes))], np.int64)
    least, width = hashes, 1
    while width < span:
        step = min(width, span - width)
        least, width = np.minimum(least[:-step], least[step:]), width + step
    # Where the leftmost minimum is another one than one step before: its value is, or the old one was left behind.
    moved = (least[1:] != least[:-1]) | (hashes[: len(least) - 1] == least[:-1])
    spans = np.concatenate(([0], np.flatnonzero(moved) + 1))
    kept = spans + hashes[spans[:, None] + np.arange(span)].argmin(axis=1)
    keep, same = np.ones(len(kept), bool), hashes[kept[1:]] == hashes[kept[:-1]]
    keep[1:-1] = ~(same[:-1] & same[1:] & (kept[2:] - kept[:-2] <= span))
    return kept[keep]
