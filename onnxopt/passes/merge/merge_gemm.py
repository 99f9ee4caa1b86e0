"""Let a Gemm do the transposition, the scale and the sum beside it.

Before: y = Add(Mul(Gemm(Transpose(x), w), 0.5), c)
After:  y = Gemm[transA=1, alpha=0.5](x, w, c)

Before: y = Gemm(Div(a, 2), b)
After:  y = Gemm[alpha=0.5](a, b)

Before: y = Add(Gemm(a, b, MatMul(d, e)), c)
After:  y = Gemm(a, b, Gemm(d, e, c))

A scale beside a constant weight is left to merge-affine, which puts it into the weight.
Declines: another node, graph or the user reads what lies between; what is added may be larger than the
    product; a scale that is 0, not finite, or does not fit the attribute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import FLOATS, constant_array, constant_of
from onnxopt.passes.shared.gemm import Product, gemm, product_of, sum_as_gemm, untransposed
from onnxopt.passes.shared.layer import require_sole_reader
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeGemm"]

_GEMM = ("Gemm",)
_SCALES = ("Div", "Mul", "Neg")


@dataclass(frozen=True)
class MergeGemm(Pass):
    """Use a Gemm's transposition, its factors alpha and beta, and its third input."""

    name: ClassVar[str] = "merge-gemm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """
        agraph (float[3,2] x, float[3,4] w, float[2,4] c) => (float[2,4] y)
        <float half = {0.5}>
        {
            t = Transpose<perm=[1,0]>(x)
            h = Mul(t, half)
            p = Gemm(h, w)
            y = Add(c, p)
        }
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("Transpose before a Gemm", _GEMM, _transposed),
            Rule("scale before a Gemm", _GEMM, _scaled_before),
            Rule("scale after a Gemm", _SCALES, _scaled_after),
            Rule("sum after a Gemm", ("Add", "Sum"), lambda node, scope: sum_as_gemm(node, _GEMM, scope)),
        )


def _transposed(node: ir.Node, scope: Scope) -> Edit | None:
    product = product_of(node, _GEMM, scope)
    result = untransposed(product) if product is not None else None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], gemm(edit, result)) if result is not None else None


def _scaled_before(node: ir.Node, scope: Scope) -> Edit | None:
    product = product_of(node, _GEMM, scope)
    if product is None or product.dtype not in (None, *FLOATS):
        return None
    for place, value in enumerate(product.factors):
        scale = _scale_of(value.producer(), scope)
        if scale is None or (place == 0 and constant_of(product.factors[1]) is not None):
            continue
        inner, source, number = scale
        require_sole_reader(inner)
        ranks = [len(tensor.shape) for v in inner.inputs if (tensor := constant_of(v)) is not None]
        if 2 in ranks and (source.shape is None or len(source.shape) != 2):
            raise Declined("what is scaled is not known to be a matrix")
        factors = (source, product.factors[1]) if place == 0 else (product.factors[0], source)
        edit = Edit(node, scope)
        scaled = replace(product, factors=factors, alpha=_times(product, product.alpha, number))
        return edit.replace(node.outputs[0], gemm(edit, scaled))
    return None


def _scaled_after(node: ir.Node, scope: Scope) -> Edit | None:
    scale = _scale_of(node, scope)
    product = product_of(scale[1].producer(), _GEMM, scope) if scale is not None else None
    if scale is None or product is None or product.dtype not in (None, *FLOATS):
        return None
    if constant_of(product.factors[1]) is not None:
        return None
    require_sole_reader(product.node)
    alpha, beta = (_times(product, number, scale[2]) for number in (product.alpha, product.beta))
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], gemm(edit, replace(product, alpha=alpha, beta=beta)))


def _scale_of(node: ir.Node | None, scope: Scope) -> tuple[ir.Node, ir.Value, float] | None:
    """A node that multiplies by a constant number, what it multiplies, and the number."""
    if node is None or node.domain or node.op_type not in _SCALES or scope.opset < 7:
        return None
    if node.op_type == "Neg":
        return (node, node.inputs[0], -1.0) if node.inputs[0] is not None else None
    pairs = [(node.inputs[0], node.inputs[1]), (node.inputs[1], node.inputs[0])]
    for value, other in pairs[: 1 if node.op_type == "Div" else 2]:
        array = constant_array(other, 8)
        if value is None or array is None or array.size != 1 or array.ndim > 2:
            continue
        number = float(array.reshape(()))
        if number == 0 or not np.isfinite(number):
            raise Declined("the scale is 0 or not finite")
        return node, value, number if node.op_type == "Mul" else 1 / number
    return None


def _times(product: Product, factor: float, scale: float) -> float:
    """The factor times the scale, as a Gemm holds it: in float32, whatever the type of the matrices."""
    exact = factor * scale
    with np.errstate(over="ignore", under="ignore"):
        held = float(np.float32(exact))
    is_double = product.dtype in (ir.DataType.DOUBLE, None)
    if not np.isfinite(held) or (held == 0) != (exact == 0) or (is_double and held != exact):
        raise Declined("the scale does not fit the attribute, which is of type float")
    return held
