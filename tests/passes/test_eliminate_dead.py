"""eliminate-dead: what nobody reads goes, one claim each; the signature and all that is read stays."""

from __future__ import annotations

import time

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.graph import nodes, subgraphs_of
from onnxopt.ledger import Ledger, Rewrite
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from tests.support import assert_equivalent, run_pass, text_model


def test_chains_of_unused_nodes_and_their_weights() -> None:
    proto = text_model(
        """g (float[3] x, float[2] unused) => (float[3] y) <float[3] w = {1, 2, 3}, float[1] v = {1}> {
            a = Add(x, w)
            b = Exp(a)
            y = Relu(x)
            c = Mul(b, w)
        }"""
    )
    result = run_pass(proto, EliminateDead())
    assert result.op_types == ["Relu"]
    assert result.changes == 5
    assert not result.model.graph.initializers
    assert [value.name for value in result.model.graph.inputs] == ["x", "unused"]
    assert_equivalent(proto, result.model)


def test_initializers_that_are_inputs_or_outputs_stay() -> None:
    proto = text_model(
        """g (float[3] x, float[3] k) => (float[3] y, float[3] w)
            <float[3] w = {1, 2, 3}, float[3] k = {1, 1, 1}> { y = Relu(x) }"""
    )
    result = run_pass(proto, EliminateDead())
    assert result.changes == 0
    assert list(result.model.graph.initializers) == ["w", "k"]
    assert_equivalent(proto, result.model)


