"""Merge two Casts in a row where the first one keeps every value.

Before: z = Cast[to=c](Cast[to=b](x)), each value of x's type a is a value of b
After:  z = Cast[to=c](x), or x itself where c is a; where c is b, the first Cast alone
Declines: the first Cast rounds, truncates or wraps; x's type is unknown; types whose Cast has options or
    is no plain conversion (float8 and smaller, strings, complex); integers that reach an integer type too
    small for them through a float (ONNX leaves the result open, the direct Cast wraps).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.passes.shared.chain import before, require_alone
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeCast", "is_lossless"]

_INTEGERS = (
    ir.DataType.INT8,
    ir.DataType.INT16,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.UINT8,
    ir.DataType.UINT16,
    ir.DataType.UINT32,
    ir.DataType.UINT64,
)
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.FLOAT, ir.DataType.DOUBLE)
_PLAIN = (ir.DataType.BOOL, *_INTEGERS, *_FLOATS)


@dataclass(frozen=True)
class MergeCast(Pass):
    """Leave out a Cast that only widens on the way to another type."""

    name = "merge-cast"
    example = """
agraph (float16[2] x) => (double[2] y) {
    a = Cast<to = 1>(x)
    y = Cast<to = 11>(a)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("Cast after Cast", ("Cast",), _cast),)


def _cast(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Cast",))
    if first is None:
        return None
    source, middle, target = first.inputs[0], _target(first), _target(node)
    if source is None or middle is None or target is None:
        return None
    if target not in _PLAIN or middle not in _PLAIN:
        raise Declined("a type whose Cast is no plain conversion")
    if target is middle:
        return Edit(node, scope).replace(node.outputs[0], first.outputs[0])
    if source.dtype is None:
        raise Declined("the type before the first Cast is unknown")
    if not is_lossless(source.dtype, middle):
        raise Declined("the first Cast does not keep every value")
    if source.dtype is target:
        return Edit(node, scope).replace(node.outputs[0], source)
    if (
        source.dtype in _INTEGERS
        and middle in _FLOATS
        and target in _INTEGERS
        and not is_lossless(source.dtype, target)
    ):
        raise Declined("integers out of the last type's range, which a float in between leaves open")
    require_alone(first, node)
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.op("Cast", (source,), {"to": target.value}))


def _target(node: ir.Node) -> ir.DataType | None:
    """The type a Cast gives; None below opset 6, where it is spelt as text."""
    attr = node.attributes.get("to")
    return ir.DataType(attr.as_int()) if attr is not None and attr.type == ir.AttributeType.INT else None


def is_lossless(source: ir.DataType, target: ir.DataType) -> bool:
    """Whether each value of one type is exactly a value of the other."""
    if source not in _PLAIN or target not in _PLAIN:
        return False
    if source is target or source is ir.DataType.BOOL:
        return True
    if source in _INTEGERS and target in _INTEGERS:
        return bool(target.min <= source.min and source.max <= target.max)
    if target not in _FLOATS:
        return False
    if source in _INTEGERS:
        return int(source.max).bit_length() <= target.mantissa_bitwidth + 1
    wider = target.exponent_bitwidth >= source.exponent_bitwidth
    return wider and target.mantissa_bitwidth >= source.mantissa_bitwidth
