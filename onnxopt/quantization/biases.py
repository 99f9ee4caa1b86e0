"""Corrected biases: rounding a weight shifts the mean of what a layer writes, and its bias can shift it back.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section
4.2, with means of the inputs that were measured on samples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from onnxopt.graph import constant_of, int_attr
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import dequantize
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.units import Unit

__all__ = ["correct_biases", "input_channels"]


def input_channels(units: Sequence[Unit]) -> dict[str, int]:
    """Of each tensor that a layer with a bias multiplies with its weight, the axis that is summed over."""
    return {unit.sources[0].name or "": 1 for unit in units if _has_room(unit)}


def correct_biases(
    units: Sequence[Unit], plan: Plan, means: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Site -> the bias that makes up for the error of the weight at the mean of the input.

    Args:
        units: in floating point.
        plan: how weights are quantized.
        means: of the tensors of `input_channels`, by channel, of shape (channels,).

    With W' the weight as quantized, b' = b - (W' - W) E[x]; of a convolution, summed over its window, which
    takes the border for the rest of the image.
    """
    found = {}
    for unit in units:
        mean = means.get(unit.sources[0].name or "") if _has_room(unit) else None
        tensor = constant_of(unit.node.inputs[1]) if mean is not None else None
        if mean is None or tensor is None:
            continue
        weight = tensor.numpy().astype(np.float64)
        error = dequantize(*quantized_weight(unit, plan, None)) - weight
        bias = constant_of(unit.bias) if unit.bias is not None else None
        shift = _shift(unit, error, mean)
        old = np.zeros(shift.shape) if bias is None else bias.numpy().astype(np.float64)
        found[unit.site] = (old - shift.reshape(old.shape)).astype(np.float32)
    return found


def _has_room(unit: Unit) -> bool:
    """Whether the layer can have a bias, and its weight is the second operand."""
    return unit.node.op_type in ("Conv", "Gemm") and unit.weight == 1


def _shift(unit: Unit, error: np.ndarray, mean: np.ndarray) -> np.ndarray:
    if unit.node.op_type == "Gemm":
        rows = error if int_attr(unit.node, "transB", 0) else error.T
        return np.asarray(rows @ mean)
    outputs, group = error.shape[0], int_attr(unit.node, "group", 1)
    window = error.reshape(outputs, error.shape[1], -1).sum(-1)
    of_group = mean.reshape(group, -1).repeat(outputs // group, axis=0)
    return np.asarray((window * of_group).sum(1))
