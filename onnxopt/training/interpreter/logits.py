"""What final activations are computed from, for losses that take logits."""

from __future__ import annotations

from typing import NamedTuple

import onnx_ir as ir

from onnxopt.graph import int_attr

__all__ = ["Logits", "final_logits"]

_FINAL = ("Softmax", "LogSoftmax", "Sigmoid")


class Logits(NamedTuple):
    """What a final activation is computed from: the tensor's name, the activation, and its axis."""

    name: str
    activation: str
    axis: int


def final_logits(graph: ir.Graph) -> dict[str, Logits]:
    """By graph output, what the Softmax, LogSoftmax or Sigmoid that gives it reads; also behind Identity."""
    found = {}
    for output in graph.outputs:
        value: ir.Value | None = output
        while value is not None and (node := value.producer()) is not None:
            if node.op_type in _FINAL and not node.domain and node.inputs[0] is not None:
                default = -1 if graph.opset_imports.get("", 13) >= 13 else 1
                axis = int_attr(node, "axis", default)
                found[output.name or ""] = Logits(node.inputs[0].name or "", node.op_type, axis)
            if node.op_type not in ("Identity", "Cast", "QuantizeLinear", "DequantizeLinear"):
                break
            value = node.inputs[0]
    return found
