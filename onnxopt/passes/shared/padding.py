"""Reading a Pad node, whatever the opset."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, float_attr, ints_attr, str_attr
from onnxopt.passes.shared.chain import axes_of, constant_ints
from onnxopt.rewrite import Declined

__all__ = ["ZERO", "Pads", "fill_array", "fill_of", "pads_of", "require_constant_mode"]

Pads = dict[int, tuple[int, int]]
"""Axis, as it is spelt -> elements put in front and behind."""

ZERO = b""
"""What `fill_of` gives for the value zero, of any type."""


def require_constant_mode(pad: ir.Node) -> None:
    """Raise Declined where a Pad repeats values instead of putting in one."""
    if str_attr(pad, "mode", "constant") != "constant":
        raise Declined("a Pad of another mode than constant")


def pads_of(pad: ir.Node, opset: int) -> Pads:
    """What a Pad puts in, by axis; Declined where it crops or depends on run-time values."""
    if opset < 11:
        amounts, axes = ints_attr(pad, "pads") or (), None
    else:
        amounts, axes = constant_ints(pad.inputs[1], "the pads are"), axes_of(pad, 3)
    count = len(amounts) // 2
    axes = tuple(range(count)) if axes is None else axes
    if len(amounts) != 2 * len(axes) or len(set(axes)) < count or min(amounts, default=0) < 0:
        raise Declined("pads that crop, or do not fit the axes")
    return {axis: (amounts[place], amounts[place + count]) for place, axis in enumerate(axes)}


def fill_array(pad: ir.Node, opset: int) -> np.ndarray | None:
    """The one value that is put in, where it is given and constant."""
    if opset < 11:
        return np.array(float_attr(pad, "value", 0.0), np.float32)
    return constant_array(pad.inputs[2]) if len(pad.inputs) > 2 else None


def fill_of(pad: ir.Node, opset: int) -> bytes | ir.Value:
    """The bytes of the value that is put in, `ZERO` for +0; the value itself where it is no constant."""
    array = fill_array(pad, opset)
    if array is None:
        value = pad.inputs[2] if len(pad.inputs) > 2 else None
        return ZERO if value is None else value
    data = array.tobytes()
    return data if any(data) else ZERO