def test_bodies_and_what_they_capture() -> None:
    proto = text_model(
        """g (float[3] x, bool c) => (float[3] y) {
            e = Exp(x)
            s = Sin(x)
            y = If(c) <
                then_branch = t () => (float[3] p) <float[3] w = {1, 2, 3}> { d = Abs(s)\n p = Neg(e) },
                else_branch = f () => (float[3] q) { q = Relu(x) }>
        }"""
    )
    result = run_pass(proto, EliminateDead())
    assert sorted(result.op_types) == ["Exp", "If", "Neg", "Relu"]
    assert all(not body.initializers for node in nodes(result.model) for body in subgraphs_of(node))
    x = np.array([1, -2, 3], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_an_unused_if_frees_what_only_its_branches_read() -> None:
    proto = text_model(
        """g (float[3] x, bool c) => (float[3] y) <float[3] w = {1, 2, 3}> {
            e = Exp(x)
            z = If(c) <then_branch = t () => (float[3] p) { p = Add(e, w) },
                       else_branch = f () => (float[3] q) { q = Relu(x) }>
            y = Relu(x)
        }"""
    )
    result = run_pass(proto, EliminateDead())
    assert result.op_types == ["Relu"]
    assert not result.model.graph.initializers
    assert_equivalent(proto, result.model, {"x": np.ones(3, np.float32), "c": np.array(True)})


def test_readers_that_are_gone_do_not_count() -> None:
    """Other passes remove nodes; the nodes of a removed body stay on record as readers."""
    model = ir.from_proto(
        text_model(
            """g (float[3] x, bool c) => (float[3] y) {
                e = Exp(x)
                z = If(c) <then_branch = t () => (float[3] p) { p = Neg(e) },
                           else_branch = f () => (float[3] q) { q = Relu(x) }>
                y = Relu(x)
            }"""
        )
    )
    model.graph.remove(next(node for node in model.graph if node.op_type == "If"), safe=True)
    EliminateDead().apply(model, Ledger(pass_name="eliminate-dead"))
    assert [node.op_type for node in model.graph] == ["Relu"]


def outputs_of(model: ir.Model, op_type: str) -> list[str | None]:
    return next([v.name for v in node.outputs] for node in nodes(model) if node.op_type == op_type)


@pytest.mark.parametrize(
    ("node", "op_type", "left"),
    [
        ("t, mask = Dropout(x)", "Dropout", ["t"]),
        ("t, i = MaxPool<kernel_shape = [2, 2], strides = [1, 1]>(x)", "MaxPool", ["t"]),
        ("t, m, s = LayerNormalization(x, w)", "LayerNormalization", ["t"]),
        ("t, m, s = LayerNormalization(x, w)\n u = Neg(s)", "LayerNormalization", ["t", "", "s"]),
        ("t, i = TopK(x, k)", "TopK", ["t", "i"]),
        ("t, i = Split<axis = 0>(x)", "Split", ["t", "i"]),
    ],
)
def test_optional_outputs(node: str, op_type: str, left: list[str]) -> None:
    used = "u" if "u =" in node else "t"
    proto = text_model(
        f"""g (float[2, 2, 4, 4] x) => (float[?, ?, ?, ?] y)
            <float[4] w = {{1, 2, 3, 4}}, int64[1] k = {{2}}> {{
            {node}
            y = Exp({used})
        }}"""
    )
    result = run_pass(proto, EliminateDead())
    assert outputs_of(result.model, op_type) == left
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(("read", "left"), [("Y", ["Y"]), ("Yh", ["", "Yh"]), ("Yc", ["", "", "Yc"])])
def test_outputs_of_lstm(read: str, left: list[str]) -> None:
    proto = lstm(read)
    result = run_pass(proto, EliminateDead())
    assert outputs_of(result.model, "LSTM") == left
    assert_equivalent(proto, result.model)


def lstm(read: str) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    helper = onnx.helper
    arrays = {"w": rng.standard_normal((1, 8, 3)), "r": rng.standard_normal((1, 8, 2))}
    graph = helper.make_graph(
        [
            helper.make_node("LSTM", ["x", "w", "r"], ["Y", "Yh", "Yc"], hidden_size=2),
            helper.make_node("Neg", [read], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 1, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(a.astype(np.float32), n) for n, a in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize(("opset", "training"), [(17, 1), (9, None)])
def test_outputs_that_say_how_to_run_stay(opset: int, training: int | None) -> None:
    """BatchNormalization with more outputs trains: always before opset 14, by an attribute since."""
    attribute = "<training_mode = 1>" if training else ""
    outputs = "t, m, v" if opset >= 14 else "t, m, v, sm, sv"
    proto = onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[2, 3] x) => (float[2, 3] y)
        <float[3] a = {{1, 2, 3}}, float[3] b = {{1, 1, 1}}> {{
            {outputs} = BatchNormalization{attribute}(x, a, b, b, a)
            y = Relu(t)
        }}"""
    )
    result = run_pass(proto, EliminateDead())
    assert result.changes == 0


def test_functions_that_nobody_calls_and_what_only_they_call() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1, "other" : 3]>
        g (float[3] x) => (float[3] y) { y = d.used(x) }
        <domain: "d", opset_import: ["" : 17, "d" : 1]> inner (a) => (b) { b = Relu(a) }
        <domain: "d", opset_import: ["" : 17, "d" : 1]> outer (a) => (b) { b = d.inner(a) }
        <domain: "d", opset_import: ["" : 17, "d" : 1]> used (a) => (b) { u = Exp(a)\n b = Neg(a) }"""
    )
    result = run_pass(proto, EliminateDead())
    assert [key[1] for key in result.model.functions] == ["used"]
    assert result.op_types == ["used", "Neg"]
    assert result.model.opset_imports == {"": 17, "d": 1}
    assert result.model.functions["d", "used", ""].opset_imports == {"": 17}
    assert_equivalent(proto, result.model)


def test_the_main_graph_imports_what_functions_use() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1, "com.microsoft" : 1]>
        g (float[3] x) => (float[3] y) { y = d.f(x) }
        <domain: "d", opset_import: ["" : 17, "com.microsoft" : 1]>
        f (a) => (b) { b = com.microsoft.Gelu(a) }"""
    )
    result = run_pass(proto, EliminateDead())
    assert result.changes == 0
    assert_equivalent(proto, result.model)


def test_each_claim_by_itself_leaves_a_valid_model() -> None:
    text = """g (float[3] x) => (float[3] y) <float[3] w = {1, 2, 3}> {
        a = Add(x, w)\n b = Exp(a)\n y = Relu(x)\n c = Mul(b, w) }"""
    whole = Ledger(pass_name="eliminate-dead")
    EliminateDead().apply(ir.from_proto(text_model(text)), whole)
    assert [claim.site for claim in whole.granted] == ["c", "b", "a", "w"]
    for limit in range(len(whole.granted)):
        model = ir.from_proto(text_model(text))
        EliminateDead().apply(model, Ledger(limit=limit, pass_name="eliminate-dead"))
        assert_equivalent(text_model(text), model)
    model = ir.from_proto(text_model(text))
    last = Rewrite("eliminate-dead", "unused node", "c")
    EliminateDead().apply(model, Ledger(left_out=frozenset({last}), pass_name="eliminate-dead"))
    assert [node.op_type for node in model.graph] == ["Add", "Exp", "Relu", "Mul"]


def test_time_is_linear() -> None:
    def seconds(count: int) -> float:
        values = [ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([3]))]
        chain = []
        for number in range(count):
            node = ir.Node("", "Relu", [values[-1]], name=f"n{number}")
            node.outputs[0].name = f"v{number}"
            chain.append(node)
            values.append(node.outputs[0])
        graph = ir.Graph([values[0]], [values[1]], nodes=chain, opset_imports={"": 17}, name="g")
        model, started = ir.Model(graph, ir_version=10), time.process_time()
        EliminateDead().apply(model, Ledger(pass_name="eliminate-dead"))
        assert len(model.graph) == 1
        return time.process_time() - started

    seconds(200)
    assert seconds(8000) < 16 * max(seconds(1000), 0.005)
