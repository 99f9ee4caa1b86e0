"""Make one RotaryEmbedding of the rotation of queries or keys by their positions.

Before: y = Add(Mul(x, cos), Mul(Concat(Neg(x[high half]), x[low half]), sin))
        with x [batch, heads, length, size], or [batch, length, heads, size]; cos and sin the same for each
        head, and in both halves of a head
After:  y = RotaryEmbedding(x, half of cos, half of sin)         before heads are split, where x has a Reshape
Declines: the opset is below 23; sine or cosine are not the same in both halves, as far as constants and
    Concat tell, or not given for each batch and position.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.evaluation import Dim, Dims, DimsOf
from onnxopt.graph import constant_array, has_reference, int_attr
from onnxopt.passes.shared.heads import Heads
from onnxopt.passes.shared.joint import joined, keep_shape, reshaped
from onnxopt.passes.shared.layout import Layout
from onnxopt.passes.shared.steps import layout_of
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["FuseRotary"]

_HALVES = (
    "Neg((high := Slice(x, ...))), (low := Slice(x, ...))",
    "Neg((high := Split(x, ...)[1])), (low := Split(x, ...)[0])",
)
_TURNED = Patterns(
    {"rotation": [f"Add(Mul(x, cos), Mul((turned := Concat({halves})), sin))" for halves in _HALVES]}
)
_LARGEST = 1 << 26
"""Bytes of a table of sines that is read."""
_FAR = 8
"""Ops above a sine that are looked at."""
_ALIKE = ("Cast", "Cos", "Div", "Gather", "Mul", "Neg", "Sin")
"""Ops that do the same to both halves; Div and Mul with a single number."""


@dataclass(frozen=True)
class FuseRotary(Pass):
    """Make one RotaryEmbedding of a rotation of halves."""

    name: ClassVar[str] = "fuse-rotary"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 23]>
      agraph (float[B, 2, S, 4] x, float[B, S, 2] angles) => (float[B, 2, S, 4] y)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] last = {3}, int64[1] four = {4}> {
        twice = Concat <axis = -1> (angles, angles)
        c = Cos (twice)
        s = Sin (twice)
        cos = Unsqueeze (c, one)
        sin = Unsqueeze (s, one)
        low = Slice (x, zero, two, last)
        high = Slice (x, two, four, last)
        minus = Neg (high)
        turned = Concat <axis = -1> (minus, low)
        a = Mul (x, cos)
        b = Mul (turned, sin)
        y = Add (a, b)
      }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("rotation of halves", ("Add",), functools.partial(_fuse, DimsOf())),)


def _fuse(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    match = _TURNED.find(node, scope)
    if match is None or not _turns_halves(match, dims_of(scope)):
        return None
    dims, x, edit = dims_of(scope), match["x"], Edit(node, scope)
    shape = dims.of(x) or ()
    if x.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
        raise Declined("the type is none that RotaryEmbedding takes")
    length = 2 if dims.of(match["cos"]) == (shape[0], 1, *shape[2:]) else 1
    tables = [_table(edit, match[name], shape, length, dims) for name in ("cos", "sin")]
    heads, size = shape[3 - length], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        raise Declined("the number of heads is not known")
    joint = None
    if length == 1:
        joint = reshaped(edit, x, (0, 0, heads * size))
    elif (found := joined(edit, [Heads.of(x, dims, scaled=False)], scope.opset)) is not None:
        joint = found[0][0]
    if scope.opset < 23:
        raise NewerOpset("RotaryEmbedding", 23)
    attributes = {} if joint is None else {"num_heads": heads}
    result = edit.op("RotaryEmbedding", (joint or x, *tables), attributes)
    if joint is not None:
        result = reshaped(edit, result, (0, 0, heads, size))
        result = edit.op("Transpose", (result,), {"perm": (0, 2, 1, 3)}) if length == 2 else result
    return edit.replace(node.outputs[0], keep_shape(result, node.outputs[0], dims))


def _turns_halves(match: Match, dims: Dims) -> bool:
    """Whether x has four axes, and its halves along the last one are what changes places."""
    shape, concat = dims.of(match["x"]), match.node("turned")
    if shape is None or len(shape) != 4 or not isinstance(shape[3], int) or shape[3] % 2:
        return False
    half = shape[3] // 2
    parts = ((match[name], start) for name, start in (("low", 0), ("high", half)))
    return int_attr(concat, "axis", 0) in (3, -1) and all(_is_part(*part, half, dims) for part in parts)


def _is_part(value: ir.Value, start: int, size: int, dims: Dims) -> bool:
    """Whether a value is the part of this size that starts there along the last of four axes."""
    node, shape = value.producer(), dims.of(value)
    if node is None or shape is None or shape[3] != size:
        return False
    if node.op_type == "Split":
        return int_attr(node, "axis", 0) in (3, -1) and len(node.outputs) == 2
    axes, steps = dims.ints(node, "axes", 3), dims.ints(node, "steps", 4) or [1]
    return axes in ([3], [-1]) and dims.ints(node, "starts", 1) == [start] and steps == [1]


def _table(edit: Edit, value: ir.Value, shape: Sequence[Dim], length: int, dims: Dims) -> ir.Value:
    """Half of the sines or cosines, as [batch, length, size / 2]."""
    wanted, layout = (shape[0], shape[length], shape[3]), Layout.identity(dims.of(value) or ())
    while dims.of(value) != wanted or layout.source != tuple(layout.target[i] for i in (0, length, 3)):
        node = value.producer()
        moves = layout_of(node, dims)
        whole = None if moves is None or len(layout.target) != 4 else moves.then(layout)
        if node is None or whole is None or node.inputs[0] is None:
            raise Declined("sine or cosine are not given for each batch and position")
        value, layout = node.inputs[0], whole
    half = _half(edit, value, dims, _FAR)
    if half is None:
        raise Declined("sine or cosine are not known to be the same in both halves of a head")
    return half


def _half(edit: Edit, value: ir.Value | None, dims: Dims, far: int) -> ir.Value | None:
    """The first half along the last axis, if the second one is the same."""
    array, node = constant_array(value, _LARGEST), None if value is None else value.producer()
    if array is not None and value is not None:
        low, high = np.split(array, 2, axis=-1) if array.ndim and array.shape[-1] % 2 == 0 else (array, None)
        return edit.constant(low, value.name) if high is not None and np.array_equal(low, high) else None
    if node is None or node.domain or has_reference(node) or not far:
        return None
    first, *others = node.inputs
    if node.op_type == "Concat" and len(node.inputs) == 2 and others[0] is first:
        rank = len(dims.of(value) or ())
        return first if int_attr(node, "axis", 0) in (-1, rank - 1) else None
    if node.op_type == "Gather" and int_attr(node, "axis", 0) != 0:
        return None
    if node.op_type in ("Div", "Mul") and set(dims.of(others[0]) or (1,)) != {1}:
        return None
    if node.op_type not in _ALIKE:
        return None
    half = _half(edit, first, dims, far - 1)
    return None if half is None else edit.op(node.op_type, (half, *others), node.attributes)
