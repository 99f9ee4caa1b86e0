"""Where the nodes of each operator are, so that a pass looks at none of the others."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

import onnx_ir as ir

from onnxopt.graph import roots, walk

__all__ = ["Index", "operator_of"]


def operator_of(node: ir.Node) -> str:
    """The operator as rules name it: its type, and in front of that any domain but ONNX's own."""
    return f"{node.domain}::{node.op_type}" if node.domain else node.op_type


class Index:
    """The nodes of a model by operator, as they are at one moment."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._nodes: dict[ir.Graph, dict[str, list[tuple[int, ir.Node]]]] = {}
        for root in roots(model):
            places = self._nodes[root] = {}
            for place in enumerate(walk(root)):
                places.setdefault(operator_of(place[1]), []).append(place)

    def find(self, root: ir.Graph, operators: Iterable[str]) -> list[ir.Node]:
        """The nodes of these operators in a root and in the graphs nested in it, in order."""
        places = self._nodes[root]
        found = [places[operator] for operator in operators if operator in places]
        return [node for _, node in sorted(chain(*found))]
