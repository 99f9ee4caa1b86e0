"""Branches of If: quantized like models, put back, proved in place; listed where no sample runs them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import onnxopt
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import nested, nodes, walk
from onnxopt.model import clone
from onnxopt.protobuf import dump
from onnxopt.quantization.branches import (
    branches_of,
    name_values_apart,
    put_back,
    samples_of,
    take_out,
)
from onnxopt.quantization.fusion import kernels_of
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.result import Result
from onnxopt.runtimes import open_session
from onnxopt.structure import checker_complaint
from tests.support import execute, sqnr, text_model

SIZE = 8
IDLE = "its branch runs on no sample of calibration, or on none that is held out"


def array(name: str, *shape: int, seed: int) -> onnx.TensorProto:
    numbers = np.random.default_rng(seed).standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return numpy_helper.from_array(numbers.astype(np.float32), name)


def layers(source: str, prefix: str, seed: int, count: int = 2) -> tuple[list[Any], list[Any], str]:
    """Nodes and weights of convolutions, each with Relu, and the name of what they give."""
    made, weights = [], []
    for number in range(count):
        weight, conv, relu = f"{prefix}w{number}", f"{prefix}c{number}", f"{prefix}r{number}"
        weights.append(array(weight, SIZE, SIZE, 3, 3, seed=seed + number))
        made.append(helper.make_node("Conv", [source, weight], [conv], pads=[1] * 4))
        made.append(helper.make_node("Relu", [conv], [relu]))
        source = relu
    return made, weights, source


def body(name: str, source: str, prefix: str, seed: int, *more: Any, count: int = 2) -> onnx.GraphProto:
    """A branch of convolutions whose last value is its output; `more` nodes stand in front."""
    made, weights, last = layers(source, prefix, seed, count)
    output = helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, SIZE, 8, 8])
    return helper.make_graph([*more, *made], name, [], [output], weights)


def choice(then: onnx.GraphProto, otherwise: onnx.GraphProto, output: str, condition: str = "b") -> Any:
    return helper.make_node("If", [condition], [output], then_branch=then, else_branch=otherwise)


def net(then: onnx.GraphProto, otherwise: onnx.GraphProto, *, convolutions: int = 1) -> onnx.ModelProto:
    """x, convolutions in the main graph, an If over what they give, a mean."""
    made, weights, last = layers("x", "m", 9, convolutions)
    made += [helper.make_node("Identity", [last], ["s"]), choice(then, otherwise, "i")]
    made.append(helper.make_node("GlobalAveragePool", ["i"], ["y"]))
    graph = helper.make_graph(
        made,
        "net",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE, 8, 8]),
            helper.make_tensor_value_info("b", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, SIZE, 1, 1])],
        weights,
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])


def two_sides(prefixes: tuple[str, str] = ("t", "e"), **options: Any) -> onnx.ModelProto:
    then, otherwise = prefixes
    return net(body("then", "s", then, 20), body("else", "s", otherwise, 40), **options)


def samples(sides: tuple[bool, ...] = (True, False), count: int = 8, seed: int = 1) -> list[Feeds]:
    rng = np.random.default_rng(seed)
    return [
        {
            "x": rng.standard_normal((1, SIZE, 8, 8)).astype(np.float32),
            "b": np.array(sides[number % len(sides)]),
        }
        for number in range(count)
    ]


def quantized(model: Any, data: list[Feeds], **options: Any) -> Result[QuantizationReport]:
    return onnxopt.quantize(
        model, data=data, **{"bench": False, "goal": "size", "metric": "mse", "max_drop": 1.0, **options}
    )


def integer_sites(result: Result[QuantizationReport]) -> set[str]:
    return {unit.site for unit in result.report.units if unit.integer}


def left_of(result: Result[QuantizationReport], reason: str) -> tuple[str, ...]:
    return result.report.left.get(reason, ())


def in_integers(graph: ir.Graph) -> int:
    """Convolutions of one graph that read integers."""
    weights = [node.inputs[1] for node in graph if node.op_type == "Conv"]
    return sum(weight is not None and weight.producer() is not None for weight in weights)


def sides_of(model: ir.Model) -> dict[str, ir.Graph]:
    node = next(node for node in model.graph if node.op_type == "If")
    return {side: node.attributes[side].as_graph() for side in ("then_branch", "else_branch")}


def least_sqnr(model: onnx.ModelProto, found: ir.Model, data: list[Feeds]) -> float:
    with open_session(found) as session:
        return min(sqnr(execute(model, feeds)[0], session.run(feeds)["y"]) for feeds in data)


def test_both_branches_run_integer_kernels_and_the_numbers_hold() -> None:
    model = two_sides()
    done = quantized(model, samples())
    assert done.report.ok, done.report.reason
    assert checker_complaint(done.graph) is None
    assert {"tc0", "tc1", "ec0", "ec1"} <= integer_sites(done)
    assert {side: in_integers(graph) for side, graph in sides_of(done.graph).items()} == {
        "then_branch": 2,
        "else_branch": 2,
    }
    assert kernels_of(done.graph)["QLinearConv"] == len([s for s in integer_sites(done) if "c" in s])
    assert least_sqnr(model, done.graph, samples(seed=2)) > 20


def test_without_an_if_nothing_differs() -> None:
    made, weights, last = layers("x", "m", 9, 3)
    graph = helper.make_graph(
        made,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, SIZE, 8, 8])],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, [1, SIZE, 8, 8])],
        weights,
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    done = quantized(model, [{"x": feeds["x"]} for feeds in samples(count=8)])
    assert {"mc0", "mc1", "mc2"} <= integer_sites(done)


@pytest.mark.parametrize("taken", [True, False])
def test_a_branch_that_no_sample_runs_stays_in_float_and_is_listed(taken: bool) -> None:
    model = two_sides()
    done = quantized(model, samples((taken,)))
    assert done.report.ok, done.report.reason
    run, idle = ("then_branch", "else_branch") if taken else ("else_branch", "then_branch")
    graphs = sides_of(done.graph)
    assert (in_integers(graphs[run]), in_integers(graphs[idle])) == (2, 0)
    sites = ("ec0", "ec1") if taken else ("tc0", "tc1")
    assert left_of(done, f"Conv: {IDLE}") == sites
    other = samples((not taken,), seed=3)
    assert least_sqnr(model, done.graph, other) > 20


def test_quantization_at_run_time_leaves_idle_branches_too() -> None:
    def side(name: str, prefix: str, seed: int) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{prefix}y", TensorProto.FLOAT, None)
        node = helper.make_node("MatMul", ["x", f"{prefix}w"], [f"{prefix}y"])
        return helper.make_graph([node], name, [], [output], [array(f"{prefix}w", 256, 256, seed=seed)])

    graph = helper.make_graph(
        [choice(side("then", "t", 1), side("else", "e", 2), "y")],
        "net",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, [64, 256]),
            helper.make_tensor_value_info("b", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
    )
    model = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 13)])
    rng = np.random.default_rng(0)
    data = [{"x": rng.standard_normal((64, 256)).astype(np.float32), "b": np.array(True)} for _ in range(8)]
    done = quantized(model, data)
    assert done.report.ok, done.report.reason
    kinds = {side: {node.op_type for node in graph} for side, graph in sides_of(done.graph).items()}
    assert kinds["else_branch"] == {"MatMul"}
    assert kinds["then_branch"] != {"MatMul"}
    assert left_of(done, f"MatMul: {IDLE}") == ("ey",)


def test_the_same_names_in_both_branches_stay_apart() -> None:
    model = two_sides(("t", "t"))
    done = quantized(model, samples())
    sites = [site for site in integer_sites(done) if site.startswith("tc")]
    assert len(sites) == 4
    assert all(in_integers(graph) == 2 for graph in sides_of(done.graph).values())
    assert least_sqnr(model, done.graph, samples(seed=2)) > 20


def nested_net() -> onnx.ModelProto:
    """An If whose then branch is a convolution and, behind it, an If of its own on another condition."""
    inner_then = body("inner_then", "tr0", "p", 60, count=1)
    inner_else = body("inner_else", "tr0", "q", 70, count=1)
    made, weights, _ = layers("s", "t", 20, 1)
    made.append(helper.make_node("ReduceMax", ["tr0"], ["top"], keepdims=0))
    made.append(helper.make_node("Less", ["top", "limit"], ["low"]))
    made.append(choice(inner_then, inner_else, "n", "low"))
    weights.append(numpy_helper.from_array(np.array(2.2, np.float32), "limit"))
    outer = helper.make_graph(
        made, "then", [], [helper.make_tensor_value_info("n", TensorProto.FLOAT, [1, SIZE, 8, 8])], weights
    )
    return net(outer, body("else", "s", "e", 40))


def test_branches_in_branches_are_quantized_alike() -> None:
    model = nested_net()
    rng = np.random.default_rng(4)
    data = [{**feeds, "x": feeds["x"] * np.float32(rng.choice([0.3, 2.0]))} for feeds in samples(count=48)]
    done = quantized(model, data)
    assert done.report.ok, done.report.reason
    assert {"tc0", "pc0", "qc0", "ec0", "ec1"} <= integer_sites(done)
    assert sum(in_integers(graph) for graph in nested(done.graph.graph)) == 5
    assert least_sqnr(model, done.graph, data[:8]) > 15


def test_a_plan_is_used_again_in_branches() -> None:
    model, data = two_sides(), samples()
    first = quantized(model, data)
    plan = first.report.plan
    assert plan is not None
    for node in plan["nodes"]:
        if node["site"] == "ec0":
            node["as"], node["output"] = "float", "float"
    again = quantized(model, data, plan=plan)
    assert integer_sites(first) - integer_sites(again) == {"ec0"}
    plan["nodes"][0]["site"] = "nobody"
    with pytest.raises(UsageError, match="there is no node 'nobody' to quantize"):
        quantized(model, data, plan=plan)


def test_what_the_user_keeps_stays_in_a_branch() -> None:
    done = quantized(two_sides(), samples(), keep=["ec1"])
    assert "ec1" not in integer_sites(done)
    assert {"tc0", "tc1", "ec0"} <= integer_sites(done)
    assert next(unit.why for unit in done.report.units if unit.site == "ec1") == "asked for"


def test_the_same_input_gives_the_same_bytes() -> None:
    made = [dump(quantized(two_sides(), samples(), metadata=False).graph) for _ in range(2)]
    assert made[0].SerializeToString() == made[1].SerializeToString()


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    same=st.booleans(),
    convolutions=st.integers(0, 2),
    direct=st.booleans(),
    side=st.sampled_from(["then_branch", "else_branch"]),
    data=st.integers(0, 1000),
)
def test_what_is_taken_out_and_put_back_computes_the_same(
    same: bool, convolutions: int, direct: bool, side: str, data: int
) -> None:
    then = body("then", "x" if direct else "s", "t", 20, count=1)
    otherwise = body("else", "s", "t" if same else "e", 40, count=1)
    proto = net(then, otherwise, convolutions=convolutions)
    model = clone(ir.from_proto(proto))
    name_values_apart(model)
    names = [value.name for node in nodes(model) for value in node.outputs]
    assert len(names) == len(set(names))
    branch = next(one for one in branches_of(model) if one.side == side)
    feeds = samples((side == "then_branch", side != "then_branch"), 4, seed=data)
    with samples_of(model, branch, feeds, feeds[1:2]) as (own, none):
        assert (len(own), len(none)) == (2, 0)
        part = take_out(model, branch, own[0])
        alone = [execute(part, one)[0] for one in own]
    whole = [execute(proto, one)[0] for one in feeds[::2]]
    means = [value.mean(axis=(2, 3), keepdims=True) for value in alone]
    np.testing.assert_allclose(means, whole, rtol=1e-4, atol=1e-6)
    back = put_back(model, branch, part)
    assert checker_complaint(back) is None
    assert [node.op_type for node in nodes(back)] == [node.op_type for node in nodes(model)]
    for one in feeds:
        np.testing.assert_array_equal(execute(back, one)[0], execute(proto, one)[0])


def test_constants_come_with_a_branch_and_keep_their_names_apart() -> None:
    model = ir.from_proto(
        text_model("""agraph (float[4] x, bool b) => (float[4] y) <float[4] w = {1, 2, 3, 4}> {
            k = Constant<value = float[4] {5, 6, 7, 8}>()
            z = Mul(x, w)
            y = If(b) <
                then_branch = t () => (p) { q = Add(z, w)
                    p = Mul(q, k) },
                else_branch = e () => (r) { r = Sub(z, k) }
            >
        }""")
    )
    branch = branches_of(model)[0]
    assert (branch.owner, branch.side, branch.reads) == ("y", "then_branch", ("z",))
    part = take_out(model, branch, {"fed": np.ones(4, np.float32)})
    assert [value.name for value in part.graph.inputs] == ["fed"]
    assert sorted(part.graph.initializers) == ["k", "w"]
    back = put_back(model, branch, part)
    assert checker_complaint(back) is None
    inner = [name for graph in nested(back.graph) for name in graph.initializers]
    assert set(inner).isdisjoint(back.graph.initializers)
    feeds = {"x": np.array([1, -2, 3, 4], np.float32), "b": np.array(True)}
    np.testing.assert_array_equal(execute(back, feeds)[0], execute(model, feeds)[0])


def test_a_branch_that_reads_a_sequence_has_no_samples() -> None:
    model = ir.from_proto(
        text_model("""agraph (float[4] x, bool b) => (float[4] y) {
            s = SequenceConstruct(x, x)
            y = If(b) <
                then_branch = t () => (p) { zero = Constant<value = int64 {0}>()
                    p = SequenceAt(s, zero) },
                else_branch = e () => (r) { r = Relu(x) }
            >
        }""")
    )
    feeds = [{"x": np.ones(4, np.float32), "b": np.array(side)} for side in (True, False)]
    counts = {}
    for branch in branches_of(model):
        with samples_of(model, branch, feeds) as (own,):
            counts[branch.side] = len(own)
    assert counts == {"then_branch": 0, "else_branch": 1}


def test_the_model_given_is_not_changed() -> None:
    model = ir.from_proto(two_sides())
    before = dump(clone(model)).SerializeToString()
    branch = branches_of(model)[0]
    part = take_out(model, branch, {"fed": np.zeros((1, SIZE, 8, 8), np.float32)})
    put_back(model, branch, part)
    assert dump(model).SerializeToString() == before
    assert all(node.graph is not None for node in walk(part.graph))
