"""Tensors that are computed box by box, when they are read: large weights change without being in memory.

A box is one slice (start and stop) for each axis. What only lies elsewhere in its file is an
`ir.ExternalTensor` again; all else is `Streamed`: it says how a box of it comes from boxes of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from onnxopt.boxes import Box, boxes, gathered, place, runs
from onnxopt.errors import ModelError

__all__ = [
    "LARGE",
    "Streamed",
    "concatenated",
    "cropped",
    "is_on_disk",
    "mapped",
    "pieces",
    "read",
    "reshaped",
    "sample",
    "sources",
    "taken",
    "transposed",
]

LARGE = 1 << 20
"""Bytes above which a tensor that lies on disk is worth computing box by box."""

_PIECE = 1 << 25
"""Bytes of a piece. Each piece of a transposed weight passes over its file once, so it is not small."""
_PAGE = 1 << 12
_SAMPLES = 16


class Streamed(ir.LazyTensor):
    """A tensor of which any box can be computed by itself.

    box: gives the elements of a box, as an array of its shape. sources: the files that it reads from.
    """

    def __init__(
        self,
        dtype: ir.DataType,
        shape: Sequence[int],
        box: Callable[[Box], np.ndarray],
        sources: frozenset[Path],
    ) -> None:
        super().__init__(lambda: ir.Tensor(_whole(self), dtype=dtype), dtype, ir.Shape(shape))
        self.box = box
        self.sources = sources

    def tofile(self, file: BinaryIO) -> None:
        """Write the bytes of the tensor, piece by piece."""
        for piece in pieces(self):
            file.write(piece)


def is_on_disk(tensor: ir.TensorProtocol | None) -> bool:
    """Whether a tensor is large and can be read in part, from its file."""
    if not isinstance(tensor, ir.ExternalTensor | Streamed) or tensor.nbytes <= LARGE:
        return False
    return tensor.dtype.bitwidth % 8 == 0


def sources(tensor: ir.TensorProtocol) -> frozenset[Path] | None:
    """The files that a tensor reads from; None where it cannot be told."""
    if isinstance(tensor, ir.ExternalTensor):
        return frozenset([Path(tensor.path).resolve()])
    if isinstance(tensor, Streamed):
        return tensor.sources
    return None if isinstance(tensor, ir.LazyTensor) else frozenset()


def read(tensor: ir.TensorProtocol, box: Box) -> np.ndarray:
    """The elements in a box. Of a file, no more is read than lies between them, and none stays mapped.

    Raises:
        ModelError: the file ends too soon.
    """
    if isinstance(tensor, Streamed):
        return tensor.box(box)
    if not isinstance(tensor, ir.ExternalTensor) or tensor.dtype.bitwidth % 8:
        array: np.ndarray = tensor.numpy()[box]
        return array
    dtype, start = tensor.dtype.numpy(), tensor.offset or 0
    with open(tensor.path, "rb", buffering=0) as file:

        def fetch(first: int, run: np.ndarray) -> None:
            _read_into(run.view(np.uint8), file, start + first * dtype.itemsize, tensor)

        return gathered(dtype, tensor.shape.numpy(), box, fetch)


def pieces(tensor: ir.TensorProtocol, size: int = _PIECE) -> Iterator[bytes | memoryview]:
    """The tensor's bytes, in order, in pieces of about `size`; memory stays flat where they lie in a file.

    Raises:
        ModelError: the file ends too soon.
    """
    if isinstance(tensor, Streamed):
        shape, itemsize = tensor.shape.numpy(), tensor.dtype.itemsize
        for box in boxes(shape, max(1, int(size // itemsize))):
            yield _bytes_of(tensor.box(box))
    elif isinstance(tensor, ir.ExternalTensor):
        for start in range(0, tensor.nbytes, size):
            yield _stored_bytes(tensor, start, min(size, tensor.nbytes - start)).data
    else:
        whole = tensor.dtype.bitwidth % 8 == 0 and not isinstance(tensor, ir.LazyTensor)
        data = _bytes_of(tensor.numpy()) if whole else memoryview(tensor.tobytes())
        yield from (data[start : start + size] for start in range(0, len(data), size))


def sample(tensor: ir.ExternalTensor) -> bytes:
    """Bytes that tell a tensor from others of its size, nearly always: pages spread over it."""
    if tensor.nbytes <= _SAMPLES * _PAGE:
        return _stored_bytes(tensor, 0, tensor.nbytes).tobytes()
    places = np.linspace(0, tensor.nbytes - _PAGE, _SAMPLES).astype(np.int64).tolist()
    return b"".join(_stored_bytes(tensor, place, _PAGE).tobytes() for place in places)


def reshaped(tensor: ir.TensorProtocol, shape: Sequence[int]) -> ir.TensorProtocol:
    """The same elements in another shape."""
    if isinstance(tensor, ir.ExternalTensor):
        return _stored(tensor, 0, shape)

    def fetch(first: int, run: np.ndarray) -> None:
        for part in runs(tensor.shape.numpy(), first, first + len(run)):
            elements = read(tensor, part).reshape(-1)
            run[: len(elements)] = elements
            run = run[len(elements) :]

    dtype = tensor.dtype.numpy()
    return _streamed(tensor.dtype, shape, lambda box: gathered(dtype, tuple(shape), box, fetch), [tensor])


def transposed(tensor: ir.TensorProtocol, perm: Sequence[int]) -> ir.TensorProtocol:
    """The tensor with its axes in another order: `perm` names them as they are now."""
    old = tensor.shape.numpy()

    def box_of(box: Box) -> np.ndarray:
        inner = [slice(0)] * len(old)
        for axis, part in zip(perm, box, strict=True):
            inner[axis] = part
        return read(tensor, tuple(inner)).transpose(perm)

    return _streamed(tensor.dtype, [old[axis] for axis in perm], box_of, [tensor])


def cropped(tensor: ir.TensorProtocol, spans: Sequence[slice]) -> ir.TensorProtocol:
    """Each axis from a start to a stop in steps, as Python slices, which may go backwards."""
    old = tensor.shape.numpy()
    kept = [range(size)[span] for size, span in zip(old, spans, strict=True)]
    shape = [len(places) for places in kept]
    size: int = math.prod(shape)
    if isinstance(tensor, ir.ExternalTensor) and size:
        first, span = place(old, [slice(places.start, places.start + len(places)) for places in kept])
        if span == size and all(places.step == 1 for places in kept):
            return _stored(tensor, first, shape)

    def box_of(box: Box) -> np.ndarray:
        parts = [places[part] for places, part in zip(kept, box, strict=True)]
        inner = tuple(slice(min(part[0], part[-1]), max(part[0], part[-1]) + 1) for part in parts)
        return read(tensor, inner)[tuple(slice(None, None, places.step) for places in kept)]

    return _streamed(tensor.dtype, shape, box_of, [tensor])


def concatenated(tensors: Sequence[ir.TensorProtocol], axis: int) -> ir.TensorProtocol:
    """Tensors of one type behind each other along an axis."""
    shape = list(tensors[0].shape.numpy())
    axis %= len(shape)
    bounds = list(accumulate((tensor.shape.numpy()[axis] for tensor in tensors), initial=0))
    shape[axis] = bounds[-1]

    def box_of(box: Box) -> np.ndarray:
        start, stop = box[axis].start, box[axis].stop
        parts = [
            read(tensor, (*box[:axis], slice(max(start, low) - low, min(stop, high) - low), *box[axis + 1 :]))
            for tensor, (low, high) in zip(tensors, pairwise(bounds), strict=True)
            if start < high and low < stop
        ]
        return np.concatenate(parts, axis)

    return _streamed(tensors[0].dtype, shape, box_of, tensors)


def taken(tensor: ir.TensorProtocol, indices: np.ndarray, axis: int) -> ir.TensorProtocol:
    """What `numpy.take` gives: entries of an axis by their indices, of which none is out of range."""
    old = tensor.shape.numpy()
    axis %= len(old)
    places = np.where(indices < 0, indices + old[axis], indices)

    def box_of(box: Box) -> np.ndarray:
        before, after = box[:axis], box[axis + places.ndim :]
        wanted = places[box[axis : axis + places.ndim]]
        low, high = int(wanted.min()), int(wanted.max()) + 1
        if high - low <= 2 * wanted.size:
            return np.take(read(tensor, (*before, slice(low, high), *after)), wanted - low, axis)
        rows = [read(tensor, (*before, slice(i, i + 1), *after)) for i in wanted.reshape(-1).tolist()]
        shape = (part.stop - part.start for part in box)
        return np.concatenate(rows, axis).reshape(tuple(shape))

    return _streamed(tensor.dtype, (*old[:axis], *places.shape, *old[axis + 1 :]), box_of, [tensor])


def mapped(
    function: Callable[..., np.ndarray],
    tensors: Sequence[ir.TensorProtocol],
    dtype: ir.DataType,
    shape: Sequence[int] | None = None,
) -> ir.TensorProtocol:
    """A function of tensors, element by element, which broadcast to `shape` (that of the first one).

    function: takes one array for each tensor; the array that it gives may be of another type than `dtype`.
    """
    whole = tuple(tensors[0].shape.numpy() if shape is None else shape)

    def box_of(box: Box) -> np.ndarray:
        blocks = []
        for tensor in tensors:
            sizes = tensor.shape.numpy()
            ends = box[len(box) - len(sizes) :]
            own = (slice(0, 1) if size == 1 else part for size, part in zip(sizes, ends, strict=True))
            blocks.append(read(tensor, tuple(own)))
        return np.asarray(function(*blocks), dtype.numpy())

    return _streamed(dtype, whole, box_of, tensors)


def _streamed(
    dtype: ir.DataType,
    shape: Sequence[int],
    box: Callable[[Box], np.ndarray],
    tensors: Sequence[ir.TensorProtocol],
) -> Streamed:
    assert dtype.bitwidth % 8 == 0  # a box of packed elements has no bytes of its own
    files = (sources(tensor) for tensor in tensors)
    return Streamed(dtype, shape, box, frozenset().union(*(found for found in files if found)))


def _stored(tensor: ir.ExternalTensor, first: int, shape: Sequence[int]) -> ir.ExternalTensor:
    """Elements of a stored tensor that follow each other, from the one numbered `first`."""
    size = tensor.dtype.itemsize
    return ir.ExternalTensor(
        tensor.path,
        (tensor.offset or 0) + int(first * size),
        math.ceil(math.prod(shape) * size),
        tensor.dtype,
        shape=ir.Shape(shape),
        name=tensor.name or "",
    )


def _whole(tensor: Streamed) -> np.ndarray:
    array = np.empty(tensor.shape.numpy(), tensor.dtype.numpy())
    for box in boxes(array.shape, _PIECE // array.itemsize):
        array[box] = tensor.box(box)
    return array


def _bytes_of(array: np.ndarray) -> memoryview:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _stored_bytes(tensor: ir.ExternalTensor, start: int, count: int) -> np.ndarray:
    data = np.empty(count, np.uint8)
    with open(tensor.path, "rb", buffering=0) as file:
        _read_into(data, file, (tensor.offset or 0) + start, tensor)
    return data


def _read_into(data: np.ndarray, file: BinaryIO, place: int, tensor: ir.ExternalTensor) -> None:
    file.seek(place)
    left = data.data
    while left and (count := file.readinto(left)):  # type: ignore[attr-defined]  # a raw file has it
        left = left[count:]
    if left:
        raise ModelError(f"{tensor.path}: cut off while tensor {tensor.name!r} was read")
