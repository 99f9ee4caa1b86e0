"""Merge Mul, Add, Sub, Div by constants and Neg into the layer before or after them.

Before: y = Add(Mul(Conv(x, w, b), c), d)      c, d: a number, or one for each channel
After:  y = Conv(x, w * c, b * c + d)

Before: y = Conv(Mul(x, c), w, b)
After:  y = Conv(x, w * c, b)

Before: y = Conv[pads=1](Add(Mul(x, c), d), w)
After:  y = Conv[pads=1](Add(x, d / c), w * c)

Before: z = Add(Concat(Conv(x, v), Transpose(Conv(y, w))), c)
After:  z = Concat(Conv(x, v, c'), Transpose(Conv(y, w, c")))

Likewise for ConvTranspose, Gemm and MatMul, and for a Gather from a constant table. Past nodes that move,
join or pool values, each read by the next alone: Transpose, Reshape, Flatten, Squeeze, Unsqueeze, Concat,
averages; a positive scale passes maxima, a scale without a shift Pad, ReduceSum, Relu and LeakyRelu.
An Add of a constant to a MatMul stays: it is its bias.
Declines: the weight, the bias or the other operand is no constant; that does not run along the channels
    alone, or makes the result larger; another node, graph or the user reads what lies between; a constant
    is divided by the layer's output; a padded Conv or a ConvTranspose would need the shift before it; the
    node before the layer ends a normalization or an activation, which runtimes know as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.passes.shared.affine import inputs_scaled, scale_inputs, scale_outputs
from onnxopt.passes.shared.arithmetic import (
    ARITHMETIC,
    Affine,
    affine_of,
    axis_of,
    ends_block,
    size_of,
    vectors_of,
)
from onnxopt.passes.shared.layer import LAYERS, Layer, along, constant, layer_of, require_sole_reader
from onnxopt.passes.shared.movement import carried_down, comes_from_layers, scaled_above, sources
from onnxopt.passes.shared.weight import rounded
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeAffine"]


@dataclass(frozen=True)
class MergeAffine(Pass):
    """Let the weights of a layer do what arithmetic with constants beside it does."""

    name: ClassVar[str] = "merge-affine"
    kind: ClassVar[Kind] = "reorder"
    example = """
agraph (float[2, 2] x) => (float[2, 1] y) <float[2, 1] w = {1, 2}, float[1] b = {3}, float c = {4}> {
    a = Gemm(x, w, b)
    y = Mul(a, c)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("arithmetic after a layer", ARITHMETIC, _after),
            Rule("arithmetic before a layer", (*LAYERS, "Add"), _before),
            Rule("arithmetic far before a layer", (*LAYERS, "Add"), _far_before),
            Rule("scale before a shift before a layer", ("Conv", "ConvTranspose"), _past_shift),
        )


def _after(node: ir.Node, scope: Scope) -> Edit | None:
    affine = affine_of(node, scope)
    if affine is None:
        return None
    layer = layer_of(affine.source.producer())
    if layer is None:
        return _far_after(affine, scope)
    if not layer.stored or (affine.shifts and layer.end.op_type == "MatMul"):
        return None
    weight = layer.weight()
    scale, shift = _scale_and_shift(affine, weight.outputs, layer.rank, weight.trailing)
    return scale_outputs(layer, scale, shift, node, scope)


def _far_after(affine: Affine, scope: Scope) -> Edit | None:
    if not comes_from_layers(affine.source, affine.node):
        return None
    plan = scaled_above(affine.source, axis_of(affine), scope)
    edit = Edit(affine.node, scope)
    return edit.replace(affine.node.outputs[0], plan(edit, *vectors_of(affine)))


def _before(node: ir.Node, scope: Scope) -> Edit | None:
    layer = layer_of(node)
    affine = affine_of(layer.source.producer(), scope) if layer is not None else None
    if layer is None or affine is None or not layer.stored:
        return None
    if affine.shifts != (layer.end is not layer.node) and layer.node.op_type == "MatMul":
        return None  # a shift needs the bias that the Add holds; a scale is taken at the MatMul itself
    require_sole_reader(affine.node)
    if ends_block(affine, scope):
        raise Declined("it ends a normalization or activation, which runtimes know as a whole")
    return scale_inputs(layer, *_on_inputs(layer, affine), affine.source, scope)


def _on_inputs(layer: Layer, affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """What the node does to each input channel of the layer, in float64."""
    weight = layer.weight()
    rank = len(affine.source.shape) if affine.source.shape is not None else None
    trailing = 1 if layer.transposes else weight.trailing
    if rank is not None and rank != (layer.rank or rank):
        raise Declined("the constant makes the layer's input larger")
    scale, shift = _scale_and_shift(affine, weight.inputs, rank, trailing)
    if max(scale.size, shift.size) > 1 and size_of(affine.source, -1 - trailing) != weight.inputs:
        raise Declined("the layer's input is not known to have as many channels as the constant")
    return scale, shift


def _past_shift(node: ir.Node, scope: Scope) -> Edit | None:
    """W (s x + t) is (W s) (x + t / s), where a layer cannot take the shift."""
    layer = layer_of(node)
    after = affine_of(layer.source.producer(), scope) if layer is not None else None
    before = affine_of(after.source.producer(), scope) if after is not None and after.shifts else None
    if layer is None or after is None or before is None or before.shifts or not layer.stored:
        return None
    if ends_block(after, scope):
        return None
    require_sole_reader(before.node)
    require_sole_reader(after.node)
    sign, shift = _on_inputs(layer, after)
    scale = _on_inputs(layer, before)[0] * sign
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        array = shift / scale
    weight = layer.weight()
    if array.size > 1:
        array = array.reshape(-1, *(1,) * weight.trailing)
    edit = Edit(node, scope)
    moved = edit.constant(
        rounded(array, weight.tensor.dtype), after.other.name if after.other is not None else None
    )
    source = edit.op("Add", [before.source, moved], name=after.node.name or "")
    return edit.replace(node.outputs[0], inputs_scaled(layer, scale, np.zeros(()), source, edit, scope))


def _far_before(node: ir.Node, scope: Scope) -> Edit | None:
    layer = layer_of(node)
    if layer is None or not layer.stored or layer.transposes:
        return None
    for above, way in sources(layer.source, layer.node):
        affine = affine_of(above, scope) if layer_of(above) is None else None
        if affine is None:
            continue
        if affine.shifts != (layer.add is not None) and layer.node.op_type == "MatMul":
            continue  # as above
        if ends_block(affine, scope):
            raise Declined("it ends a normalization or activation, which runtimes know as a whole")
        axis, scale, shift = carried_down(way, axis_of(affine), *vectors_of(affine), scope)
        if axis not in (None, layer.axis):
            raise Declined("the constant does not run along the channels alone")
        return scale_inputs(layer, scale, shift, affine.source, scope, way)
    return None


def _scale_and_shift(
    affine: Affine, channels: int, rank: int | None, trailing: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the node does to each channel of its layer, in float64: each of shape `()` or `[channels]`."""
    if affine.other is not None:
        tensor = constant(affine.other, "constant")
        if not along(tensor, channels, trailing, rank):
            raise Declined("the constant does not run along the channels alone")
    return vectors_of(affine)
