"""Multiply the weights of two fully connected layers that follow each other.

Before: y = MatMul(MatMul(x, A), B)            A: [K, M], B: [M, N]
After:  y = MatMul(x, A @ B)                   where K M + M N > K N

Before: y = Gemm(Gemm(x, A, a), B, b)
After:  y = Gemm(x, A @ B, a @ B + b)

Declines: a weight or a bias that matters is no constant; another node, graph or the user reads what lies
    between; the product takes no fewer multiply-adds, or more than 10^11 to compute; a weight is shared,
    stays, and the product is above 1 MiB; the second Gemm transposes what it reads; the first bias differs
    by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import float_attr
from onnxopt.passes.shared.layer import Layer, layer_of, require_sole_reader
from onnxopt.passes.shared.weight import LARGE, rounded
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeMatmul"]

_OPS = ("Gemm", "MatMul")
_MOST = 10**11
"""Multiply-adds that a product of two weights may take: some seconds."""


@dataclass(frozen=True)
class MergeMatmul(Pass):
    """Make one layer of two fully connected ones with nothing between them."""

    name: ClassVar[str] = "merge-matmul"
    kind: ClassVar[Kind] = "reorder"
    example = """
agraph (float[2, 2] x) => (float[2, 2] y) <float[2, 2] v = {1, 2, 3, 4}, float[2, 2] w = {5, 6, 7, 8}> {
    a = MatMul(x, v)
    y = MatMul(a, w)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("two matrix products", _OPS, _merge),)


def _merge(node: ir.Node, scope: Scope) -> Edit | None:
    second = layer_of(node)
    first = layer_of(second.source.producer()) if second is not None else None
    if second is None or first is None or first.node.op_type not in _OPS:
        return None
    if not (first.stored and second.stored):
        return None
    if scope.opset < 7:
        raise Declined("a bias before opset 7 broadcasts by rules of its own")
    if second.transposes:
        raise Declined("the second Gemm transposes what it reads")
    require_sole_reader(first.end)
    a, b = first.weight(), second.weight()
    if a.inputs * a.outputs + b.inputs * b.outputs <= a.inputs * b.outputs:
        raise Declined("the product of the weights takes no fewer multiply-adds")
    if a.outputs * a.inputs * b.outputs > _MOST:
        raise Declined("the product of the weights would take too long to compute")
    lost = sum(w.tensor.nbytes for w in (a, b) if len(w.value.uses()) == 1)
    if a.inputs * b.outputs * a.tensor.dtype.itemsize > max(lost, LARGE):
        raise Declined("the weights are shared and their product too large to add")
    kept = second if second.node.op_type == "Gemm" and not first.transposes else first
    bias = None if kept is second and first.bias is None else _bias(first, second)
    product = b.blocks[0, :, :, 0] @ a.blocks[0, :, :, 0]
    product *= float_attr((first if kept is second else second).node, "alpha", 1.0)
    weight = product.T if kept.weight().inputs_first else product
    edit = Edit(node, scope)
    output = kept.rebuilt(edit, first.source, rounded(weight, a.tensor.dtype), bias)
    return edit.replace(node.outputs[0], output)


def _bias(first: Layer, second: Layer) -> np.ndarray:
    """What the two add to the product of their weights with the input, in float64."""
    bias = first.bias_array()
    if bias.ndim == 2 and bias.shape[0] > 1:
        raise Declined("the bias of the first Gemm differs by row")
    alpha = float_attr(second.node, "alpha", 1.0)
    total: np.ndarray = alpha * second.weight().times(bias.reshape(-1)) + second.bias_array()
    return total
