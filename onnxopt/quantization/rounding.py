"""Weights rounded so that the errors of their elements make up for each other.

Source: Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
2022: elements are rounded one summand after the other, and those not yet rounded take up the error, as the
second moments of the input tell. A row for which plain rounding is better keeps that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.compensation import change_summands, damped, square_error
from onnxopt.calibration.moments import MOST_SUMMANDS, layers_with_moments
from onnxopt.calibration.successive import Turn, in_turn
from onnxopt.calibration.windows import from_rows, has_rows, summands_of, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, int_attr, read_once, sizes_of
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import Format, QuantParams, dequantize, quantize, shaped
from onnxopt.quantization.saturation import can_saturate
from onnxopt.quantization.weights import quantize_weight

__all__ = ["has_few_levels", "round_in_turn", "round_rows", "round_weights"]

_BLOCK = 64
_FEW_BITS = 4
_TIMES = 4
"""As many positions of a layer are looked at as its second moments take: each rounding follows from them."""
_RATIOS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


def round_weights(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With the weights of layers rounded for what they are multiplied with, as it is quantized.

    Conv, Gemm, and MatMul with a matrix; layers with more than 2048 summands stay as they are. Small floats
    are no whole numbers of a step, and there is nothing to do. Scales stay.
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
        found = _rounded(layer.node, layer.weight, layer.moments, ints.shape, params).astype(ints.dtype)
        if not (draft.plan.saturates and can_saturate(layer.node, found)):
            rounded[unit.site] = (found, params)
    return replace(draft, plan=replace(draft.plan, rounded=rounded)) if rounded else None


def has_few_levels(form: Format) -> bool:
    """Whether rounding to it loses so much that it matters how it is rounded."""
    return not form.is_float and form.bits <= _FEW_BITS


def round_in_turn(
    model: ir.Model,
    nodes: Iterable[ir.Node],
    samples: Sequence[Feeds],
    form: Format,
    axis_of: Callable[[ir.Node], int | None],
    progress: Callable[[str, float], None] = lambda *_: None,
) -> dict[ir.Node, tuple[np.ndarray, QuantParams]]:
    """The integers of the weights of layers, one layer after the other, and what they stand for.

    Each layer is held against what it writes in the whole model, so that it makes up for the errors of those
    in front of it, too; its bias takes up the mean of what is missing. Of each scale those of narrower ranges
    are tried, down to 0.4 of what reaches the largest element, for what comes out, not for the elements.

    Args:
        model: in floating point; its layers get the weights that the integers stand for, and their biases.
        nodes: of its main graph. Left out are those that are no layer with a float32 weight of its own, and
            with more than 2048 summands.
        samples: complete feeds.
        form: of integers.
        axis_of: the axis of a node's weight along which there are scales of their own; None: one for all.
        progress: called before each layer: one of 1024 x 1024 takes some seconds.
    """
    found = {}
    layers = [node for node in nodes if _takes_turns(node)]
    for number, turn in enumerate(in_turn(model, layers, samples, times=_TIMES)):
        progress("rounding layer after layer", number / len(layers))
        tensor = constant_of(turn.node.inputs[1])
        assert tensor is not None  # it has rows
        target = from_rows(turn.node, turn.target, sizes_of(tensor))
        _, params = quantize_weight(target, form, axis=axis_of(turn.node))
        ints, params = found[turn.node] = _nearest(turn, target, params)
        turn.store(weight_rows(turn.node, dequantize(ints, params).astype(np.float64)))
    return found


def _takes_turns(node: ir.Node) -> bool:
    """Whether a node is a layer whose weight is read by it alone, and whose moments can be had."""
    if not has_rows(node) or int_attr(node, "transA", 0):
        return False
    value = node.inputs[1]
    tensor = constant_of(value)
    assert value is not None
    assert tensor is not None  # it has rows
    if tensor.dtype != ir.DataType.FLOAT or not read_once(value):
        return False
    return summands_of(node) <= MOST_SUMMANDS


def _nearest(turn: Turn, target: np.ndarray, params: QuantParams) -> tuple[np.ndarray, QuantParams]:
    """Of some scales those with the least error: for each row that has its own, or for all together."""
    rows, shape = weight_rows(turn.node, target), params.scale.shape
    ints, least, best = np.zeros(target.shape), np.full(shape, np.inf), np.ones(shape, np.float32)
    moments = damped(turn.moments)
    for ratio in map(np.float32, _RATIOS):
        narrow = replace(params, scale=params.scale * ratio)
        tried = _rounded(turn.node, rows, turn.moments, target.shape, narrow)
        change = weight_rows(turn.node, dequantize(tried, narrow)) - rows
        error = square_error(change, moments)
        error = error.reshape(shape) if error.size == params.scale.size else np.full(shape, error.sum())
        better = error < least
        least, best = np.where(better, error, least), np.where(better, ratio, best)
        _, which = shaped(replace(params, zero_point=better), target.ndim, target.shape)
        ints = np.where(which, tried, ints)
    return ints.astype(params.format.dtype.numpy()), replace(params, scale=np.asarray(params.scale * best))


def round_rows(
    rows: np.ndarray,
    scale: np.ndarray,
    moments: np.ndarray,
    low: np.ndarray | float,
    high: np.ndarray | float,
) -> np.ndarray:
    """Whole numbers, which times their scales give nearly the same sums as the rows do.

    Args:
        rows: float64 [groups, rows, summands].
        scale: what the whole numbers of each row are multiplied with; broadcasts to [groups, rows, 1].
        moments: float64 [groups, summands, summands], the second moments of what is multiplied.
        low, high: bounds of the whole numbers, likewise.

    Of each row, the mean square of the difference is at most that of rounding to nearest.
    """
    nearest = np.rint(rows / scale).clip(low, high)
    size = np.diagonal(moments, axis1=1, axis2=2)
    order = np.argsort(-size, axis=1, kind="stable")
    sorted_rows = np.take_along_axis(rows, order[:, None], 2)
    sorted_moments = np.take_along_axis(np.take_along_axis(moments, order[:, None], 2), order[:, :, None], 1)
    ends = [*range(_BLOCK, rows.shape[2], _BLOCK), rows.shape[2]]
    steps, least, most = (np.broadcast_to(one, (*rows.shape[:2], 1))[..., 0] for one in (scale, low, high))

    def change(i: int, left: np.ndarray, _: np.ndarray) -> np.ndarray:
        return np.asarray(np.rint(left[..., i] / steps).clip(least, most) * steps)

    changed = change_summands(sorted_rows, sorted_moments, ends, change)
    found = np.empty_like(changed)
    np.put_along_axis(found, np.broadcast_to(order[:, None], rows.shape), np.rint(changed / scale), 2)
    better = square_error(found * scale - rows, moments) < square_error(nearest * scale - rows, moments)
    return np.where(better, found, nearest)


def _rounded(
    node: ir.Node, rows: np.ndarray, moments: np.ndarray, shape: tuple[int, ...], params: QuantParams
) -> np.ndarray:
    """The integers of a weight of that shape. Of symmetric ones, the least is not used."""
    scale, zero = (
        weight_rows(node, np.broadcast_to(one, shape))[..., :1].astype(np.float64)
        for one in shaped(params, len(shape), shape)
    )
    low, high = params.format.low - zero, params.format.high - zero
    low = np.where(low == -high - 1, -high, low)
    return from_rows(node, round_rows(rows, scale, moments, low, high) + zero, shape)
