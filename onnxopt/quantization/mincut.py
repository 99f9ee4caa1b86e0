"""Minimum cuts, by Dinic's algorithm.

Source: E. A. Dinic, "Algorithm for solution of a problem of maximum flow in networks with power estimation",
1970. Each round saturates an edge exactly, so that it ends with capacities of floating point, too.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable

__all__ = ["Cut"]

_NOTHING = 1e-9
"""Capacity that counts as none: costs are rounded."""


class Cut:
    """A graph whose nodes are to be parted in two sides at the least cost.

    Nodes are named by anything that can be hashed, and come to be when they are first mentioned.
    """

    def __init__(self) -> None:
        self._number: dict[Hashable, int] = {}
        self._edges: list[list[int]] = []  # of each node, the numbers of its edges
        self._target: list[int] = []
        self._room: list[float] = []
        self._source, self._sink = self._index(("source",)), self._index(("sink",))

    def if_first(self, node: Hashable, cost: float) -> None:
        """Let it cost so much where the node is on the first side."""
        self._edge(self._index(node), self._sink, cost)

    def if_second(self, node: Hashable, cost: float) -> None:
        """Let it cost so much where the node is on the second side."""
        self._edge(self._source, self._index(node), cost)

    def if_parted(self, first: Hashable, second: Hashable, cost: float) -> None:
        """Let it cost so much where `first` is on the first side and `second` on the second one."""
        self._edge(self._index(first), self._index(second), cost)

    def first_side(self) -> set[Hashable]:
        """The nodes of the first side in a parting of the least cost; a node that may be on either is not."""
        while (levels := self._levels()) is not None:
            self._push(levels)
        reached, work = {self._source}, deque([self._source])
        while work:
            for edge in self._edges[work.popleft()]:
                other = self._target[edge]
                if self._room[edge] > _NOTHING and other not in reached:
                    reached.add(other)
                    work.append(other)
        return {name for name, number in self._number.items() if number in reached}

    def _index(self, node: Hashable) -> int:
        if node not in self._number:
            self._number[node] = len(self._edges)
            self._edges.append([])
        return self._number[node]

    def _edge(self, start: int, end: int, room: float) -> None:
        if room <= 0:
            return
        for origin, target, amount in ((start, end, room), (end, start, 0.0)):
            self._edges[origin].append(len(self._target))
            self._target.append(target)
            self._room.append(amount)

    def _levels(self) -> list[int] | None:
        """Each node's distance from the source, -1 where it is out of reach; None once the sink is."""
        levels = [-1] * len(self._edges)
        levels[self._source], work = 0, deque([self._source])
        while work:
            node = work.popleft()
            for edge in self._edges[node]:
                other = self._target[edge]
                if levels[other] < 0 and self._room[edge] > _NOTHING:
                    levels[other] = levels[node] + 1
                    work.append(other)
        return levels if levels[self._sink] >= 0 else None

    def _push(self, levels: list[int]) -> None:
        """Fill every shortest way from the source to the sink."""
        tried = [0] * len(self._edges)
        way: list[int] = []
        node = self._source
        while True:
            if node == self._sink:
                amount = min(self._room[edge] for edge in way)
                assert amount < math.inf, "a cut of finite cost exists"
                for edge in way:
                    self._room[edge] -= amount
                    self._room[edge ^ 1] += amount
                full = next(place for place, edge in enumerate(way) if self._room[edge] <= _NOTHING)
                node = self._target[way[full] ^ 1]
                del way[full:]
                continue
            edges = self._edges[node]
            while tried[node] < len(edges):
                edge = edges[tried[node]]
                if self._room[edge] > _NOTHING and levels[self._target[edge]] == levels[node] + 1:
                    way.append(edge)
                    node = self._target[edge]
                    break
                tried[node] += 1
            else:
                if not way:
                    return
                node = self._target[way.pop() ^ 1]
                tried[node] += 1
