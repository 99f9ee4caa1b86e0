"""Fold BatchNormalization into the layer before it, or else into the one after it.

Before: y = BatchNormalization(Conv(x, w, b), gamma, beta, mean, variance)
After:  y = Conv(x, w * s, (b - mean) * s + beta), s = gamma / sqrt(variance + epsilon)

Before: y = Conv(BatchNormalization(x, gamma, beta, mean, variance), w, b)
After:  y = Conv(x, w * s, b + sum(w * (beta - mean * s)))

Likewise for ConvTranspose, Gemm and MatMul, whose bias is an Add after it; past nodes that move, join or pool
values, as merge-affine does: Concat, Flatten, pools.
Declines: the weight, the bias or a parameter is no constant; another node, graph or the user reads what
    lies between; it computes batch statistics; its channels are not those of the layer; a padded Conv or
    a ConvTranspose after it would need the shift.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import float_attr, has_reference, int_attr, sole_user
from onnxopt.passes.shared.affine import scale_inputs, scale_outputs
from onnxopt.passes.shared.layer import LAYERS, Layer, constant, layer_of, require_sole_reader
from onnxopt.passes.shared.movement import carried_down, comes_from_layers, scaled_above, sources
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FoldBatchnorm"]


@dataclass(frozen=True)
class FoldBatchnorm(Pass):
    """Let the weights of a layer do what a BatchNormalization beside it does."""

    name: ClassVar[str] = "fold-batchnorm"
    kind: ClassVar[Kind] = "reorder"
    operators = ("BatchNormalization",)
    example = """
agraph (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y)
    <float[1, 1, 1, 1] w = {3}, float[1] gamma = {2}, float[1] beta = {1}, float[1] mean = {5},
    float[1] var = {4}> {
    a = Conv(x, w)
    y = BatchNormalization<epsilon = 0.0>(a, gamma, beta, mean, var)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("BatchNormalization after a layer", ("BatchNormalization",), _after),
            Rule("BatchNormalization before a layer", LAYERS, _before),
            Rule("BatchNormalization far before a layer", (*LAYERS, "Add"), _far_before),
        )


def _after(node: ir.Node, scope: Scope) -> Edit | None:
    source = node.inputs[0]
    if source is None:
        return None
    layer = layer_of(source.producer())
    if layer is None:
        return _far_after(node, source, scope)
    _require_channels(layer)
    scale, shift = _scale_and_shift(node, scope)
    return scale_outputs(layer, scale, shift, node, scope)


def _far_after(node: ir.Node, source: ir.Value, scope: Scope) -> Edit | None:
    if not comes_from_layers(source, node):
        return None
    plan, edit = scaled_above(source, 1, scope), Edit(node, scope)
    return edit.replace(node.outputs[0], plan(edit, *_scale_and_shift(node, scope)))


def _before(node: ir.Node, scope: Scope) -> Edit | None:
    layer = layer_of(node)
    norm = layer.source.producer() if layer is not None else None
    if layer is None or norm is None or norm.op_type != "BatchNormalization" or norm.domain:
        return None
    source = norm.inputs[0]
    previous = layer_of(source.producer()) if source is not None else None
    if source is None or (previous is not None and sole_user(previous.end.outputs[0]) is norm):
        return None  # the layer before it has declined it, by name
    _require_channels(layer)
    if layer.transposes:
        raise Declined("the Gemm transposes what it reads")
    require_sole_reader(norm)
    scale, shift = _scale_and_shift(norm, scope)
    return scale_inputs(layer, scale, shift, source, scope)


def _far_before(node: ir.Node, scope: Scope) -> Edit | None:
    layer = layer_of(node)
    if layer is None or not layer.stored or layer.transposes:
        return None
    for norm, way in sources(layer.source, layer.node):
        if norm.op_type != "BatchNormalization" or norm.domain or norm.inputs[0] is None:
            continue
        if layer.node.op_type == "MatMul" and layer.add is None:
            continue
        axis, scale, shift = carried_down(way, 1, *_scale_and_shift(norm, scope), scope)
        if axis != layer.axis:
            raise Declined("the channels of the BatchNormalization are not those of the layer")
        return scale_inputs(layer, scale, shift, norm.inputs[0], scope, way)
    return None


def _require_channels(layer: Layer) -> None:
    """Axis 1 holds the channels of a BatchNormalization, the last axis those of a MatMul."""
    if layer.rank != 2 and layer.node.op_type == "MatMul":
        raise Declined("the MatMul's result is not known to be a matrix, with the channels on axis 1")


def _scale_and_shift(node: ir.Node, scope: Scope) -> tuple[np.ndarray, np.ndarray]:
    """What the node does to each channel, in float64.

    Raises:
        Declined: it does something else, or a parameter is no constant.
    """
    if has_reference(node):
        raise Declined("an attribute of the BatchNormalization is a parameter of the function")
    if _computes_statistics(node, scope.opset):
        raise Declined("the BatchNormalization is in training mode: it computes batch statistics")
    if not int_attr(node, "spatial", 1):
        raise Declined("the BatchNormalization has parameters for each position (spatial=0)")
    gamma, beta, mean, variance = (
        constant(value, f"{what} of the BatchNormalization").numpy().astype(np.float64)
        for value, what in zip(node.inputs[1:5], ("scale", "bias", "mean", "variance"), strict=True)
    )
    spread = variance + float_attr(node, "epsilon", 1e-5)
    if not (spread > 0).all():
        raise Declined("a variance of the BatchNormalization is not positive")
    scale = gamma / np.sqrt(spread)
    return scale, beta - mean * scale


def _computes_statistics(node: ir.Node, opset: int) -> bool:
    """Training mode is an attribute since opset 14, the mere presence of more outputs before that."""
    if opset >= 14:
        return bool(int_attr(node, "training_mode", 0))
    return any(value.name for value in node.outputs[1:]) or (opset < 7 and not int_attr(node, "is_test", 0))
