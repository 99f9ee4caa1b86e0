"""Quantized element types, and the arithmetic of QuantizeLinear and DequantizeLinear.

Source: ONNX operators QuantizeLinear-25 and DequantizeLinear-25; scale and zero point from a range as in
Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", 2018, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.errors import UsageError, did_you_mean

__all__ = [
    "FORMATS",
    "INTEGERS",
    "Format",
    "QuantParams",
    "dequantize",
    "find_format",
    "params_from_range",
    "quantize",
    "shaped",
]

_SMALLEST_SCALE = np.float32(2.0**-100)
"""Below it, x / scale and products of two scales would leave the normal numbers of float32."""


@dataclass(frozen=True)
class Format:
    """A quantized element type.

    low, high: the smallest and largest number it holds. opset: the first with QuantizeLinear and
    DequantizeLinear of it. bits: of one element, as it is stored.
    """

    name: str
    dtype: ir.DataType
    low: float
    high: float
    opset: int
    bits: int

    @property
    def is_float(self) -> bool:
        """Whether elements are small floats, which have no zero point other than 0."""
        return self.name.startswith("float")

    @property
    def signed(self) -> bool:
        """Whether it holds negative numbers."""
        return self.low < 0

    @property
    def narrow(self) -> tuple[float, float]:
        """The range that is symmetric about zero: -127 to 127 of int8."""
        return (-self.high, self.high) if self.signed else (self.low, self.high)


FORMATS = {
    one.name: one
    for one in (
        Format("int7", ir.DataType.INT8, -64, 63, 10, 8),  # as int8, like int3: pairs of products fit 16 bits
        Format("int8", ir.DataType.INT8, -128, 127, 10, 8),
        Format("uint8", ir.DataType.UINT8, 0, 255, 10, 8),
        Format("int16", ir.DataType.INT16, -32768, 32767, 21, 16),
        Format("uint16", ir.DataType.UINT16, 0, 65535, 21, 16),
        Format("int3", ir.DataType.INT4, -4, 3, 21, 4),  # stored as int4, whose range counts: it is last
        Format("int4", ir.DataType.INT4, -8, 7, 21, 4),
        Format("uint4", ir.DataType.UINT4, 0, 15, 21, 4),
        Format("int2", ir.DataType.INT2, -2, 1, 25, 2),
        Format("uint2", ir.DataType.UINT2, 0, 3, 25, 2),
        Format("float8e4m3fn", ir.DataType.FLOAT8E4M3FN, -448, 448, 19, 8),
        Format("float8e5m2", ir.DataType.FLOAT8E5M2, -57344, 57344, 19, 8),
    )
}
INTEGERS = {one.dtype: (int(one.low), int(one.high)) for one in FORMATS.values() if not one.is_float}
"""The smallest and the largest number of each integer type."""


@dataclass(frozen=True)
class QuantParams:
    """Scale and zero point of one tensor.

    scale: float32, a scalar, one number a channel of `axis`, or for blocks of `block` elements along `axis`
    the tensor's shape with that axis divided. zero_point: int64 of the same shape.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    format: Format
    axis: int | None = None
    block: int = 0


def find_format(name: str) -> Format:
    """The format of that name. Raises UsageError where there is none."""
    if name not in FORMATS:
        raise UsageError(f"unknown quantized type {name!r}{did_you_mean(name, FORMATS)}")
    return FORMATS[name]


def params_from_range(
    low: np.ndarray | float,
    high: np.ndarray | float,
    form: Format,
    *,
    symmetric: bool = False,
    power_of_two: bool = False,
    axis: int | None = None,
    block: int = 0,
) -> QuantParams:
    """The scale and zero point that cover [low, high], widened to hold zero, which is exact.

    symmetric: zero maps to the middle: 0 of a signed format, of which -128 then stays unused, and 128 of
    uint8. power_of_two: the scale is the next larger power of two. An empty range takes the scale 1.
    """
    low = np.minimum(np.asarray(low, np.float64), 0)
    high = np.maximum(np.asarray(high, np.float64), 0)
    first, last = form.low, form.high
    if form.is_float or symmetric:
        middle = 0.0 if form.signed else (last + 1) / 2
        scale = np.maximum(-low, high) / (last - middle)
        zero = np.full(scale.shape, middle)
    else:
        scale = (high - low) / (last - first)
        zero = np.full(scale.shape, first)
    scale = np.where(scale > 0, np.maximum(scale, _SMALLEST_SCALE), 1.0)
    if power_of_two:
        scale = 2.0 ** np.ceil(np.log2(scale))
    scale = np.asarray(scale, np.float32)
    if not (form.is_float or symmetric):
        zero = np.clip(np.rint(first - low / scale.astype(np.float64)), first, last)
    return QuantParams(scale, np.asarray(zero, np.int64), form, axis, block)


def quantize(array: np.ndarray, params: QuantParams) -> np.ndarray:
    """The elements as integers in int32 (small floats as themselves), as QuantizeLinear gives them."""
    scale, zero = shaped(params, array.ndim, array.shape)
    ratio = array.astype(np.float32) / scale
    low, high = params.format.low, params.format.high
    if params.format.is_float:
        return np.asarray(np.clip(ratio, low, high).astype(params.format.dtype.numpy()))
    # Exact in float32: sums of 2**24 and more are clipped, whatever they were rounded to.
    whole = np.clip(np.rint(ratio) + zero.astype(np.float32), low, high)
    return np.asarray(np.where(np.isnan(whole), 0, whole), np.int32)


def dequantize(elements: np.ndarray, params: QuantParams) -> np.ndarray:
    """The float32 numbers that the elements stand for, as DequantizeLinear gives them."""
    scale, zero = shaped(params, elements.ndim, elements.shape)
    if params.format.is_float:
        return np.asarray(elements.astype(np.float32) * scale)
    return np.asarray((elements.astype(np.int64) - zero).astype(np.float32) * scale)


def shaped(params: QuantParams, rank: int, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point, shaped to broadcast with a tensor of that rank and shape."""
    scale, zero = params.scale, params.zero_point
    if params.block:
        assert params.axis is not None
        size = shape[params.axis]
        return tuple(  # type: ignore[return-value]  # two of them
            np.repeat(one, params.block, axis=params.axis).take(range(size), axis=params.axis)
            for one in (scale, zero)
        )
    if params.axis is None or scale.ndim == 0:
        return scale, zero
    sizes = [1] * rank
    sizes[params.axis] = -1
    return scale.reshape(sizes), zero.reshape(sizes)
