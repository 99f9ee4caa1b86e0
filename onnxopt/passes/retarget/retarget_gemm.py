"""Say a product of two matrices and its bias as Gemm, or as MatMul and Add.

Before: y = Add(MatMul(x, w), b)               form=gemm, the default; x and w have rank 2
After:  y = Gemm(x, w, b)

Before: y = MatMul(x, Transpose(w))            form=gemm
After:  y = Gemm[transB=1](x, w)

Before: y = Gemm[transB=1](x, w, b)            form=matmul, for quantizers that know no other product
After:  y = Add(MatMul(x, w'), b)              w' is the transpose of w

ONNX Runtime computes both in the same time (it makes the Gemm itself at load).
Declines: another node, graph or the user reads the product; what is added may be larger than it; other types
    than floating point; as MatMul: a transposed or scaled operand, or a scaled bias, that is no constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_of
from onnxopt.passes.shared.gemm import gemm, product_of, sum_as_gemm, untransposed
from onnxopt.passes.shared.layer import constant
from onnxopt.passes.shared.weight import rounded
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope
from onnxopt.streamed import LARGE, is_on_disk, mapped, transposed

__all__ = ["RetargetGemm"]

_MATMUL = ("MatMul",)


@dataclass(frozen=True)
class RetargetGemm(Pass):
    """Make Gemm of MatMul and Add, or the reverse.

    form: "gemm" or "matmul", what to make.
    """

    name: ClassVar[str] = "retarget-gemm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """
        agraph (float[N,2] x) => (float[N,3] y)
        <float[2,3] w = {1, 2, 3, 4, 5, 6}, float[3] b = {7, 8, 9}>
        {
            p = MatMul(x, w)
            y = Add(p, b)
        }
    """

    form: Literal["gemm", "matmul"] = "gemm"

    def rules(self) -> Sequence[Rule]:
        if self.form == "matmul":
            return (Rule("Gemm", ("Gemm",), _as_matmul),)
        return (
            Rule("MatMul of a Transpose", _MATMUL, _transposed),
            Rule("MatMul and Add", ("Add", "Sum"), lambda node, scope: sum_as_gemm(node, _MATMUL, scope)),
        )


def _transposed(node: ir.Node, scope: Scope) -> Edit | None:
    product = product_of(node, _MATMUL, scope) if scope.opset >= 11 else None  # before, a Gemm has to add
    result = untransposed(product) if product is not None else None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], gemm(edit, result)) if result is not None else None


def _as_matmul(node: ir.Node, scope: Scope) -> Edit | None:
    product = product_of(node, ("Gemm",), scope)
    if product is None:
        return None
    if product.sums_nothing:
        raise Declined("the product sums up nothing")
    edit, factors, scales = Edit(node, scope), list(product.factors), [1.0, 1.0]
    scales[1 if constant_of(factors[1]) is not None else 0] = product.alpha
    for place, value in enumerate(product.factors):
        if product.transposed[place] or scales[place] != 1:
            tensor = constant(value, "transposed or scaled operand")
            if tensor.nbytes > LARGE and len(value.uses()) > 1:
                raise Declined("the operand is shared and too large to duplicate")
            changed = _changed(tensor, scales[place], product.transposed[place])
            factors[place] = edit.constant(changed, value.name)
    c = product.c
    if c is not None and product.beta != 1:
        c = edit.constant(_changed(constant(c, "scaled bias"), product.beta, False), c.name)
    result = edit.op("MatMul", factors, name=node.name or "")
    return edit.replace(node.outputs[0], result if c is None else edit.op("Add", [result, c]))


def _changed(tensor: ir.TensorProtocol, scale: float, transpose: bool) -> ir.TensorProtocol:
    """The tensor scaled and transposed; one on disk stays there until the result is read."""
    result = transposed(tensor, (1, 0)) if transpose else tensor
    if scale != 1:
        result = mapped(lambda array: array.astype(np.float64) * scale, [result], tensor.dtype)
    if is_on_disk(tensor):
        return result
    return rounded(result.numpy(), tensor.dtype)
