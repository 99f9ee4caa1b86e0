"""Take a quantized model back to floats.

Before: y = QLinearConv(x, sx, zx, w, sw, zw, sy, zy, b)
After:  y = QuantizeLinear(Conv(DequantizeLinear(x, sx, zx), DequantizeLinear(w, sw, zw), b'), sy, zy)

Before: y = Mul(Cast(MatMulInteger(q, w, z, zw)), Mul(s, sw))      q, s, z = DynamicQuantizeLinear(x)
After:  y = MatMul(DequantizeLinear(q, s, z), DequantizeLinear(w, sw, zw))

Before: y = DequantizeLinear(QuantizeLinear(x, s, z), s, z)        form=float, the default, from here on
After:  y = Clip(x, (0 - z) s, (255 - z) s)                        as wide as the integers; z: uint8

Before: y = DequantizeLinear(w, s, z)                              w: a constant
After:  y is a constant of floats

Before: y = MatMulNBits(x, w, scales, zeros)
After:  y = MatMul(x, w')                                          w': floats

Also DequantizeLinear of integers that are moved or joined first; and DynamicQuantizeLinear, whose range is
as wide as its input. The bounds stay: quantizers leave out a Relu or Clip where the integers end.
form=qdq only says quantized operators as floating-point ones between DequantizeLinear and QuantizeLinear, as
other runtimes take them: sums are rounded as floats there, so that now and then a result is the next integer,
unless the runtime fuses it back.
Declines: a graph input or output is quantized; scale and zero point differ between the two sides, are
    computed at run time, or by channel for activations; no float form of the operator is known (QAttention).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_array, constant_of
from onnxopt.index import operator_of
from onnxopt.passes.shared.plain import PLAIN, SCALED, plain, scaled, unpacked
from onnxopt.passes.shared.quantized import (
    DEQUANTIZE,
    MS,
    QUANTIZE,
    carried,
    input_of,
    pads_with_number,
    quantized_kind,
    require_same,
    stored_floats,
)
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["Dequantize"]

_DYNAMIC = "DynamicQuantizeLinear"
_OTHERS = (
    *("ConvInteger", "MatMulInteger", MS + "DynamicQuantizeLSTM", MS + "GatherBlockQuantized"),
    *(MS + "MatMulBnb4", MS + "QAttention", MS + "QEmbedLayerNormalization", MS + "QLinearReduceMean"),
    *(MS + "QMoE", MS + "QLinearConv", MS + "QOrderedMatMul", MS + "QOrderedAttention"),
)


@dataclass(frozen=True)
class Dequantize(Pass):
    """Compute in floats what a quantized model computes in integers.

    form: "float", or "qdq" to keep the rounding, between DequantizeLinear and QuantizeLinear.
    """

    name: ClassVar[str] = "dequantize"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """
        agraph (float[N,2] x) => (float[N,2] y)
        <float s = {0.1}, uint8 z = {3}, float t = {0.01}, int8[2,2] w = {1, 2, -3, -4}>
        {
            q = QuantizeLinear(x, s, z)
            a = DequantizeLinear(q, s, z)
            f = DequantizeLinear(w, t)
            y = MatMul(a, f)
        }
    """

    form: Literal["float", "qdq"] = "float"

    def rules(self) -> Sequence[Rule]:
        rules = [Rule("quantized operator", PLAIN, plain), Rule("product of integers", SCALED, scaled)]
        if self.form == "float":
            rules += [
                Rule("stored weight", DEQUANTIZE, _stored),
                Rule("rounding", DEQUANTIZE, _unrounded),
                Rule("weight in blocks", (MS + "MatMulNBits",), unpacked),
                Rule("quantized output", QUANTIZE, _output),
            ]
        return (*rules, Rule("operator without a float form", _OTHERS, _left))


def _stored(node: ir.Node, scope: Scope) -> Edit | None:
    if constant_of(node.inputs[0]) is None:
        return None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.constant(stored_floats(node), node.outputs[0].name))


def _unrounded(node: ir.Node, scope: Scope) -> Edit | None:
    value = node.inputs[0]
    maker = value.producer() if value is not None else None
    if value is None or maker is None:
        raise Declined("a graph input or a constant of an unknown type is quantized")
    if operator_of(maker) in QUANTIZE:
        return _bounded(node, maker, scope)
    if maker.op_type == _DYNAMIC and not maker.domain:
        if [input_of(node, 1), input_of(node, 2)] != list(maker.outputs[1:]):
            raise Declined("scale or zero point differ")
        return Edit(node, scope).replace(node.outputs[0], _present(maker.inputs[0]))
    moves = carried(maker)
    if moves is None:
        raise Declined(f"{maker.op_type} makes the integers")
    scale = input_of(node, 1)
    if scale is None or scale.shape is None or len(scale.shape):
        raise Declined("the scale may differ by channel, which the data in between moves")
    edit = Edit(node, scope)
    inputs = list(maker.inputs)
    if pads_with_number(maker) and input_of(maker, 2) is None:
        raise Declined("it is padded with 0, whatever that stands for")
    for place in [*moves[0], *([2] if pads_with_number(maker) else [])]:
        given = (inputs[place], *node.inputs[1:])
        inputs[place] = edit.op(node.op_type, given, node.attributes, domain=node.domain)
    outputs = edit.ops(maker.op_type, inputs, maker.attributes, outputs=len(maker.outputs), name=maker.name)
    return edit.replace(node.outputs[0], outputs[maker.outputs.index(value)])


def _bounded(node: ir.Node, first: ir.Node, scope: Scope) -> Edit:
    """The input of a QuantizeLinear, held where its integers end."""
    require_same(first, node)
    kind, scale = quantized_kind(node), constant_array(node.inputs[1])
    zero = np.zeros(()) if input_of(node, 2) is None else constant_array(node.inputs[2])
    if kind is None or scale is None or zero is None:
        raise Declined("scale or zero point are computed at run time")
    if scale.size != 1:
        raise Declined("activations are quantized by channel")
    ends = [(float(end) - float(zero.item())) * float(scale.item()) for end in (kind.min, kind.max)]
    edit, value = Edit(node, scope), _present(first.inputs[0])
    if scope.opset < 11:
        bounds = {"min": ends[0], "max": ends[1]}
        return edit.replace(node.outputs[0], edit.op("Clip", (value,), bounds))
    low, high = (edit.constant(np.array(end, scale.dtype), "bound") for end in ends)
    return edit.replace(node.outputs[0], edit.op("Clip", (value, low, high)))


def _output(node: ir.Node, _: Scope) -> Edit | None:
    if node.outputs[0].is_graph_output():
        raise Declined("a graph output is quantized")
    return None


def _left(node: ir.Node, _: Scope) -> Edit | None:
    raise Declined(f"no float form of {node.op_type} is known")


def _present(value: ir.Value | None) -> ir.Value:
    assert value is not None  # the operator demands it
    return value
