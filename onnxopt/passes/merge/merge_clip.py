"""Merge two ops in a row that bound their input: Clip, Relu, Min and Max with a constant.

Before: z = Clip(Clip(x, a, b), c, d)
After:  z = Clip(x, low, high), with high = min(max(b, c), d) and low = min(max(min(a, b), c), d)
    or the first op alone, where the second one changes nothing.
Each op is min(max(x, low), high), so that two of them hold every x between what they make of -inf and of
+inf. Clip's missing bounds are the largest finite values of the type; Relu, Min and Max have none.
Declines: a bound that is no constant, no scalar or NaN; a type that is unknown; the value in between is
    read elsewhere too, unless the first op does it alone; a Clip of another type than float32 before opset
    12, for which runtimes have none.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_of, float_attr
from onnxopt.passes.shared.chain import before, rank_of, require_alone
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeClip"]

_OPS = ("Clip", "Relu", "Min", "Max")


@dataclass(frozen=True)
class MergeClip(Pass):
    """Let one Clip hold what two ops hold."""

    name = "merge-clip"
    example = """
agraph (float[4] x) => (float[4] y) <float high = {6}> {
    a = Relu(x)
    y = Min(a, high)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("bounds after bounds", _OPS, _merge),)


@dataclass(frozen=True)
class _Bounds:
    """x -> min(max(x, low), high); infinite where the op has no such bound."""

    low: float
    high: float

    def of(self, x: float) -> float:
        return min(max(x, self.low), self.high)


def _merge(node: ir.Node, scope: Scope) -> Edit | None:
    place = _data_input(node)
    first = None if place is None else before(node.inputs[place], node, _OPS)
    if place is None or first is None or scope.opset < 6:
        return None
    inside = _data_input(first)
    if inside is None:
        return None
    source, result = first.inputs[inside], node.outputs[0]
    dtype = _dtype(scope.opset, source, *first.inputs, *first.outputs, *node.inputs, result)
    inner = _bounds(first, dtype, rank_of(source) or 0)
    outer = _bounds(node, dtype, rank_of(*first.outputs, source) or 0)
    low, high = outer.of(inner.of(-math.inf)), outer.of(inner.of(math.inf))
    edit = Edit(node, scope)
    if (low, high) == (inner.of(-math.inf), inner.high):
        return edit.replace(result, first.outputs[0])
    require_alone(first, node)
    if (low, high) == (outer.low, outer.high):
        inputs = [source if position == place else value for position, value in enumerate(node.inputs)]
        return edit.replace(result, edit.op(node.op_type, inputs, node.attributes))
    if math.isinf(low) or math.isinf(high):
        return None
    return edit.replace(result, _clip(edit, scope.opset, source, low, high, dtype))


def _clip(
    edit: Edit, opset: int, source: ir.Value | None, low: float, high: float, dtype: ir.DataType
) -> ir.Value:
    """A Clip in the form of the opset."""
    if opset < 11:
        return edit.op("Clip", (source,), {"min": float(low), "max": float(high)})
    if opset < 12 and dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Declined("runtimes take no Clip of this type before opset 12")
    bounds = (
        edit.constant(np.array(bound, dtype.numpy()), name) for name, bound in (("min", low), ("max", high))
    )
    return edit.op("Clip", (source, *bounds))


def _data_input(node: ir.Node) -> int | None:
    """The position of the input that is bounded; None unless a Min or Max has one more, a constant."""
    if node.op_type in ("Clip", "Relu"):
        return 0
    fixed = [position for position, value in enumerate(node.inputs) if constant_of(value) is not None]
    return 1 - fixed[0] if len(node.inputs) == 2 and len(fixed) == 1 else None


def _dtype(opset: int, *values: ir.Value | None) -> ir.DataType:
    """The type of the values; below opset 11 bounds are attributes, which are float32."""
    dtype = next((v.dtype for v in values if v is not None and v.dtype is not None), None)
    if dtype is None:
        raise Declined("the type is unknown")
    if opset < 11 and dtype is not ir.DataType.FLOAT:
        raise Declined("bounds are float32 attributes, the values are not")
    return dtype


def _bounds(node: ir.Node, dtype: ir.DataType, rank: int) -> _Bounds:
    """What the node does to a value of this type, and of at least this rank."""
    if node.op_type == "Relu":
        return _Bounds(0, math.inf)
    if node.op_type == "Clip":
        low, high = _limits(dtype)
        if "min" in node.attributes or "max" in node.attributes:
            return _Bounds(float_attr(node, "min", low), float_attr(node, "max", high))
        given = (*node.inputs[1:], None, None)
        return _Bounds(
            low if given[0] is None else _scalar(given[0], 0),
            high if given[1] is None else _scalar(given[1], 0),
        )
    place = _data_input(node)
    assert place is not None
    bound = _scalar(node.inputs[1 - place], rank)
    return _Bounds(bound, math.inf) if node.op_type == "Max" else _Bounds(-math.inf, bound)


def _scalar(value: ir.Value | None, rank: int) -> float:
    """A bound that broadcasts to nothing larger than a value of this rank."""
    tensor = constant_of(value)
    if tensor is None:
        raise Declined("a bound is no constant")
    if tensor.size != 1 or len(tensor.shape) > rank:
        raise Declined("a bound is no scalar")
    element = tensor.numpy().reshape(-1)[0]
    bound = int(element) if element.dtype.kind in "iu" else float(element)
    if math.isnan(bound):
        raise Declined("a bound is no number")
    return bound


def _limits(dtype: ir.DataType) -> tuple[float, float]:
    """The smallest and the largest finite value of a type."""
    if dtype.is_integer():
        return int(dtype.min), int(dtype.max)
    return float(dtype.min), float(dtype.max)
