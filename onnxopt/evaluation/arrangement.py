"""Kernels that move, repeat, select or make elements, and compute none.

The first group also works on arrays of Python objects, of which some elements are not known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from onnxopt.evaluation.call import Call, CannotEvaluateError, Kernel
from onnxopt.graph import float_attr, int_attr, ints_attr, str_attr

__all__ = ["ARRANGEMENT", "spans", "split_points"]

_PAD_MODES = ("constant", "edge", "reflect", "wrap")
_OPEN_ENDS = (np.iinfo(np.int64).max, np.iinfo(np.int32).max)
"""With a negative step, ONNX clamps these to the size; ONNX Runtime goes on past index 0."""


def _identity(call: Call) -> np.ndarray:
    return call.array()


def _reshape(call: Call) -> np.ndarray:
    x, shape = call.array(), call.ints("shape", 1)
    if shape is None:
        raise CannotEvaluateError("an input is missing")
    if not int_attr(call.node, "allowzero", 0):
        shape = tuple(x.shape[axis] if size == 0 else size for axis, size in enumerate(shape))
    return x.reshape(shape)


def _flatten(call: Call) -> np.ndarray:
    x = call.array()
    axis = int_attr(call.node, "axis", 1)
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _squeeze(call: Call) -> np.ndarray:
    return call.array().squeeze(call.ints("axes", 1))


def _unsqueeze(call: Call) -> np.ndarray:
    return np.expand_dims(call.array(), call.ints("axes", 1) or ())


def _transpose(call: Call) -> np.ndarray:
    return call.array().transpose(ints_attr(call.node, "perm"))


def _concat(call: Call) -> np.ndarray:
    return np.concatenate(call.present(), int_attr(call.node, "axis", 1))


def _split(call: Call) -> tuple[np.ndarray, ...]:
    x, axis = call.array(), int_attr(call.node, "axis", 0)
    return tuple(np.split(x, split_points(call, x.shape[axis]), axis))


def split_points(call: Call, length: int) -> list[int]:
    """Where a Split cuts an axis of this length."""
    outputs, sizes = len(call.node.outputs), call.ints("split", 1)
    if sizes is None:
        step = -(-length // outputs)
        sizes = (step,) * (outputs - 1) + (length - step * (outputs - 1),)
    if sum(sizes) != length or len(sizes) != outputs or min(sizes) < 0:
        raise CannotEvaluateError(f"{length} elements do not split into {outputs} outputs as asked")
    return list(itertools.accumulate(sizes[:-1]))


def _slice(call: Call) -> np.ndarray:
    x = call.array()
    return np.asarray(x[spans(call, x.shape)])


def spans(call: Call, shape: Sequence[int]) -> tuple[slice, ...]:
    """What a Slice takes of each axis of this shape."""
    first = call.opset < 10
    starts, ends = (call.ints("starts", 1) or (), call.ints("ends", 2) or ())
    axes = call.ints("axes", None if first else 3) or tuple(range(len(starts)))
    steps = (None if first else call.ints("steps", 4)) or (1,) * len(starts)
    index = [slice(None)] * len(shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        if step < 0 and end in _OPEN_ENDS:
            raise CannotEvaluateError("a negative step to the largest integer, on which runtimes disagree")
        index[axis] = _span(start, end, step, shape[axis])
    return tuple(index)


def _span(start: int, end: int, step: int, size: int) -> slice:
    """A Python slice for ONNX's, in which an end before element 0 is no index from behind."""
    start, end = (i + size if i < 0 else i for i in (start, end))
    if step > 0 or size == 0:
        return slice(max(start, 0), max(end, 0), abs(step))
    return slice(min(max(start, 0), size - 1), None if end < 0 else end, step)


def _gather(call: Call) -> np.ndarray:
    x, indices = call.array(), call.array(1)
    axis = int_attr(call.node, "axis", 0)
    call.room((*x.shape[:axis], *indices.shape, *x.shape[axis:][1:]), x.dtype.itemsize)
    return np.asarray(np.take(x, indices, axis), x.dtype)


def _expand(call: Call) -> np.ndarray:
    x = call.array()
    shape = np.broadcast_shapes(x.shape, call.ints("shape", 1) or ())
    call.room(shape, x.dtype.itemsize)
    return np.broadcast_to(x, shape)


def _tile(call: Call) -> np.ndarray:
    if call.opset < 6:
        raise CannotEvaluateError("Tile had other inputs before opset 6")
    x, repeats = call.array(), call.ints("repeats", 1) or ()
    if len(repeats) != x.ndim:
        raise CannotEvaluateError("Tile needs one repeat for each axis")
    call.room([size * times for size, times in zip(x.shape, repeats, strict=True)], x.dtype.itemsize)
    return np.tile(x, repeats)


def _constant_of_shape(call: Call) -> np.ndarray:
    attr = call.node.attributes.get("value")
    value = np.zeros(1, np.float32) if attr is None else attr.as_tensor().numpy()
    shape = call.array().tolist()
    call.room(shape, value.dtype.itemsize)
    return np.full(shape, value.reshape(()), value.dtype)


