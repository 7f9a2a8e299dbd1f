"""Ragged rows over paged KV: which keys each row of a batch may see, said once for every attention kernel.

Host arrays say what is planned, so that planning never waits for the device; only the slots stay there.
"""

from typing import NamedTuple

import numpy as np
import torch

from kvshare_kernels.device import on_device


class PagedRows(NamedTuple):
    """Rows of b sequences; key j of a sequence stands at position j, in slot kv_indices[kv_indptr[sequence] + j].

    A row sees the keys at positions up to its own. Pages of any size are slots: page * page_size + offset.
    """

    positions: np.ndarray  # int64 [n], ascending inside a sequence, gaps allowed
    qo_indptr: np.ndarray  # int64 [b + 1], first row of each sequence
    kv_indptr: np.ndarray  # int64 [b + 1], first slot of each sequence
    kv_indices: torch.Tensor  # int32 [kv_indptr[-1]], on the device of the keys

    @classmethod
    def checked(cls, positions, qo_indptr, kv_indptr, kv_indices: torch.Tensor) -> "PagedRows":
        """The record, or ValueError with what does not fit. The slots themselves are not looked at."""
        positions, qo, kv = (np.asarray(x, np.int64) for x in (positions, qo_indptr, kv_indptr))
        if qo.ndim != 1 or qo.shape != kv.shape or len(qo) < 2 or qo[0] or kv[0]:
            raise ValueError(f"qo_indptr {qo.tolist()} and kv_indptr {kv.tolist()}: give both as [0, ...], alike long")
        if qo[-1] != len(positions) or (np.diff(qo) < 1).any():
            raise ValueError(f"qo_indptr {qo.tolist()} for {len(positions)} rows: every sequence needs a row")
        if kv_indices.dtype != torch.int32 or kv_indices.shape != (kv[-1],):
            raise ValueError(
                f"kv_indices {kv_indices.dtype} {tuple(kv_indices.shape)}: give int32 [{kv[-1]}], one slot a key"
            )
        inside = np.ones(len(positions), bool)
        inside[qo[:-1]] = False  # the first row of a sequence has nobody before it
        if (np.diff(positions, prepend=-1)[inside] < 1).any() or (positions[qo[:-1]] < 0).any():
            raise ValueError("positions must ascend inside each sequence, from 0 on")
        if (positions[qo[1:] - 1] >= np.diff(kv)).any():
            raise ValueError(f"last positions {positions[qo[1:] - 1].tolist()} lie beyond the keys given")
        return cls(positions, qo, kv, kv_indices)

    def cut(self, rows: int) -> "Cut":
        """The rows in blocks of at most `rows`, and each block's keys in two parts: those that all of its rows see, and
        those from its first row's position to its last row's, which need a mask."""
        starts = [np.arange(a, b, rows) for a, b in zip(self.qo_indptr[:-1], self.qo_indptr[1:], strict=True)]
        owner = np.repeat(np.arange(len(starts)), [len(s) for s in starts])
        qo = np.append(np.concatenate(starts), len(self.positions))
        first, last = self.positions[qo[:-1]], self.positions[qo[1:] - 1]
        begin = self.kv_indptr[owner]
        shared, indices = _taken(self.kv_indices, begin, first)
        inner = np.repeat(first, np.diff(qo))
        return Cut(
            shared,
            indices,
            PagedRows(self.positions - inner, qo, *_taken(self.kv_indices, begin + first, last - first + 1)),
        )


class Cut(NamedTuple):
    """Blocks of rows, `span.qo_indptr`, and their keys in two parts."""

    shared_indptr: np.ndarray  # int64 [blocks + 1]
    shared_indices: torch.Tensor  # int32, slots of the keys that all rows of a block see; none for some blocks
    span: PagedRows  # the rest, positions counted from where it starts


def _taken(indices: torch.Tensor, begin: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, torch.Tensor]:
    """indptr int64 [b + 1] and indices[begin[i] : begin[i] + lengths[i]] one after another; does not wait."""
    indptr = np.concatenate(([0], np.cumsum(lengths)))
    total = int(indptr[-1])
    into = torch.repeat_interleave(
        on_device(begin - indptr[:-1], indices), on_device(lengths, indices), output_size=total
    )
    return indptr, indices[into + torch.arange(total, device=indices.device)]


def slots_of(table: torch.Tensor, owners: torch.Tensor, seen: np.ndarray) -> torch.Tensor:
    """kv_indices int32 [seen.sum()]: the first seen[i] entries of row owners[i] of a table of slots, one after another.

    table int32 [requests, longest]; owners int64 [b] on its device; seen int64 [b].
    """
    total = int(seen.sum())
    lengths, starts = on_device(seen, table), on_device(np.cumsum(seen) - seen, table)
    owner = torch.repeat_interleave(torch.arange(len(seen), device=table.device), lengths, output_size=total)
    return table[owners[owner], torch.arange(total, device=table.device) - starts[owner]].int()
