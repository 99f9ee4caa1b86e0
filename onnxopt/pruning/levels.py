"""What stored integers stand for: where their scale and their zero point are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxopt.graph import FLOATS, constant_array, constant_of, has_reference, int_attr, sizes_of
from onnxopt.index import operator_of
from onnxopt.quantization.operands import MOVES, reads_codebook

__all__ = ["INTEGERS", "Levels", "Reader", "levels_of", "passes_on"]

_RETYPES = frozenset({"Cast", "DequantizeLinear", "QuantizeLinear"})
_MS = "com.microsoft::"
_SECOND: dict[int, tuple[int | None, int]] = {1: (None, 3)}
INTEGERS: dict[str, dict[int, tuple[int | None, int]]] = {
    "ConvInteger": _SECOND,
    "MatMulInteger": _SECOND,
    "QLinearConv": {3: (4, 5)},
    "QLinearMatMul": {3: (4, 5)},
    _MS + "DynamicQuantizeLSTM": {1: (8, 9), 2: (10, 11)},
    _MS + "DynamicQuantizeMatMul": {1: (2, 3)},
    _MS + "MatMulIntegerToFloat": {1: (3, 5)},
    _MS + "QAttention": {1: (4, 7)},
    _MS + "QGemm": {3: (4, 5)},
}
"""Operator -> its inputs that are integer weights -> those that are their scale, if any, and zero point."""


class Reader(NamedTuple):
    """A node that multiplies with a weight, the position of that input, and what stands in between."""

    node: ir.Node
    position: int
    between: tuple[ir.Node, ...]


class Levels(NamedTuple):
    """What stored integers stand for: (stored - zero) * scale; scale None: not known.

    book: what is stored are places in this codebook, float32 [places], which holds the numbers.
    """

    scale: np.ndarray | None
    zero: np.ndarray
    book: np.ndarray | None = None

    def steps(self, stored: np.ndarray) -> np.ndarray:
        """Stored elements less the zero point, in float32."""
        if self.book is not None:
            stored = self.book.take(stored.astype(np.int64), mode="wrap")
        return stored.astype(np.float32) - self.zero.astype(np.float32)

    def same_zeros(self, other: Levels) -> bool:
        """Whether the same stored elements stand for zero."""
        if self.book is None or other.book is None:
            return self.book is other.book and np.array_equal(self.zero, other.zero)
        return np.array_equal(self.book == self.zero, other.book == other.zero)

    def stored_zero(self, dtype: np.dtype) -> np.ndarray | None:
        """What is stored for zero, of the type of the elements; None where nothing can be."""
        zero = self.zero
        if self.book is not None:
            places = np.flatnonzero(self.book == zero) if zero.ndim == 0 else np.zeros(0, np.int64)
            if not len(places):
                return None
            zero = places[0]
        zero = np.asarray(zero, np.float64)
        with np.errstate(invalid="ignore"):
            stored = zero.astype(dtype)
        return stored if np.array_equal(stored.astype(np.float64), zero) else None


def passes_on(node: ir.Node, position: int, size: int, dtype: ir.DataType) -> bool:
    """Whether a weight of so many elements is still one behind a node that reads it: zero stays zero there.

    Of stored integers, a smaller constant may be taken away: their zero point.
    """
    if node.domain or has_reference(node):
        return False
    if node.op_type in MOVES | _RETYPES:
        return position == 0
    if node.op_type == "Gather":
        return position == 1 and reads_codebook(node)
    if node.op_type not in ("Div", "Mul", "Sub") or (position and node.op_type != "Mul"):
        return False
    other = constant_of(node.inputs[1 - position])
    return other is not None and other.size < size and (node.op_type != "Sub" or dtype not in FLOATS)


def levels_of(reader: Reader, tensor: ir.TensorProtocol) -> Levels | str | None:
    """What stored elements stand for; or why that is not known; None: for themselves, also of integers."""
    node, position, between = reader
    ports = INTEGERS.get(operator_of(node), {}).get(position)
    shape = sizes_of(tensor)
    if ports is not None and tensor.dtype not in FLOATS:
        if any(one.op_type not in MOVES | {"Cast"} for one in between):
            return "is scaled more than once"
        axis = 0 if "Conv" in node.op_type or "LSTM" in node.op_type else -1
        levels = _levels(node, ports, shape, axis)
        apart = isinstance(levels, Levels) and any(one is not None and one.ndim for one in levels)
        return "is moved before it is scaled" if between and apart else levels
    found, moved, scaled = Levels(np.ones((), np.float32), np.zeros(())), False, False
    for one in between:
        moved = moved or one.op_type in MOVES
        if one.op_type in MOVES or one.op_type in ("Cast", "QuantizeLinear"):
            continue
        if moved:
            return "is moved before it is scaled"
        if one.op_type == "Gather":
            found = found._replace(book=constant_array(one.inputs[0]))
        elif one.op_type == "DequantizeLinear":
            if not scaled and tensor.dtype not in FLOATS:
                levels = _levels(one, (1, 2), shape, int_attr(one, "axis", 1), int_attr(one, "block_size", 0))
                if isinstance(levels, str):
                    return levels
                found = levels
        else:
            other = _other(one)
            if np.broadcast_shapes(shape, other.shape) != tuple(shape):
                return "is made larger by what scales it"
            found = _after(one.op_type, other, found)
        scaled = True
    return found if scaled else None


def _other(node: ir.Node) -> np.ndarray:
    """The constant operand of a Sub, Mul or Div, in float32."""
    arrays = map(constant_array, reversed(node.inputs))
    return next(array for array in arrays if array is not None).astype(np.float32)


def _after(operator: str, other: np.ndarray, levels: Levels) -> Levels:
    """What is stood for where a Sub, Mul or Div with a constant follows."""
    scale, zero, book = levels
    assert scale is not None
    if operator == "Sub":
        return Levels(scale, zero + other / scale, book)
    return Levels(scale * other if operator == "Mul" else scale / other, zero, book)


def _levels(
    node: ir.Node, ports: tuple[int | None, int], shape: Sequence[int], axis: int, block: int = 0
) -> Levels | str:
    values = [node.inputs[p] if p is not None and p < len(node.inputs) else None for p in ports]
    arrays = [constant_array(value) for value in values]
    if any(value is not None and array is None for value, array in zip(values, arrays, strict=True)):
        return "has a scale or zero point that is computed at run time"
    scale, zero = (None if one is None else _spread(one, shape, axis, block) for one in arrays)
    return Levels(None if scale is None else scale.astype(np.float32), np.zeros(()) if zero is None else zero)


def _spread(array: np.ndarray, shape: Sequence[int], axis: int, block: int) -> np.ndarray:
    """Scales or zero points, shaped to broadcast with the elements."""
    if array.size == 1:
        return array.reshape(())
    if block:
        return np.repeat(array, block, axis).take(range(shape[axis]), axis)
    if array.ndim == 1:
        return array.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return array[:, None] if array.ndim < len(shape) else array  # [directions, rows] of a recurrent layer
