"""Where a weight lives: a constant, or what leads from one to the operator that reads it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import CannotEvaluateError, evaluate
from onnxopt.graph import FLOATS, constant_of, has_reference, ints_attr

__all__ = ["CODES", "COMPUTED", "MOVES", "QUANTIZED", "Weight", "find_weight", "reads_codebook"]

COMPUTED = "is computed at run time"
QUANTIZED = "is quantized already"

MOVES = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that only move what their first input holds."""

_UNPACKS = frozenset({"Add", "Cast", "Div", "Mul", "Sub"})
"""Operators that turn a stored weight into the one that is meant."""

CODES = "_codes"
"""What the name of a weight ends in that is stored as places in a codebook."""

_CODES = (ir.DataType.UINT8, ir.DataType.UINT4, ir.DataType.UINT2)
_DEPTH = 8
"""Nodes between a constant and the operand, at most."""
_ROOM = 1 << 20
"""Bytes of an unpacked weight, besides 16 for each one of what it is unpacked from."""


@dataclass(frozen=True)
class Weight:
    """A constant operand, or why it is none.

    value: the operand. source: the constant, or what unpacks one (Cast, Mul, ..); `moves` lead from there to
    the operand, first one first. reason: why this is no weight, in words that follow "the weight"; empty for
    one that is.
    """

    value: ir.Value
    source: ir.Value
    moves: tuple[ir.Node, ...] = ()
    reason: str = ""

    @property
    def dtype(self) -> ir.DataType:
        """The element type of the operand."""
        tensor = constant_of(self.source)
        return tensor.dtype if tensor is not None else self.source.dtype or ir.DataType.FLOAT

    def array(self, opset: int) -> np.ndarray:
        """The elements of the operand in float32, as they are after all moves; they are read at each call.

        Raises:
            CannotEvaluateError: something on the way is malformed.
        """
        return self._arrays(opset)[-1]

    def source_array(self, opset: int) -> np.ndarray:
        """The elements of the source, in float32."""
        return self._arrays(opset)[0]

    def source_axis(self, axis: int | None, opset: int) -> int | None:
        """The axis of the source that is this axis of the operand; None where no single one is."""
        arrays = self._arrays(opset)
        for move, array, moved in reversed(list(zip(self.moves, arrays, arrays[1:], strict=False))):
            axis = None if axis is None else _axis_before(move, array.shape, moved.shape, axis % moved.ndim)
        return None if axis is None else axis % arrays[0].ndim

    def _arrays(self, opset: int) -> list[np.ndarray]:
        """The elements of the source, and those after each move."""
        arrays = [_elements(self.source, opset).astype(np.float32, copy=False)]
        for move in self.moves:
            others = [None if one is None else _elements(one, opset) for one in move.inputs[1:]]
            arrays.append(evaluate(move, [arrays[-1], *others], opset)[0])
        return arrays


def find_weight(value: ir.Value) -> Weight:
    """Where an operand lives: a constant, behind operators that move it or unpack it."""
    moves: list[ir.Node] = []
    source = value
    while (node := _move_before(source)) is not None and len(moves) < _DEPTH:
        moves.insert(0, node)
        assert node.inputs[0] is not None  # it moves something
        source = node.inputs[0]
    weight = Weight(value, source, tuple(moves))
    reason = _why_not(source, _DEPTH)
    if not reason and weight.dtype not in FLOATS:
        reason = f"is of type {weight.dtype.name}"
    return replace(weight, reason=reason)


def reads_codebook(gather: ir.Node | None) -> bool:
    """Whether a node takes the elements of a weight out of few numbers, by stored codes of 8 bits or less."""
    if gather is None or gather.domain or gather.op_type != "Gather" or has_reference(gather):
        return False
    numbers, index = gather.inputs
    book, cast = constant_of(numbers), index.producer() if index is not None else None
    if book is None or len(book.shape) != 1 or book.dtype not in FLOATS:
        return False
    if cast is None or cast.domain or cast.op_type != "Cast":
        return False
    codes = constant_of(cast.inputs[0])
    return codes is not None and codes.dtype in _CODES


def _move_before(value: ir.Value) -> ir.Node | None:
    node = value.producer()
    if node is None or node.domain or node.op_type not in MOVES or has_reference(node):
        return None
    moved, *others = node.inputs
    return node if moved is not None and all(constant_of(one) for one in others if one) else None


def _why_not(value: ir.Value, depth: int) -> str:
    """Why a value is no constant, nor unpacked from constants; empty where it is."""
    if constant_of(value) is not None:
        return ""
    if value.is_graph_input() and value.is_initializer():
        return "is a graph input (overridable; --freeze-initializers folds it)"
    node = value.producer()
    if node is not None and node.op_type == "DequantizeLinear":
        return QUANTIZED
    known = node is not None and not node.domain and node.op_type in MOVES | _UNPACKS
    if node is None or not known or has_reference(node) or not depth:
        return COMPUTED
    return next(filter(None, (_why_not(one, depth - 1) for one in node.inputs if one is not None)), "")


def _elements(value: ir.Value, opset: int) -> np.ndarray:
    """The elements of a constant, or of what is unpacked from one."""
    tensor = constant_of(value)
    if tensor is not None:
        array: np.ndarray = tensor.numpy()
        return array
    node = value.producer()
    if node is None:
        raise CannotEvaluateError("it is computed at run time")
    inputs = [None if one is None else _elements(one, opset) for one in node.inputs]
    room = _ROOM + 16 * sum(array.nbytes for array in inputs if array is not None)
    return evaluate(node, inputs, opset, room)[0]


def _axis_before(move: ir.Node, old: tuple[int, ...], new: tuple[int, ...], axis: int) -> int | None:
    """The axis that a move takes to `axis`: one of its size with as many elements in front of it."""
    if move.op_type == "Transpose":
        return (ints_attr(move, "perm") or tuple(reversed(range(len(old)))))[axis]
    place = (math.prod(new[:axis]), new[axis])
    return next((i for i, size in enumerate(old) if (math.prod(old[:i]), size) == place), None)
