"""Which units to quantize: those that together take the least time at a given price of noise.

Each node is in floating point or in integers, each tensor is quantized or not, and costs arise where
neighbours differ: a QuantizeLinear, a DequantizeLinear. All of these are costs of two things that differ,
so that the best choice is a minimum cut of a graph (Greig, Porteous and Seheult, "Exact maximum a
posteriori estimation for binary images", 1989). A source of noise costs its noise times a price: at the
price 0 the choice is the fastest, and units move to floating point as the price rises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.graph import constant_of
from onnxopt.quantization.costs import NodeCost, Shapes, features, node_cost, shipped_costs
from onnxopt.quantization.layouts import keeps_layout
from onnxopt.quantization.mincut import Cut
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.units import LAYERS, Unit

__all__ = [
    "Choice",
    "Prices",
    "choose",
    "chosen_tensors",
    "prices_of_bytes",
    "prices_of_time",
    "prices_of_work",
]

_NEVER = 1e18
"""More than any choice costs."""
_MACS_OF_MOVE = 16
"""Multiply-accumulates in the time of one element that is read and written: 4 to 100 on what there is."""
_LATE_NS = 0.14
"""What an element of floats with channels last takes longer to transpose than one of integers (0.19 to 0.05):
the runtime moves transpositions past a DequantizeLinear and what follows it."""
_FLOATS_OUT = ("Gemm", "MatMul")
"""Layers whose integer kernels can write floats."""


@dataclass(frozen=True)
class Prices:
    """What nodes cost, and what it costs to quantize a tensor, to read it back, to change its layout.

    In any unit. late: what a change from channels last costs more for floats than for integers.
    """

    node: Callable[[ir.Node], NodeCost]
    quantize: Callable[[ir.Value], float]
    dequantize: Callable[[ir.Value], float]
    layout: Callable[[ir.Value], float] = lambda _: 0.0
    late: Callable[[ir.Value], float] = lambda _: 0.0


@dataclass(frozen=True)
class Choice:
    """Sites of units and names of tensors to quantize, and what the graph is expected to cost and to lose.

    before, after: of the whole graph, in the unit of the prices. noise: the sum over the chosen sources.
    """

    nodes: frozenset[str]
    tensors: frozenset[str]
    before: float
    after: float
    noise: float


def prices_of_time(shapes: Shapes) -> Prices:
    """Nanoseconds on the CPU, by the table that ships; `shapes` gives the sizes of a value."""
    table = shipped_costs()

    def elements(value: ir.Value) -> int:
        return math.prod(shapes(value))

    return Prices(
        lambda node: node_cost(node, shapes, table),
        lambda value: table.quantize_ns(elements(value)),
        lambda value: table.dequantize_ns(elements(value)),
        lambda value: sum(table.layout_ns(elements(value), quantized=side) for side in (False, True)),
        lambda value: _LATE_NS * elements(value),
    )


def prices_of_bytes() -> Prices:
    """Bytes of weights; activations cost nothing but the few bytes of their scales."""

    def node(one: ir.Node) -> NodeCost:
        weights = sum(t.nbytes for value in one.inputs if (t := constant_of(value)) is not None)
        return NodeCost(weights, weights / 4)

    return Prices(node, lambda _: 1.0, lambda _: 1.0)


def prices_of_work(shapes: Shapes) -> Prices:
    """Where no times are known: multiply-accumulates and the elements that are moved, a quarter in 8 bits.

    Integers thus pay for every layer, and for what lies between layers in integers.
    """

    def node(one: ir.Node) -> NodeCost:
        work = features(one, shapes, quantized=False)[1]
        work *= 1 if one.op_type in LAYERS else _MACS_OF_MOVE
        return NodeCost(work, work / 4)

    def elements(value: ir.Value) -> float:
        return math.prod(shapes(value)) * _MACS_OF_MOVE / 4

    return Prices(node, elements, elements)


def choose(
    graph: ir.Graph,
    units: Sequence[Unit],
    prices: Prices,
    noise: Mapping[Source, float],
    price_of_noise: float,
    *,
    outputs: bool = True,
    kept: Collection[str] = (),
) -> Choice:
    """The choice of the least cost; where several cost the same, the one of the fewest integers.

    Args:
        graph: the main graph; nodes in its bodies stay as they are.
        units: those that may be chosen.
        prices: of time or size.
        noise: of each source; 0 for those that are not in it. One of infinite noise is never chosen.
        price_of_noise: cost of a noise of 1.
        outputs: whether what a layer writes is quantized, too.
        kept: sites that stay in floating point.
    """

    def cost_of(source: Source) -> float:
        amount = noise.get(source, 0.0)
        return min(price_of_noise * amount, _NEVER) if math.isfinite(amount) else _NEVER

    part = {unit.node: unit for unit in units} | {
        unit.output.producer(): unit for unit in units if unit.output.producer() is not unit.node
    }
    cut, costs = Cut(), {node: prices.node(node) for node in graph}
    for node in graph:
        side = part.get(node, node)
        stays = not isinstance(side, Unit) or side.site in kept
        cut.if_second(side, costs[node].float_ns)
        cut.if_first(side, _NEVER if stays else min(costs[node].int8_ns, _NEVER))
        for value in node.inputs[:1]:
            producer = part.get(value.producer()) if value is not None else None
            if producer is not None and producer is not side:
                cut.if_parted(producer, side, costs[node].apart_ns)
    written = {unit.output: unit for unit in units}
    tensors = dict.fromkeys(value for unit in units for value in (*unit.sources, unit.output))
    for value in tensors:
        cost = cost_of(Source("tensor", value.name or ""))
        _add_tensor(cut, value, written.get(value), part, graph, prices, cost, outputs)
    for unit in units:
        for value in unit.sources:
            cut.if_parted(unit, value, math.inf)
        if unit.layer is not None:
            cut.if_parted(unit, part.get(unit.layer, unit.layer), math.inf)
        cut.if_first(unit, cost_of(Source("weight", unit.site)))
    changes = _changes_of_layout(graph, part, prices)
    for one, other, cost in changes:
        cut.if_parted(one, other, cost)
    first = cut.first_side()
    chosen = [unit for unit in units if unit in first]
    quantized = [value for value in tensors if value in first]
    return Choice(
        frozenset(unit.site for unit in chosen),
        frozenset(value.name or "" for value in quantized),
        sum(one.float_ns for one in costs.values()),
        _total(graph, part, first, costs, quantized, written, prices)
        + sum(cost for one, other, cost in changes if one in first and other not in first),
        _noise(chosen, quantized, written, first, noise),
    )


def chosen_tensors(
    units: Sequence[Unit], nodes: Collection[str], written: Collection[str], *, outputs: bool = True
) -> frozenset[str]:
    """The names of the tensors that are quantized where `nodes` become integers.

    Those are what such units read, and what they write where they have to (`outputs`: as of `choose`) or
    where it is one of `written`.
    """
    found: set[str] = set()
    for unit in units:
        if unit.site not in nodes:
            continue
        found.update(value.name or "" for value in unit.sources)
        if (outputs and unit.node.op_type not in _FLOATS_OUT) or unit.output.name in written:
            found.add(unit.output.name or "")
    return frozenset(found)


def _changes_of_layout(
    graph: ir.Graph, part: Mapping[ir.Node | None, Unit], prices: Prices
) -> list[tuple[object, object, float]]:
    """What costs how much where the first has channels last, as integer convolutions do, the second blocks.

    A tensor has a layout of its own, as operators in between keep the one that they get. What a unit writes
    may be in integers when channels move back, unless the unit itself is in floating point.
    """
    found: list[tuple[object, object, float]] = []

    def to_blocks(value: ir.Value) -> float:
        return prices.layout(value) + (0.0 if value.producer() in part else prices.late(value))

    for node in graph:
        result, side = node.outputs[0], part.get(node, node)
        sources = [v for v in node.inputs if v is not None and v.producer() is not None]
        if node.op_type == "Conv":
            around = (*sources[:1], result)
            found += [(side, ("layout", v), prices.layout(v)) for v in around]
            found += [(("layout", v), side, to_blocks(v)) for v in around]
        elif keeps_layout(node):
            found += [(("layout", v), ("layout", result), to_blocks(v)) for v in sources]
            found += [(("layout", result), ("layout", v), prices.layout(v)) for v in sources]
            if isinstance(side, Unit) and side.node is node:
                found.append((("layout", result), side, prices.late(result)))
    return found


def _add_tensor(
    cut: Cut,
    value: ir.Value,
    unit: Unit | None,
    part: Mapping[ir.Node | None, Unit],
    graph: ir.Graph,
    prices: Prices,
    cost: float,
    outputs: bool,
) -> None:
    """What it costs to quantize a tensor, its noise included, and to read back what a kernel wrote."""
    if unit is None:
        cut.if_first(value, cost + prices.quantize(value))
        return
    if unit.is_move:
        cut.if_parted(value, unit, cost + prices.quantize(value))
    else:
        cut.if_first(value, cost)
        cut.if_parted(value, unit, prices.quantize(value))
    if outputs and unit.node.op_type not in _FLOATS_OUT:
        cut.if_parted(unit, value, math.inf)
    read_back = ("read back", value)
    cut.if_parted(unit, read_back, prices.dequantize(value))
    readers = [usage.node for usage in value.uses()]
    for node in readers:
        cut.if_parted(read_back, part.get(node, node), math.inf)
    if value.is_graph_output() or any(node.graph is not graph for node in readers):
        cut.if_first(read_back, _NEVER)


def _total(
    graph: ir.Graph,
    part: Mapping[ir.Node | None, Unit],
    first: Collection[object],
    costs: Mapping[ir.Node, NodeCost],
    quantized: Sequence[ir.Value],
    written: Mapping[ir.Value, Unit],
    prices: Prices,
) -> float:
    """What the graph costs as chosen."""
    total = 0.0
    for node in graph:
        integer = part.get(node, node) in first
        total += costs[node].int8_ns if integer else costs[node].float_ns
        producer = (
            part.get(value.producer()) if node.inputs and (value := node.inputs[0]) is not None else None
        )
        if producer is not None and producer is not part.get(node) and producer in first and not integer:
            total += costs[node].apart_ns
    for value in quantized:
        total += prices.quantize(value) if written.get(value) not in first else 0.0
    for value, unit in written.items():
        plain = [n for usage in value.uses() if part.get(n := usage.node, n) not in first]
        if unit in first and (plain or value.is_graph_output()):
            total += prices.dequantize(value)
    return total


def _noise(
    chosen: Sequence[Unit],
    quantized: Sequence[ir.Value],
    written: Mapping[ir.Value, Unit],
    first: Collection[object],
    noise: Mapping[Source, float],
) -> float:
    """The noise of the chosen sources; what a chosen move writes is as exact as what it reads."""
    moved = {value for value in quantized if (unit := written.get(value)) in first and unit and unit.is_move}
    tensors = (noise.get(Source("tensor", v.name or ""), 0.0) for v in quantized if v not in moved)
    return sum(tensors) + sum(noise.get(Source("weight", unit.site), 0.0) for unit in chosen)
