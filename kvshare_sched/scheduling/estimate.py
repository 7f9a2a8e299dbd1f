"""What a waiting request still costs, from a thinned set of its fingerprints. A guess for the order only.

The plan made at admission compares every token; here hashes nominate and a share is taken for the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvshare_sched.scheduling.duplicates import Texts


@dataclass(frozen=True, slots=True)
class Prices:
    """What this engine does with a reused token."""

    reuse: bool  # for this request
    recompute: float  # share of the reused tokens that is computed again
    copy: float  # a copied token, in tokens of ordinary prefill
    least: int  # shorter remainders are not looked up
    lends: bool = True  # what this request computes enters the tree


@dataclass(frozen=True, slots=True)
class Estimate:
    """Tokens of a prompt by what they will cost."""

    exact: int
    reused: int
    work: float
    texts: Texts


def estimate(
    prompt: int, exact: int, texts: Sequence[int], positions: Sequence[int], known: Sequence[bool], prices: Prices
) -> Estimate:
    """texts, positions, known: of each fingerprint of the prompt, ascending; known: some donor has it."""
    rest = [(text, there) for text, at, there in zip(texts, positions, known, strict=True) if at >= exact]
    missing = [text for text, there in rest if not there]
    tokens = (prompt - exact) // max(1, len(rest))
    reused, takes = 0, prices.reuse and prompt - exact >= prices.least
    if takes and rest:
        reused = (prompt - exact) * (len(rest) - len(missing)) // len(rest)
    first = next((place for place, (_, there) in enumerate(rest) if there), len(rest)) if reused else len(missing)
    work = prompt - exact - reused + reused * (prices.recompute + prices.copy)
    gives = first if prices.lends else 0
    return Estimate(exact, reused, max(1.0, work), Texts(tuple((text, tokens) for text in missing), gives, takes))
