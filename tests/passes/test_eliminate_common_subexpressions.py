"""eliminate-common-subexpressions: equal is equal, bodies see what runs around them before, chance stays."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxopt.passes.eliminate.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tests.support import assert_equivalent, run_pass, text_model

PASS = EliminateCommonSubexpressions()


def pair(first: str, second: str, *, opset: int = 17, y: str = "Add(a, b)") -> onnx.ModelProto:
    return onnx.parser.parse_model(
        f"""<ir_version: 10, opset_import: ["" : {opset}]>
        g (float[1, 2, 4, 4] x) => (float[?, ?, ?, ?] y)
        <float lo = {{0}}, float p = {{0.5}}, bool on = {{1}}> {{
            {first}
            {second}
            y = {y}
        }}"""
    )


EQUAL = [
    ("a = Relu(x)", "b = Relu(x)"),
    ("a = LeakyRelu(x)", "b = LeakyRelu<alpha = 0.01>(x)"),
    ("a = Softmax<axis = -1>(x)", "b = Softmax(x)"),
    ("a = Transpose<perm = [0, 1, 3, 2]>(x)", "b = Transpose<perm = [0, 1, 3, 2]>(x)"),
    ("a = Clip(x, lo)", "b = Clip(x, lo, )"),
    ("a = MaxPool<kernel_shape = [2, 2]>(x)", "b = MaxPool<kernel_shape = [2, 2], ceil_mode = 0>(x)"),
    ("u = Exp(x)\n a = Neg(u)", "v1 = Exp(x)\n b = Neg(v1)"),
    ("a = Constant<value = float[1] {1.5}>()", "b = Constant<value = float[1] {1.5}>()"),
    ("a = Constant<value_floats = [1.0, 2.0]>()", "b = Constant<value_floats = [1.0, 2.0]>()"),
]
DIFFERENT = [
    ("a = Relu(x)", "b = Exp(x)"),
    ("a = LeakyRelu(x)", "b = LeakyRelu<alpha = 0.02>(x)"),
    ("a = Add(x, lo)", "b = Add(x, p)"),
    ("a = Transpose<perm = [0, 1, 3, 2]>(x)", "b = Transpose<perm = [0, 1, 2, 3]>(x)"),
    ("a = Clip(x, lo)", "b = Clip(x, , lo)"),
    ("a = Sub(x, lo)", "b = Sub(lo, x)"),
    ("a = Constant<value = float[1] {0.0}>()", "b = Constant<value = float[1] {-0.0}>()"),
    ("a = Constant<value_float = 0.0>()", "b = Constant<value_float = -0.0>()"),
    ("a = Constant<value = float[1] {1.5}>()", "b = Constant<value = float {1.5}>()"),
    ("a, i = MaxPool<kernel_shape = [2, 2]>(x)", "b = MaxPool<kernel_shape = [2, 2]>(x)"),
]
RANDOM = [
    "RandomNormalLike(x)",
    "RandomNormalLike<seed = 1.0>(x)",
    "RandomUniformLike(x)",
    "Dropout(x, p, on)",
    "Bernoulli(x)",
]


@pytest.mark.parametrize(("first", "second"), EQUAL)
def test_equal_nodes_are_merged(first: str, second: str) -> None:
    proto = pair(first, second)
    result = run_pass(proto, PASS)
    assert len(result.op_types) == (len(proto.graph.node) - 1) // 2 + 1
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(("first", "second"), DIFFERENT)
def test_different_nodes_stay(first: str, second: str) -> None:
    proto = pair(first, second)
    result = run_pass(proto, PASS)
    assert result.changes == 0
    assert len(result.op_types) == len(proto.graph.node)


@pytest.mark.parametrize("node", RANDOM)
def test_chance_is_never_merged(node: str) -> None:
    assert run_pass(pair(f"a = {node}", f"b = {node}"), PASS).changes == 0


def test_unknown_operators_and_functions_are_never_merged() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1, "unknown" : 1]>
        g (float[3] x) => (float[3] y) {
            a = d.f(x)\n b = d.f(x)\n c = unknown.Op(a)\n d = unknown.Op(a)\n y = Sum(a, b, c, d) }
        <domain: "d", opset_import: ["" : 17]> f (a) => (b) { b = RandomNormalLike(a) }"""
    )
    assert run_pass(proto, PASS).changes == 0


