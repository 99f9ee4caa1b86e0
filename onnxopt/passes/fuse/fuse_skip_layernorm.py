"""Fuse a sum and the normalization of it into ONNX Runtime's SkipLayerNormalization.

Before: s = Add(Add(x, bias), skip)                       x, skip: of one shape, rank 2 or 3
        y = LayerNormalization(s, gamma, beta, axis=-1)
After:  y, , , s = com.microsoft.SkipLayerNormalization(x, skip, gamma, beta, bias)

Likewise RMSNormalization to SkipSimplifiedLayerNormalization. The sum stays an output where it is read
    elsewhere; the bias is optional.
It is guarded: version 1.31 of the runtime takes eight times as long for it on the CPU as for the two nodes.
Declines: the two operands are not known to have one shape; rank or axis are others; the sum is read elsewhere
    and gamma or beta are made after it; mean or deviation are read.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.evaluation import Dims, DimsOf
from onnxopt.graph import float_attr, has_reference, int_attr, sole_user
from onnxopt.passes.shared.chain import before
from onnxopt.passes.shared.layer import is_stored
from onnxopt.passes.shared.normalization import FLOATS, shape_of
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseSkipLayernorm"]

_FUSED = {
    "LayerNormalization": "SkipLayerNormalization",
    "RMSNormalization": "SkipSimplifiedLayerNormalization",
}


@dataclass(frozen=True)
class FuseSkipLayernorm(Pass):
    """Let the normalization of a sum make the sum itself."""

    name: ClassVar[str] = "fuse-skip-layernorm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[N,S,4] x, float[N,S,4] skip) => (float[N,S,4] y) {
        gamma = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
        sum = Add(x, skip)
        y = LayerNormalization(sum, gamma)
    }"""
    pattern: ClassVar[str] = """
    agraph (float[batch_1, length_128, 384] x)
        => (float[batch_1, length_128, 384] y, float[batch_1, length_128, 384] sum)
        <float[384, 384] weight, float[384] bias, float[384] gamma, float[384] beta,
         float[batch_1, length_128, 384] product, float[batch_1, length_128, 384] biased> {
        product = MatMul(x, weight)
        biased = Add(product, bias)
        sum = Add(biased, x)
        y = LayerNormalization(sum, gamma, beta)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("normalization of a sum", tuple(_FUSED), functools.partial(_fuse, DimsOf())),)


def _fuse(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    add = before(node.inputs[0], node, ("Add",))
    if add is None or scope.opset < 7 or add.graph is not node.graph:
        return None
    x, skip = add.inputs
    if is_stored(x) or is_stored(skip) or has_reference(node):
        return None
    gamma, beta = (*node.inputs[1:], None)[:2]
    if beta is not None and shape_of(beta) != shape_of(gamma):
        raise Declined("the bias has not the shape of the scale")
    _require_form(dims_of(scope), node, x, skip, gamma)
    total = add.outputs[0]
    kept = total.is_graph_output() or len(total.uses()) > 1
    if kept and any(value is not None and value.producer() for value in (gamma, beta)):
        raise Declined("the sum is read elsewhere, and scale or bias are made after it")
    x, skip, bias = _biased(x, skip, add, gamma)
    inputs = [x, skip, gamma, beta, bias] if node.op_type == "LayerNormalization" else [x, skip, gamma, bias]
    while inputs[-1] is None:
        inputs.pop()
    edit = Edit(add if kept else node, scope)
    outputs = edit.ops(
        _FUSED[node.op_type],
        inputs,
        {"epsilon": float_attr(node, "epsilon", 1e-5)},
        domain="com.microsoft",
        outputs=(True, False, False, True) if kept else 1,
        name=node.name,
    )
    if kept:
        edit.replace(total, outputs[3])
    return edit.replace(node.outputs[0], outputs[0])


def _require_form(
    dims: Dims, node: ir.Node, x: ir.Value | None, skip: ir.Value | None, gamma: ir.Value | None
) -> None:
    """Raise `Declined` where the operator does not take what is normalized."""
    if x is None or skip is None or x.dtype not in FLOATS:
        raise Declined("its type is none that the operator takes")
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        raise Declined("its mean or deviation is read too")
    shape = dims.of(x)
    if shape is None or shape != dims.of(skip):
        raise Declined("the operands of the sum are not known to have one shape")
    if float_attr(node, "epsilon", 1e-5) < 0:
        raise Declined("epsilon is negative")
    rank = len(shape)
    if rank not in (2, 3) or int_attr(node, "axis", -1) not in (-1, rank - 1):
        raise Declined("it is not along the last of two or three axes")
    if shape_of(gamma) != (shape[-1],):
        raise Declined("the scale has not one number for each element of the last axis")


def _biased(
    x: ir.Value | None, skip: ir.Value | None, add: ir.Node, gamma: ir.Value | None
) -> tuple[ir.Value | None, ir.Value | None, ir.Value | None]:
    """The operands of the sum; where a weight is added to one, the one before that, and the weight."""
    for one, other in ((x, skip), (skip, x)):
        inner = before(one, add, ("Add",))
        if inner is None or one is None or sole_user(one) is not add:
            continue
        for source, bias in (inner.inputs, inner.inputs[::-1]):
            if is_stored(bias) and shape_of(bias) == shape_of(gamma):
                return source, other, bias
    return x, skip, None
