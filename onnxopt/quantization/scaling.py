"""Channels of activations brought to like ranges: what writes them is divided, what reads them multiplied.

Sources: cross-layer equalization, Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias
Correction", 2019; from ranges of the activations, Xiao et al., "SmoothQuant: Accurate and Efficient
Post-Training Quantization for Large Language Models", 2022. Weights have a scale for each output channel, so
that dividing costs the writer nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.calibration import ChannelStatistics
from onnxopt.calibration.windows import from_rows, has_rows, weight_rows
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, int_attr, sizes_of, sole_user, use_count
from onnxopt.model import clone
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.units import Unit
from onnxopt.quantization.weights import weight_axis
from onnxopt.scope import Names

__all__ = ["balance_weights", "equalize_layers", "smooth_activations"]

_HOMOGENEOUS = {
    1: ("AveragePool", "GlobalAveragePool", "LeakyRelu", "MaxPool", "Relu"),
    -1: ("LeakyRelu", "Relu"),
}
"""Axis of the channels -> operators for which f(x / s) = f(x) / s, s > 0 of each channel."""
_NORMS = {1: "BatchNormalization", -1: "LayerNormalization"}
_WRITERS = {1: ("Conv",), -1: ("Gemm", "MatMul")}
_POWERS = (0.25, 0.5, 0.75, 1.0)
"""Of the activations' ranges, against those of the weights, that are tried."""
_GAIN = 0.5
"""The part of the expected noise that has to remain at most."""
_ROUNDS = 4
"""Each weight is balanced against the one before and the one behind, so that they move each other."""
_SPREAD = 1e-3
"""Channels count as at least this part of the widest."""
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class _Span:
    """Constants to divide, positions with their nodes; the tensors in between, the one that is read first."""

    divided: tuple[tuple[ir.Node, int], ...]
    tensors: tuple[ir.Value, ...]
    readers: tuple[Unit, ...]
    axis: int

    @property
    def tensor(self) -> str:
        return self.tensors[0].name or ""


