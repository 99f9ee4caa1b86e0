"""Weights rounded so that the errors of their elements make up for each other.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022: elements are rounded one summand after the other, and those not yet rounded take up the error, as the
second moments of the input tell. Scales stay; a row for which plain rounding is better keeps that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from onnxopt.calibration.exposing import Slices
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, sizes_of
from onnxopt.model import reusable
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import QuantParams, dequantize, quantize
from onnxopt.quantization.saturation import can_saturate
from onnxopt.quantization.units import Unit
from onnxopt.quantization.windows import from_rows, has_rows, operand_rows, weight_rows

__all__ = ["round_rows", "round_weights"]

_SUMMANDS = 2048
"""Layers that add up more are rounded to nearest: the time grows with the third power."""
_MEMORY = 256 << 20
"""Bytes of moments that are gathered in one run of the samples, and of tensors exposed at once."""
_PER_SUMMAND, _LEAST = 4, 4096
"""Positions of a layer that are looked at, in all samples together."""
_TOGETHER = 256
"""Positions whose moments are added up in float32."""
_DAMPING = 0.01
_BLOCK = 64
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class _Layer:
    """weight: [groups, channels of a group, summands]. moments: [groups, summands, summands].

    waiting: [groups, positions, summands] of samples, float32, whose moments are still to be added.
    """

    unit: Unit
    weight: np.ndarray
    shape: tuple[int, ...]
    moments: np.ndarray = field(init=False)
    waiting: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        groups, _, summands = self.weight.shape
        object.__setattr__(self, "moments", np.zeros((groups, summands, summands)))

    @property
    def source(self) -> str:
        return self.unit.sources[0].name or ""


def round_weights(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With the weights of layers rounded for what they are multiplied with, as it is quantized.

    Conv, Gemm, and MatMul with a matrix; layers with more than 2048 summands stay as they are. Small floats
    are no whole numbers of a step, and there is nothing to do.
    """
    if draft.plan.weight.is_float:
        return None
    rounded = {}
    for units in _batches(draft):
        layers = [_layer(unit) for unit in units]
        _add_moments(draft, layers, samples)
        for layer in layers:
            ints, params = quantized_weight(layer.unit, draft.plan, draft.plan.params[layer.source])
            found = _rounded(layer, ints, params, params.format.high)
            if not (draft.plan.saturates and can_saturate(layer.unit.node, found)):
                rounded[layer.unit.site] = (found, params)
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
    damping = _DAMPING * size.mean(1) + _TINY
    sorted_moments += damping[:, None, None] * np.eye(target.shape[2])
    factor = np.linalg.cholesky(np.linalg.inv(sorted_moments)).swapaxes(1, 2)
    whole = np.empty_like(left)
    for start in range(0, target.shape[2], _BLOCK):
        stop = min(start + _BLOCK, target.shape[2])
        errors = np.empty_like(left[..., start:stop])
        for i in range(start, stop):
            whole[..., i] = np.rint(left[..., i]).clip(low, high)
            error = (left[..., i] - whole[..., i]) / factor[:, i, i, None]
            left[..., i:stop] -= error[..., None] * factor[:, i, None, i:stop]
            errors[..., i - start] = error
        left[..., stop:] -= errors @ factor[:, start:stop, stop:]
    found = np.empty_like(whole)
    np.put_along_axis(found, np.broadcast_to(order[:, None], whole.shape), whole, 2)
    return np.where(_loss(found - target, moments) < _loss(nearest - target, moments), found, nearest)


def _loss(error: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The mean square of what an error of the weight does to the sums: [groups, rows, 1]."""
    return np.asarray(((error @ moments) * error).sum(-1, keepdims=True))


def _rounded(layer: _Layer, ints: np.ndarray, params: QuantParams, limit: float) -> np.ndarray:
    zero = int(params.zero_point.reshape(-1)[0])
    scale = np.broadcast_to(params.scale.reshape(-1), layer.weight[..., 0].size)
    target = layer.weight / scale.reshape(*layer.weight.shape[:2], 1).astype(np.float64)
    whole = round_rows(target, layer.moments, -limit, limit) + zero
    return from_rows(layer.unit.node, whole, layer.shape).astype(ints.dtype)


def _batches(draft: Draft) -> list[list[Unit]]:
    """The layers to round, in batches whose moments fit the memory."""
    batches: list[list[Unit]] = [[]]
    filled = 0
    for unit in draft.units():
        weight = constant_of(unit.node.inputs[1]) if has_rows(unit) else None
        if weight is None:
            continue
        groups, _, summands = weight_rows(unit.node, np.broadcast_to(np.float32(0), sizes_of(weight))).shape
        if summands > _SUMMANDS:
            continue
        size = groups * summands**2 * 8
        if batches[-1] and filled + size > _MEMORY:
            batches.append([])
            filled = 0
        batches[-1].append(unit)
        filled += size
    return [batch for batch in batches if batch]


def _layer(unit: Unit) -> _Layer:
    tensor = constant_of(unit.node.inputs[1])
    assert tensor is not None  # it has a weight
    array = tensor.numpy().astype(np.float64)
    return _Layer(unit, weight_rows(unit.node, array), array.shape)


def _add_moments(draft: Draft, layers: Sequence[_Layer], samples: Sequence[Feeds]) -> None:
    readers: dict[str, list[_Layer]] = {}
    for layer in layers:
        readers.setdefault(layer.source, []).append(layer)
    slices = Slices(reusable(draft.model), list(readers))
    for group in slices.groups(samples[0], _MEMORY):
        with slices.runner(group) as run:
            for feeds in samples:
                for name, array in run(feeds):
                    for layer in readers[name]:
                        _add(layer, array, draft.plan.params[name], len(samples))
    for layer in layers:
        _add_waiting(layer)


def _add(layer: _Layer, array: np.ndarray, params: QuantParams, samples: int) -> None:
    most = -(-max(_LEAST, _PER_SUMMAND * layer.weight.shape[2]) // samples)
    rows = operand_rows(layer.unit.node, array, layer.shape[2:], most)
    layer.waiting.append(dequantize(quantize(rows, params), params).swapaxes(0, 1))
    if sum(one.shape[1] for one in layer.waiting) >= _TOGETHER:
        _add_waiting(layer)


def _add_waiting(layer: _Layer) -> None:
    """Many rows at once take a fraction of the time of a sample's few."""
    if layer.waiting:
        rows = np.concatenate(layer.waiting, axis=1)
        layer.moments[...] += rows.swapaxes(1, 2) @ rows
        layer.waiting.clear()
