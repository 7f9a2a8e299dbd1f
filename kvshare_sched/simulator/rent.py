"""What the server's ledger is told of a prompt that is a list of blocks; see `kvshare_sched.reuse.promotion`."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from kvshare_sched.reuse.promotion import Bill, Piece, Rents
from kvshare_sched.simulator.cache import SHORTEST, Found
from kvshare_sched.simulator.traffic import Block


def bill(rents: Rents, tenant: str, blocks: Sequence[Block], found: Found, recompute: float) -> Bill:
    """Of a prompt that borrows; `recompute`: the share of borrowed text that is computed again."""
    ends = list(itertools.accumulate(tokens for _, tokens in blocks))
    keys = _beginnings(blocks)
    lacks, pieces = set(found.lacks), []
    for place in range(found.path, len(blocks)):
        tokens = blocks[place][1]
        if blocks[place] not in lacks:
            rent = recompute * tokens
            pieces.append(Piece(ends[place], tokens - rent, rent, (keys[place],)))
        elif tokens >= SHORTEST:
            pieces.append(Piece(ends[place], 0.0, (1 - recompute) * tokens, (hash(blocks[place]),)))
    return rents.due(tenant, tuple(pieces), ends[found.path :], keys[found.path :])


def answered(rents: Rents, tenant: str, blocks: Sequence[Block]) -> None:
    """A request that borrowed has ended; `blocks`: its prompt and its answer."""
    rents.answered(tenant, _beginnings(blocks)[-1])


def _beginnings(blocks: Sequence[Block]) -> list[int]:
    """A key for the prompt up to the end of each block."""
    return list(itertools.accumulate(blocks, lambda key, block: hash((key, block)), initial=0))[1:]
