"""inspect: MACs against closed forms, memory against hand counts, contents, and what is unused."""

from __future__ import annotations

import gc
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.bert import bert
from models.control_flow import control_flow
from models.llama import llama
from models.resnet20 import resnet20
from models.scale import big_model, chain, wide
from onnxopt.errors import UsageError
from onnxopt.inspection import inspect, macs, totals


def parse(text: str, header: str = '<ir_version: 8, opset_import: ["" : 17]>') -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{header}\n{text}")


def single(op: str, inputs: dict[str, list[int | str]], rank: int, **attrs: Any) -> onnx.ModelProto:
    """One node on float inputs; the output's dimensions are left to shape inference."""
    node = helper.make_node(op, list(inputs), ["y"], **attrs)
    ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph([node], "single", ports, [output])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def total(model: onnx.ModelProto, **shapes: list[int]) -> int | str:
    return macs(ir.from_proto(model), shapes)


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize(("stride", "pad", "dilation"), [(1, 0, 1), (2, 1, 1), (3, 2, 2)])
def test_conv_macs(group: int, stride: int, pad: int, dilation: int) -> None:
    size, kernel, c_in, c_out = 13, 3, 8, 12
    model = single(
        "Conv",
        {"x": [2, c_in, size, size], "w": [c_out, c_in // group, kernel, kernel]},
        4,
        group=group,
        strides=[stride] * 2,
        pads=[pad] * 4,
        dilations=[dilation] * 2,
    )
    out = (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
    assert total(model) == 2 * c_out * out * out * (c_in // group) * kernel * kernel


@pytest.mark.parametrize("group", [1, 2])
def test_conv_transpose_macs_are_those_of_its_gradient(group: int) -> None:
    shapes: dict[str, list[int | str]] = {"x": [1, 4, 5, 5], "w": [4, 6 // group, 3, 3]}
    model = single("ConvTranspose", shapes, 4, group=group, strides=[2, 2])
    assert total(model) == 4 * 5 * 5 * (6 // group) * 9


@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm_macs(trans_a: int, trans_b: int) -> None:
    m, k, n = 3, 5, 7
    a: list[int | str] = [k, m] if trans_a else [m, k]
    b: list[int | str] = [n, k] if trans_b else [k, n]
    assert total(single("Gemm", {"a": a, "b": b}, 2, transA=trans_a, transB=trans_b)) == m * k * n


@pytest.mark.parametrize(
    ("a", "b", "rank", "expected"),
    [
        ([2, 3, 4, 5], [5, 6], 4, 2 * 3 * 4 * 5 * 6),
        ([2, 1, 4, 5], [3, 5, 6], 4, 2 * 3 * 4 * 5 * 6),
        ([5], [5, 6], 1, 5 * 6),
        ([5], [5], 0, 5),
        (["batch", 4, 5], [5, 6], 3, "120*batch"),
        (["batch", "seq", 5], ["batch", 5, "seq"], 3, "5*batch*seq**2"),
    ],
)
def test_matmul_macs(a: list[int | str], b: list[int | str], rank: int, expected: int | str) -> None:
    assert total(single("MatMul", {"a": a, "b": b}, rank)) == expected


@pytest.mark.parametrize(("op", "gates"), [("LSTM", 4), ("GRU", 3), ("RNN", 1)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_macs(op: str, gates: int, directions: int) -> None:
    steps, batch, width, hidden = 7, 3, 5, 6
    shapes: dict[str, list[int | str]] = {
        "x": [steps, batch, width],
        "w": [directions, gates * hidden, width],
        "r": [directions, gates * hidden, hidden],
    }
    direction = "bidirectional" if directions == 2 else "forward"
    model = single(op, shapes, 4, hidden_size=hidden, direction=direction)
    assert total(model) == steps * batch * directions * gates * hidden * (width + hidden)


@pytest.mark.parametrize(
    ("equation", "a", "b", "rank", "expected"),
    [
        ("ij,jk->ik", [2, 3], [3, 4], 2, 24),
        ("bhid,bhjd->bhij", [2, 3, 4, 5], [2, 3, 6, 5], 4, 2 * 3 * 4 * 6 * 5),
        ("...ij,...jk->...ik", [7, 2, 3], [7, 3, 4], 3, 7 * 24),
        ("ij,jk", [2, 3], [3, 4], 2, 24),
        ("i,j->ij", [3], [4], 2, 12),
    ],
)
def test_einsum_macs(equation: str, a: list[int | str], b: list[int | str], rank: int, expected: int) -> None:
    assert total(single("Einsum", {"a": a, "b": b}, rank, equation=equation)) == expected


def test_attention_macs_count_past_keys() -> None:
    batch, heads, queries, past, size = 2, 3, 4, 6, 8
    cache = [batch, heads, past, size]
    shapes = {name: [batch, heads, queries, size] for name in "qkv"} | {"past_k": cache, "past_v": cache}
    ports = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in shapes.items()]
    outputs = ["y", "present_k", "present_v"]
    node = helper.make_node("Attention", ["q", "k", "v", "", "past_k", "past_v"], outputs)
    results = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph([node], "attention", ports, results)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    assert total(model) == 2 * batch * heads * queries * (past + queries) * size


@pytest.mark.parametrize("fused", ["FastGelu (a)", "BiasGelu (a, b)"])
def test_sizes_pass_through_fused_operators_of_the_runtime(fused: str) -> None:
    model = onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
        agraph (float[N, 4] x, float[4, 8] u, float[8, 2] v, float[8] b) => (float[N, 2] y) {{
            a = MatMul (x, u)
            g = com.microsoft.{fused}
            y = MatMul (g, v)
        }}"""
    )
    assert macs(ir.from_proto(model)) == "48*N"
    assert macs(ir.from_proto(model), {"x": (3, 4)}) == 144


def test_resnet20_has_its_published_cost() -> None:
    report = inspect(resnet20())
    assert report.macs == "40813184*batch"
    assert inspect(resnet20(), shapes={"image": [4, 3, 32, 32]}).macs == 4 * 40_813_184
    assert report.ops["BatchNormalization"] == 21
    convolutions = (
        16 * 27 + 6 * 16 * 144 + 32 * 144 + 5 * 32 * 288 + 64 * 288 + 5 * 64 * 576 + 16 * 32 + 32 * 64
    )
    channels = 7 * 16 + 7 * 32 + 7 * 64
    assert report.totals.parameters == convolutions + 4 * channels + 640 + 10


def test_shape_arithmetic_is_followed() -> None:
    layers, hidden, batch, sequence = 2, 64, 3, 11
    shapes = {name: [batch, sequence] for name in ("input_ids", "attention_mask", "token_type_ids")}
    report = inspect(bert(layers, hidden), shapes=shapes)
    projections, attention = batch * sequence * 12 * hidden * hidden, 2 * batch * sequence * sequence * hidden
    assert report.macs == layers * (projections + attention)
    assert report.shape_inference_failure is None


def test_a_symbol_settled_by_one_input_is_settled_in_all() -> None:
    symbolic = "128*batch*sequence*total + 46080*batch*sequence"
    assert inspect(llama()).macs == symbolic
    shapes = {
        "attention_mask": [2, 1, 3, 8],
        "past_key.0": [2, 2, 5, 16],
    }
    assert inspect(llama(), shapes=shapes).macs == 128 * 2 * 3 * 8 + 46080 * 2 * 3


def test_control_flow_multiplies_by_its_trips() -> None:
    assert inspect(control_flow()).macs == "64*rows*trips(Loop_2) + 64*rows"
    report = inspect(control_flow(), shapes={"x": [4, 8], "steps": [], "flip": []})
    branches = {cost.op: cost.macs for cost in report.costs if cost.scope == "Loop_2"}
    assert branches["If"] == 4 * 8 * 8
    assert report.subgraphs == 4
    assert report.subgraph_ops["Scan"] == 1
    assert "Scan" not in report.ops


def test_scan_multiplies_by_its_sequence() -> None:
    body = parse(
        """agraph (float[3,4] s, float[4,3] e) => (float[3,4] t, float[3,3] o)
        { o = MatMul(s, e) t = Identity(s) }"""
    )
    scan = helper.make_node("Scan", ["init", "xs"], ["last", "out"], body=body.graph, num_scan_inputs=1)
    ports = [
        helper.make_tensor_value_info("init", TensorProto.FLOAT, [3, 4]),
        helper.make_tensor_value_info("xs", TensorProto.FLOAT, ["n", 4, 3]),
    ]
    result = helper.make_tensor_value_info("out", TensorProto.FLOAT, ["n", 3, 3])
    graph = helper.make_graph([scan], "scan", ports, [result])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert total(model) == "36*n"
    assert total(model, xs=[5, 4, 3]) == 180


def test_a_loop_with_constant_trips_costs_a_number() -> None:
    model = parse(
        """agraph (float[2,2] x) => (float[2,2] y) <int64 trips = {6}, bool go = {1}> {
            y = Loop (trips, go, x) <
                body = b (int64 i, bool c, float[2,2] s) => (bool d, float[2,2] t)
                { d = Identity(c)  t = MatMul(s, x) }
            >
        }"""
    )
    assert inspect(model).macs == 6 * 8


def test_functions_are_counted_apart_and_costed_at_each_call() -> None:
    model = parse(
        """agraph (float[2,3] x, float[3,3] w) => (float[2,3] y)
        { h = local.twice(x, w)  y = local.twice(h, w) }
        <opset_import: ["" : 17], domain: "local"> twice (x, w) => (y) { h = MatMul(x, w)  y = MatMul(h, w) }
        <opset_import: ["" : 17], domain: "local"> idle (x) => (y) { y = Relu(x) }""",
        '<ir_version: 8, opset_import: ["" : 17, "local" : 1, "com.example" : 2]>',
    )
    report = inspect(model)
    assert report.ops == {"local.twice": 2}
    assert report.function_ops == {"MatMul": 2, "Relu": 1}
    assert report.macs == 4 * 2 * 3 * 3
    assert report.totals.nodes == 5
    assert report.unused.functions == ("local.idle",)
    assert report.unused.opset_imports == ("com.example",)


def test_peak_activation_is_the_largest_live_set() -> None:
    model = parse(
        """agraph (float[4] x) => (float[4] y) {
            a = Relu(x)            # x 16 + a 16
            b = Concat<axis=0>(a, a, a, a)   # a 16 + b 64
            c = Neg(b)             # b 64 + c 64
            d = ReduceSum<keepdims=1>(c)
            y = Add(a, d)
        }""".replace("            #", "#")
    )
    report = inspect(model)
    live = [cost.live_bytes for cost in report.costs]
    assert live == [32, 80, 16 + 64 + 64, 16 + 64 + 4, 16 + 4 + 16]
    assert report.peak_activation_bytes == 144
    assert report.peak_node == "c"


def test_a_subgraph_adds_to_what_is_live_around_it() -> None:
    model = parse(
        """agraph (float[8] x, bool c) => (float[8] y) {
            y = If (c) <
                then_branch = yes () => (float[8] t) { u = Neg(x)  t = Relu(u) },
                else_branch = no () => (float[8] e) { e = Identity(x) }
            >
        }"""
    )
    report = inspect(model)
    assert report.peak_activation_bytes == (32 + 1 + 32) + (32 + 32)
    assert report.subgraphs == 2


def test_unused_things() -> None:
    model = parse(
        """agraph (float[2] x, float[2] idle) => (float[2] y)
        <float[2] used = {1, 2}, float[2] stray = {3, 4}, float[2] dead_only = {5, 6}> {
            y = Add(x, used)
            d = Mul(x, dead_only)
            e = Neg(d)
        }"""
    )
    unused = inspect(model).unused
    assert unused.nodes == ("d", "e")
    assert unused.initializers == ("stray", "dead_only")
    assert unused.inputs == ("idle",)


def test_overridable_initializers_are_no_inputs() -> None:
    model = parse("agraph (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }")
    report = inspect(model)
    assert report.overridable_initializers == ("w",)
    assert [port.name for port in report.inputs] == ["x"]


def test_parameters_are_weights_not_indices_scales_or_scalars() -> None:
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["w"]),
                helper.make_node("MatMul", ["x", "w"], ["m"]),
                helper.make_node("Mul", ["m", "half"], ["s"]),
                helper.make_node(
                    "Constant", [], ["c"], value=numpy_helper.from_array(np.ones(5, np.float32))
                ),
                helper.make_node("Add", ["s", "c"], ["a"]),
                helper.make_node("Reshape", ["a", "shape"], ["y"]),
            ],
            "weights",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 5])],
            [
                numpy_helper.from_array(np.ones((3, 5), np.int8), "q"),
                numpy_helper.from_array(np.ones(5, np.float32), "scale"),
                numpy_helper.from_array(np.zeros(5, np.int8), "zero"),
                numpy_helper.from_array(np.array(0.5, np.float32), "half"),
                numpy_helper.from_array(np.array([-1, 5]), "shape"),
            ],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    report = inspect(model)
    assert report.totals.parameters == 3 * 5 + 5
    assert report.totals.bytes == 15 + 20 + 5 + 4 + 16 + 20
    assert report.totals == totals(ir.from_proto(model))
    assert report.bytes_by_dtype == {"float32": 44, "int8": 20, "int64": 16}
    assert report.quantization == {"weight-only": 1}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("q = QuantizeLinear(x, s)  y = DequantizeLinear(q, s)", {"qdq": 2}),
        (
            "q, s2, z = DynamicQuantizeLinear(x)  i = MatMulInteger(q, w, z)  y = Cast<to=1>(i)",
            {"dynamic": 2},
        ),
        ("f = Cast<to=1>(w)  y = MatMul(x, f)", {"weight-only": 1}),
        ("y = Relu(x)", {}),
    ],
)
def test_quantization_forms(nodes: str, expected: dict[str, int]) -> None:
    model = parse(
        f"""agraph (float[2,2] x) => (float[2,2] y)
        <float s = {{0.1}}, int8[2,2] w = {{1,2,3,4}}> {{ {nodes} }}"""
    )
    assert inspect(model).quantization == expected


def test_unknown_ops_are_named_not_guessed() -> None:
    model = parse(
        "agraph (float[2,3] x) => (float[2,3] y) { h = com.example.Mystery(x)  y = Relu(h) }",
        '<ir_version: 8, opset_import: ["" : 17, "com.example" : 1]>',
    )
    report = inspect(model)
    assert report.macs == 0
    assert report.uncounted_ops == {"com.example.Mystery": 1}
    assert str(report.peak_activation_bytes).endswith("?")


def test_unnamed_dimensions_get_the_names_of_their_inputs() -> None:
    model = parse("agraph (float[?,3] x, float[3,4] w) => (float[?,4] y) { y = MatMul(x, w) }")
    report = inspect(model)
    assert report.macs == "12*x[0]"
    assert report.inputs[0].shape == (None, 3)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"imag": [1, 3, 32, 32]}, "did you mean 'image'"),
        ({"image": [1, 3, 32]}, "has 4 dimensions, 3 were given"),
        ({"image": [-1, 3, 32, 32]}, "negative"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, list[int]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        inspect(resnet20(), shapes=shapes)


def test_one_symbol_with_two_sizes_is_refused() -> None:
    shapes = {"input_ids": [1, 4], "attention_mask": [2, 4]}
    with pytest.raises(UsageError, match="'batch' is 1, but input 'attention_mask' makes it 2"):
        inspect(bert(1, 16, 2), shapes=shapes)


def test_the_model_is_not_changed_and_the_report_is_json() -> None:
    model = ir.from_proto(resnet20())
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    report = inspect(model, shapes={"image": [2, 3, 32, 32]})
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before
    again = json.loads(json.dumps(report.to_dict()))
    assert again["totals"]["nodes"] == len(model.graph)
    assert sum(cost["macs"] for cost in again["costs"]) == report.macs


def test_external_data_is_measured_not_read(tmp_path: Path) -> None:
    path = big_model(tmp_path, gigabytes=0.5)
    report = inspect(path)
    layers, width = 2, 8192
    assert report.external_data == {"model.onnx.data": layers * width * width * 4}
    assert report.file_bytes == path.stat().st_size + layers * width * width * 4
    assert report.macs == f"{layers * width * width}*batch"
    assert report.totals.parameters == layers * (width * width + 2 * width)


FUNCTIONS = '<ir_version: 8, opset_import: ["" : 17, "f" : 1]>'
CALL = "agraph (float[2,3] x, float[3,3] w) => (float[2,3] y) { h = f.twice(x, w)  y = Relu(h) }"


def twice(opset: int, body: str = "h = MatMul(x, w)  y = MatMul(h, w)") -> str:
    return f'<opset_import: ["" : {opset}, "f" : 1], domain: "f"> twice (x, w) => (y) {{ {body} }}'


@pytest.mark.parametrize(
    ("opset", "macs", "uncounted"), [(17, 36, {}), (16, 36, {}), (12, "?", {"f.twice": 1})]
)
def test_a_function_of_another_opset_counts_where_its_operators_mean_the_same(
    opset: int, macs: int | str, uncounted: dict[str, int]
) -> None:
    report = inspect(parse(CALL + twice(opset), FUNCTIONS))
    assert report.macs == macs == total(parse(CALL + twice(opset), FUNCTIONS))
    assert report.uncounted_ops == uncounted
    assert report.function_ops == {"MatMul": 2}
    assert report.shape_inference_failure is None


@pytest.mark.parametrize(("opset", "macs"), [(16, 36), (12, "?")])
def test_a_function_that_calls_one_of_another_opset(opset: int, macs: int | str) -> None:
    outer = '<opset_import: ["" : 17, "f" : 1], domain: "f"> outer (x, w) => (y) { y = f.twice(x, w) }'
    model = parse(CALL.replace("f.twice", "f.outer") + outer + twice(opset), FUNCTIONS)
    assert inspect(model).macs == macs


@pytest.mark.parametrize("opset", [11, 17])
def test_functions_with_subgraphs(opset: int) -> None:
    body = """y = If (c) <then_branch = t () => (o) { o = MatMul(x, w) },
                        else_branch = e () => (o) { o = Neg(x) }>"""
    function = f'<opset_import: ["" : {opset}], domain: "f"> choose (x, w, c) => (y) {{ {body} }}'
    graph = """agraph (float[2,3] x, float[3,3] w, bool c) => (float[2,3] y)
        { h = f.choose(x, w, c)  y = f.choose(h, w, c) }"""
    assert total(parse(graph + function, FUNCTIONS)) == (36 if opset == 17 else "?")


def test_a_function_that_stays_costs_nothing_where_its_operators_do_not() -> None:
    report = inspect(parse(CALL + twice(12, "y = Mul(x, x)"), FUNCTIONS))
    assert report.macs == 0
    assert report.uncounted_ops == {"f.twice": 1}


def test_unused_functions_of_any_domain_and_opset() -> None:
    idle = '<opset_import: ["" : 9, "q" : 3], domain: "g"> idle (x) => (y) { y = q.Mystery(x) }'
    model = parse("agraph (float[2,3] x, float[3,4] w) => (float[2,4] y) { y = MatMul(x, w) }" + idle)
    report = inspect(model)
    assert report.macs == 24
    assert report.uncounted_ops == {}
    assert report.unused.functions == ("g.idle",)


def test_a_function_that_hands_its_inputs_through() -> None:
    through = '<opset_import: ["" : 17], domain: "f"> through (x, w) => (x, w) { z = MatMul(x, w) }'
    graph = (
        "agraph (float[N,3] x, float[3,3] w) => (float[N,3] y) { a, b = f.through(x, w)  y = MatMul(a, b) }"
    )
    assert total(parse(graph + through, FUNCTIONS), x=[4, 3]) == 2 * 4 * 9


def test_a_function_called_for_some_of_its_outputs_with_some_of_its_inputs() -> None:
    function = """<opset_import: ["" : 17], domain: "f"> twice (x, w, low, high) => (y, z)
        { z = MatMul(x, w)  c = Clip(z, low, high)  y = MatMul(c, w) }"""
    assert total(parse(CALL + function, FUNCTIONS)) == 36


@pytest.mark.parametrize(
    ("body", "reason"),
    [("y = f.twice(x, w)", "must not be recursive"), ("y = f.once(x, w, w)", "cannot exceed")],
)
def test_what_cannot_be_inlined_is_reported(body: str, reason: str) -> None:
    once = '<opset_import: ["" : 17], domain: "f"> once (x) => (y) { y = Neg(x) }'
    report = inspect(parse(CALL + twice(17, body) + once, FUNCTIONS))
    assert report.macs == "?"
    assert report.uncounted_ops == {"f.twice": 1}
    assert reason in (report.shape_inference_failure or "")


@pytest.mark.parametrize(
    ("graph", "macs", "peak"),
    [
        ("(float[2,3] x) => (float[2,3] x) { }", 0, 0),
        ("(float[0,3] x, float[3,4] w) => (float[0,4] y) { y = MatMul(x, w) }", 0, 48),
        (
            """(float[2,3] x, float[3,3] w, int64 i) => (float[2,3] y)
            { s = SequenceConstruct(x, x)  a = SequenceAt(s, i)  y = MatMul(a, w) }""",
            18,
            36 + 24 + 24,
        ),
        (
            """(optional(float[2,3]) o, float[3,3] w) => (float[2,3] y)
            { a = OptionalGetElement(o)  y = MatMul(a, w) }""",
            18,
            36 + 24 + 24,
        ),
        ("(optional(seq(float[2,3])) o) => (bool y) { y = OptionalHasElement(o) }", 0, "1 + ?"),
        ("(string[2] x) => (string[2] y) { y = Identity(x) }", 0, "?"),
        ("(float[2,3] x, float[4,3] w) => (float[2,5] y) { h = MatMul(x, w)  y = Relu(h) }", "?", "72 + ?"),
    ],
)
def test_odd_graphs(graph: str, macs: int | str, peak: int | str) -> None:
    report = inspect(parse(f"agraph {graph}"))
    assert report.macs == macs == total(parse(f"agraph {graph}"))
    assert report.peak_activation_bytes == peak


def test_values_without_types_and_outputs_without_names() -> None:
    nodes = [helper.make_node("Dropout", ["x"], ["d", ""]), helper.make_node("MatMul", ["d", "w"], ["y"])]
    weight = helper.make_tensor_value_info("w", TensorProto.FLOAT, [3, 4])
    known = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])
    unknown = onnx.ValueInfoProto(name="x")
    for port, expected in ((known, "12*n"), (unknown, "?")):
        graph = helper.make_graph(nodes, "g", [port, weight], [onnx.ValueInfoProto(name="y")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        assert inspect(model).macs == expected == total(model)


def test_failed_inference_is_reported() -> None:
    report = inspect(parse("agraph (float[2,3] x) => (float[2,3] y) { y = Reshape(x) }"))
    assert "Input 1 is out of bounds" in (report.shape_inference_failure or "")


def test_stale_records_are_inferred_anew_for_given_shapes() -> None:
    graph = "(float[2,3] x, float[3,3] w) => (float[2,3] y) <float[7,3] h> { h = MatMul(x, w) y = Relu(h) }"
    assert total(parse(f"agraph {graph}"), x=[2, 3]) == 18


def test_external_data_in_a_folder_of_its_own(tmp_path: Path) -> None:
    model = parse("agraph (float[n,64] x) => (float[n,64] y) { y = MatMul(x, w) }")
    model.graph.initializer.append(numpy_helper.from_array(np.ones((64, 64), np.float32), "w"))
    (tmp_path / "weights").mkdir()
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="weights/w.bin", size_threshold=0)
    report = inspect(path)
    assert report.external_data == {str(Path("weights", "w.bin")): 64 * 64 * 4}
    assert report.file_bytes == path.stat().st_size + 64 * 64 * 4
    assert report.macs == "4096*n"


@pytest.mark.parametrize("build", [chain, wide])
@pytest.mark.parametrize("measure", [macs, inspect])
def test_costs_take_time_linear_in_the_nodes(
    build: Callable[[int], onnx.ModelProto], measure: Callable[[ir.Model], object]
) -> None:
    def seconds(nodes: int) -> float:
        model = ir.from_proto(build(nodes))
        times = []
        for _ in range(5):
            gc.collect()
            start = time.process_time()
            measure(model)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(4000) < 10 * seconds(1000)  # 16 times would be quadratic


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shapes", "expected"),
    [
        ("ppocr_cls", {"x": [1, 3, 48, 192]}, 16_315_376),
        ("basic_pitch", {"serving_default_input_2:0": [1, 43844, 1]}, 524_079_648),
        ("dnsmos_p808", {"input_1": [1, 900, 120]}, 435_326_016),
    ],
)
def test_real_models(name: str, shapes: dict[str, list[int]], expected: int, tmp_path: Path) -> None:
    from models.zoo import fetch

    report = inspect(fetch(name, tmp_path), shapes=shapes)
    assert report.macs == expected
    assert isinstance(report.peak_activation_bytes, int)
    assert math.isclose(report.totals.bytes, report.file_bytes or 0, rel_tol=0.5)
