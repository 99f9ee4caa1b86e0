"""Where sums of two 8-bit products leave 16 bits, on CPUs that have AVX2 and no VNNI.

Their kernels for U8 activations and S8 weights use vpmaddubsw, a0 w0 + a1 w1 in int16 with saturation (Intel
64 and IA-32 Architectures Software Developer's Manual, volume 2, PMADDUBSW), on neighbours along the axis
that is summed up, in pairs from its start. Other types of operands, ConvInteger and depthwise convolutions
are added in 32 bits. ONNX Runtime 1.31 does so to the bit: the tests hold this file against an emulated CPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, int_attr, nodes
from onnxopt.index import operator_of
from onnxopt.quantization.formats import QuantParams, quantize

__all__ = ["Saturation", "can_saturate", "find_saturation", "kernel_rows", "pair_excess", "safe_params"]

_MOST, _LEAST = 2**15 - 1, -(2**15)
_INTEGER_OPERATORS = {
    "MatMulInteger": (1,),
    "QLinearConv": (3,),
    "QLinearMatMul": (3,),
    "com.microsoft::DynamicQuantizeLSTM": (1, 2),
    "com.microsoft::DynamicQuantizeMatMul": (1,),
    "com.microsoft::MatMulIntegerToFloat": (1,),
    "com.microsoft::QAttention": (1,),
    "com.microsoft::QGemm": (3,),
}
"""Operator -> its inputs that hold weights."""
_FLOAT_OPERATORS = ("Conv", "Gemm", "MatMul")
"""Become one of those above where DequantizeLinear stands before both operands."""
_SLAB = 1 << 22


@dataclass(frozen=True)
class Saturation:
    """A node whose sums can saturate.

    excess: int64, for each output channel how far its worst pair can leave int16; 0 where it cannot.
    """

    node: ir.Node
    weight: ir.Value
    excess: np.ndarray

    @property
    def summary(self) -> str:
        """One line: ``Conv 'conv1': 3 of 16 channels can saturate, by up to 29%``, of 16 bits."""
        channels = f"{np.count_nonzero(self.excess)} of {len(self.excess)} channels can saturate"
        return f"{self.node.op_type} {self.node.name!r}: {channels}, by up to {self.excess.max() / _MOST:.0%}"


def find_saturation(model: ir.Model) -> tuple[Saturation, ...]:
    """The nodes of a quantized model that can saturate, for activations that may take all values of 8 bits.

    Weights are S8 constants, direct operands or behind one DequantizeLinear. Signed activations count there
    too, as the runtime makes them unsigned.
    """
    found = []
    for node in nodes(model):
        for weight in _weights(node):
            array = constant_array(weight)
            rows = None if array is None or array.dtype != np.int8 else kernel_rows(node, array)
            excess = None if rows is None else pair_excess(rows)
            if excess is not None and excess.any():
                found.append(Saturation(node, weight, excess))
    return tuple(found)


def can_saturate(node: ir.Node, ints: np.ndarray) -> bool:
    """Whether the node's sums can saturate with such a weight, where activations take all 8-bit values."""
    rows = kernel_rows(node, ints)
    return rows is not None and bool(pair_excess(rows).any())


def kernel_rows(node: ir.Node, weight: np.ndarray) -> np.ndarray | None:
    """A weight as [output channels, summands], in the order in which the node's kernel adds them.

    Pixels come before input channels. None where the kernel adds in 32 bits: depthwise convolutions.
    """
    if node.op_type in ("Conv", "QLinearConv"):
        if int_attr(node, "group", 1) == weight.shape[0] > 1 == weight.shape[1]:
            return None
        return np.moveaxis(weight, 1, -1).reshape(len(weight), -1)
    if not int_attr(node, "transB", 0):
        weight = np.atleast_2d(weight.T).T.swapaxes(-1, -2)
    return weight.reshape(-1, weight.shape[-1])


def pair_excess(rows: np.ndarray, low: int = 0, high: int = 255) -> np.ndarray:
    """How far the worst pair of each row can leave int16: int64 [rows].

    `low` and `high` bound the activations as they are stored, of which no zero point is taken off.
    """
    rows = np.pad(rows, ((0, 0), (0, rows.shape[1] % 2)))
    step = max(1, _SLAB // max(rows.shape[1], 1))
    parts = [_excess(rows[start : start + step], low, high) for start in range(0, len(rows), step)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def safe_params(
    node: ir.Node, weight: np.ndarray, params: QuantParams, low: int = 0, high: int = 255
) -> QuantParams:
    """`params` with those scales enlarged with which the node could saturate, as little as avoids it.

    Args:
        node: the operator that reads the weight.
        weight: its elements in floating point.
        params: of int8, by output channel or one for all.
        low, high: bounds of the activations as they are stored, in U8.

    Raises:
        UsageError: no scale avoids it, because the zero point is far from 0.
    """
    reach = int(params.format.high)
    steps = np.full(params.scale.shape, reach)  # what the largest element of a channel may become
    while True:
        widened = replace(params, scale=np.asarray(params.scale * (reach / steps), np.float32))
        rows = kernel_rows(node, quantize(weight, widened))
        if rows is None:
            return params
        excess = pair_excess(rows, low, high).reshape(-1, params.scale.size).max(0).reshape(steps.shape)
        if not excess.any():
            return widened
        less = np.minimum(steps - 1, np.ceil(steps * (_MOST / (_MOST + excess))))
        steps = np.where(excess > 0, less, steps).astype(np.int64)
        if steps.min() < 1:
            raise UsageError(f"{node.op_type} {node.name!r}: weights with zero point 0 are needed")


def _excess(rows: np.ndarray, low: int, high: int) -> np.ndarray:
    wide = rows.astype(np.int32)
    ends = wide * low, wide * high
    most, least = (way(*ends).reshape(len(wide), -1, 2).sum(-1) for way in (np.maximum, np.minimum))
    return np.asarray(np.maximum(most.max(-1, initial=0) - _MOST, _LEAST - least.min(-1, initial=0)).clip(0))


def _weights(node: ir.Node) -> list[ir.Value]:
    """The stored weights of an operator that computes in integers."""
    found = [node.inputs[i] for i in _INTEGER_OPERATORS.get(operator_of(node), ()) if i < len(node.inputs)]
    if operator_of(node) in _FLOAT_OPERATORS:
        before = [value.producer() if value else None for value in node.inputs[:2]]
        if all(one is not None and one.op_type == "DequantizeLinear" for one in before):
            assert before[1] is not None
            found = [before[1].inputs[0]]
    return [value for value in found if value is not None]