def equalize_layers(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With equalized channels between convolutions with nothing but Relu, LeakyRelu and pools between them.

    Others are not positively homogeneous: Clip, HardSwish, and x sigmoid(x), where the scale would have to be
    taken off one factor and not the other.
    """
    return _scaled(draft, samples, ("Conv",), 1)


def smooth_activations(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With equalized channels between MatMul or Gemm and the normalization, factor or layer before."""
    return _scaled(draft, samples, ("Gemm", "MatMul"), -1)


def balance_weights(model: ir.Model, units: Sequence[Unit]) -> None:
    """Bring channels to like ranges in convolutions whose weights are to have one scale each, in place.

    Cross-layer equalization: what writes a channel with the largest weight a, and reads it with b, does so
    with sqrt(a b) then.
    """
    names, spans = Names(model), _spans(units, ("Conv",), 1)
    for span in spans * _ROUNDS:
        writer = next((node for node, _ in span.divided if node.op_type == "Conv"), None)
        if writer is None:
            continue
        array = _array(writer, 1)
        written = abs(array).max(tuple(range(1, array.ndim)))
        ends = [np.maximum(one, _SPREAD * one.max() + _TINY) for one in (written, _sizes(span))]
        _apply(span, np.sqrt(ends[0] / ends[1]), names)


def _sizes(span: _Span) -> np.ndarray:
    """The largest weight that each channel is read with, float64 (channels,)."""
    weights = [abs(_by_channel(unit)).max((1, 3)).reshape(-1) for unit in span.readers]
    return np.asarray(np.max(weights, axis=0))


def _scaled(draft: Draft, samples: Sequence[Feeds], operators: Sequence[str], axis: int) -> Draft | None:
    model = clone(draft.model)
    copy = Draft(model, draft.placement, draft.plan, draft.statistics, draft.method)
    spans = _spans(copy.units(), operators, axis)
    if not spans:
        return None
    channels = draft.channels({span.tensor: axis for span in spans}, samples)
    names, changed = Names(model), []
    for span in spans:
        scale = _scale_of(span, channels[span.tensor], draft.plan)
        if scale is not None:
            _apply(span, scale, names)
            changed += [value.name or "" for value in span.tensors]
    return draft.with_model(model, changed, samples) if changed else None


def _spans(units: Sequence[Unit], operators: Sequence[str], axis: int) -> list[_Span]:
    readers: dict[ir.Value, list[Unit]] = {}
    for unit in units:
        if unit.node.op_type in operators and unit.weight == 1 and has_rows(unit.node):
            readers.setdefault(unit.sources[0], []).append(unit)
    found = []
    for value, layers in readers.items():
        if len(layers) == use_count(value) and not value.is_graph_output():
            span = _span(value, layers, axis)
            found += [span] if span is not None else []
    return found


def _span(value: ir.Value, readers: Sequence[Unit], axis: int) -> _Span | None:
    """From a tensor back to what can be divided."""
    divided: list[tuple[ir.Node, int]] = []
    tensors = [value]
    groups, _, inputs, _ = _by_channel(readers[0]).shape
    channels = groups * inputs
    while (node := tensors[-1].producer()) is not None and node.domain == "" and len(node.outputs) == 1:
        if node.op_type in _HOMOGENEOUS[axis]:
            before = node.inputs[0]
        elif node.op_type == "Add":
            place = next((p for p in (0, 1) if _is_vector(node, p)), None)
            if place is None:
                return None
            divided.append((node, place))
            before = node.inputs[1 - place]
        else:
            places = _places(node, axis, channels)
            if not places or not all(_is_float(node.inputs[place]) for place in places):
                return None
            divided += [(node, place) for place in places]
            return _Span(tuple(divided), tuple(tensors), tuple(readers), axis)
        if before is None or sole_user(before) is not node:
            return None
        tensors.append(before)
    return None


def _places(node: ir.Node, axis: int, channels: int) -> tuple[int, ...]:
    """The constants of a node that make what it writes proportional to them, channel by channel."""
    if node.op_type == "Mul":
        return next(((place,) for place in (0, 1) if _is_vector(node, place)), ())
    if node.op_type == _NORMS[axis]:
        along: int | None = 0
        if int_attr(node, "axis", -1) != -1 or int_attr(node, "training_mode", 0):
            return ()
    elif node.op_type in _WRITERS[axis]:
        along = weight_axis(node, 1)
    else:
        return ()
    tensor = constant_of(node.inputs[1])
    if tensor is None or along is None or sizes_of(tensor)[along] != channels:
        return ()  # what it writes is broadcast to these channels later
    return (1, 2) if len(node.inputs) > 2 and node.inputs[2] is not None else (1,)


def _is_vector(node: ir.Node, place: int) -> bool:
    tensor = constant_of(node.inputs[place])
    return _is_float(node.inputs[place]) and tensor is not None and tensor.size > 1


def _is_float(value: ir.Value | None) -> bool:
    tensor = constant_of(value)
    return tensor is not None and tensor.dtype == ir.DataType.FLOAT


def _scale_of(span: _Span, seen: ChannelStatistics, plan: Plan) -> np.ndarray | None:
    """What to divide each channel by, float64 (channels,); None where nothing gains much."""
    extent = np.maximum(seen.maximum, 0.0) - np.minimum(seen.minimum, 0.0)
    if not np.isfinite(extent).all() or not extent.any():
        return None
    power = seen.squares / np.maximum(seen.count, 1)
    weights = [_by_channel(unit) for unit in span.readers]
    size = _sizes(span)
    if not size.any():
        return None
    extent, size = (np.maximum(one, _SPREAD * one.max()) for one in (extent, size))
    trials = [np.ones(len(extent)), *(extent**part / size ** (1 - part) for part in _POWERS)]
    form = plan.params[span.tensor].format
    levels, reach = form.high - form.low, plan.weight.high
    losses = [_loss(one, extent, power, weights, levels, reach) for one in trials]
    best = int(np.argmin(losses))
    if losses[best] > _GAIN * losses[0]:
        return None
    scale = trials[best]
    return np.asarray(scale * ((extent / scale).max() / extent.max()))


def _loss(
    scale: np.ndarray,
    extent: np.ndarray,
    power: np.ndarray,
    weights: Sequence[np.ndarray],
    levels: float,
    reach: float,
) -> float:
    """The noise expected of what readers write over its power: of their quantized input, and weights."""
    step, total = (extent / scale).max() / levels, 0.0
    for weight in weights:
        groups, _, channels, window = weight.shape
        spread, power_in = (one.reshape(groups, 1, channels, 1) for one in (scale, power))
        scaled = weight * spread
        steps = abs(scaled).max((2, 3)) / reach
        noise = step**2 * (scaled**2).sum((2, 3)) + steps**2 * window * (power_in / spread**2).sum((2, 3))
        signal = (weight**2 * power_in).sum((2, 3))
        total += float((noise / np.maximum(signal, _SPREAD**2 * signal.max() + _TINY)).mean())
    return total


def _by_channel(unit: Unit) -> np.ndarray:
    """A reader's weight as float64 [groups, outputs, inputs of a group, window]."""
    tensor = constant_of(unit.node.inputs[1])
    assert tensor is not None  # it has a weight
    rows = weight_rows(unit.node, tensor.numpy().astype(np.float64))
    window = math.prod(sizes_of(tensor)[2:])
    return rows.reshape(*rows.shape[:2], -1, window)


def _apply(span: _Span, scale: np.ndarray, names: Names) -> None:
    """Divide what is written, multiply what reads it."""
    for node, place in span.divided:
        array = _array(node, place)
        if node.op_type in ("Add", "Mul"):
            shape = (-1,) + (1,) * (_array(span.readers[0].node, 1).ndim - 2) * (span.axis == 1)
        elif place == 1 and (axis := weight_axis(node, 1)) is not None:
            shape = tuple(-1 if i == axis else 1 for i in range(array.ndim))
        else:
            shape = (-1,)
        _replace(node, place, array / scale.reshape(shape), names)
    for unit in span.readers:
        by_channel = _by_channel(unit)
        groups, outputs, channels, _ = by_channel.shape
        scaled = (by_channel * scale.reshape(groups, 1, channels, 1)).reshape(groups, outputs, -1)
        _replace(unit.node, 1, from_rows(unit.node, scaled, _array(unit.node, 1).shape), names)


def _array(node: ir.Node, place: int) -> np.ndarray:
    tensor = constant_of(node.inputs[place])
    assert tensor is not None  # only such are looked at
    return tensor.numpy()


def _replace(node: ir.Node, place: int, array: np.ndarray, names: Names) -> None:
    """Put a constant of its own in place of an operand."""
    old, graph = node.inputs[place], node.graph
    assert old is not None
    assert graph is not None
    tensor = ir.Tensor(array.astype(np.float32))
    value = ir.Value(
        name=names.fresh(f"{(old.name or '').partition('_scaled')[0]}_scaled"),
        type=old.type,
        const_value=tensor,
    )
    value.shape = ir.Shape(array.shape)
    graph.register_initializer(value)
    node.replace_input_with(place, value)
