"""Put nodes in an order that needs less memory for activations, where the present one needs more.

Before: a = Large(x); b = Large(x); p = Small(a); q = Small(b)
After:  a = Large(x); p = Small(a); b = Large(x); q = Small(b)

Of the nodes whose inputs are there, the one comes first that adds least: its outputs, less the inputs that
nobody reads any more (list scheduling, as compilers order instructions under register pressure). Each body
of control flow is ordered alone. ONNX Runtime chooses an order of its own; this is for what runs a file from
top to bottom.
Declines: nothing; the order is kept where the peak, as `onnxopt inspect` counts it, is no lower.
Option `symbol`: the number that an unknown size counts as.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import graphs, subgraphs_of, walk
from onnxopt.ledger import Ledger

__all__ = ["ReorderNodes"]


@dataclass(frozen=True)
class ReorderNodes(Pass):
    """Order nodes so that activations take less memory at the peak."""

    symbol: int = 64

    name: ClassVar[str] = "reorder-nodes"
    example: ClassVar[str] = """agraph (float[8,64] x) => (float[64] p, float[64] q)
    <int64[2] many = {8, 8}, float[64,512] a, float[64,512] b> {
        a = Tile(x, many)
        b = Tile(x, many)
        p = ReduceMax<axes = [1], keepdims = 0>(a)
        q = ReduceMin<axes = [1], keepdims = 0>(b)
    }"""

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for graph in graphs(model):
            constants = [node for node in graph if _is_constant(node)]
            schedule = _Schedule(graph, self.symbol)
            better = schedule.greedy()
            if schedule.peak(better) >= schedule.peak(schedule.nodes):
                continue
            if ledger.claim("lower peak", graph.name or ""):
                for node in (*constants, *better):
                    graph.remove(node)
                    graph.append(node)
                ledger.touch(better)


class _Schedule:
    """What each node of a graph, but for Constants, adds to and takes from memory."""

    def __init__(self, graph: ir.Graph, symbol: int) -> None:
        self._symbol = symbol
        self.nodes = [node for node in graph if not _is_constant(node)]
        self._place = {node: place for place, node in enumerate(self.nodes)}
        self._reads = {node: self._activations(graph, node) for node in self.nodes}
        self._readers: dict[ir.Value, list[ir.Node]] = {}
        for node, values in self._reads.items():
            for value in values:
                self._readers.setdefault(value, []).append(node)
        self._kept = set(graph.outputs)

    def peak(self, order: Sequence[ir.Node]) -> int:
        """Bytes that are live at once, at most."""
        left = {value: len(readers) for value, readers in self._readers.items()}
        live = sum(self._bytes(value) for value in left if value.producer() is None)
        most = live
        for node in order:
            live += sum(map(self._bytes, node.outputs))
            most = max(most, live)
            for value in self._reads[node]:
                left[value] -= 1
            live -= sum(self._bytes(v) for v in self._reads[node] if not left[v] and v not in self._kept)
            live -= sum(self._bytes(v) for v in node.outputs if v not in left and v not in self._kept)
        return most

    def greedy(self) -> list[ir.Node]:
        """The nodes, each as soon as it adds least; as now where that is equal."""
        waits = {node: sum(v.producer() is not None for v in values) for node, values in self._reads.items()}
        left = {value: len(readers) for value, readers in self._readers.items()}
        ready = [(self._adds(node, left), self._place[node]) for node, count in waits.items() if not count]
        heapq.heapify(ready)
        order: dict[ir.Node, None] = {}
        while ready:
            node = self.nodes[heapq.heappop(ready)[1]]
            if node in order:
                continue
            order[node] = None
            cheaper: dict[ir.Node, None] = {}
            for value in self._reads[node]:
                left[value] -= 1
                if left[value] == 1:
                    cheaper.update((r, None) for r in self._readers[value] if r not in order)
            for value in node.outputs:
                for reader in self._readers.get(value, ()):
                    waits[reader] -= 1
                    cheaper[reader] = None
            for other in cheaper:
                if not waits[other]:
                    heapq.heappush(ready, (self._adds(other, left), self._place[other]))
        return list(order)

    def _adds(self, node: ir.Node, left: dict[ir.Value, int]) -> int:
        """Bytes that are live after the node, and were not before; a last reader frees what it reads."""
        freed = sum(self._bytes(v) for v in self._reads[node] if left[v] == 1 and v not in self._kept)
        return sum(map(self._bytes, node.outputs)) - freed

    def _bytes(self, value: ir.Value) -> int:
        if value.shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
            return self._symbol
        sizes = (size if isinstance(size, int) else self._symbol for size in value.shape.dims)
        return math.ceil(math.prod(sizes) * value.dtype.itemsize)

    def _activations(self, graph: ir.Graph, node: ir.Node) -> list[ir.Value]:
        """What a node reads, in its bodies too, of this graph's own values; no constants."""
        own = dict.fromkeys(v for v in _read(node) if v.graph is graph or _made_in(v, graph))
        return [v for v in own if not v.is_initializer() and not _is_constant(v.producer())]


def _read(node: ir.Node) -> Iterable[ir.Value]:
    inside = [inner for body in subgraphs_of(node) for inner in walk(body)]
    for one in (node, *inside):
        yield from (value for value in one.inputs if value is not None)
    for body in (body for one in (node, *inside) for body in subgraphs_of(one)):
        yield from body.outputs


def _made_in(value: ir.Value, graph: ir.Graph) -> bool:
    producer = value.producer()
    return producer is not None and producer.graph is graph


def _is_constant(node: ir.Node | None) -> bool:
    return node is not None and node.op_type == "Constant" and not node.domain
