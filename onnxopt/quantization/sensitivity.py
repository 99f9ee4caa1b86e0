"""What quantizing one tensor alone does to a model's outputs.

The noise of a source (an activation, or the weight of a unit) is the power of the error it makes in the
outputs over the power of the outputs. Errors of many sources are nearly independent, so that their noise
adds up. The graph is run in segments: what reaches a segment is computed once, and a source within it is
tried by running what follows from there, in a model where a number that is fed switches it on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from itertools import pairwise, zip_longest
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import onnx_ir as ir

from onnxopt.calibration.segments import needed_from, part_of
from onnxopt.data import Feeds
from onnxopt.graph import constant_of
from onnxopt.quantization.emit import quantized_weight
from onnxopt.quantization.formats import dequantize
from onnxopt.quantization.plan import Plan
from onnxopt.quantization.units import Unit, survey
from onnxopt.runtimes import open_session
from onnxopt.scope import Names
from onnxopt.targets import Placement
from onnxopt.verification.distance import arrays_of, is_float

__all__ = ["Noise", "Source", "measure_sensitivity", "noise_between", "sources_of"]

_SEGMENTS = 8
_SWITCH = "onnxopt_source"

State = Mapping[str, np.ndarray]
Outputs = Mapping[str, Any]


class Source(NamedTuple):
    """Something quantized: an activation by its name, or the constant operand of a unit by its site."""

    kind: Literal["tensor", "weight"]
    name: str


class Noise:
    """The noise of sources, measured when it is first asked for; `known` has what was.

    Args:
        sources: all there are.
        measure: gives the noise of some of them.
        known: what was measured before.
    """

    def __init__(
        self,
        sources: Collection[Source] = (),
        measure: Callable[[Sequence[Source]], Mapping[Source, float]] = lambda _: {},
        known: Mapping[Source, float] = MappingProxyType({}),
    ) -> None:
        self._sources, self._measure, self.known = sources, measure, known

    def __call__(self, wanted: Container[Source] | None = None) -> Mapping[Source, float]:
        """Source -> its noise, at least of those wanted; None: all."""
        missing = [
            one for one in self._sources if one not in self.known and (wanted is None or one in wanted)
        ]
        if missing:
            self.known = {**self.known, **self._measure(missing)}
        return self.known


def sources_of(units: Iterable[Unit]) -> tuple[Source, ...]:
    """What is quantized where units are."""
    found: dict[Source, None] = {}
    for unit in units:
        for value in (*unit.sources, *(() if unit.is_move else (unit.output,))):
            if constant_of(value) is None:
                found[Source("tensor", value.name or "")] = None
        if unit.weight is not None:
            found[Source("weight", unit.site)] = None
    return tuple(found)


def measure_sensitivity(
    model: ir.Model,
    placement: Placement,
    plan: Plan,
    samples: Sequence[Feeds],
    sources: Container[Source] | None = None,
    *,
    progress: Callable[[float], None] = lambda _: None,
) -> dict[Source, float]:
    """The noise of each source of a model alone, on these samples.

    Args:
        model: in floating point; not changed.
        placement, plan: how sources are quantized; the plan's choice of units does not matter.
        samples: a few.
        sources: which ones; None: all.
        progress: called with the share that is done.
    """
    order = list(model.graph)
    placed = _placed(survey(model, placement, plan.params).units, order, sources)
    outputs = list(model.graph.outputs)
    states: list[State] = [dict(feeds) for feeds in samples]
    with open_session(model) as session:
        expected = [session.run(feeds) for feeds in samples]
    noise: dict[Source, float] = {}
    start = 0
    for first, end in _segments(list(placed.values()), len(order)):
        within = [one for one, place in placed.items() if first <= place < end]
        after = dict.fromkeys(order[start:])
        late = [value.name or "" for value in outputs if value.producer() in after]
        rest = part_of(model, start, len(order), late, states[0])
        _add_switches(rest, within, placement, plan)
        with open_session(rest) as session:
            for number, one in enumerate(within):
                which = {_SWITCH: np.array(number, np.int64)}
                noise[one] = noise_between(expected, [session.run({**state, **which}) for state in states])
                progress(len(noise) / len(placed))
        advanced = _advanced(model, start, end, states, samples) if end < len(order) else []
        if all(isinstance(value, np.ndarray) for state in advanced for value in state.values()):
            start, states = (
                end,
                advanced,
            )  # sequences cannot be fed: the next segment begins where this one did
    return noise


def noise_between(expected: Sequence[Outputs], found: Sequence[Outputs]) -> float:
    """The power of the errors over that of the values, summed over the outputs found, averaged over samples.

    Outputs of other types than floats count by the share of elements that differ, and what has another shape
    counts as lost, which is 1. Elements that are NaN or infinite on both sides do not count; infinite where
    there are any on one side only.
    """
    total = 0.0
    for before, after in zip(expected, found, strict=True):
        for name, value in after.items():
            pairs = zip_longest(arrays_of(before[name]), arrays_of(value))
            total += sum(_noise(reference, array) for reference, array in pairs)
    return total / len(expected)


def _noise(reference: np.ndarray | None, array: np.ndarray | None) -> float:
    if reference is None or array is None:
        return float(reference is not array)
    if reference.shape != array.shape:
        return 1.0
    if not is_float(reference.dtype):
        return float(np.mean(reference != array)) if array.size else 0.0
    before, after = reference.astype(np.float64), array.astype(np.float64)
    power, lost = _powers(before, after)
    if not math.isfinite(power + lost):
        odd = ~np.isfinite(before) & ((before == after) | (np.isnan(before) & np.isnan(after)))
        before[odd] = after[odd] = 0.0
        power, lost = _powers(before, after)
    if not math.isfinite(lost):
        return math.inf
    return lost / power if power > 0 else float(lost > 0)


def _powers(before: np.ndarray, after: np.ndarray) -> tuple[float, float]:
    """Of a signal, and of its error."""
    with np.errstate(invalid="ignore"):
        error = after - before
    return float(np.square(before).sum()), float(np.square(error).sum())


def _placed(
    units: Sequence[Unit], order: Sequence[ir.Node], wanted: Container[Source] | None
) -> dict[Source, int]:
    """Each source and the number of the node that makes or reads it, in the order of the nodes."""
    made = {value.name: number for number, node in enumerate(order) for value in node.outputs}
    found = {one: made.get(one.name, 0) for one in sources_of(units) if wanted is None or one in wanted}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _segments(places: Sequence[int], nodes: int) -> list[tuple[int, int]]:
    """Where to cut the list of nodes, so that segments hold about as many sources each."""
    step = -(-len(places) // _SEGMENTS)
    starts = [0, *sorted({place for place in places[::step] if place}), nodes]
    return list(pairwise(starts))


def _advanced(
    model: ir.Model, start: int, end: int, states: Sequence[State], samples: Sequence[Feeds]
) -> list[State]:
    """What nodes from `end` on need, from what those from `start` on do."""
    order = list(model.graph)
    made = {value.name for node in order[start:end] for value in node.outputs}
    needed = needed_from(order, end, model.graph.outputs)
    ahead = part_of(model, start, end, [name for name in needed if name in made], states[0])
    with open_session(ahead) as session:
        computed = [session.run(state) for state in states]
    kept = [{name: state[name] for name in needed if name not in made} for state in states]
    return [{**feeds, **old, **new} for feeds, old, new in zip(samples, kept, computed, strict=True)]


def _add_switches(model: ir.Model, sources: Sequence[Source], placement: Placement, plan: Plan) -> None:
    """Quantize each source where the number fed as an input is its own."""
    graph, names = model.graph, Names(model)
    units = {unit.site: unit for unit in survey(model, placement, plan.params).units}
    rounded = {
        one.name: dequantize(*quantized_weight(units[one.name], plan, None))
        for one in sources
        if one.kind == "weight"
    }
    values = {value.name: value for value in (*graph.inputs, *(v for node in graph for v in node.outputs))}
    which = ir.Value(name=_SWITCH, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    graph.inputs.append(which)

    def constant(array: np.ndarray) -> ir.Value:
        tensor = ir.Tensor(np.asarray(array))
        value = ir.Value(name=names.fresh("constant"), const_value=tensor, type=ir.TensorType(tensor.dtype))
        value.shape = ir.Shape(tensor.shape.numpy())
        graph.register_initializer(value)
        return value

    def computed(op_type: str, *inputs: ir.Value) -> ir.Value:
        output = ir.Value(name=names.fresh(op_type))
        graph.append(ir.Node("", op_type, inputs, outputs=[output], name=output.name))
        return output

    for number, source in enumerate(sources):
        on = computed("Equal", which, constant(np.array(number, np.int64)))
        if source.kind == "weight":
            unit = units[source.name]
            assert unit.weight is not None
            weight = unit.node.inputs[unit.weight]
            assert weight is not None
            chosen = computed("Where", on, constant(rounded[source.name]), weight)
            unit.node.replace_input_with(unit.weight, chosen)
            if unit.site in plan.biases:
                corrected = plan.biases[unit.site]
                plain = unit.bias or constant(np.zeros_like(corrected))
                unit.node.resize_inputs(3)
                unit.node.replace_input_with(2, computed("Where", on, constant(corrected), plain))
            continue
        value, params = values[source.name], plan.params[source.name]
        zero = params.zero_point.astype(params.format.dtype.numpy())
        scale, zero_point = constant(params.scale), constant(zero)
        readers = [(usage.node, usage.idx) for usage in value.uses()]
        quantized = computed("QuantizeLinear", value, scale, zero_point)
        result = computed("Where", on, computed("DequantizeLinear", quantized, scale, zero_point), value)
        for node, place in readers:
            node.replace_input_with(place, result)
        if value.is_graph_output():
            result.type, name = value.type, value.name
            value.name, result.name = names.fresh(f"{name}_float"), name
            graph.outputs[:] = [result if one is value else one for one in graph.outputs]
    graph.sort()
