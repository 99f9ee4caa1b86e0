"""Merge constants that are added or multiplied one after the other, and a product with a reciprocal.

Before: y = Sub(Add(x, a), b)                  a, b: constants
After:  y = Add(x, a - b)

Before: y = Mul(Div(x, a), b)
After:  y = Mul(x, b / a)

Before: y = Mul(x, Reciprocal(z)), or Mul(x, Div(1, z))
After:  y = Div(x, z)

Float constants are computed in float64 and rounded once. Integers are added as they wrap; Div of integers
is left alone.
Declines: the value in between is read elsewhere too, or is a graph output; the merged constant would be
    larger than both, is not finite, or is no normal number of its type; sums of floats whose constants
    cancel out, as (x + 1.5 * 2^23) - 1.5 * 2^23 does to round x.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_of
from onnxopt.passes.shared.chain import before, require_alone
from onnxopt.pattern import Patterns
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeArithmetic"]

_SHIFTS, _SCALES = ("Add", "Sub"), ("Mul", "Div")
_SMALLEST = {
    ir.DataType.FLOAT: 2.0**-126,
    ir.DataType.FLOAT16: 2.0**-14,
    ir.DataType.BFLOAT16: 2.0**-126,
    ir.DataType.DOUBLE: 2.0**-1022,
}
"""The smallest normal number of each floating-point type."""
_ROUNDING = {
    ir.DataType.FLOAT: 2.0**12,
    ir.DataType.FLOAT16: 2.0**5,
    ir.DataType.BFLOAT16: 2.0**4,
    ir.DataType.DOUBLE: 2.0**26,
}
"""From here on a constant that is added and taken away again rounds visibly: to half of the type's digits."""
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_LARGEST = 1 << 20
"""Bytes of a constant that is merged."""
_RECIPROCAL = Patterns({"Div(x, z)": ("Mul(x, Reciprocal(z))", "Mul(x, Div(1, z))")})


@dataclass(frozen=True)
class MergeArithmetic(Pass):
    """Let one op add, or multiply by, the constants of two."""

    name: ClassVar[str] = "merge-arithmetic"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[2,3] x) => (float[2,3] y) {
        a = Constant<value_float = 2.0>()
        b = Constant<value_floats = [1.0, 2.0, 3.0]>()
        c = Div(x, a)
        y = Mul(b, c)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("constants in a row", (*_SHIFTS, *_SCALES), _constants),
            Rule("product with a reciprocal", _RECIPROCAL.op_types, _quotient),
        )


@dataclass(frozen=True)
class _Term:
    """An op on a run-time value and a constant; `first`: the constant is its first operand."""

    source: ir.Value
    constant: ir.TensorProtocol
    first: bool


def _term(node: ir.Node) -> _Term | None:
    a, b = node.inputs
    left, right = constant_of(a), constant_of(b)
    if a is None or b is None or (left is None) == (right is None):
        return None
    if left is not None:
        return None if node.op_type == "Div" else _Term(b, left, True)
    assert right is not None
    return _Term(a, right, False)


def _constants(node: ir.Node, scope: Scope) -> Edit | None:
    family = _SHIFTS if node.op_type in _SHIFTS else _SCALES
    outer = _term(node) if scope.opset >= 7 else None
    above = before(outer.source, node, family) if outer is not None else None
    inner = _term(above) if above is not None else None
    if outer is None or inner is None or above is None:
        return None
    dtype = outer.constant.dtype
    if dtype not in _SMALLEST and (dtype not in _INTEGERS or family is _SCALES):
        return None
    require_alone(above, node)
    if max(outer.constant.nbytes, inner.constant.nbytes) > _LARGEST:
        raise Declined("a constant is too large to be merged")
    a, b = (_wide(term.constant) for term in (inner, outer))
    if np.broadcast(a, b).size > max(a.size, b.size):
        raise Declined("the merged constant would be larger than both")
    edit = Edit(node, scope)
    if family is _SCALES:
        with np.errstate(all="ignore"):
            scale = (1 / a if above.op_type == "Div" else a) * (1 / b if node.op_type == "Div" else b)
        merged = edit.constant(_rounded(scale, dtype, (a, b)), outer.constant.name)
        return edit.replace(node.outputs[0], edit.op("Mul", (inner.source, merged)))
    sign, shift = _shifted(above.op_type, inner.first, 1, np.zeros((), a.dtype), a)
    sign, shift = _shifted(node.op_type, outer.first, sign, shift, b)
    larger = np.maximum(np.abs(a), np.abs(b))
    if dtype in _ROUNDING and ((larger >= _ROUNDING[dtype]) & (np.abs(shift) < larger / 64)).any():
        raise Declined("the constants cancel out, which may be there to round")
    merged = edit.constant(_rounded(shift, dtype, (a, b)), outer.constant.name)
    operands = (inner.source, merged) if sign > 0 else (merged, inner.source)
    return edit.replace(node.outputs[0], edit.op("Add" if sign > 0 else "Sub", operands))


def _shifted(
    op_type: str, first: bool, sign: int, shift: np.ndarray, constant: np.ndarray
) -> tuple[int, np.ndarray]:
    """sign x + shift, after one more Add or Sub of a constant."""
    if op_type == "Add":
        return sign, shift + constant
    return (-sign, constant - shift) if first else (sign, shift - constant)


def _wide(tensor: ir.TensorProtocol) -> np.ndarray:
    array = tensor.numpy()
    return array if tensor.dtype in _INTEGERS else array.astype(np.float64)


def _rounded(array: np.ndarray, dtype: ir.DataType, given: Sequence[np.ndarray]) -> np.ndarray:
    """The merged constant in its type; a number that is lost in it would be lost for good."""
    kind = dtype.numpy()
    if dtype in _INTEGERS:
        return np.asarray(array, kind)
    with np.errstate(all="ignore"):
        result = np.asarray(array, kind)
    back = result.astype(np.float64)
    if not all(np.isfinite(one).all() for one in (back, *given)):
        raise Declined("the merged constant is not finite")
    if ((np.abs(back) < _SMALLEST[dtype]) & (array != 0)).any():
        raise Declined("the merged constant is no normal number of its type")
    return result


def _quotient(node: ir.Node, scope: Scope) -> Edit | None:
    match = _RECIPROCAL.find(node, scope)
    if match is None or match["z"].dtype not in _SMALLEST:
        return None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], match.build(edit, match.name))
