"""Say a stored quantized weight as DequantizeLinear of integers, the one form that later steps look for.

Before: y = Mul(Sub(Cast(w), z), s)        w: a constant of integers; s and z: one number, or one a channel
After:  y = DequantizeLinear(w, s, z)

Before: q = QuantizeLinear(w, s, z)        w: a constant of floats, as quantization-aware tools leave it
After:  q is a constant of integers

(w - z) s is computed in float32 both times, from whole numbers that float32 holds; the floats are rounded as
the runtime would.
Declines: scales or zero points are no constants; scales differ along several axes, make the result larger
    than the weight, or are not float32; a zero point is no number of the weight's type; DequantizeLinear of
    the type, or by channel, came with a later opset.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, constant_of, int_attr, sizes_of
from onnxopt.passes.shared.chain import before
from onnxopt.passes.shared.quantized import QUANTIZE, SMALL, stored_integers
from onnxopt.quantization.formats import FORMATS
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["FuseDequantize"]

_FORMATS = {form.dtype: form for form in FORMATS.values() if not form.is_float and form.bits <= 8}


@dataclass(frozen=True)
class FuseDequantize(Pass):
    """Make DequantizeLinear of stored integers of a Cast, Sub and Mul, or of floats that are quantized."""

    name: ClassVar[str] = "fuse-dequantize"
    example: ClassVar[str] = """
        agraph (float[N,2] x) => (float[N,3] y)
        <int8[2,3] w = {1, 2, 3, -4, -5, -6}, float[3] s = {0.1, 0.2, 0.3}>
        {
            c = Cast<to=1>(w)
            f = Mul(c, s)
            y = MatMul(x, f)
        }
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("scaled integers", ("Mul",), _scaled),
            Rule("stored floats that are quantized", QUANTIZE, _quantized),
        )


def _scaled(node: ir.Node, scope: Scope) -> Edit | None:
    for place in (0, 1):
        weight, zero = _difference(node, node.inputs[place])
        tensor, scale = constant_of(weight), node.inputs[1 - place]
        if weight is None or tensor is None or tensor.dtype not in _FORMATS:
            continue
        form = _FORMATS[tensor.dtype]
        scales, zeros = (_numbers(value) for value in (scale, zero))
        if scales.dtype != np.float32:
            raise Declined("the scale is not float32")
        whole = zeros.astype(np.int64)
        if (whole != zeros).any() or (whole < form.low).any() or (whole > form.high).any():
            raise Declined("the zero point is no number of the weight's type")
        joint = np.broadcast_shapes(scales.shape, whole.shape)
        axis = _axis(joint, sizes_of(tensor))
        if scope.opset < (needed := max(form.opset, 10 if axis is None else 13)):
            raise NewerOpset("DequantizeLinear of such a weight", needed)
        shape = () if axis is None else (-1,)
        edit = Edit(node, scope)
        inputs = [weight, edit.constant(np.broadcast_to(scales, joint).reshape(shape), _name(scale))]
        if whole.any():
            spread = np.broadcast_to(whole, joint).reshape(shape).astype(form.dtype.numpy())
            inputs.append(edit.constant(ir.Tensor(spread, dtype=form.dtype), _name(zero)))
        floats = edit.op("DequantizeLinear", inputs, {} if axis is None else {"axis": axis})
        return edit.replace(node.outputs[0], floats)
    return None


def _difference(node: ir.Node, value: ir.Value | None) -> tuple[ir.Value | None, ir.Value | None]:
    """What is cast to float32, and what is subtracted from it then."""
    less = before(value, node, ("Sub",))
    cast = before(value if less is None else less.inputs[0], node, ("Cast",))
    if cast is None or int_attr(cast, "to", 0) != ir.DataType.FLOAT:
        return None, None
    return cast.inputs[0], None if less is None else less.inputs[1]


def _name(value: ir.Value | None) -> str | None:
    return None if value is None else value.name


def _numbers(value: ir.Value | None) -> np.ndarray:
    array = np.zeros(()) if value is None else constant_array(value, SMALL)
    if array is None:
        raise Declined("scale or zero point are no constants")
    return array


def _axis(scales: tuple[int, ...], weight: tuple[int, ...]) -> int | None:
    """The axis of the weight along which scales differ; None where there is one for all."""
    far = [i - len(scales) + len(weight) for i, size in enumerate(scales) if size != 1]
    if len(scales) > len(weight) or any(weight[axis] != scales[axis - len(weight)] for axis in far):
        raise Declined("the scale makes the result larger than the weight")
    if len(far) > 1:
        raise Declined("the scales differ along several axes")
    return far[0] if far else None


def _quantized(node: ir.Node, scope: Scope) -> Edit | None:
    if constant_of(node.inputs[0]) is None:
        return None
    edit = Edit(node, scope)
    value = edit.constant(stored_integers(node), node.outputs[0].name)
    return edit.replace(node.outputs[0], value)
