"""Corrected biases: quantizing shifts the mean of what a layer writes, and its bias can shift it back.

Sources: the error of the weight at the mean of the input, Nagel et al., "Data-Free Quantization Through
Weight Equalization and Bias Correction", 2019, section 4.2; measured layer after layer in the quantized
model, Nagel et al., "A White Paper on Neural Network Quantization", 2021, section 3.4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from onnxopt.calibration import calibrate
from onnxopt.calibration.segments import needed_from, part_of
from onnxopt.data import Feeds
from onnxopt.graph import constant_of, int_attr
from onnxopt.model import clone
from onnxopt.quantization.draft import Draft
from onnxopt.quantization.emit import bias_of, emit, quantized_weight
from onnxopt.quantization.formats import dequantize
from onnxopt.quantization.units import Unit, survey
from onnxopt.runtimes import open_session

__all__ = ["correct_biases", "measure_biases"]

_SAMPLES = 16
"""Samples that biases are measured on: what all of them need next is held at once."""


def correct_biases(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With the biases that make up for the error of each weight at the mean of its input.

    With W' the weight as quantized, b' = b - (W' - W) E[x]; of a convolution, summed over its window, which
    takes the border for the rest of the image.
    """
    units, plan = [unit for unit in draft.units() if _has_room(unit)], replace(draft.plan, biases={})
    inputs = draft.channels({unit.sources[0].name or "": 1 for unit in units}, samples)
    found = {}
    for unit in units:
        tensor = constant_of(unit.node.inputs[1])
        assert tensor is not None  # it has a weight
        source = unit.sources[0].name or ""
        quantized = dequantize(*quantized_weight(unit, plan, plan.params[source]))
        shift = _shift(unit, quantized - tensor.numpy().astype(np.float64), inputs[source].mean)
        found[unit.site] = _shifted(bias_of(unit, plan), -shift)
    return replace(draft, plan=replace(plan, biases=found)) if found else None


def measure_biases(draft: Draft, samples: Sequence[Feeds]) -> Draft | None:
    """With the biases that give each layer in integers the mean that it has in floating point.

    It makes up for clipped activations and for the layers before, too, so that it holds for the units of
    the plan together. The first 16 samples count. Each layer runs once, on what the corrected ones write.
    """
    samples = [samples[number] for number in range(min(len(samples), _SAMPLES))]
    units = {u.site: u for u in draft.units() if _has_room(u) and u.site in draft.plan.nodes}
    model = clone(draft.model)
    copies = survey(model, draft.placement, draft.plan.params).units
    layers = {node: site for site, node in emit(model, copies, draft.plan, draft.placement).items()}
    expected = calibrate(draft.model, samples, list(units), channels=dict.fromkeys(units, 1)) if units else {}
    biases = dict(draft.plan.biases)
    order, start = list(model.graph), 0
    states: list[Mapping[str, np.ndarray]] = [dict(feeds) for feeds in samples]
    for end, node in enumerate(order, 1):
        site, name = layers.get(node, ""), node.outputs[0].name or ""
        seen = expected[site].channel if site in units else None
        if seen is None:
            continue
        made = {value.name for one in order[start:end] for value in one.outputs}
        needed = dict.fromkeys([*needed_from(order, end, model.graph.outputs), name])
        piece = part_of(model, start, end, [one for one in needed if one in made], states[0])
        with open_session(piece, level="none") as session:
            written = [session.run(state) for state in states]
        shift = seen.mean - _mean([state[name] for state in written])
        biases[site] = _shifted(bias_of(units[site], draft.plan), shift)
        for state in written:
            rest = (1,) * (state[name].ndim - 2)
            state[name] = state[name] + shift.astype(np.float32).reshape(-1, *rest)
        kept = [{key: state[key] for key in needed if key not in made} for state in states]
        states = [{**one, **old, **new} for one, old, new in zip(samples, kept, written, strict=True)]
        start = end
    return replace(draft, plan=replace(draft.plan, biases=biases)) if units else None


def _mean(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Of each channel of axis 1, over all arrays."""
    total = [array.sum((0, *range(2, array.ndim)), dtype=np.float64) for array in arrays]
    return np.asarray(np.sum(total, 0) / sum(array.size // array.shape[1] for array in arrays))


def _shifted(bias: np.ndarray | None, shift: np.ndarray) -> np.ndarray:
    return (shift if bias is None else bias + shift.reshape(bias.shape)).astype(np.float32)


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
