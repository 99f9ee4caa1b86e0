"""Where the nodes of each operator are, so that a pass looks at none of the others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from itertools import chain

import onnx_ir as ir

from onnxopt.graph import nbytes, roots, subgraphs_of, tensors_of

__all__ = ["Index", "operator_of"]


def operator_of(node: ir.Node) -> str:
    """The operator as rules name it: its type, and in front of that any domain but ONNX's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


class Index:
    """The nodes of a model by operator, as they are at one moment; and how large the model is."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._bytes = 0
        self._by_operator: dict[ir.Graph, dict[str, list[ir.Node]]] = {}
        self._place: dict[ir.Node, int] = {}
        for root in roots(model):
            self._by_operator[root] = defaultdict(list)
            self._add(root, self._by_operator[root])

    def _add(self, graph: ir.Graph, by_operator: dict[str, list[ir.Node]]) -> None:
        held = (value.const_value for value in graph.initializers.data.values())
        self._bytes += sum(nbytes(tensor) for tensor in held if tensor is not None)
        for node in graph:
            self._place[node] = len(self._place)
            by_operator[operator_of(node)].append(node)
            if node.attributes.data:
                self._bytes += sum(map(nbytes, tensors_of(node)))
                for body in subgraphs_of(node):
                    self._add(body, by_operator)

    @property
    def size(self) -> tuple[int, int]:
        """How many nodes there are, and how many bytes of tensors."""
        return len(self._place), self._bytes

    def has(self, operators: Iterable[str]) -> bool:
        """Whether a node has one of these operators."""
        return any(operator in found for operator in operators for found in self._by_operator.values())

    def find(self, root: ir.Graph, operators: Iterable[str]) -> list[ir.Node]:
        """The nodes of these operators in a root and in the graphs nested in it, in order."""
        by_operator = self._by_operator.get(root, {})
        found = [by_operator[operator] for operator in operators if operator in by_operator]
        if len(found) == 1:
            return list(found[0])
        return sorted(chain.from_iterable(found), key=self._place.__getitem__)
