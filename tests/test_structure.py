"""What makes a graph invalid, and what does not."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from onnxopt.graph import nodes
from onnxopt.model import load
from onnxopt.structure import all_problems, checker_complaint, find_problem, signature_of
from tests.support import text_model

NESTED = """agraph (bool c, float[2] x) => (float[2] y) {
    y = If(c) <
        then_branch = t () => (float[2] p) { q = Neg(x)\n p = Neg(q) },
        else_branch = e () => (float[2] r) { q = Abs(x)\n r = Neg(q) }
    >
}"""


@pytest.mark.parametrize(
    "text",
    [
        NESTED,
        """<ir_version: 8, opset_import: ["" : 9]>
        agraph (float[1,2,1] x) => (float[2] y) { y = Squeeze<axes = [2, 0]>(x) }""",
        """<ir_version: 8, opset_import: ["" : 17, "d" : 1]>
        agraph (float[2] x) => (float[2] y) { y = d.f(x) }
        <domain: "d", opset_import: ["" : 11]> f (a) => (b) { b = Clip(a) }""",
        "agraph (float[2,3] x) => (float[2,1] v) <int64[1] k = {1}> { v, i = TopK(x, k) }",
        "agraph (float[N] x) => (float[M] y) { y = Relu(x) }",
    ],
)
def test_valid_graphs_have_no_problem(text: str) -> None:
    model = load(text_model(text))
    assert find_problem(model, list(nodes(model))) is None
    assert all_problems(model) == frozenset()


def test_a_branch_does_not_see_its_sibling() -> None:
    model = load(text_model(NESTED))
    then_branch, else_branch = (attr.as_graph() for attr in model.graph[0].attributes.values())
    else_branch[1].replace_input_with(0, then_branch[0].outputs[0])
    problem = find_problem(model)
    assert problem is not None
    assert "reads 'q', which nothing before it defines" in problem


def test_an_inner_value_may_not_take_an_outer_name() -> None:
    model = load(text_model(NESTED))
    next(iter(model.graph[0].attributes.values())).as_graph()[0].outputs[0].name = "x"
    assert find_problem(model) == "two values are named 'x'"


def test_a_value_that_is_read_needs_a_name() -> None:
    model = load(text_model("agraph (float[2] x) => (float[2] y) { a = Neg(x)\n y = Neg(a) }"))
    model.graph[0].outputs[0].name = None
    problem = find_problem(model)
    assert problem is not None
    assert "has no name" in problem


def test_the_node_is_held_against_its_opset_and_type_on_record() -> None:
    text = '<ir_version: 8, opset_import: ["" : 13]> agraph (float[2] x) => (float[2] y) { y = Relu(x) }'
    model = load(text_model(text))
    node = model.graph[0]
    node.op_type = "Mish"
    assert find_problem(model, [node]) == "Mish is not in opset 13"
    node.op_type = "IsNaN"
    problem = find_problem(model, [node])
    assert problem is not None
    assert "FLOAT on record, BOOL by its operator" in problem
    assert find_problem(model, [node], lambda: {problem}) is None


def test_below_ir_version_4_initializers_are_graph_inputs() -> None:
    head = '<ir_version: 3, opset_import: ["" : 9]>'
    text = "agraph (float[2] x, float[2] w = {1, 2}) => (float[2] y) { y = Add(x, w) }"
    model = load(text_model(head + text))
    assert find_problem(model) is None
    model.graph.inputs.pop()
    problem = find_problem(model)
    assert problem is not None
    assert "as IR version 3 asks" in problem


def test_the_checker_speaks_of_the_whole_model() -> None:
    proto = text_model("agraph (float[2] x) => (float[2] y) { y = Relu(x) }")
    assert checker_complaint(load(proto)) is None
    proto.graph.node[0].attribute.append(onnx.helper.make_attribute("nonsense", 1))
    complaint = checker_complaint(load(proto))
    assert complaint is not None
    assert "nonsense" in complaint


def test_the_signature_is_names_types_and_shapes_in_order() -> None:
    model = load(text_model("agraph (float[N,3] x, int64[2] i) => (float[N,3] y) { y = Relu(x) }"))
    before = signature_of(model)
    assert [(p.name, p.shape) for p in before.inputs] == [("x", "[N,3]"), ("i", "[2]")]
    model.graph.inputs[0].shape = ir.Shape([1, 3])
    assert signature_of(model) != before