def test_one_of_two_may_be_a_graph_output() -> None:
    for outputs in ("a", "b"):
        other = "b" if outputs == "a" else "a"
        proto = text_model(
            f"""g (float[3] x) => (float[3] {outputs}, float[3] y) {{
                a = Relu(x)\n b = Relu(x)\n y = Neg({other}) }}"""
        )
        result = run_pass(proto, PASS)
        assert result.op_types == ["Relu", "Neg"]
        assert [value.name for value in result.model.graph.outputs] == [outputs, "y"]
        assert_equivalent(proto, result.model)


def test_two_graph_outputs_are_declined() -> None:
    proto = text_model("g (float[3] x) => (float[3] a, float[3] b) { a = Relu(x)\n b = Relu(x) }")
    result = run_pass(proto, PASS)
    assert result.changes == 0
    assert result.declined == ("is a graph output of the same value as another one",)


BRANCHES = """g (float[3] x, bool c) => (float[3] y, float[3] z) {{
    {before}
    y = If(c) <
        then_branch = t () => (float[3] p) {{ r = Exp(x)\n p = Neg(r) }},
        else_branch = f () => (float[3] q) {{ s = Exp(x)\n q = Relu(s) }}>
    {after}
}}"""


@pytest.mark.parametrize(
    ("before", "after", "exps"),
    [
        ("e = Exp(x)", "z = Abs(e)", 1),
        ("", "e = Exp(x)\n z = Abs(e)", 3),
        ("u = Exp(x)\n e = Exp(x)", "z = Add(e, u)", 1),
    ],
    ids=["before", "after", "twice"],
)
def test_branches_see_what_runs_before_them(before: str, after: str, exps: int) -> None:
    proto = text_model(BRANCHES.format(before=before, after=after))
    result = run_pass(proto, PASS)
    assert result.count("Exp") == exps
    x = np.array([1, -2, 3], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_an_output_of_a_branch_is_computed_in_it() -> None:
    proto = text_model(
        """g (float[3] x, bool c) => (float[3] y, float[3] z) {
            z = Exp(x)
            y = If(c) <then_branch = t () => (float[3] p) { p = Exp(x) },
                       else_branch = f () => (float[3] q) { q = Relu(x) }>
        }"""
    )
    result = run_pass(proto, PASS)
    assert result.count("Exp") == 2
    assert result.declined == ("is a graph output whose value comes from outside the graph",)


def test_loop_values_differ_from_round_to_round() -> None:
    proto = text_model(
        """g (float[3] x) => (float[3] y) <int64 n = {3}, bool t = {1}> {
            e = Exp(x)
            y = Loop(n, t, x) <body = b (int64 i, bool c, float[3] s) => (bool d, float[3] r) {
                d = Identity(c)\n f = Exp(x)\n h = Tanh(s)\n k = Tanh(s)\n m = Add(h, k)\n r = Div(m, f) }>
        }"""
    )
    result = run_pass(proto, PASS)
    assert result.count("Exp") == 1
    assert result.count("Tanh") == 1
    assert_equivalent(proto, result.model)


def test_references_are_equal_by_name() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x) => (float[3] y) { y = d.f<one = 0.1, two = 0.2>(x) }
        <domain: "d", opset_import: ["" : 17]> f <one, two> (a) => (b) {
            p = LeakyRelu<alpha: float = @one>(a)
            q = LeakyRelu<alpha: float = @one>(a)
            r = LeakyRelu<alpha: float = @two>(a)
            b = Sum(p, q, r)
        }"""
    )
    result = run_pass(proto, PASS)
    assert result.count("LeakyRelu") == 2
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(("max_bytes", "changes"), [(400, 1), (399, 0)])
def test_large_tensors_are_not_compared(max_bytes: int, changes: int) -> None:
    array = onnx.numpy_helper.from_array(np.ones(100, np.float32))
    helper = onnx.helper
    nodes = [helper.make_node("Constant", [], [name], value=array) for name in "ab"]
    nodes.append(helper.make_node("Add", ["a", "b"], ["y"]))
    output = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [100])
    graph = helper.make_graph(nodes, "g", [], [output])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    assert run_pass(proto, EliminateCommonSubexpressions(max_bytes)).changes == changes


def test_strings_are_compared_by_content() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 19]>
        g (float[2] x) => (bool[2] y, bool[2] z) {
            a = Constant<value_strings = ["x", "y"]>()
            b = Constant<value_strings = ["x", "z"]>()
            c = Constant<value_strings = ["x", "y"]>()
            y = Equal(a, b)
            z = Equal(a, c)
        }"""
    )
    result = run_pass(proto, PASS)
    assert result.count("Constant") == 2
    assert_equivalent(proto, result.model)
