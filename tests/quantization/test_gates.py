"""HardSigmoid and HardSwish in integers: numbers in closed form, kernels as the runtime makes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.quantization.choose import Prices, choose
from onnxopt.quantization.costs import NodeCost
from onnxopt.quantization.emit import emit
from onnxopt.quantization.formats import dequantize, find_format, quantize
from onnxopt.quantization.fusion import fusion_of
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.units import survey
from onnxopt.runtimes import open_session
from onnxopt.targets import PLACEMENTS
from tests.support import text_model

Level = Literal["none", "all"]
LOW, HIGH = -6.0, 8.0


def graph(body: str, weights: str = "") -> ir.Model:
    """A graph from x to y, and 1x1 weights for 8 channels by these names."""
    proto = text_model(
        f'<ir_version: 8, opset_import: ["": 17]> g (float[1,8,6,6] x) => (float[1,8,6,6] y) {{ {body} }}'
    )
    rng = np.random.default_rng(0)
    for name in weights.split():
        array = rng.normal(0, 0.3, (8, 8, 1, 1)).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(proto)


def emitted(
    model: ir.Model, ranges: dict[str, tuple[float, float]]
) -> tuple[ir.Model, Plan, dict[str, ir.Node]]:
    placement = PLACEMENTS["x86"]
    units = survey(model, placement, ranges).units
    params = params_of_tensors(units, ranges, placement)
    plan = Plan(frozenset(unit.site for unit in units), frozenset(params), params, find_format("int8"))
    return model, plan, emit(model, units, plan, placement)


def run(model: ir.Model, x: np.ndarray, level: Level) -> np.ndarray:
    with open_session(model, level=level) as session:
        found: np.ndarray = session.run({"x": x})["y"]
    return found


@pytest.mark.parametrize("level", ["none", "all"])
@pytest.mark.parametrize(
    ("body", "slope", "offset"),
    [
        ("y = HardSigmoid(x)", 0.2, 0.5),
        ("y = HardSigmoid<alpha=0.5, beta=-0.25>(x)", 0.5, -0.25),
        ("y = HardSigmoid<alpha=0.25, beta=0.0>(x)", 0.25, 0.0),
        ("y = HardSwish(x)", 1 / 6, 0.5),
    ],
)
def test_gates_are_within_a_step_of_the_closed_form(
    body: str, slope: float, offset: float, level: Level
) -> None:
    swish = "Swish" in body
    model, plan, _ = emitted(graph(body), {"x": (LOW, HIGH), "y": (-0.375, HIGH) if swish else (0.0, 1.0)})
    x = np.linspace(LOW, HIGH, 288, dtype=np.float32).reshape(1, 8, 6, 6)
    read = dequantize(quantize(x, plan.params["x"]), plan.params["x"]).astype(np.float64)
    gate = np.clip(slope * read + offset, 0, 1)
    expected = read * gate if swish else gate
    step = float(plan.params["y"].scale)
    error = np.abs(run(model, x, level) - expected)
    most = step / 2 + np.abs(read) / 255 / 2 if swish else step / 2  # the roundings of output and gate
    assert (error <= most + 1e-5 + np.float64(step) * (level == "all")).all()
    assert not {"HardSigmoid", "HardSwish"} & {node.op_type for node in model.graph}


@pytest.mark.parametrize(("op", "adds", "muls"), [("HardSigmoid", 1, 0), ("HardSwish", 1, 1)])
def test_gates_between_layers_are_integer_kernels(op: str, adds: int, muls: int) -> None:
    conv = "Conv<kernel_shape=[1,1]>"
    model = graph(f"a = {conv}(x, v) b = {op}(a) y = {conv}(b, w)", "v w")
    model, _, sites = emitted(model, dict.fromkeys("xaby", (LOW, HIGH)))
    fusion = fusion_of(model, sites)
    assert not fusion.unfused
    found = {name: fusion.kernels.get(name, 0) for name in ("QLinearConv", "QLinearAdd", "QLinearMul", op)}
    assert found == {"QLinearConv": 2, "QLinearAdd": adds, "QLinearMul": muls, op: 0}
    assert fusion.borders == 2


def test_a_gate_that_falls_stays_in_floating_point() -> None:
    model = graph("y = HardSigmoid<alpha=-0.2>(x)")
    assert survey(model, PLACEMENTS["x86"], {"x", "y"}).units == ()


def test_a_change_of_layout_keeps_convolutions_together() -> None:
    conv = "Conv<kernel_shape=[1,1]>"
    model = graph(f"a = {conv}(x, u) c = LeakyRelu(a) y = {conv}(c, u)", "u")
    units = survey(model, PLACEMENTS["x86"], {"x", "a", "c", "y"}).units
    times = {"a": NodeCost(10, 5), "c": NodeCost(1, 1), "y": NodeCost(5, 7)}
    prices = Prices(lambda node: times[node.outputs[0].name or ""], lambda _: 0.5, lambda _: 0.5)
    apart = choose(model.graph, units, prices, {}, 0.0).nodes
    assert "a" in apart
    assert "y" not in apart
    dear = replace(prices, layout=lambda _: 4.0)
    both = choose(model.graph, units, dear, {}, 0.0)
    assert both.nodes >= {"a", "y"}
    assert both.after == 5 + 1 + 7 + 0.5 + 0.5
