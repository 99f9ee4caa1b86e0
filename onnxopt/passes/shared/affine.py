"""Fold a scale and a shift per channel into the layer before or after them.

After a layer:  scale (W x + b) + shift = (scale W) x + (scale b + shift)
Before a layer: W (scale x + shift) + b = (W scale) x + (b + W shift), the shift only where nothing is
    padded: padding puts zeros beside scale x + shift, which no x stands for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import float_attr, ints_attr, str_attr
from onnxopt.passes.shared.layer import Layer, require_sole_reader
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope

__all__ = ["Place", "inputs_scaled", "outputs_scaled", "scale_inputs", "scale_outputs"]

Place = tuple[ir.Node, int]
"""A node, and which of its inputs is meant."""


def scale_outputs(layer: Layer, scale: np.ndarray, shift: np.ndarray, anchor: ir.Node, scope: Scope) -> Edit:
    """Let the layer give the output of `anchor`, which is scale * layer + shift.

    Args:
        layer: what `anchor` reads.
        scale, shift: float64, of shape `()` or one number an output channel.
        anchor: the node to replace.
        scope: where it stands.

    Raises:
        Declined: the layer cannot take them.
    """
    edit = Edit(anchor, scope)
    return edit.replace(anchor.outputs[0], outputs_scaled(layer, scale, shift, edit, scope))


def outputs_scaled(layer: Layer, scale: np.ndarray, shift: np.ndarray, edit: Edit, scope: Scope) -> ir.Value:
    """The layer anew, giving scale * layer + shift; like `scale_outputs`, for what lies further above."""
    require_sole_reader(layer.end)
    weight = layer.weight()
    _check(layer, scale, shift, weight.outputs, scope)
    bias = layer.bias_array() * scale + shift
    tensor = weight.scaled(scale, outputs=True)
    return layer.rebuilt(edit, layer.source, tensor, bias)


def scale_inputs(
    layer: Layer,
    scale: np.ndarray,
    shift: np.ndarray,
    source: ir.Value,
    scope: Scope,
    way: Sequence[Place] = (),
) -> Edit:
    """Let the layer read `source`, where it reads scale * source + shift.

    Args:
        layer: the only reader of that.
        scale, shift: float64, of shape `()` or one number an input channel.
        source: of the same shape as what the layer reads, but for nodes on the way.
        scope: where the layer stands.
        way: nodes that `source` goes through before the layer reads it.

    Raises:
        Declined: the layer cannot take them.
    """
    edit = Edit(layer.end, scope)
    for node, place in way:
        inputs = (*node.inputs[:place], source, *node.inputs[place + 1 :])
        source = edit.op(node.op_type, inputs, node.attributes, name=node.name or "")
    return edit.replace(layer.end.outputs[0], inputs_scaled(layer, scale, shift, source, edit, scope))


def inputs_scaled(
    layer: Layer, scale: np.ndarray, shift: np.ndarray, source: ir.Value, edit: Edit, scope: Scope
) -> ir.Value:
    """The layer anew, reading `source` for scale * source + shift; as `scale_inputs`, in an edit."""
    weight, bias = layer.weight(), None
    _check(layer, scale, shift, weight.inputs, scope)
    if shift.any():
        if layer.node.op_type == "ConvTranspose":
            raise Declined("the shift does not reach all outputs of a ConvTranspose alike")
        if layer.node.op_type == "Conv" and not _unpadded(layer, weight.shape[2:]):
            raise Declined("the padding of the Conv would need the shift")
        bias = layer.bias_array() + float_attr(layer.node, "alpha", 1.0) * weight.times(shift)
    return layer.rebuilt(edit, source, weight.scaled(scale, outputs=False), bias)


def _check(layer: Layer, scale: np.ndarray, shift: np.ndarray, channels: int, scope: Scope) -> None:
    if layer.node.op_type in ("Gemm", "MatMul") and scope.opset < 7:
        raise Declined("a bias before opset 7 broadcasts by rules of its own")
    if not {scale.shape, shift.shape} <= {(), (1,), (channels,)}:
        raise Declined("scale or shift do not match the number of channels")
    if not (np.isfinite(scale).all() and np.isfinite(shift).all()):
        raise Declined("scale or shift are not finite")


def _unpadded(layer: Layer, kernel: tuple[int, ...]) -> bool:
    """Whether a Conv surely adds no padding."""
    mode = str_attr(layer.node, "auto_pad", "NOTSET")
    if mode == "VALID":
        return True
    if mode == "NOTSET":
        return not any(ints_attr(layer.node, "pads") or ())
    strides = ints_attr(layer.node, "strides") or (1,) * len(kernel)
    dilations = ints_attr(layer.node, "dilations") or (1,) * len(kernel)
    shape = layer.source.shape
    sizes = shape.dims[2:] if shape is not None else (None,) * len(kernel)
    for size, width, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        reach = (width - 1) * dilation + 1
        if reach > 1 and (not isinstance(size, int) or ((size - 1) // stride) * stride + reach > size):
            return False
    return True
