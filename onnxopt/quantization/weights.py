"""Weights in few bits: which operands are weights, along which axis, and as which integers.

Everything that quantizes a weight goes through `quantize_weight`, so that all passes round alike.
Sources: symmetric scales by channel as in Krishnamoorthi, "Quantizing deep convolutional networks for
efficient inference", 2018; ranges clipped for the least squared error as in Banner et al., "Post training
4-bit quantization of convolutional networks", 2019, here from a grid; binary weights as in Rastegari et
al., "XNOR-Net", 2016; ternary ones as in Li and Liu, "Ternary Weight Networks", 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, int_attr, sizes_of, static_shape
from onnxopt.index import operator_of
from onnxopt.quantization.formats import Format, QuantParams, dequantize, params_from_range, quantize

__all__ = ["OPERANDS", "block_axis", "kernel_axis", "quantize_weight", "ternarize", "weight_axis"]

_RECURRENT = ("GRU", "LSTM", "RNN")
OPERANDS = {
    "Conv": (1,),
    "ConvTranspose": (1,),
    "Gather": (0,),
    "Gemm": (0, 1),
    "MatMul": (0, 1),
    **dict.fromkeys(_RECURRENT, (1, 2)),
    "com.microsoft::Attention": (1,),
}
"""Operator -> the inputs that may be weights."""

_RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)
"""Of the whole range, those that `clip` tries."""

_SLAB = 1 << 22
"""Elements that are quantized at once; the numbers in between take some 30 bytes for each."""


def weight_axis(node: ir.Node, position: int, shape: Sequence[int] | None = None) -> int | None:
    """The axis of an operand that holds output channels, from the front; None where none is known to.

    The shape is that of the operand, by default the one on record.

    A ConvTranspose in groups holds those of each group in axis 1, and a depthwise one its channels in axis 0.
    The channels of a recurrent layer are the rows of its gates; those of an embedding its entries.
    """
    shape, operator = shape or _shape(node, position), operator_of(node)
    if shape is None or len(shape) < 2 or position not in OPERANDS.get(operator, ()):
        return None
    rank = len(shape)
    if operator == "ConvTranspose":
        return 0 if int_attr(node, "group", 1) == shape[0] > 1 else 1
    if operator == "Gemm":
        return position ^ int_attr(node, "transB" if position else "transA", 0)
    if operator == "MatMul":
        return rank - 2 + position
    if operator == "Gather":
        return int_attr(node, "axis", 0) % rank
    return 1 if operator in (*_RECURRENT, "com.microsoft::Attention") else 0


def kernel_axis(node: ir.Node, position: int) -> int | None:
    """The axis along which a target's integer kernels take a scale each; None: one for the whole weight.

    ONNX Runtime's take one for a stack of matrices. TensorRT's take axis 1 of a ConvTranspose, where an index
    stands for a channel of each group: channels of its own it has only where there is one group.
    """
    axis, shape = weight_axis(node, position), _shape(node, position)
    stacked = node.op_type == "MatMul" and shape is not None and len(shape) > 2
    grouped = node.op_type == "ConvTranspose" and int_attr(node, "group", 1) > 1
    return None if stacked or grouped else axis


def block_axis(node: ir.Node, position: int, shape: Sequence[int] | None = None) -> int | None:
    """The axis of an operand that is summed up, along which blocks run; None where none is known to be."""
    shape = shape or _shape(node, position)
    channels = weight_axis(node, position, shape)
    if shape is None or channels is None:
        return None
    operator, rank = operator_of(node), len(shape)
    if operator == "MatMul":
        return rank - 1 - position
    if operator in _RECURRENT:
        return 2
    return None if operator == "Gather" else 1 - channels


def _shape(node: ir.Node, position: int) -> tuple[int, ...] | None:
    value = node.inputs[position] if position < len(node.inputs) else None
    tensor = constant_of(value)
    return sizes_of(tensor) if tensor is not None else static_shape(value)


def quantize_weight(
    array: np.ndarray,
    form: Format,
    *,
    axis: int | None,
    symmetric: bool = True,
    block: int = 0,
    power_of_two: bool = False,
    clip: bool = False,
    limit: float | None = None,
) -> tuple[np.ndarray, QuantParams]:
    """A weight in few bits: its elements in the format's own numpy type, and what they stand for.

    Args:
        array: finite, floating point.
        form: the format.
        axis: one scale for each index of it, or for each `block` elements along it; None: one for all.
        symmetric: zero maps to the middle, and the range is as wide on both sides: -127 to 127 of int8.
        block: elements that share a scale; the last block may be shorter.
        power_of_two: scales are powers of two.
        clip: of a few narrower ranges, take for each scale the one with the least squared error.
        limit: the largest distance from the zero point, of symmetric integers; 64 leaves sums of two 8-bit
            products room in 16 bits, where processors saturate.
    """
    most = form.high if form.signed else form.high // 2
    reach = most if limit is None else min(limit, most)

    def part(slab: np.ndarray) -> tuple[np.ndarray, QuantParams]:
        low, high = (_reduced(way, slab, axis, block) for way in (np.minimum, np.maximum))

        def params_at(ratio: float) -> QuantParams:
            ends = (low * (ratio * most / reach), high * (ratio * most / reach))
            how = {"symmetric": symmetric, "power_of_two": power_of_two}
            return params_from_range(*ends, form, **how, axis=axis, block=block)

        def elements(params: QuantParams) -> np.ndarray:
            found = quantize(slab, params)
            if form.is_float or not symmetric:
                return found
            middle = int(params.zero_point.reshape(-1)[0])
            return found.clip(int(middle - reach), int(middle + reach))

        def error(params: QuantParams) -> np.ndarray:
            return _reduced(np.add, np.square(dequantize(elements(params), params) - slab), axis, block)

        params = params_at(1.0)
        if clip:
            params = _best([params_at(ratio) for ratio in _RATIOS], error)
        return elements(params).astype(form.dtype.numpy()), params

    parts = [part(slab) for slab in _slabs(array.astype(np.float32, copy=False), axis, block)]
    if len(parts) == 1:
        return parts[0]
    first, along = parts[0][1], (axis or 0) if block else 0
    scale, zero = (np.concatenate([getattr(p, name) for _, p in parts], along) for name in _NUMBERS)
    return np.concatenate([ints for ints, _ in parts], axis or 0), replace(
        first, scale=scale, zero_point=zero
    )


def ternarize(
    array: np.ndarray, form: Format, *, axis: int | None, block: int = 0, threshold: float = 0.7
) -> tuple[np.ndarray, QuantParams]:
    """A weight as -a, 0 and a: 0 below `threshold` times the mean magnitude, and a the mean of the others.

    A threshold of 0 gives -a and a: binary weights. The format holds signed integers.
    """
    size = np.abs(array)
    count = _reduced(np.add, np.ones_like(array), axis, block)
    mean = np.asarray(_reduced(np.add, size, axis, block) / count, np.float32)
    params = QuantParams(mean, np.zeros(mean.shape, np.int64), form, axis, block)
    bound = dequantize(np.ones(array.shape, np.int32), params) * threshold
    signs = (array >= bound).astype(np.int32) - (array < -bound)
    count = _reduced(np.add, np.abs(signs), axis, block)
    scale = _reduced(np.add, size * np.abs(signs), axis, block) / np.maximum(count, 1)
    scale = np.asarray(np.where(scale > 0, scale, 2.0**-100), np.float32)
    return signs.astype(form.dtype.numpy()), replace(params, scale=scale)


_NUMBERS = ("scale", "zero_point")


def _best(candidates: list[QuantParams], error: Callable[[QuantParams], np.ndarray]) -> QuantParams:
    """Of each scale the candidate with the least error."""
    least = np.stack([error(one) for one in candidates]).argmin(0)[None]
    scale, zero = (
        np.take_along_axis(np.stack([getattr(one, name) for one in candidates]), least, 0)[0]
        for name in _NUMBERS
    )
    return replace(candidates[0], scale=np.asarray(scale), zero_point=np.asarray(zero))


def _reduced(way: np.ufunc, array: np.ndarray, axis: int | None, block: int) -> np.ndarray:
    """A reduction to the shape of the scales, in float64."""
    if block:
        assert axis is not None
        starts = range(0, array.shape[axis], block)
        found: np.ndarray = way.reduceat(array, starts, axis=axis, dtype=np.float64)
        return found
    over = None if axis is None else tuple(i for i in range(array.ndim) if i != axis)
    return np.asarray(way.reduce(array, axis=over, dtype=np.float64))


def _slabs(array: np.ndarray, axis: int | None, block: int) -> Iterator[np.ndarray]:
    """The array in pieces along an axis that have scales of their own."""
    if axis is None or array.size <= _SLAB:
        yield array
        return
    unit = block or 1
    step = max(1, _SLAB * array.shape[axis] // array.size // unit) * unit
    for start in range(0, array.shape[axis], step):
        yield array[(slice(None),) * axis + (slice(start, start + step),)]
