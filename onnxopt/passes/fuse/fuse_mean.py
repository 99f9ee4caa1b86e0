"""Fuse a sum and the division by the number of its terms.

Before: y = Mul(ReduceSum(x, axes=[-1]), 1 / n)          n: the size of the axis, or the product of several
After:  y = ReduceMean(x, axes=[-1])

Likewise Div(ReduceSum(x), n).
Declines: the sizes of the axes are not known; the type is none of floating-point numbers; the sum is read
    elsewhere.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import int_attr
from onnxopt.passes.shared.chain import axes_of, normalised
from onnxopt.passes.shared.forms import with_axes
from onnxopt.pattern import Patterns
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseMean"]

_PRECISION = {ir.DataType.FLOAT: 2.0**-23, ir.DataType.FLOAT16: 2.0**-10, ir.DataType.DOUBLE: 2.0**-52}


@dataclass(frozen=True)
class FuseMean(Pass):
    """Make a ReduceMean of a ReduceSum and what divides it by the number of terms."""

    name: ClassVar[str] = "fuse-mean"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[N,8] x) => (float[N,1] y) {
        last = Constant<value_ints = [-1]>()
        eighth = Constant<value_float = 0.125>()
        sum = ReduceSum(x, last)
        y = Mul(sum, eighth)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("sum over its number of terms", _patterns().op_types, _fuse),)


@functools.cache
def _patterns() -> Patterns:
    total = "(sum := ReduceSum(x, ...))"
    return Patterns({"Mul": f"Mul({total}, 'factor')", "Div": f"Div({total}, 'factor')"})


def _fuse(node: ir.Node, scope: Scope) -> Edit | None:
    match = _patterns().find(node, scope)
    if match is None:
        return None
    x, total, factor = match["x"], match.node("sum"), match.number("factor")
    axes = axes_of(total)
    if x.dtype not in _PRECISION or x.shape is None or not axes or not factor:
        return None
    sizes = [x.shape[axis] for axis in normalised(axes, len(x.shape))]
    count = math.prod(size for size in sizes if isinstance(size, int))
    wanted = 1 / count if match.name == "Mul" and count else count
    if not count or abs(factor - wanted) > _PRECISION[x.dtype] * wanted:
        return None
    if not all(isinstance(size, int) for size in sizes):
        raise Declined("the size of an axis is not known")
    edit = Edit(node, scope)
    keepdims = {"keepdims": int_attr(total, "keepdims", 1)}
    mean = with_axes(edit, "ReduceMean", x, axes, scope.opset, keepdims)
    return edit.replace(node.outputs[0], mean)
