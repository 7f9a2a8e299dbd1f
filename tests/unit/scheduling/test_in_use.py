"""How much cached text is in use: counted once, forgotten in time, sampled by content."""

import numpy as np
import pytest

from kvshare_sched.scheduling import in_use
from kvshare_sched.scheduling.in_use import SAMPLE, InUse

WINDOW = 16


def text(seed: int, length: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 50_000, length)


def places(tokens: np.ndarray, cached: np.ndarray, window: int) -> list[int]:
    """Of one owner."""
    found = list(in_use.places(tokens, {"owner": cached}, window))
    assert all(owner == "owner" for owner, _ in found)
    return [place for _, place in found]


def followed(*parts: np.ndarray, cached=True) -> list[int]:
    tokens = np.concatenate(parts)
    return places(tokens, np.full(len(tokens), cached), WINDOW)


def test_a_text_counts_once_until_a_window_of_prompts_has_not_hit_it():
    use = InUse()
    use.hit([("a", 100), ("b", 50)], 1000)
    use.hit([("a", 100)], 1000)
    assert use.tokens(5000) == 150
    use.hit([], 500)
    assert use.tokens(1000) == 100, "b was hit 1,500 prompt tokens ago"
    use.hit([], 1000)
    assert use.tokens(1000) == 0
    use.hit([("b", 70)], 1)
    assert use.tokens(1000) == 70


def test_the_memory_is_bounded(monkeypatch):
    monkeypatch.setattr(in_use, "_MOST", 10)
    use = InUse()
    for n in range(30):
        use.hit([(n, 5)], 1)
    assert use.tokens(1e9) == 50


def test_the_sample_stands_for_the_text_wherever_it_is():
    document = text(1, 20_000)
    alone, moved = followed(document), followed(text(2, 333), document, text(3, 50))
    assert set(alone) <= set(moved)
    assert len(alone) * SAMPLE == pytest.approx(len(document), rel=0.25)
    assert not set(alone) & set(followed(text(4, 20_000)))


def test_only_what_is_cached_is_followed():
    document = text(1, 20_000)
    cached = np.arange(len(document)) < 10_000
    found = places(document, cached, WINDOW)
    assert found == followed(document[:10_000]) and followed(document, cached=False) == []
    assert places(document[:10], cached[:10], WINDOW) == [] == places(document[:0], cached[:0], WINDOW)


def test_each_place_is_its_owners():
    document = text(1, 20_000)
    mine = np.arange(len(document)) < 10_000
    both = list(in_use.places(document, {"me": mine, "them": ~mine}, WINDOW))
    assert [place for owner, place in both if owner == "me"] == places(document, mine, WINDOW)
    assert [place for owner, place in both if owner == "them"] == places(document, ~mine, WINDOW)
