"""The choice of units against all subsets, with costs written down a second time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.quantization.choose import Choice, Prices, choose, chosen_tensors, prices_of_bytes
from onnxopt.quantization.costs import NodeCost, keeps_layout
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.units import Unit, survey
from onnxopt.targets import PLACEMENTS
from tests.support import text_model

X86 = PLACEMENTS["x86"]
LINES = {
    "Conv": "Conv({0}, w)",
    "Relu": "Relu({0})",
    "Add": "Add({0}, {1})",
    "MaxPool": "MaxPool <kernel_shape = [1, 1]> ({0})",
    "MatMul": "MatMul({0}, m)",
    "Sub": "Sub({0}, {1})",
    "Sigmoid": "Sigmoid({0})",
}
PRICES = st.integers(0, 9).map(float)


def model_of(lines: list[str], outputs: list[str]) -> ir.Model:
    weights = ", ".join("1" for _ in range(4))
    text = f"""agraph (float[1,2,2,2] x) => ({", ".join(f"float[1,2,2,2] {one}" for one in outputs)})
        <float[2,2,1,1] w = {{{weights}}}, float[2,2] m = {{{weights}}}> {{ {" ".join(lines)} }}"""
    return ir.from_proto(text_model(text))


@st.composite
def graphs(draw: st.DrawFn) -> ir.Model:
    """Up to six nodes, each reading what came before; what nobody reads is an output, and perhaps more."""
    values, lines, read = ["x"], [], set()
    for number in range(draw(st.integers(1, 6))):
        op_type = draw(st.sampled_from(sorted(LINES)))
        operands = [draw(st.sampled_from(values)) for _ in range(2)]
        used = operands if "{1}" in LINES[op_type] else operands[:1]
        read |= set(used)
        lines.append(f"v{number} = {LINES[op_type].format(*operands)}")
        values.append(f"v{number}")
    ends = [one for one in values[1:] if one not in read or draw(st.integers(0, 4)) == 0]
    return model_of(lines, ends)


@st.composite
def problems(draw: st.DrawFn) -> tuple[ir.Model, list[Unit], Prices, dict[Source, float]]:
    model = draw(graphs())
    names = ["x", *(node.outputs[0].name or "" for node in model.graph)]
    units = list(survey(model, X86, names).units)
    costs = {
        node: NodeCost(draw(PRICES), draw(st.one_of(PRICES, st.just(float("inf")))), draw(PRICES))
        for node in model.graph
    }
    borders = {name: [draw(PRICES) for _ in range(4)] for name in names}
    prices = Prices(
        lambda node: costs[node],
        lambda value: borders[value.name or ""][0],
        lambda value: borders[value.name or ""][1],
        lambda value: borders[value.name or ""][2],
        lambda value: borders[value.name or ""][3],
    )
    sources = [Source("tensor", name) for name in names] + [Source("weight", unit.site) for unit in units]
    return model, units, prices, {source: draw(PRICES) / 4 for source in sources}


def is_conv(node: ir.Node) -> bool:
    return node.op_type == "Conv"


def layouts(model: ir.Model, units: list[Unit], inside: set[ir.Node | None], prices: Prices) -> float:
    """The least that changes of layout cost, over all layouts of all tensors."""
    written = {unit.node for unit in units} | {unit.output.producer() for unit in units}
    meant = {unit.node for unit in units}
    results = [node.outputs[0] for node in model.graph]
    least = float("inf")
    for layout in itertools.product((False, True), repeat=len(results)):
        last = dict(zip(results, layout, strict=True))  # whether channels are last
        cost = 0.0
        for node in model.graph:
            computed = [value for value in node.inputs if value in last]
            for value in computed:
                after = last[node.outputs[0]] if keeps_layout(node) else node in inside
                if value is None or last[value] == after or not (keeps_layout(node) or is_conv(node)):
                    continue
                cost += prices.layout(value)
                if last[value] and value.producer() not in written:
                    cost += prices.late(value)
            if is_conv(node) and last[node.outputs[0]] != (node in inside):
                cost += prices.layout(node.outputs[0])
            if keeps_layout(node) and node in meant - inside and last[node.outputs[0]]:
                cost += prices.late(node.outputs[0])
        least = min(least, cost)
    return least


def reckoned(
    model: ir.Model,
    units: list[Unit],
    prices: Prices,
    noise: Mapping[Source, float],
    chosen: frozenset[str],
    outputs: bool,
) -> tuple[float, float]:
    """Cost and noise of a choice: node by node, tensor by tensor."""
    ints = [unit for unit in units if unit.site in chosen]
    inside: set[ir.Node | None] = {node for unit in ints for node in (unit.node, unit.output.producer())}
    quantized = {value for unit in ints for value in unit.sources}
    if outputs:
        quantized |= {unit.output for unit in ints if unit.node.op_type != "MatMul"}
    written = {unit.output: unit for unit in ints}
    total = 0.0
    for node in model.graph:
        cost = prices.node(node)
        total += cost.int8_ns if node in inside else cost.float_ns
        source = node.inputs[0]
        assert source is not None
        if node not in inside and source.producer() in inside:
            total += cost.apart_ns
    total += sum(prices.quantize(value) for value in quantized if value not in written)
    for value in written:
        if value.is_graph_output() or any(node not in inside for node, _ in value.uses()):
            total += prices.dequantize(value)
    total += layouts(model, units, inside, prices)
    moved = {value for value, unit in written.items() if unit.is_move}
    lost = sum(noise[Source("tensor", value.name or "")] for value in quantized - moved)
    return total, lost + sum(noise[Source("weight", unit.site)] for unit in ints)


@given(problems(), st.sampled_from([0.0, 0.5, 3.0, 1e6]), st.booleans(), st.integers(0, 127))
@settings(derandomize=True, deadline=None, max_examples=150)
def test_the_choice_costs_least_of_all_subsets(
    problem: tuple[ir.Model, list[Unit], Prices, dict[Source, float]], price: float, outputs: bool, mask: int
) -> None:
    model, units, prices, noise = problem
    kept = [unit.site for number, unit in enumerate(units) if mask >> number & 1]
    found = choose(model.graph, units, prices, noise, price, outputs=outputs, kept=kept)
    assert found.nodes.isdisjoint(kept)
    free = [unit.site for unit in units if unit.site not in kept]
    every = [frozenset(some) for r in range(len(free) + 1) for some in itertools.combinations(free, r)]
    costs = {one: reckoned(model, units, prices, noise, one, outputs) for one in every}
    least = min(cost + price * lost for cost, lost in costs.values())
    after, lost = costs[found.nodes]
    assert (found.after, found.noise) == pytest.approx((after, lost))
    assert after + price * lost == pytest.approx(least)
    assert found.before == pytest.approx(costs[frozenset()][0])
    assert found.tensors == chosen_tensors(units, found.nodes, (), outputs=outputs)


@given(problems())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_noise_falls_and_cost_rises_with_the_price_of_noise(
    problem: tuple[ir.Model, list[Unit], Prices, dict[Source, float]],
) -> None:
    model, units, prices, noise = problem
    found = [choose(model.graph, units, prices, noise, price) for price in (0, 0.1, 0.5, 1, 2, 4, 16, 1e3)]
    for dearer, cheaper in itertools.pairwise(found[::-1]):
        assert dearer.noise <= cheaper.noise + 1e-9
        assert dearer.after >= cheaper.after - 1e-9
    assert found[0].after <= found[0].before


def simple() -> tuple[ir.Model, list[Unit], Prices]:
    model = model_of(["a = Conv(x, w)", "b = Relu(a)", "c = Conv(b, w)"], ["c"])
    units = list(survey(model, X86, ["x", "a", "b", "c"]).units)
    return model, units, Prices(lambda _: NodeCost(10, 1), lambda _: 1.0, lambda _: 1.0, lambda _: 0.0)


def chosen(found: Choice) -> list[str]:
    return sorted(found.nodes)


def test_a_source_that_breaks_the_outputs_is_never_chosen_at_whatever_price() -> None:
    model, units, prices = simple()
    assert chosen(choose(model.graph, units, prices, {}, 0.0)) == ["a", "c"]
    for price in (0.0, 1.0):
        broken = {Source("weight", "c"): np.inf}
        found = choose(model.graph, units, prices, broken, price)
        assert chosen(found) == ["a"]
        assert np.isfinite(found.noise)
    assert chosen(choose(model.graph, units, prices, {Source("tensor", "b"): np.inf}, 0.0)) == []


def test_relu_behind_a_layer_goes_with_it() -> None:
    model, units, _ = simple()
    costs = {"Conv": NodeCost(10, 1), "Relu": NodeCost(0, 1000)}
    prices = Prices(lambda node: costs[node.op_type], lambda _: 1.0, lambda _: 1.0, lambda _: 0.0)
    found = choose(model.graph, units, prices, {}, 0.0)
    assert chosen(found) == ["c"]
    assert found.tensors == {"b", "c"}


def test_a_body_that_reads_an_integer_tensor_has_it_read_back() -> None:
    text = """agraph (float[1,2,2,2] x, bool on) => (float[1,2,2,2] y) <float[2,2,1,1] w = {1, 2, 3, 4}> {
        a = Conv(x, w)
        y = If (on) <then_branch = t () => (float[1,2,2,2] p) { p = Neg(a) },
                     else_branch = e () => (float[1,2,2,2] q) { q = Abs(a) }>
    }"""
    model = ir.from_proto(text_model(text))
    units = list(survey(model, X86, ["x", "a"]).units)
    for dequantize, integer in ((5.0, True), (9.0, False)):
        prices = Prices(
            lambda node: NodeCost(10 if node.op_type == "Conv" else 0, 1),
            lambda _: 1.0,
            lambda _, cost=dequantize: cost,  # type: ignore[misc]  # a default in a lambda
            lambda _: 0.0,
        )
        found = choose(model.graph, units, prices, {}, 0.0)
        assert bool(found.nodes) == integer
        assert found.after == (1 + 1 + dequantize if integer else 10)


def test_bytes_are_those_of_weights_and_a_quarter_of_them_as_integers() -> None:
    model, units, _ = simple()
    found = choose(model.graph, units, prices_of_bytes(), {}, 0.0)
    assert found.before == 2 * 2 * 2 * 4
    assert chosen(found) == ["a", "c"]
    assert found.after == 2 * 4 + 2  # x is quantized, and c read back


@pytest.mark.parametrize(("late", "expected"), [(0.0, 1.0), (0.5, 1.5), (3.0, 2.0)])
def test_floats_with_channels_last_cost_more_to_move_than_integers(late: float, expected: float) -> None:
    lines = ["a = Conv(x, w)", "b = Tanh(a)", "c = Conv(b, w)", "d = Conv(b, w)"]
    model = model_of(lines, ["c", "d"])
    units = list(survey(model, X86, ["x", "a", "b", "c", "d"]).units)
    prices = Prices(
        lambda node: NodeCost(0, math.inf) if node.op_type == "Tanh" else NodeCost(100, 10),
        lambda _: 0.0,
        lambda _: 0.0,
        lambda _: 1.0,
        lambda _: late,
    )
    found = choose(model.graph, units, prices, {}, 0.0, kept=["d"])
    assert chosen(found) == ["a", "c"]
    assert found.after == pytest.approx(100 + 2 * 10 + expected)
