"""Arithmetic with constants: what it does to each channel."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.passes.shared.layer import constant, is_stored
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope

__all__ = ["ARITHMETIC", "Affine", "affine_of", "axis_of", "ends_block", "size_of", "vectors_of"]

ARITHMETIC = ("Add", "Div", "Mul", "Neg", "Sub")
_GATES = ("Clip", "HardSigmoid", "Sigmoid")


@dataclass(frozen=True)
class Affine:
    """Neg, or one of Add, Div, Mul and Sub, of a run-time value and one that comes with the model."""

    node: ir.Node
    source: ir.Value
    other: ir.Value | None

    @property
    def reversed(self) -> bool:
        """Whether the constant is the first operand of a Sub or Div."""
        return self.node.op_type in ("Sub", "Div") and self.node.inputs[0] is self.other

    @property
    def shifts(self) -> bool:
        """Whether it adds or subtracts."""
        return self.node.op_type in ("Add", "Sub")


def affine_of(node: ir.Node | None, scope: Scope) -> Affine | None:
    """Before opset 7 these operators broadcast by attributes: none is taken there."""
    if node is None or node.domain or node.op_type not in ARITHMETIC or scope.opset < 7:
        return None
    first, second = node.inputs if node.op_type != "Neg" else (node.inputs[0], None)
    if node.op_type == "Neg":
        return Affine(node, first, None) if first is not None and not is_stored(first) else None
    if first is None or second is None or is_stored(first) == is_stored(second):
        return None
    return Affine(node, second, first) if is_stored(first) else Affine(node, first, second)


def axis_of(affine: Affine) -> int | None:
    """The axis that the constant runs along, None for a single number; it makes the result no larger."""
    if affine.other is None:
        return None
    shape = constant(affine.other, "constant").shape.numpy()
    rank = len(affine.source.shape) if affine.source.shape is not None else 0
    if len(shape) > rank:
        raise Declined("the constant makes the result larger, or the number of axes is unknown")
    axes = [axis for axis, size in enumerate(shape, rank - len(shape)) if size != 1]
    if len(axes) > 1 or any(size_of(affine.source, axis) != max(shape) for axis in axes):
        raise Declined("the constant does not run along the channels alone")
    return axes[0] if axes else None


def vectors_of(affine: Affine) -> tuple[np.ndarray, np.ndarray]:
    """Scale and shift in float64: each of shape `()`, or one number a channel."""
    one, zero = np.ones(()), np.zeros(())
    if affine.other is None:
        return -one, zero
    if affine.reversed and affine.node.op_type == "Div":
        raise Declined("the constant is divided by the run-time value")
    array = constant(affine.other, "constant").numpy().astype(np.float64)
    array = array.reshape(-1) if array.size > 1 else array.reshape(())
    match affine.node.op_type:
        case "Mul":
            return array, zero
        case "Div":
            with np.errstate(divide="ignore"):
                return 1 / array, zero
        case "Add":
            return one, array
    return (-one, array) if affine.reversed else (one, -array)


def size_of(value: ir.Value, axis: int) -> int | None:
    size = value.shape.dims[axis] if value.shape is not None else None
    return size if isinstance(size, int) else None


def ends_block(affine: Affine, scope: Scope) -> bool:
    """Whether it follows a product or quotient of run-time values, as LayerNorm, RMSNorm and GELU end.

    A product with a gate is none of them: what follows a HardSwish is free to be merged.
    """
    inner = affine_of(affine.source.producer(), scope) or affine
    node = inner.source.producer()
    if node is None or node.domain or node.op_type not in ("Mul", "Div") or affine_of(node, scope):
        return False
    factors = (value.producer() for value in node.inputs if value is not None)
    return not any(factor is not None and factor.op_type in _GATES for factor in factors)
