"""Corrected biases: rounding a weight shifts the mean of what a layer writes, and its bias can shift it back.

Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section
4.2, with means of the inputs that were measured on samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxopt.data import Feeds
from onnxopt.graph import constant_of, int_attr
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import dequantize
from onnxopt.quantization.units import Unit

__all__ = ["correct_biases"]


def correct_biases(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With the biases that make up for the error of each weight at the mean of its input.

    With W' the weight as quantized, b' = b - (W' - W) E[x]; of a convolution, summed over its window, which
    takes the border for the rest of the image.
    """
    units = [unit for unit in draft.units() if _has_room(unit)]
    inputs = draft.channels({unit.sources[0].name or "": 1 for unit in units}, samples)
    found = {}
    for unit in units:
        tensor = constant_of(unit.node.inputs[1])
        assert tensor is not None  # it has a weight
        error = dequantize(*quantized_weight(unit, draft.plan, None)) - tensor.numpy().astype(np.float64)
        shift = _shift(unit, error, inputs[unit.sources[0].name or ""].mean)
        bias = constant_of(unit.bias) if unit.bias is not None else None
        old = np.zeros(shift.shape) if bias is None else bias.numpy().astype(np.float64)
        found[unit.site] = (old - shift.reshape(old.shape)).astype(np.float32)
    return replace(draft, plan=replace(draft.plan, biases=found)) if found else None


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
