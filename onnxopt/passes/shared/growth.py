"""What a fold adds to the model: bytes of the new constants, less those that nobody reads any more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.evaluation import Facts
from onnxopt.graph import static_shape
from onnxopt.inference import refine
from onnxopt.passes.shared.chain import dies
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope

__all__ = ["Growth", "used"]


@dataclass(frozen=True)
class Growth:
    """Judges folds by the bytes that they add, of which `most` are allowed each time."""

    facts: Facts
    scope: Scope
    most: int

    def check(self, nodes: Sequence[ir.Node]) -> None:
        """Raise `Declined` where the outputs of nodes, which are known, are too much to put in place."""
        self._afford(nodes, sum(self.facts.nbytes(value) for node in nodes for value in used(node)))

    def foresee(self, node: ir.Node) -> None:
        """Raise `Declined` for a node of which the same is sure before it is worked out, or may be."""
        self.facts.record(node.inputs)
        refine(node, self.scope.graph.opset_imports)
        size = 0
        for value in used(node):
            shape = static_shape(value)
            if shape is None or value.dtype is None:
                raise Declined("the size of the result is not known")
            size += math.ceil(math.prod(shape) * value.dtype.itemsize)
        self._afford([node], size)

    def _afford(self, nodes: Sequence[ir.Node], size: int) -> None:
        growth = size - self._freed(nodes) if size > self.most else 0
        if growth > self.most:
            raise Declined(f"it would add {growth / 1e3:,.0f} kB to the model (max_growth={self.most})")

    def _freed(self, nodes: Sequence[ir.Node]) -> int:
        """Bytes of the constants that nobody reads any more when the nodes' outputs are in place."""
        dying, work, seen, total = set(nodes), list(nodes), set[ir.Value](), 0
        while work:
            for value in work.pop().inputs:
                if value is None or value in seen or not self.facts.has(value) or not dies(value, dying):
                    continue
                seen.add(value)
                producer = value.producer()
                if not self.facts.learned(value):
                    total += self.facts.nbytes(value)
                elif producer is not None and all(dies(output, dying) for output in producer.outputs):
                    dying.add(producer)
                    work.append(producer)
        return total


def used(node: ir.Node) -> list[ir.Value]:
    """The outputs of a node that are read, by another one or by the user of the model."""
    return [value for value in node.outputs if value.uses() or value.is_graph_output()]
