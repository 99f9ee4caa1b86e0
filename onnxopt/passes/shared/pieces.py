"""Where the parts of a value along one axis come from, through Concat, Split, Slice, Gather and ScatterND."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dims, known_array
from onnxopt.graph import constant_array, has_reference, int_attr, str_attr

__all__ = ["PIECEWISE", "Piece", "Tracer", "axis_of"]

PIECEWISE = ("Concat", "Gather", "ScatterElements", "ScatterND", "Slice", "Split")
_DEEPEST = 8
_MOST = 64
"""Pieces of one value that are told apart."""
_INDICES = 1 << 22
"""Bytes of indices that are worked out to see whether they are regular."""


@dataclass(frozen=True)
class Piece:
    """What a value has from `start` to `stop` along the axis."""

    value: ir.Value
    start: int
    stop: int


@dataclass
class Tracer:
    """Pieces along one axis. joined: whether a Concat or a Scatter was passed on the way."""

    dims: Dims
    opset: int
    axis: int
    joined: bool = False
    _depth: int = field(default=0)

    def size(self, value: ir.Value | None) -> int | None:
        """How long a value is along the axis."""
        shape = self.dims.of(value)
        size = shape[self.axis] if shape is not None and self.axis < len(shape) else None
        return size if isinstance(size, int) else None

    def pieces(self, value: ir.Value) -> list[Piece] | None:
        """The value, in pieces; None where its length is not known."""
        size, maker = self.size(value), value.producer()
        if size is None:
            return None
        parts = None
        if (
            maker is not None
            and self._depth < _DEEPEST
            and axis_of(maker, self.dims, self.opset) == self.axis
        ):
            self._depth += 1
            parts = self._from(maker, value, size)
            self._depth -= 1
        whole = [Piece(value, 0, size)]
        return whole if parts is None or len(parts) > _MOST else _coalesced(parts)

    def cut(self, node: ir.Node) -> tuple[int, int] | None:
        """From where to where of its source a Slice is, in steps of 1; None where that is not known."""
        size = self.size(node.outputs[0])
        start = None if size is None else self._start(node, node.outputs[0])
        return None if size is None or start is None else (start, start + size)

    def _from(self, maker: ir.Node, value: ir.Value, size: int) -> list[Piece] | None:
        op, source = maker.op_type, maker.inputs[0]
        if source is None:
            return None
        if op == "Concat" and len(maker.inputs) > _MOST:
            return None
        if op == "Concat":
            lists = [self.pieces(part) for part in maker.inputs if part is not None]
            self.joined = True
            return None if None in lists else [piece for part in lists for piece in part or ()]
        if op in ("ScatterND", "ScatterElements"):
            region, updates, before = (
                written(maker, self.dims, self.opset),
                maker.inputs[2],
                self.pieces(source),
            )
            inside = self.pieces(updates) if updates is not None else None
            if region is None or before is None or inside is None:
                return None
            self.joined = True
            start, stop = region[1]
            return [*_cut(before, 0, start), *inside, *_cut(before, stop, size)]
        before, first = self.pieces(source), self._start(maker, value)
        return None if before is None or first is None else _cut(before, first, first + size)

    def _start(self, maker: ir.Node, value: ir.Value) -> int | None:
        """Where in the source of a Slice, Split or Gather a result of its begins."""
        length = self.size(maker.inputs[0])
        if length is None:
            return None
        if maker.op_type == "Split":
            lengths = [self.size(part) for part in maker.outputs[: maker.outputs.index(value)]]
            return None if None in lengths else sum(part or 0 for part in lengths)
        if maker.op_type == "Slice":
            starts, steps = self.dims.ints(maker, "starts", 1), self.dims.ints(maker, "steps", 4)
            regular = starts is not None and steps is not None and set(steps) <= {1}
            first = (starts or [0])[0]
            return min(max(first + length if first < 0 else first, 0), length) if regular else None
        index = constant_array(maker.inputs[1], _INDICES)
        if index is None or index.ndim != 1 or not index.size:
            return None
        first = int(index[0]) + (length if index[0] < 0 else 0)
        whole = np.where(index < 0, index + length, index)
        return first if np.array_equal(whole, first + np.arange(index.size)) else None


def axis_of(node: ir.Node, dims: Dims, opset: int) -> int | None:
    """The one axis along which an op joins, cuts or writes; None where there is no such axis."""
    shape = dims.of(node.inputs[0]) if node.inputs else None
    if node.domain or node.op_type not in PIECEWISE or not shape or has_reference(node):
        return None
    if node.op_type.startswith("Scatter"):
        region = written(node, dims, opset)
        return None if region is None else region[0]
    if node.op_type == "Slice":
        starts, axes = dims.ints(node, "starts", 1), dims.ints(node, "axes", 3)
        if starts is None or axes is None or len(starts) != 1:
            return None
        return (axes or [0])[0] % len(shape)
    return int_attr(node, "axis", 0) % len(shape)


def written(node: ir.Node, dims: Dims, opset: int) -> tuple[int, tuple[int, int]] | None:
    """The axis, and from where to where along it, of the slab that a Scatter writes over; None: no slab."""
    data = dims.of(node.inputs[0])
    if str_attr(node, "reduction", "none") != "none" or data is None:
        return None
    shape = [size for size in data if isinstance(size, int)]
    indices = known_array(node.inputs[1], opset, _INDICES) if len(shape) == len(data) else None
    if indices is None or indices.size == 0:
        return None
    if node.op_type == "ScatterND":
        grid = indices.shape[:-1]
        if len(grid) != indices.shape[-1] or len(grid) > len(shape):
            return None
        found = np.where(indices < 0, indices + np.array(shape[: len(grid)]), indices)
        offset = found[(0,) * len(grid)]
        regular = np.array_equal(found, np.moveaxis(np.indices(grid), 0, -1) + offset)
        return _slab(shape, offset.tolist(), grid) if regular else None
    axis = int_attr(node, "axis", 0) % len(shape)
    found = np.where(indices < 0, indices + shape[axis], indices)
    start = int(found.flat[0])
    if indices.ndim != len(shape) or not np.array_equal(found, start + np.indices(indices.shape)[axis]):
        return None
    return _slab(shape, [start if number == axis else 0 for number in range(len(shape))], indices.shape)


def _slab(
    shape: Sequence[int], offset: Sequence[int], sizes: Sequence[int]
) -> tuple[int, tuple[int, int]] | None:
    """The axis of a region that is whole along all others."""
    part = [axis for axis, size in enumerate(sizes) if size != shape[axis]]
    if len(part) > 1:
        return None
    axis = part[0] if part else 0
    return axis, (offset[axis], offset[axis] + sizes[axis])


def _cut(pieces: Sequence[Piece], start: int, stop: int) -> list[Piece]:
    """What lies between two places."""
    found, place = [], 0
    for piece in pieces:
        end = place + piece.stop - piece.start
        low, high = max(start, place), min(stop, end)
        if low < high:
            shift = piece.start - place
            found.append(Piece(piece.value, low + shift, high + shift))
        place = end
    return found


def _coalesced(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces that follow each other in one value joined."""
    found: list[Piece] = []
    for piece in pieces:
        last = found[-1] if found else None
        if last is not None and last.value is piece.value and last.stop == piece.start:
            found[-1] = Piece(piece.value, last.start, piece.stop)
        elif piece.start < piece.stop:
            found.append(piece)
    return found
