"""What stored integers stand for: where their scale and their zero point are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, int_attr
from onnxopt.index import operator_of

__all__ = ["INTEGERS", "Levels", "Reader", "levels_of"]

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
    """What stored integers stand for: (stored - zero) * scale; scale None: not known."""

    scale: np.ndarray | None
    zero: np.ndarray


def levels_of(reader: Reader, shape: Sequence[int]) -> Levels | str | None:
    """What stored integers stand for; or why that is not known; None: for themselves."""
    node, position, between = reader
    ports = INTEGERS.get(operator_of(node), {}).get(position)
    axis: int | None = None
    block = 0
    if ports is None:
        node = next((one for one in between if one.op_type == "DequantizeLinear"), node)
        if node is reader.node:
            return None
        if node is not between[0]:
            return "is moved before it is dequantized"
        ports, axis, block = (1, 2), int_attr(node, "axis", 1), int_attr(node, "block_size", 0)
    values = [node.inputs[p] if p is not None and p < len(node.inputs) else None for p in ports]
    arrays = [constant_array(value) for value in values]
    if any(value is not None and array is None for value, array in zip(values, arrays, strict=True)):
        return "has a scale or zero point that is computed at run time"
    if axis is None:
        axis = 0 if "Conv" in node.op_type or "LSTM" in node.op_type else -1
    scale, zero = (None if one is None else _spread(one, shape, axis, block) for one in arrays)
    zero = np.zeros((), np.int32) if zero is None else zero
    return Levels(None if scale is None else scale.astype(np.float32), zero)


def _spread(array: np.ndarray, shape: Sequence[int], axis: int, block: int) -> np.ndarray:
    """Scales or zero points, shaped to broadcast with the elements."""
    if array.size == 1:
        return array.reshape(())
    if block:
        return np.repeat(array, block, axis).take(range(shape[axis]), axis)
    if array.ndim == 1:
        return array.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
    return array[:, None] if array.ndim < len(shape) else array  # [directions, rows] of a recurrent layer
