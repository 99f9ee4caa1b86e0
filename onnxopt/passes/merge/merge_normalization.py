"""Merge a factor and a shift by weights into the normalization before them.

Before: y = Add(Mul(LayerNormalization(x, s), c), d)
After:  y = LayerNormalization(x, s * c, d)

Likewise behind a Transpose, and for RMSNormalization (factors alone), InstanceNormalization and
    GroupNormalization. A scale of ones makes room for a factor that is computed at run time or overridable,
    if that has the scale's shape.
Declines: the other operand does not run along the normalized axes, or the channels, alone; it or the scale
    is no constant; the normalized value is read elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_array, has_reference, int_attr, ints_attr
from onnxopt.passes.shared.layer import constant, is_stored, require_sole_reader
from onnxopt.passes.shared.normalization import shape_of
from onnxopt.passes.shared.weight import rounded
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeNormalization"]

_PER_CHANNEL = ("GroupNormalization", "InstanceNormalization")
_NORMALIZATIONS = (*_PER_CHANNEL, "LayerNormalization", "RMSNormalization")
_Affine = tuple[ir.Value | None, ir.Value | None]


@dataclass(frozen=True)
class MergeNormalization(Pass):
    """Let the scale and bias of a normalization do what arithmetic after it does."""

    name: ClassVar[str] = "merge-normalization"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[N,2] x) => (float[N,2] y) {
        ones = Constant<value_floats = [1.0, 1.0]>()
        scale = Constant<value_floats = [2.0, 3.0]>()
        bias = Constant<value_floats = [4.0, 5.0]>()
        normal = LayerNormalization(x, ones)
        scaled = Mul(normal, scale)
        y = Add(scaled, bias)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("arithmetic after a normalization", ("Add", "Div", "Mul", "Sub"), _arithmetic),)


def _chain(value: ir.Value | None) -> tuple[ir.Node, ir.Node | None] | None:
    """The normalization that gives the value, and the Transpose after it."""
    node = value.producer() if value is not None and value.index() == 0 else None
    if node is not None and node.op_type == "Transpose" and not node.domain:
        above = _chain(node.inputs[0])
        return None if above is None or above[1] is not None else (above[0], node)
    found = node is not None and not node.domain and node.op_type in _NORMALIZATIONS
    return (node, None) if found and node is not None else None


def _arithmetic(node: ir.Node, scope: Scope) -> Edit | None:
    for first, other in (node.inputs, node.inputs[::-1]):
        chain = _chain(first)
        if chain is None or other is None or _chain(other) is not None:
            continue
        if node.op_type in ("Div", "Sub") and first is not node.inputs[0]:
            return None
        if node.op_type in ("Add", "Sub") and chain[0].op_type == "RMSNormalization":
            return None
        return _merged(node, *chain, other, scope)
    return None


def _merged(
    node: ir.Node, norm: ir.Node, moved: ir.Node | None, other: ir.Value, scope: Scope
) -> Edit | None:
    x, scale, bias = (*norm.inputs, None)[:3]
    shape, given = shape_of(scale), shape_of(other)
    if not is_stored(other) and (given is None or given != shape):
        return None  # a sum with another branch of the model
    _require_plain(norm)
    rank = len(x.shape) if x is not None and x.shape is not None else None
    if shape is None or given is None or rank is None:
        raise Declined("a shape is not known")
    after = (1,) * (rank - 2) if norm.op_type in _PER_CHANNEL else ()
    whole = (*[1] * (rank - len(shape) - len(after)), *shape, *after)
    padded = (*[1] * (rank - len(given)), *given)
    back = _back(moved, rank)
    fits = len(padded) == rank and all(padded[place] in (1, whole[axis]) for axis, place in enumerate(back))
    if not fits or not _spans(norm, len(shape), rank):
        raise Declined("the other operand does not run along the scale alone")
    edit, array = Edit(node, scope), constant_array(other)
    if array is None:
        affine = _taken(node, other, (scale, bias), shape == given and moved is None)
    else:
        array = array.astype(np.float64).reshape(padded).transpose(back)
        affine = _computed(edit, node, np.broadcast_to(array, whole).reshape(shape), (scale, bias))
    inputs = [x, *(one for one in affine if one is not None)]
    output = edit.op(norm.op_type, inputs, norm.attributes, name=norm.name)
    if moved is not None:
        output = edit.op("Transpose", (output,), moved.attributes, name=moved.name)
    return edit.replace(node.outputs[0], output)


def _back(moved: ir.Node | None, rank: int) -> Sequence[int]:
    """Where each axis is after the Transpose.

    Raises:
        Declined: another node reads what it transposes.
    """
    if moved is None:
        return range(rank)
    require_sole_reader(moved)
    order = ints_attr(moved, "perm") or range(rank)[::-1]
    return [order.index(axis) for axis in range(rank)]


def _require_plain(norm: ir.Node) -> None:
    if has_reference(norm):
        raise Declined("an attribute refers to one of the enclosing function")
    require_sole_reader(norm)
    if any(value.uses() or value.is_graph_output() for value in norm.outputs[1:]):
        raise Declined("its mean or deviation is read too")


def _spans(norm: ir.Node, axes: int, rank: int) -> bool:
    """Whether the scale has an element for each normalized one: others broadcast."""
    if norm.op_type in _PER_CHANNEL:
        return axes == 1
    axis = int_attr(norm, "axis", -1)
    return axes == (-axis if axis < 0 else rank - axis)


def _taken(node: ir.Node, other: ir.Value, affine: _Affine, fits: bool) -> _Affine:
    """Scale and bias, where one of them is the operand itself."""
    scale, bias = affine
    if fits and _is_all(bias, 0):
        if node.op_type == "Add":
            return scale, other
        if node.op_type == "Mul" and _is_all(scale, 1):
            return other, bias
    raise Declined("the other operand is computed at run time, or is a graph input")


def _is_all(value: ir.Value | None, number: int) -> bool:
    array = constant_array(value)
    return number == 0 if value is None else array is not None and bool((array == number).all())


def _computed(edit: Edit, node: ir.Node, array: np.ndarray, affine: _Affine) -> _Affine:
    """Scale and bias with the operand merged, in float64, rounded once."""
    old_scale, old_bias = affine
    dtype = constant(old_scale, "scale").dtype
    scale, bias = (
        np.zeros(()) if one is None else constant(one, "scale or bias").numpy().astype(np.float64)
        for one in affine
    )
    scales = node.op_type in ("Div", "Mul")
    with np.errstate(divide="ignore"):
        factor = 1 / array if node.op_type == "Div" else array
    if scales:
        scale, bias = scale * factor, bias * factor
    else:
        bias = bias - array if node.op_type == "Sub" else bias + array
    assert old_scale is not None
    return (
        edit.constant(rounded(scale, dtype), old_scale.name) if scales else old_scale,
        None if scales and old_bias is None else edit.constant(rounded(bias, dtype), "bias"),
    )
