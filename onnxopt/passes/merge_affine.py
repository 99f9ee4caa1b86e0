"""Merge Mul, Add, Sub and Div by constants into the layer before or after them.

Before: y = Add(Mul(Conv(x, w, b), c), d)      c, d: a number, or one for each channel
After:  y = Conv(x, w * c, b * c + d)

Before: y = Conv(Mul(x, c), w, b)
After:  y = Conv(x, w * c, b)

Likewise for ConvTranspose, Gemm and MatMul. An Add of a constant to a MatMul stays: it is its bias.
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
from onnxopt.passes._affine import scale_inputs, scale_outputs
from onnxopt.passes._layer import LAYERS, along, constant, is_stored, layer_of, require_sole_reader
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeAffine"]

_AFFINE = ("Add", "Div", "Mul", "Sub")
_GATES = ("Clip", "HardSigmoid", "Sigmoid")


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
            Rule("arithmetic after a layer", _AFFINE, _after),
            Rule("arithmetic before a layer", (*LAYERS, "Add"), _before),
        )


@dataclass(frozen=True)
class _Affine:
    """One of Add, Div, Mul and Sub, of a run-time value and one that comes with the model."""

    node: ir.Node
    source: ir.Value
    other: ir.Value

    @property
    def reversed(self) -> bool:
        """Whether the constant is the first operand of a Sub or Div."""
        return self.node.op_type in ("Sub", "Div") and self.node.inputs[0] is self.other

    @property
    def shifts(self) -> bool:
        """Whether it adds or subtracts."""
        return self.node.op_type in ("Add", "Sub")


def _affine_of(node: ir.Node | None, scope: Scope) -> _Affine | None:
    """Before opset 7 these operators broadcast by attributes: none is taken there."""
    if node is None or node.domain or node.op_type not in _AFFINE or scope.opset < 7:
        return None
    first, second = node.inputs
    if first is None or second is None or is_stored(first) == is_stored(second):
        return None
    return _Affine(node, second, first) if is_stored(first) else _Affine(node, first, second)


def _after(node: ir.Node, scope: Scope) -> Edit | None:
    affine = _affine_of(node, scope)
    layer = layer_of(affine.source.producer()) if affine is not None else None
    if affine is None or layer is None or not layer.stored:
        return None
    if affine.shifts and layer.end.op_type == "MatMul":
        return None
    weight = layer.weight()
    scale, shift = _scale_and_shift(affine, weight.outputs, layer.rank, weight.trailing)
    return scale_outputs(layer, scale, shift, node, scope)


def _before(node: ir.Node, scope: Scope) -> Edit | None:
    layer = layer_of(node)
    affine = _affine_of(layer.source.producer(), scope) if layer is not None else None
    if layer is None or affine is None or not layer.stored:
        return None
    if affine.shifts != (layer.end is not layer.node) and layer.node.op_type == "MatMul":
        return None  # a shift needs the bias that the Add holds; a scale is taken at the MatMul itself
    require_sole_reader(affine.node)
    if _ends_block(affine, scope):
        raise Declined("it ends a normalization or activation, which runtimes know as a whole")
    weight = layer.weight()
    rank = len(affine.source.shape) if affine.source.shape is not None else None
    trailing = 1 if layer.transposes else weight.trailing
    if rank is not None and rank != (layer.rank or rank):
        raise Declined("the constant makes the layer's input larger")
    scale, shift = _scale_and_shift(affine, weight.inputs, rank, trailing)
    if max(scale.size, shift.size) > 1 and _size(affine.source, -1 - trailing) != weight.inputs:
        raise Declined("the layer's input is not known to have as many channels as the constant")
    return scale_inputs(layer, scale, shift, affine.source, scope)


def _size(value: ir.Value, axis: int) -> int | None:
    size = value.shape.dims[axis] if value.shape is not None else None
    return size if isinstance(size, int) else None


def _scale_and_shift(
    affine: _Affine, channels: int, rank: int | None, trailing: int
) -> tuple[np.ndarray, np.ndarray]:
    """What the node does to each channel, in float64: each of shape `()` or `[channels]`."""
    tensor = constant(affine.other, "constant")
    if affine.reversed and affine.node.op_type == "Div":
        raise Declined("the constant is divided by the run-time value")
    if not along(tensor, channels, trailing, rank):
        raise Declined("the constant does not run along the channels alone")
    array = tensor.numpy().astype(np.float64)
    array = array.reshape(-1) if array.size > 1 else array.reshape(())
    one, zero = np.ones(()), np.zeros(())
    match affine.node.op_type:
        case "Mul":
            return array, zero
        case "Div":
            with np.errstate(divide="ignore"):
                return 1 / array, zero
        case "Add":
            return one, array
    return (-one, array) if affine.reversed else (one, -array)


def _ends_block(affine: _Affine, scope: Scope) -> bool:
    """Whether it follows a product or quotient of run-time values, as LayerNorm, RMSNorm and GELU end.

    A product with a gate is none of them: what follows a HardSwish is free to be merged.
    """
    inner = _affine_of(affine.source.producer(), scope) or affine
    node = inner.source.producer()
    if node is None or node.domain or node.op_type not in ("Mul", "Div") or _affine_of(node, scope):
        return False
    factors = (value.producer() for value in node.inputs if value is not None)
    return not any(factor is not None and factor.op_type in _GATES for factor in factors)
