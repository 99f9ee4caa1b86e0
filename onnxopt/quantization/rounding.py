"""Weights rounded so that the errors of their elements make up for each other.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022: elements are rounded one summand after the other, and those not yet rounded take up the error, as the
second moments of the input tell. Scales stay; a row for which plain rounding is better keeps that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from onnxopt.calibration.compensation import change_summands, square_error
from onnxopt.calibration.moments import Layer, layers_with_moments
from onnxopt.calibration.windows import from_rows
from onnxopt.data import Feeds
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import QuantParams, dequantize, quantize
from onnxopt.quantization.saturation import can_saturate

__all__ = ["round_rows", "round_weights"]

_BLOCK = 64


def round_weights(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With the weights of layers rounded for what they are multiplied with, as it is quantized.

    Conv, Gemm, and MatMul with a matrix; layers with more than 2048 summands stay as they are. Small floats
    are no whole numbers of a step, and there is nothing to do.
    """
    if draft.plan.weight.is_float:
        return None
    units = {unit.node: unit for unit in draft.units() if unit.weight == 1}
    units = {node: unit for node, unit in units.items() if node.op_type != "ConvTranspose"}

    def as_quantized(name: str, rows: np.ndarray) -> np.ndarray:
        params = draft.plan.params[name]
        return dequantize(quantize(rows, params), params)

    rounded = {}
    for layer in layers_with_moments(draft.model, list(units), samples, as_quantized):
        unit = units[layer.node]
        ints, params = quantized_weight(unit, draft.plan, draft.plan.params[layer.source])
        found = _rounded(layer, ints, params, params.format.high)
        if not (draft.plan.saturates and can_saturate(layer.node, found)):
            rounded[unit.site] = (found, params)
    return replace(draft, plan=replace(draft.plan, rounded=rounded)) if rounded else None


def round_rows(target: np.ndarray, moments: np.ndarray, low: float, high: float) -> np.ndarray:
    """Whole numbers near `target` that give nearly the same sums.

    Args:
        target: float64 [groups, rows, summands].
        moments: float64 [groups, summands, summands], the second moments of what is multiplied.
        low, high: bounds of the whole numbers.

    Of each row, the mean square of the difference is at most that of rounding to nearest.
    """
    nearest = np.rint(target).clip(low, high)
    size = np.diagonal(moments, axis1=1, axis2=2)
    order = np.argsort(-size, axis=1, kind="stable")
    left = np.take_along_axis(target, order[:, None], 2)
    sorted_moments = np.take_along_axis(np.take_along_axis(moments, order[:, None], 2), order[:, :, None], 1)
    ends = [*range(_BLOCK, target.shape[2], _BLOCK), target.shape[2]]
    whole = change_summands(
        left, sorted_moments, ends, lambda i, left, _: np.rint(left[..., i]).clip(low, high)
    )
    found = np.empty_like(whole)
    np.put_along_axis(found, np.broadcast_to(order[:, None], whole.shape), whole, 2)
    better = square_error(found - target, moments) < square_error(nearest - target, moments)
    return np.where(better, found, nearest)


def _rounded(layer: Layer, ints: np.ndarray, params: QuantParams, limit: float) -> np.ndarray:
    zero = int(params.zero_point.reshape(-1)[0])
    scale = np.broadcast_to(params.scale.reshape(-1), layer.weight[..., 0].size)
    target = layer.weight / scale.reshape(*layer.weight.shape[:2], 1).astype(np.float64)
    whole = round_rows(target, layer.moments, -limit, limit) + zero
    return from_rows(layer.node, whole, layer.shape).astype(ints.dtype)
