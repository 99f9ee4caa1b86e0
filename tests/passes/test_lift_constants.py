"""lift-constants: Constant nodes become initializers of the main graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from onnxopt.ledger import Ledger
from onnxopt.passes.lift_constants import LiftConstants
from tests.support import assert_equivalent, run_pass, text_model

KINDS = [
    ("value = float[3] {1, 2, 3}", "float[3]"),
    ("value = int64 {7}", "int64"),
    ("value_float = 1.5", "float"),
    ("value_floats = [1.5, 2.5, -0.0]", "float[3]"),
    ("value_int = 7", "int64"),
    ("value_ints = [1, 2, 3]", "int64[3]"),
    ('value_string = "a"', "string"),
    ('value_strings = ["a", "bc", "d"]', "string[3]"),
]


@pytest.mark.parametrize(("attribute", "kind"), KINDS)
def test_each_kind(attribute: str, kind: str) -> None:
    proto = text_model(
        f"g (int64 i) => ({kind} y) {{ k = Constant<{attribute}>()\n u = Identity(k)\n y = Identity(u) }}"
    )
    result = run_pass(proto, LiftConstants())
    assert result.op_types == ["Identity", "Identity"]
    assert list(result.model.graph.initializers) == ["k"]
    assert_equivalent(proto, result.model)


def test_a_graph_output_is_declined() -> None:
    proto = text_model(
        "g (float[1] x) => (float y, float[1] z) { y = Constant<value_float = 1.0>()\n z = Neg(x) }"
    )
    result = run_pass(proto, LiftConstants())
    assert result.declined == ("is a graph output",)
    assert_equivalent(proto, result.model)


def test_a_sparse_constant_is_declined() -> None:
    """Files cannot bring one, since onnx_ir does not read it; a model built in memory can."""
    sparse = ir.Node("", "Constant", [], [ir.Attr("sparse_value", ir.AttributeType.SPARSE_TENSOR, None)])
    add = ir.Node("", "Neg", sparse.outputs)
    model = ir.Model(ir.Graph([], add.outputs, nodes=[sparse, add], opset_imports={"": 17}), ir_version=10)
    ledger = Ledger(pass_name="lift-constants")
    LiftConstants().apply(model, ledger)
    assert list(ledger.declined.values()) == ["is sparse"]
    assert not ledger.granted


def test_below_ir_version_4_it_is_declined() -> None:
    proto = text_model(
        """<ir_version: 3, opset_import: ["" : 8]>
        g (float[1] x) => (float[1] y) { k = Constant<value = float[1] {2}>()\n y = Add(x, k) }"""
    )
    result = run_pass(proto, LiftConstants())
    assert result.declined == ("below IR version 4 each initializer is a graph input",)
    assert_equivalent(proto, result.model)


def test_functions_keep_theirs() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x) => (float[3] y) { y = d.f(x) }
        <domain: "d", opset_import: ["" : 17]>
        f (a) => (b) { k = Constant<value_float = 2.0>()\n b = Mul(a, k) }"""
    )
    result = run_pass(proto, LiftConstants())
    assert result.declined == ("functions hold no initializers",)
    assert_equivalent(proto, result.model)


def test_bodies_give_theirs_to_the_main_graph_under_new_names() -> None:
    """Both branches use one name."""
    proto = text_model(
        """g (float[2] x, bool c) => (float[2] y) {
            y = If(c) <
                then_branch = t () => (float[2] p) {
                    k = Constant<value_floats = [1.0, 2.0]>()
                    p = Add(x, k) },
                else_branch = f () => (float[2] q) {
                    k = Constant<value_floats = [3.0, 4.0]>()
                    q = Add(x, k) }>
        }"""
    )
    result = run_pass(proto, LiftConstants())
    assert sorted(result.op_types) == ["Add", "Add", "If"]
    assert list(result.model.graph.initializers) == ["k_1", "k_2"]
    x = np.array([1, -2], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_a_constant_output_of_a_branch_is_declined() -> None:
    proto = text_model(
        """g (float[2] x, bool c) => (float y) {
            y = If(c) <then_branch = t () => (float p) { p = Constant<value_float = 1.0>() },
                       else_branch = f () => (float q) { q = Constant<value_float = 2.0>() }>
        }"""
    )
    result = run_pass(proto, LiftConstants())
    assert set(result.declined) == {"is a graph output"}
    x = np.array([1, -2], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])
