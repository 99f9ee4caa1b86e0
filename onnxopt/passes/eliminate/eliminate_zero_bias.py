"""Eliminate biases that are zero everywhere.

Before: y = Conv(x, w, b)                      b holds zeros
After:  y = Conv(x, w)

A line an operator says which of its inputs the bias is.
Declines: the bias is a graph input, the user's to override; a Gemm before opset 11 has to have one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_of
from onnxopt.passes.shared.weight import LARGE
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["EliminateZeroBias"]

_BIAS = {
    "Conv": 2,
    "ConvTranspose": 2,
    "DeformConv": 3,
    "Gemm": 2,
    "LayerNormalization": 2,
    "QLinearConv": 8,
}


@dataclass(frozen=True)
class EliminateZeroBias(Pass):
    """Drop what adds nothing; only the sign of a zero may change."""

    name: ClassVar[str] = "eliminate-zero-bias"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """
        agraph (float[1,2,N] x) => (float[1,1,N] y)
        <float[1,2,1] w = {3, 4}, float[1] b = {0}>
        {
            y = Conv(x, w, b)
        }
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("a bias of zeros", tuple(_BIAS), _without),)


def _without(node: ir.Node, scope: Scope) -> Edit | None:
    place = _BIAS[node.op_type]
    value = node.inputs[place] if len(node.inputs) > place else None
    if value is None or len(node.outputs) > 1:
        return None
    tensor = value.const_value if value.is_initializer() else constant_of(value)
    if tensor is None or tensor.nbytes > LARGE or tensor.numpy().any():
        return None
    if value.is_graph_input():
        raise Declined("the bias is a graph input (overridable; --freeze-initializers folds it)")
    if node.op_type == "Gemm" and scope.opset < 11:
        raise Declined("a Gemm before opset 11 has to have a bias")
    inputs = [*node.inputs[:place], *([None, *node.inputs[place + 1 :]] if node.inputs[place + 1 :] else [])]
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.op(node.op_type, inputs, node.attributes))
