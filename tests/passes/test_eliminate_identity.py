"""eliminate-identity: Identity and idle Dropout go, names and signature stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from tests.support import assert_equivalent, run_pass, text_model


def test_readers_read_the_input() -> None:
    proto = text_model("g (float[3] x) => (float[3] y) { a = Identity(x)\n b = Identity(a)\n y = Relu(b) }")
    result = run_pass(proto, EliminateIdentity())
    assert result.op_types == ["Relu"]
    assert result.changes == 2
    assert_equivalent(proto, result.model)


def test_a_graph_output_keeps_its_name_and_type() -> None:
    proto = text_model("g (float[N] x) => (float[M] y) { a = Relu(x)\n y = Identity(a) }")
    result = run_pass(proto, EliminateIdentity())
    assert result.op_types == ["Relu"]
    assert [(v.name, str(v.shape)) for v in result.model.graph.outputs] == [("y", "[M]")]
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(
    ("text", "left", "reason"),
    [
        ("g (float[3] x) => (float[3] y) { y = Identity(x) }", 1, "comes from outside the graph"),
        (
            "g (float[3] x) => (float[3] y, float[3] w) <float[3] w = {1, 2, 3}> { y = Identity(w) }",
            1,
            "comes from outside the graph",
        ),
        (
            "g (float[3] x) => (float[3] y, float[3] z) { t = Relu(x)\n y = Identity(t)\n z = Identity(t) }",
            1,
            "the same value as another",
        ),
    ],
    ids=["input", "initializer", "two outputs"],
)
def test_graph_outputs_that_need_the_node(text: str, left: int, reason: str) -> None:
    proto = text_model(text)
    result = run_pass(proto, EliminateIdentity())
    assert result.count("Identity") == left
    assert any(reason in declined for declined in result.declined)
    assert_equivalent(proto, result.model)


def test_branches_of_if() -> None:
    proto = text_model(
        """g (float[3] x, bool c) => (float[3] y) {
            n = Neg(x)
            y = If(c) <
                then_branch = t () => (float[3] p) { p = Identity(n) },
                else_branch = e () => (float[3] q) { i = Identity(n)\n r = Exp(i)\n q = Identity(r) }>
        }"""
    )
    result = run_pass(proto, EliminateIdentity())
    assert result.op_types == ["Neg", "If", "Identity", "Exp"]
    assert result.declined == ("is a graph output whose value comes from outside the graph",)
    x = np.array([1, -2, 3], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_loop_that_swaps_its_values() -> None:
    proto = text_model(
        """g (float[3] x, float[3] w) => (float[3] y) <int64 n = {3}, bool t = {1}> {
            u, v = Loop(n, t, x, w) <body = b (int64 i, bool c, float[3] p, float[3] q)
                => (bool d, float[3] r, float[3] s) { d = Identity(c)\n r = Identity(q)\n s = Identity(p) }>
            y = Sub(u, v)
        }"""
    )
    result = run_pass(proto, EliminateIdentity())
    assert result.count("Identity") == 3
    assert_equivalent(proto, result.model)


def test_sequences() -> None:
    proto = text_model(
        """g (float[4] x) => (float[2] y) <int64 two = {2}, int64 one = {1}> {
            s = SplitToSequence<axis = 0>(x, two)
            t = Identity(s)
            y = SequenceAt(t, one)
        }"""
    )
    result = run_pass(proto, EliminateIdentity())
    assert result.count("Identity") == 0
    assert_equivalent(proto, result.model)


def test_function_bodies() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x) => (float[3] y) { y = d.f(x) }
        <domain: "d", opset_import: ["" : 17]> f (a) => (b) { t = Identity(a)\n b = Relu(t) }"""
    )
    result = run_pass(proto, EliminateIdentity())
    assert result.count("Identity") == 0
    assert_equivalent(proto, result.model)


DROPOUTS = [
    (17, "t = Dropout(x)", None),
    (17, "t = Dropout(x, ratio)", None),
    (17, "t = Dropout(x, ratio, off)", None),
    (17, "t = Dropout(x, , off)", None),
    (17, "t, unread = Dropout(x)", None),
    (11, "t = Dropout<ratio = 0.9>(x)", None),
    (7, "t = Dropout<ratio = 0.9>(x)", None),
    (17, "t = Dropout(x, ratio, on)", "the Dropout trains"),
    (17, "t = Dropout(x, ratio, mode)", "whether the Dropout trains is known only when the model runs"),
    (17, "t, mask = Dropout(x)\n m = Not(mask)", "the Dropout's mask is read"),
]


@pytest.mark.parametrize(("opset", "node", "reason"), DROPOUTS)
def test_dropout(opset: int, node: str, reason: str | None) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float[100] x, bool mode) => (float[100] y)
            <float ratio = {{0.5}}, bool on = {{1}}, bool off = {{0}}> {{
            {node}
            y = Relu(t)
        }}"""
    proto = onnx.parser.parse_model(text)
    result = run_pass(proto, EliminateIdentity())
    assert result.count("Dropout") == (reason is not None)
    assert result.declined == ((reason,) if reason else ())
    if reason is None:
        assert_equivalent(proto, result.model)


@pytest.mark.parametrize(("test", "left"), [("is_test = 1", 0), ("is_test = 0", 1), ("ratio = 0.5", 1)])
def test_dropout_before_opset_7_trains_by_default(test: str, left: int) -> None:
    text = f"""<ir_version: 3, opset_import: ["" : 6]>
        g (float[4] x) => (float[4] y) {{ t = Dropout<{test}>(x)\n y = Relu(t) }}"""
    assert run_pass(onnx.parser.parse_model(text), EliminateIdentity()).count("Dropout") == left


def test_a_mode_that_can_be_overridden_is_unknown() -> None:
    proto = text_model(
        """g (float[4] x, bool off) => (float[4] y) <bool off = {0}> {
            t = Dropout(x, , off)
            y = Relu(t)
        }"""
    )
    assert run_pass(proto, EliminateIdentity()).count("Dropout") == 1
