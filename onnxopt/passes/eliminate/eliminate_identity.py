"""Remove nodes whose operator hands its input on: Identity, and Dropout at inference.

Before: y = Identity(x); z = Dropout(y); w = Relu(z)
After:  w = Relu(x)
Declines: the output is a graph output whose value is a graph input, an initializer, comes from
    outside the graph, or is a graph output itself; the Dropout trains, may train, or its mask is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, has_reference, int_attr
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["EliminateIdentity"]


@dataclass(frozen=True)
class EliminateIdentity(Pass):
    """Let the readers of an Identity's or idle Dropout's output read its input."""

    name = "eliminate-identity"
    example = """
agraph (float[2] x) => (float[2] y) {
    a = Identity(x)
    b = Dropout(a)
    y = Relu(b)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("Identity", ("Identity",), _identity),
            Rule("Dropout at inference", ("Dropout",), _dropout),
        )


def _identity(node: ir.Node, scope: Scope) -> Edit | None:
    source = node.inputs[0]
    return None if source is None else Edit(node, scope).replace(node.outputs[0], source)


def _dropout(node: ir.Node, scope: Scope) -> Edit | None:
    source, output = node.inputs[0], node.outputs[0]
    if source is None or not (output.uses() or output.is_graph_output()):
        return None
    if _trains(node, scope.opset):
        raise Declined("the Dropout trains")
    if any(mask.uses() or mask.is_graph_output() for mask in node.outputs[1:]):
        raise Declined("the Dropout's mask is read")
    return Edit(node, scope).replace(output, source)


def _trains(node: ir.Node, opset: int) -> bool:
    """Dropout trains by `is_test` = 0 up to opset 6, by the input `training_mode` from 12 on, else never."""
    if opset < 7:
        return has_reference(node) or int_attr(node, "is_test", 0) == 0
    mode = node.inputs[2] if opset >= 12 and len(node.inputs) > 2 else None
    if mode is None:
        return False
    training = constant_array(mode)
    if training is None:
        raise Declined("whether the Dropout trains is known only when the model runs")
    return bool(training.any())
