"""Who has which text: a model of the exact tree and the donors, in blocks instead of tokens.

A block counts as cached when all of it is. Least recently used ends of paths leave first, as in SGLang's tree.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from kvshare_sched.simulator.traffic import Block

SHORTEST = 32  # tokens of a run that may be reused elsewhere


class _Node:
    __slots__ = ("parent", "block", "children", "used", "number", "locks")

    def __init__(self, parent: _Node | None, block: Block, number: int):
        self.parent, self.block, self.number = parent, block, number
        self.children: dict[Block, _Node] = {}
        self.used = 0
        self.locks = 0  # running requests that stand on it


@dataclass(frozen=True, slots=True)
class Found:
    """What the cache has of a prompt."""

    exact: int  # tokens at its start
    reused: int  # tokens elsewhere
    lacks: tuple[Block, ...]  # the rest
    gives: int  # the first of `lacks` that will enter the tree
    path: int  # blocks that will: those before the first reused one
    depth: int  # blocks of its exact start


class Cache:
    """KV of every tenant, `capacity` tokens."""

    def __init__(self, capacity: int, reuse: bool = True):
        self.capacity, self.reuse = capacity, reuse
        self.tokens = 0
        self.locked = 0  # of them, under running requests
        self._roots: dict[str, _Node] = {}
        self._homes: dict[str, dict[Block, list[_Node]]] = {}  # where each tenant's blocks are
        self._ends: list[tuple[int, int, str, _Node]] = []  # (used, number, tenant, end of a path); some out of date
        self._time = self._number = 0

    def find(self, tenant: str, blocks: Sequence[Block], computed: int = 0) -> Found:
        """No side effects. `computed`: borrow nothing among so many tokens at the start."""
        node, depth, exact = self._roots.get(tenant), 0, 0
        while node is not None and depth < len(blocks) and (child := node.children.get(blocks[depth])) is not None:
            node, exact, depth = child, exact + blocks[depth][1], depth + 1
        homes = self._homes.get(tenant, ())
        reused, lacks, first, end = 0, [], None, exact
        for place in range(depth, len(blocks)):
            block = blocks[place]
            end += block[1]
            if self.reuse and end > computed and block[1] >= SHORTEST and block in homes:
                reused += block[1]
                first = (place, len(lacks)) if first is None else first
            else:
                lacks.append(block)
        path, gives = first if first is not None else (len(blocks), len(lacks))
        return Found(exact, reused, tuple(lacks), gives, path, depth)

    def publish(self, tenant: str, blocks: Sequence[Block]) -> bool:
        """These blocks' exact KV enters the tree; whether anything is new."""
        self._time += 1
        node = self._roots.setdefault(tenant, _Node(None, ("", 0), 0))
        homes = self._homes.setdefault(tenant, {})
        new = False
        for block in blocks:
            child = node.children.get(block)
            if child is None:
                self._number += 1
                child = node.children[block] = _Node(node, block, self._number)
                homes.setdefault(block, []).append(child)
                self.tokens += block[1]
                new = True
            child.used = self._time
            node = child
        if node.parent is not None and not node.children:
            heapq.heappush(self._ends, (node.used, node.number, tenant, node))
        return new

    def touch(self, tenant: str, blocks: Sequence[Block]) -> None:
        """A request reuses: the donors of its blocks, one each, are worth keeping."""
        self._time += 1
        homes = self._homes.get(tenant, {})
        for block in blocks:
            node = homes[block][-1] if block in homes else None
            while node is not None and node.parent is not None:
                node.used, node = self._time, node.parent

    def lock(self, tenant: str, blocks: Sequence[Block], by: int) -> None:
        """One running request more (by=1) or less (-1) stands on this path, which is in the tree."""
        node = self._roots.get(tenant)
        for block in blocks:
            node = node.children[block]
            self.locked += block[1] * ((node.locks + by > 0) - (node.locks > 0))
            node.locks += by
        if blocks and not node.locks and not node.children:
            heapq.heappush(self._ends, (node.used, node.number, tenant, node))

    def shrink(self, room: int) -> None:
        """Evict until at most `room` tokens are kept, or all that is left is locked."""
        while self.tokens > room and self._ends:
            used, _, tenant, node = heapq.heappop(self._ends)
            if node.locks or node.children or node.parent is None or node.parent.children.get(node.block) is not node:
                continue
            if node.used != used:
                heapq.heappush(self._ends, (node.used, node.number, tenant, node))
                continue
            parent = node.parent
            del parent.children[node.block]
            self.tokens -= node.block[1]
            homes = self._homes[tenant]
            homes[node.block].remove(node)
            if not homes[node.block]:
                del homes[node.block]
            if parent.parent is not None and not parent.children:
                heapq.heappush(self._ends, (parent.used, parent.number, tenant, parent))
