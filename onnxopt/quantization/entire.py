"""Quantize all that can be, whatever it costs: the start of a training that wins the accuracy back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial

import onnx_ir as ir

from onnxopt.calibration import exposable
from onnxopt.data import Feeds
from onnxopt.model import clone
from onnxopt.quantization.choose import chosen_tensors
from onnxopt.quantization.rounding import has_few_levels, round_in_turn
from onnxopt.quantization.search import write
from onnxopt.quantization.static import Progress, Settings, calibrated, plan_of, ranges_of, tensors_of
from onnxopt.quantization.units import survey
from onnxopt.quantization.weights import kernel_axis

__all__ = ["quantize_entirely"]

_LAST = ("LogSoftmax", "Sigmoid", "Softmax")
"""Operators that end a graph in floating point: losses look through them."""


def quantize_entirely(
    model: ir.Model,
    samples: Sequence[Feeds],
    held_out: Sequence[Feeds],
    settings: Settings,
    keep: Collection[str],
    progress: Progress,
) -> ir.Model | None:
    """A quantized copy of a prepared model, neither judged nor measured; None where nothing can be quantized.

    Args:
        model: in floating point, of an opset that has the formats.
        samples, held_out: to calibrate, and to choose ranges by.
        settings: how.
        keep: sites that stay in floating point.
        progress: called with what is being done.
    """
    placement, model = settings.placement, clone(model)
    possible = survey(model, placement, frozenset(exposable(model)))
    if not possible.units:
        return None
    statistics = calibrated(model, samples, held_out, settings, possible, progress)
    names = tensors_of(possible.units)
    known = [name for name in names if statistics[name].count and not statistics[name].nonfinite]
    units = survey(model, placement, frozenset(known)).units
    plan = plan_of(units, ranges_of(units, statistics, settings), settings)
    nodes = frozenset(
        unit.site
        for unit in units
        if unit.site not in keep
        and not (unit.node.op_type in _LAST and unit.node.outputs[0].is_graph_output())
    )
    tensors = chosen_tensors(units, nodes, (), outputs=placement.outputs)
    plan = replace(plan, nodes=nodes, tensors=tensors)
    if has_few_levels(plan.weight):
        layers = {
            unit.node: unit.site
            for unit in units
            if unit.site in nodes and unit.is_layer and unit.weight == 1
        }
        axis_of = partial(kernel_axis, position=1) if plan.per_channel else lambda _: None
        found = round_in_turn(model, layers, samples, plan.weight, axis_of, progress)
        plan = replace(plan, rounded={layers[node]: one for node, one in found.items()})
    return write(model, placement, plan)[0] if nodes else None