def _range(call: Call) -> np.ndarray:
    start, limit, delta = (call.array(index).reshape(()) for index in range(3))
    if delta == 0:
        raise CannotEvaluateError("Range with a step of 0")
    count = max(
        math.ceil((limit.astype(np.float64) - start.astype(np.float64)) / delta.astype(np.float64)), 0
    )
    call.room((count,), start.dtype.itemsize)
    return np.asarray(start + np.arange(count).astype(start.dtype) * delta, start.dtype)


def _one_hot(call: Call) -> np.ndarray:
    indices, depth, values = call.array(0), int(call.array(1).reshape(())), call.array(2)
    axis = int_attr(call.node, "axis", -1)
    call.room((*indices.shape, depth), values.dtype.itemsize)
    whole = indices.astype(np.int64)
    whole = np.where(whole < 0, whole + depth, whole)
    hot = np.expand_dims(whole, -1) == np.arange(depth)
    return np.moveaxis(np.where(hot, values[1], values[0]), -1, axis)


def _pad(call: Call) -> np.ndarray:
    x, mode = call.array(), str_attr(call.node, "mode", "constant")
    pads = call.ints("paddings") if call.opset < 2 else call.ints("pads", 1)
    axes = (call.ints("axes", 3) if call.opset >= 18 else None) or tuple(range(x.ndim))
    if pads is None or len(pads) != 2 * len(axes) or mode not in _PAD_MODES:
        raise CannotEvaluateError(
            f"Pad with mode {mode!r} and {len(pads or ())} amounts for {len(axes)} axes"
        )
    amounts = [(0, 0)] * x.ndim
    for axis, before, after in zip(axes, pads[: len(axes)], pads[len(axes) :], strict=True):
        amounts[axis] = (before, after)
    sizes = [size + before + after for size, (before, after) in zip(x.shape, amounts, strict=True)]
    call.room(sizes, x.dtype.itemsize)
    cropped = any(min(pair) < 0 for pair in amounts)
    if cropped and (mode != "constant" or any(size < 0 for size in sizes)):
        raise CannotEvaluateError("Pad takes elements away in a way that runtimes differ on")
    grow = [(max(before, 0), max(after, 0)) for before, after in amounts]
    if mode != "constant":
        return np.asarray(np.pad(x, grow, mode))  # type: ignore[call-overload]  # the mode is one of _PAD_MODES
    fill = call.optional(2) if call.opset >= 11 else np.asarray(float_attr(call.node, "value", 0.0), x.dtype)
    result = np.full([s + b + a for s, (b, a) in zip(x.shape, grow, strict=True)], 0, x.dtype)
    if fill is not None:
        result[...] = fill.reshape(())
    result[tuple(slice(b, b + s) for s, (b, _) in zip(x.shape, grow, strict=True))] = x
    return result[
        tuple(slice(max(-b, 0), r - max(-a, 0)) for r, (b, a) in zip(result.shape, amounts, strict=True))
    ]


def _gather_elements(call: Call) -> np.ndarray:
    x, indices = call.array(), call.array(1)
    axis = int_attr(call.node, "axis", 0)
    grid = np.indices(indices.shape, sparse=True)
    index: list[np.ndarray] = list(grid)
    index[axis] = indices
    return np.asarray(x[tuple(index)])


def _gather_nd(call: Call) -> np.ndarray:
    x, indices, batch = call.array(), call.array(1), int_attr(call.node, "batch_dims", 0)
    call.room((*indices.shape[:-1], *x.shape[batch + indices.shape[-1] :]), x.dtype.itemsize)
    index: list[np.ndarray] = list(np.moveaxis(indices, -1, 0))
    places: tuple[np.ndarray, ...] = np.indices(indices.shape[:batch], sparse=True)
    outer = [place.reshape(place.shape + (1,) * (indices.ndim - 1 - batch)) for place in places]
    return np.asarray(x[(*outer, *index)])


def _scatter_nd(call: Call) -> np.ndarray:
    if str_attr(call.node, "reduction", "none") != "none":
        raise CannotEvaluateError("ScatterND with a reduction")
    result, indices = call.array().copy(), call.array(1)
    result[tuple(np.moveaxis(indices, -1, 0))] = call.array(2)
    return result


def _non_zero(call: Call) -> np.ndarray:
    x = call.array()
    return np.array(np.nonzero(x if x.ndim else x.reshape(1)), np.int64)


def _dropout(call: Call) -> tuple[np.ndarray, ...]:
    x = call.array()
    if call.opset < 12 and len(call.node.outputs) > 1:
        raise CannotEvaluateError("the mask of a Dropout before opset 12, on which runtimes differ")
    mask = np.ones(x.shape, np.bool_)
    return (x, mask)[: len(call.node.outputs)]


ARRANGEMENT: dict[str, Kernel] = {
    "Concat": _concat,
    "Expand": _expand,
    "Flatten": _flatten,
    "Gather": _gather,
    "Identity": _identity,
    "Reshape": _reshape,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "ConstantOfShape": _constant_of_shape,
    "Dropout": _dropout,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": _non_zero,
    "OneHot": _one_hot,
    "Pad": _pad,
    "Range": _range,
    "ScatterND": _scatter_nd,
    "Tile": _tile,
}
