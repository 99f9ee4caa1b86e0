"""Patterns written as expressions: what they find, and what they refuse."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import scopes
from tests.support import text_model

GELU = "Mul(Mul(x, Add(Erf(Div(x, 1.4142135623730951)), 1)), 0.5)"


def find(pattern: str, body: str, *, inputs: str = "float[2,3] x", opset: int = 17) -> Match | None:
    """What the pattern finds at the node that gives `y`."""
    text = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>\n'
    model = ir.from_proto(text_model(f"{text} agraph ({inputs}) => (float[N,M] y) {{ {body} }}"))
    scope = next(scopes(model))
    node = model.graph.outputs[0].producer()
    assert node is not None
    return Patterns({"it": pattern}).find(node, scope)


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        ("Mul(x, Sigmoid(x))", "s = Sigmoid(x) y = Mul(s, x)"),
        ("Mul(x, Sigmoid(x))", "s = Sigmoid(x) y = Mul(x, s)"),
        ("Div(1, Sqrt(x))", "one = Constant<value = float {1}>() s = Sqrt(x) y = Div(one, s)"),
        ("Abs(x) | Neg(x)", "y = Neg(x)"),
        ("Relu(Abs(x) | Neg(x))", "a = Abs(x) y = Relu(a)"),
        ("Relu(_)", "y = Relu(x)"),
        ("Concat(a, ...)", "y = Concat<axis=0>(x, x, x)"),
        ("Clip(x, None, b)", "b = Constant<value_float=1.0>() y = Clip(x, , b)"),
        ("com_microsoft.FastGelu(x)", "y = com.microsoft.FastGelu(x)"),
        ("Elu(x, alpha=0.3)", "y = Elu<alpha=0.3>(x)"),
        ("Mul(x, 'alpha')", "a = Constant<value_float=0.3>() y = Mul(a, x)"),
        ("Neg(Split(x)[1])", "a, b = Split<axis=0>(x) y = Neg(b)"),
        ("Div((d := Sub(x, m)), Sqrt(Mul(d, d)))", "d = Sub(x, x) q = Mul(d, d) s = Sqrt(q) y = Div(d, s)"),
    ],
)
def test_a_pattern_is_found_where_it_stands(pattern: str, body: str) -> None:
    found = find(pattern, body)
    assert found is not None
    assert found.nodes[0].outputs[0].name == "y"
    if "x" in found.values:
        assert found["x"].name == "x"


@pytest.mark.parametrize(
    ("pattern", "body"),
    [
        ("Mul(x, Sigmoid(x))", "a = Abs(x) s = Sigmoid(a) y = Mul(s, x)"),
        ("Sub(x, Neg(z))", "n = Neg(x) y = Sub(n, x)"),
        ("Concat(a)", "y = Concat<axis=0>(x, x)"),
        ("Elu(x, alpha=0.3)", "y = Elu<alpha=0.31>(x)"),
        ("Elu(x, alpha=1)", "y = Elu(x)"),
        ("Mul(x, 'alpha')", "y = Mul(x, x)"),
        ("Clip(x, None, b)", "b = Constant<value_float=1.0>() y = Clip(x, b)"),
        ("FastGelu(x)", "y = com.microsoft.FastGelu(x)"),
        ("Neg(Split(x)[0])", "a, b = Split<axis=0>(x) y = Neg(b)"),
        ("Mul(x, 2)", "c = Constant<value_floats=[2.0, 2.0, 2.0]>() y = Mul(x, c)"),
        ("Mul(x, 2)", "c = Constant<value = float[1,1,1] {2}>() y = Mul(x, c)"),
        ("Mul(x, 2)", "c = Constant<value = float {2.000001}>() y = Mul(x, c)"),
        (
            "Mul(x, 2)",
            "c = Constant<value = float[1] {2}>() d = Constant<value_float = 3.0>() y = Mul(d, c)",
        ),
    ],
)
def test_what_differs_is_not_found(pattern: str, body: str) -> None:
    assert find(pattern, body) is None


@pytest.mark.parametrize(
    "product",
    [
        "h = Mul(x, half) y = Mul(h, e)",
        "h = Mul(e, half) y = Mul(x, h)",
        "h = Mul(x, e) y = Mul(half, h)",
        "h = Div(x, two) y = Mul(h, e)",
        "h = Div(e, two) y = Mul(x, h)",
        "h = Mul(x, e) y = Div(h, two)",
    ],
)
def test_a_product_of_three_is_found_in_any_order(product: str) -> None:
    constants = "half = Constant<value_float=0.5>() two = Constant<value_float=2.0>() e = Exp(x)"
    found = find("Mul(x, 0.5, Exp(x))", f"{constants} {product}")
    assert found is not None
    assert len(found.nodes) == 3
    assert find("Mul(x, 0.25, Exp(x))", f"{constants} {product}") is None
    assert find("Mul(x, 0.5, Exp(x), Abs(x))", f"{constants} {product}") is None


def test_a_sum_of_three_is_found_in_any_order() -> None:
    for body in ("s = Add(x, n) y = Add(a, s)", "s = Add(x, a) y = Add(s, n)", "s = Add(a, n) y = Add(s, x)"):
        assert find("Add(x, Neg(x), Abs(x))", f"n = Neg(x) a = Abs(x) {body}") is not None


def test_names_are_bound_and_numbers_read() -> None:
    found = find(
        "Add((p := Mul(x, scale)), shift)",
        "c = Constant<value_float=3.0>() d = Constant<value_float=4.0>() m = Mul(c, x) y = Add(d, m)",
    )
    assert found is not None
    assert (found.node("p").op_type, found.get("absent"), len(found.nodes)) == ("Mul", None, 2)
    values = {found["x"].name, found["scale"].name}
    assert values == {"c", "x"}
    with pytest.raises(Declined, match="no constant number"):
        found.number("x" if found["x"].name == "x" else "scale")


@pytest.mark.parametrize(
    ("dtype", "number"),
    [
        ("float", float(np.float32(2**0.5))),
        ("float16", int(np.float16(2**0.5).view(np.int16))),
        ("double", 2**0.5),
    ],
)
def test_a_number_is_compared_in_the_type_of_the_constant(dtype: str, number: float) -> None:
    body = f"c = Constant<value = {dtype} {{{number!r}}}>() y = Mul(x, c)"
    assert find("Mul(x, 1.4142135623730951)", body, inputs=f"{dtype}[2,3] x") is not None


def test_the_whole_of_gelu() -> None:
    body = """r = Constant<value = float {1.4142135381698608}>() one = Constant<value = float {1}>()
    half = Constant<value = float {0.5}>() d = Div(x, r) e = Erf(d)
    a = Add(one, e) m = Mul(a, x) y = Mul(half, m)"""
    found = find(GELU, body)
    assert found is not None
    assert len(found.nodes) == 5
    assert find(GELU, body, opset=6) is None


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("s = Sigmoid(x) y = Mul(s, x) z = Neg(s)", "float[N] y, float[N] z", "also read elsewhere"),
        ("s = Sigmoid(x) y = Mul(s, x)", "float[N] y, float[N] s", "also a graph output"),
    ],
)
def test_inner_values_are_nobody_elses(body: str, outputs: str, reason: str) -> None:
    model = ir.from_proto(text_model(f"agraph (float[2] x) => ({outputs}) {{ {body} }}"))
    node = model.graph.outputs[0].producer()
    assert node is not None
    with pytest.raises(Declined, match=reason):
        Patterns({"silu": "Mul(x, Sigmoid(x))"}).find(node, next(scopes(model)))


def test_an_inner_value_of_an_outer_graph_is_no_part() -> None:
    model = ir.from_proto(
        text_model("""agraph (float[2] x, bool c) => (float[2] y) {
            s = Sigmoid(x)
            y = If (c) <
              then_branch = a () => (float[2] p) { p = Mul(x, s) },
              else_branch = b () => (float[2] q) { q = Neg(x) }
            >
        }""")
    )
    branch = model.graph[1].attributes["then_branch"].as_graph()
    with pytest.raises(Declined, match="another graph"):
        Patterns({"silu": "Mul(x, Sigmoid(x))"}).find(branch[0], next(scopes(model)))


@pytest.mark.parametrize("text", ["x", "Elu(x, alpha=y)", "x | Relu(x)", "Mul(b'a')", "f(x)(y)", "a.b.C(x)"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="pattern"):
        Patterns({"it": text})


def test_the_first_pattern_in_order_wins_and_op_types_serve_a_rule() -> None:
    patterns = Patterns({"a": "Neg(Abs(x))", "b": ("Neg(x)", "com_microsoft.Gelu(x)")})
    assert patterns.op_types == ("Neg", "com.microsoft::Gelu")
    model = ir.from_proto(text_model("agraph (float[2] x) => (float[2] y) { a = Abs(x) y = Neg(a) }"))
    found = patterns.find(model.graph[1], next(scopes(model)))
    assert found is not None
    assert found.name == "a"


def test_an_attribute_is_built_from_a_number_that_was_found() -> None:
    model = ir.from_proto(
        text_model("""agraph (float[2] x) => (float[2] y) {
            a = Constant<value_float=0.25>() m = Mul(a, x) y = Max(x, m)
        }""")
    )
    scope, node = next(scopes(model)), model.graph[2]
    found = Patterns({"LeakyRelu(x, alpha=alpha)": "Max(x, Mul(x, 'alpha'))"}).find(node, scope)
    assert found is not None
    edit = Edit(node, scope)
    edit.replace(node.outputs[0], found.build(edit, found.name)).check()
    edit.commit()
    made = model.graph[0]
    assert (made.op_type, made.attributes["alpha"].as_float()) == ("LeakyRelu", 0.25)


def test_a_part_is_written_once_and_stands_in_several_places() -> None:
    parts = {
        "Gate": "Sigmoid(x) | HardSigmoid(x)",
        "Product": """Mul(x, Gate)
        | Mul(Gate, Neg(x))""",
    }
    patterns = Patterns({"it": "Add(Product, Gate)"}, parts)
    model = ir.from_proto(
        text_model("""agraph (float[2] x) => (float[2] y) {
            s = Sigmoid(x) p = Mul(s, x) h = HardSigmoid(x) y = Add(h, p)
        }""")
    )
    found = patterns.find(model.graph[3], next(scopes(model)))
    assert found is not None
    assert len(found.nodes) == 4
