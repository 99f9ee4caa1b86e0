"""Remove steps between quantized values that change nothing.

Before: q = QuantizeLinear(DequantizeLinear(p, s, z), s, z)
After:  q is p

Before: q = QuantizeLinear(Transpose(DequantizeLinear(p, s, z)), s, z)      and other ops that move data
After:  q = Transpose(p)

Before: q = QuantizeLinear(Relu(x), s, z)      z: the smallest quantized number; or a Clip that is as wide
After:  q = QuantizeLinear(x, s, z)

Before: y = Transpose(DequantizeLinear(w, s, z))      w: a constant
After:  y = DequantizeLinear(Transpose(w), s, z)      and the Transpose can be folded

Quantizing saturates: round(v / s) + z is held between the smallest and the largest quantized number, as
Relu and Clip would hold it before. (p - z) s / s is off an integer by far less than one half, where the type
in between has the bits for it: float32, or float16 for eight bits.
Declines: scales or zero points differ or are computed at run time; they differ by channel where data
    moves; a scale that is not positive, or takes the numbers out of the range of its type; the type in
    between is too narrow; data of other types than integers of 8 or 16 bits is moved; the value in between
    is read elsewhere too.
Option `movement`: whether data is moved while quantized; TensorRT takes none outside of Q and DQ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, constant_of, int_attr, ints_attr
from onnxopt.passes.shared.chain import before, require_alone
from onnxopt.passes.shared.quantized import SMALL, input_of, quantized_kind, require_same
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeQdq"]

_MOVES = ("Expand", "Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze")
_MOVED = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16))


@dataclass(frozen=True)
class MergeQdq(Pass):
    """Leave out what does nothing between QuantizeLinear and DequantizeLinear."""

    movement: bool = True

    name = "merge-qdq"
    example = """agraph (float[2,3] x) => (float[3,2] y) <float s = {0.1}, uint8 z = {0}> {
        r = Relu(x)
        q = QuantizeLinear(r, s, z)
        d = DequantizeLinear(q, s, z)
        t = Transpose(d)
        p = QuantizeLinear(t, s, z)
        y = DequantizeLinear(p, s, z)
    }"""

    def rules(self) -> Sequence[Rule]:
        always = (
            Rule("quantized again", ("QuantizeLinear",), _again),
            Rule("bounds that quantizing has", ("QuantizeLinear",), _bounded),
            Rule("weight turned after dequantizing", ("Transpose",), _turned_weight),
        )
        return (
            (*always, Rule("data moved in between", ("QuantizeLinear",), _moved)) if self.movement else always
        )


def _again(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("DequantizeLinear",))
    if first is None or first.inputs[0] is None:
        return None
    require_same(first, node)
    _require_exact(first)
    return Edit(node, scope).replace(node.outputs[0], first.inputs[0])


def _moved(node: ir.Node, scope: Scope) -> Edit | None:
    move = before(node.inputs[0], node, _MOVES)
    first = before(move.inputs[0], move, ("DequantizeLinear",)) if move is not None else None
    if move is None or first is None:
        return None
    require_same(first, node)
    _require_exact(first)
    scale = constant_of(node.inputs[1])
    if scale is None or scale.size != 1:
        raise Declined("the scale differs by channel, which the data in between moves")
    if quantized_kind(node) not in _MOVED:
        raise Declined("runtimes do not move data of this quantized type")
    require_alone(move, node)
    edit = Edit(node, scope)
    moved = edit.op(move.op_type, (first.inputs[0], *move.inputs[1:]), move.attributes, name=move.name)
    return edit.replace(node.outputs[0], moved)


def _bounded(node: ir.Node, scope: Scope) -> Edit | None:
    bound = before(node.inputs[0], node, ("Clip", "Relu"))
    if bound is None or bound.inputs[0] is None or scope.opset < 11:
        return None
    kind, scale = quantized_kind(node), constant_array(node.inputs[1], SMALL)
    zero = np.zeros(()) if input_of(node, 2) is None else constant_array(input_of(node, 2), SMALL)
    if kind is None or scale is None or zero is None:
        raise Declined("scale or zero point are computed at run time")
    if not kind.is_integer() or not _as_wide(bound, scale.astype(np.float64), zero.astype(np.float64), kind):
        return None
    if not (scale > 0).all():
        raise Declined("a scale is not positive")
    require_alone(bound, node)
    edit = Edit(node, scope)
    quantized = edit.op("QuantizeLinear", (bound.inputs[0], *node.inputs[1:]), node.attributes)
    return edit.replace(node.outputs[0], quantized)


def _as_wide(bound: ir.Node, scale: np.ndarray, zero: np.ndarray, kind: ir.DataType) -> bool:
    """Whether a Relu or Clip holds values where quantizing does: its bounds become the last numbers."""
    if bound.op_type == "Relu":
        return bool((zero == float(kind.min)).all())
    ends = ((float(kind.min) + 0.25 - zero) * scale, (float(kind.max) - 0.25 - zero) * scale)
    for value, end, sign in zip([*bound.inputs[1:], None, None], ends, (1, -1), strict=False):
        array = None if value is None else constant_array(value, SMALL)
        if value is not None and (array is None or (sign * array > sign * end).any()):
            return False
    return True


def _turned_weight(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("DequantizeLinear",))
    weight = constant_of(first.inputs[0]) if first is not None else None
    if first is None or weight is None or int_attr(first, "block_size", 0):
        return None
    rank, scale = len(weight.shape), first.inputs[1]
    if rank < 2:
        return None
    perm = ints_attr(node, "perm") or tuple(reversed(range(rank)))
    scale_rank = len(scale.shape) if scale is not None and scale.shape is not None else None
    if scale_rank is None:
        raise Declined("whether the scale differs by channel is unknown")
    require_alone(first, node)
    attributes = dict(first.attributes)
    edit = Edit(node, scope)
    turned = edit.op("Transpose", (first.inputs[0],), {"perm": perm})
    if scale_rank == 1 and scope.opset >= 13:  # before, there is one scale for all
        attributes["axis"] = ir.AttrInt64("axis", perm.index(int_attr(first, "axis", 1) % rank))
    plain = edit.op("DequantizeLinear", (turned, *first.inputs[1:]), attributes, name=first.name)
    return edit.replace(node.outputs[0], plain)


def _require_exact(node: ir.Node) -> None:
    """Raise Declined unless what a DequantizeLinear gives falls to the same number when it is quantized."""
    kind, scale = quantized_kind(node), constant_array(node.inputs[1], SMALL)
    between = int_attr(node, "output_dtype", 0) or (node.inputs[1].dtype if node.inputs[1] else None)
    bits = {ir.DataType.FLOAT: 24, ir.DataType.FLOAT16: 11}.get(ir.DataType(between or 0), 0)
    assert kind is not None  # the caller has looked
    if bits < kind.bitwidth + 3:
        raise Declined("the type in between is not known to hold what is quantized")
    if scale is not None:
        far = (2 * float(kind.max) + 1) * scale.astype(np.float64)
        most = np.finfo(np.float32 if bits == 24 else np.float16).max
        if not ((far > 0) & (far < most)).all():
            raise Declined("a scale is not positive, or takes the numbers out of range")
