"""Constant operands that a pass may quantize, and everybody who reads them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import CannotEvaluateError
from onnxopt.graph import FLOATS, has_reference, read_once
from onnxopt.index import operator_of
from onnxopt.quantization.operands import COMPUTED, MOVES, QUANTIZED, Weight, find_weight
from onnxopt.quantization.weights import OPERANDS
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["Stored", "elements", "operand", "weight_rules"]


def weight_rules(
    layers: Sequence[str], rewrite: Callable[[int, ir.Node, Scope], Edit | None]
) -> tuple[Rule, ...]:
    """A rule for each position that a weight can stand in, of these operators; of all where there are none.

    rewrite: from the position, the node and where it is to the change.
    """
    by_position: dict[int, list[str]] = {}
    for operator, positions in OPERANDS.items():
        if not layers or operator in layers:
            for position in positions:
                by_position.setdefault(position, []).append(operator)
    return tuple(
        Rule(f"weight in input {position}", tuple(operators), partial(rewrite, position))
        for position, operators in sorted(by_position.items())
    )


def operand(node: ir.Node, position: int) -> Weight | None:
    """The floating-point weight that a node reads at a position; None where there is nothing to say of it.

    Raises:
        Declined: it is no weight, and no other operand of the node is one.
    """
    positions = [p for p in OPERANDS[operator_of(node)] if p < len(node.inputs)]
    found = {p: find_weight(value) for p in positions if (value := node.inputs[p]) is not None}
    weight = found.get(position)
    if weight is None or weight.reason == QUANTIZED or weight.dtype not in FLOATS:
        return None
    if weight.reason == COMPUTED:
        others = any(one.reason in ("", QUANTIZED) for one in found.values())
        if others or position != positions[-1] or node.op_type == "Gather":
            return None
    if weight.reason:
        raise Declined(f"the weight {weight.reason}")
    if has_reference(node):
        raise Declined("an attribute is set by the caller of the function")
    return weight


def elements(weight: Weight, scope: Scope, *, moved: bool = True) -> np.ndarray:
    """The elements in float32, of the operand, or before they are moved to it.

    Raises:
        Declined: one is not finite, or they cannot be worked out.
    """
    try:
        array = weight.array(scope.opset) if moved else weight.source_array(scope.opset)
    except CannotEvaluateError as error:
        raise Declined(f"the weight cannot be worked out: {error}") from error
    if not np.isfinite(array).all():
        raise Declined("the weight is not finite, or not so in float32")
    return array


@dataclass(frozen=True)
class Stored:
    """A weight where it can be replaced for all who read it.

    value: the operand itself, or the constant that several operands are moved from. readers: the nodes it is
    an operand of, directly or moved, with the position. array: float32, its finite elements.
    """

    value: ir.Value
    readers: Sequence[tuple[ir.Node, int]]
    dtype: ir.DataType
    array: np.ndarray
    opset: int

    @classmethod
    def of(cls, weight: Weight, scope: Scope) -> Stored:
        """Raises Declined: something else reads it too, or an element is not finite."""
        chain = [weight.source, *(move.outputs[0] for move in weight.moves)]
        alone = all(map(read_once, chain[:-1]))
        alone = alone and not any(_moves(*use) for use in weight.value.uses())
        value = weight.value if alone else weight.source
        readers = _readers(value)
        array = elements(weight, scope, moved=alone)
        return cls(value, readers, weight.dtype, array, scope.opset)

    def axes(self, along: Callable[[ir.Node, int, Sequence[int]], int | None]) -> list[int | None]:
        """The axes of the value that readers know by that function, each once."""
        found = []
        for reader, position in self.readers:
            value = reader.inputs[position]
            assert value is not None  # it is read
            if value is self.value:
                found.append(along(reader, position, self.array.shape))
                continue
            weight = find_weight(value)
            axis = along(reader, position, weight.array(self.opset).shape)
            found.append(weight.source_axis(axis, self.opset))
        return list(dict.fromkeys(found))

    @property
    def anchor(self) -> ir.Node:
        """The node in whose front a replacement is known to all readers, in the graph of the value.

        A body that reads a weight from outside would otherwise compute it anew in each turn.
        """
        producer = self.value.producer()
        graph = self.value.graph if producer is None else producer.graph
        assert isinstance(graph, ir.Graph)
        users = list(dict.fromkeys(use.node for use in self.value.uses()))
        inside = all(user.graph is graph for user in users)
        if inside and len(users) == 1:
            return users[0]
        nodes = iter(graph)
        if not inside and producer is not None:
            next(node for node in nodes if node is producer)
        return next(node for node in nodes if not inside or node in users)


def _moves(node: ir.Node, position: int) -> bool:
    return position == 0 and node.op_type in MOVES and not node.domain


def _readers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    found, work = [], [value]
    while work:
        value = work.pop()
        if value.is_graph_output():
            raise Declined("the weight is a graph output, too")
        for node, position in value.uses():
            if _moves(node, position):
                work.append(node.outputs[0])
            elif position in OPERANDS.get(operator_of(node), ()):
                found.append((node, position))
            else:
                raise Declined(f"the weight is also read by {node.op_type}")
    return found
