"""inline-functions: bodies in the place of calls, with names that clash with nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from onnxopt.passes.inline_functions import InlineFunctions
from tests.support import Feeds, Rewritten, assert_equivalent, execute, random_feeds, run_pass, text_model

HEAD = '<ir_version: 10, opset_import: ["" : 17, "d" : 1]>\n'
OWN = '<domain: "d", opset_import: ["" : 17, "d" : 1]> '


def inlined(text: str) -> tuple[onnx.ModelProto, Rewritten]:
    """A model before and after the pass; that no value has the name of one around it is checked there."""
    return text_model(HEAD + text), run_pass(HEAD + text, InlineFunctions())


def assert_as_specified(before: onnx.ModelProto, after: ir.Model, feeds: Sequence[Feeds]) -> None:
    """Where the runtime does not take the function, ONNX's own evaluator runs the original."""
    for sample in feeds:
        expected = ReferenceEvaluator(before).run(None, dict(sample))
        for want, have in zip(expected, execute(after, sample), strict=True):
            np.testing.assert_allclose(have, want, rtol=1e-6)


def test_two_calls_and_names_that_clash() -> None:
    proto, result = inlined(
        """g (float[3] t, float[3] t_2) => (float[3] y) { u = d.f(t, t_2)\n y = d.f(u, t) }
        """
        + OWN
        + "f (a, t) => (b) { u = Mul(a, t)\n b = Relu(u) }"
    )
    assert result.op_types == ["Mul", "Relu", "Mul", "Relu"]
    assert not result.model.functions
    assert result.model.graph.outputs[0].name == "y"
    assert_equivalent(proto, result.model)


def test_attributes_defaults_and_absent_ones() -> None:
    proto, result = inlined(
        """g (float[3] x) => (float[3] y) {
            u = d.f<alpha = 0.3>(x)\n v = d.f<alpha = 0.1, axis = 0>(u)\n y = Neg(v) }
        """
        + OWN
        + """f <alpha, axis: int = -1> (a) => (b) {
            s = LeakyRelu<alpha: float = @alpha>(a)
            b = Softmax<axis: int = @axis>(s) }"""
    )
    assert result.count("f") == 0
    assert_equivalent(proto, result.model)


def test_functions_that_call_functions() -> None:
    proto, result = inlined(
        "g (float[3] x) => (float[3] y) { y = d.outer<k = 0.5>(x) }\n"
        + OWN
        + "outer <k> (a) => (b) { t = d.inner<k: float = @k>(a)\n b = d.inner<k = 0.25>(t) }\n"
        + OWN
        + "inner <k> (a) => (b) { t = LeakyRelu<alpha: float = @k>(a)\n b = Neg(t) }"
    )
    assert result.changes == 2
    assert result.op_types == ["LeakyRelu", "Neg"] * 2
    assert_equivalent(proto, result.model)


def test_calls_in_bodies_and_bodies_in_functions() -> None:
    proto, result = inlined(
        """g (float[3] x, bool c) => (float[3] y) {
            t = d.f(x, c)
            y = If(c) <then_branch = p () => (float[3] u) { u = d.f(t, c) },
                       else_branch = q () => (float[3] v) { t_2 = Neg(t)\n v = Abs(t_2) }>
        }
        """
        + OWN
        + """f (a, c) => (b) {
            t = Neg(a)
            b = If(c) <then_branch = p () => (float[3] u) { w = Exp(t)\n u = Add(w, a) },
                       else_branch = q () => (float[3] v) { v = Sin(t) }>
        }"""
    )
    assert result.count("f") == 0
    x = np.array([1, -2, 3], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_initializers_in_the_branches_of_a_function() -> None:
    proto, result = inlined(
        """g (float[2] x, bool c) => (float[2] y) <float[2] w = {5, 6}> {
            t = d.f(x, c)\n u = d.f(t, c)\n y = Add(u, w) }
        """
        + OWN
        + """f (a, c) => (b) {
            b = If(c) <then_branch = p () => (float[2] u) <float[2] w = {1, 2}> { u = Add(w, a) },
                       else_branch = q () => (float[2] v) <float[2] w = {3, 4}> { v = Mul(w, a) }>
        }"""
    )
    x = np.array([1, -2], np.float32)
    assert_as_specified(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_absent_inputs_and_unread_outputs() -> None:
    _, result = inlined(
        """g (float[3] x) => (float[3] y, float[3] z) <float one = {1}> {
            y = d.f(x, , one)
            , z = d.f(x, one)
        }
        """
        + OWN
        + "f (a, lo, hi) => (b, c) { b = Clip(a, lo, hi)\n c = Neg(b) }"
    )
    assert result.op_types == ["Clip", "Neg"] * 2
    x = np.array([-2, 0.5, 3], np.float32)
    y, z = execute(result.model, {"x": x})
    np.testing.assert_array_equal(y, np.minimum(x, 1))
    np.testing.assert_array_equal(z, -np.maximum(x, 1))


@pytest.mark.parametrize(
    "body", ["p = Neg(a)\n q = Identity(b)", "u = Neg(a)\n p = Identity(u)\n q = Identity(u)"]
)
def test_graph_outputs(body: str) -> None:
    proto, result = inlined(
        "g (float[3] x) => (float[3] y, float[3] z) { y, z = d.f(x, x) }\n"
        + OWN
        + f"f (a, b) => (p, q) {{ {body} }}"
    )
    assert [value.name for value in result.model.graph.outputs] == ["y", "z"]
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(
    ("head", "body"), [("f (a, b) => (p, b)", "p = Neg(a)"), ("f (a, b) => (p, p)", "p = Add(a, b)")]
)
def test_outputs_that_are_inputs_or_repeat(head: str, body: str) -> None:
    """Renaming what stands behind such an output would rename the graph's input, or one value twice."""
    proto, result = inlined(
        """g (float[3] x, float[3] w) => (float[3] y, float[3] z, float[3] v) {
            y, z = d.f(x, w)\n v = Neg(w) }
        """
        + OWN
        + f"{head} {{ {body} }}"
    )
    assert [value.name for value in result.model.graph.inputs] == ["x", "w"]
    assert [value.name for value in result.model.graph.outputs] == ["y", "z", "v"]
    assert_as_specified(proto, result.model, [random_feeds(proto)])


def test_imports_come_along() -> None:
    proto, result = inlined(
        """g (float[3] x) => (float[3] y) { y = d.f(x) }
        <domain: "d", opset_import: ["" : 17, "com.microsoft" : 1]>
        f (a) => (b) { b = com.microsoft.Gelu(a) }"""
    )
    assert result.model.opset_imports["com.microsoft"] == 1
    assert_equivalent(proto, result.model)


def test_another_opset_version_is_declined_with_all_that_is_called_there() -> None:
    _, result = inlined(
        """g (float[2, 3] x) => (float[2, 3] y) { t = d.old(x)\n y = d.inner(t) }
        <domain: "d", opset_import: ["" : 11, "d" : 1]> old (a) => (b) { t = Softmax(a)\n b = d.inner(t) }
        """
        + OWN
        + "inner (a) => (b) { b = Neg(a) }"
    )
    assert result.changes == 0
    assert result.declined == (
        "the function imports another opset version than the model",
        "the function is called by one that stays",
    )


def test_functions_that_nobody_calls_are_left_to_others() -> None:
    _, result = inlined(
        "g (float[3] x) => (float[3] y) { y = Neg(x) }\n" + OWN + "f (a) => (b) { b = Neg(a) }"
    )
    assert (result.changes, result.declined, len(result.model.functions)) == (0, (), 1)


def test_too_many_inputs_are_declined() -> None:
    proto = text_model(
        HEAD + "g (float[3] x) => (float[3] y) { y = d.f(x, x) }\n" + OWN + "f (a) => (b) { b = Neg(a) }"
    )
    result = run_pass(proto, InlineFunctions())
    assert result.declined == ("the function is called with more inputs or outputs than it has",)


def test_a_function_that_calls_itself_is_declined() -> None:
    proto = text_model(
        HEAD + "g (float[3] x) => (float[3] y) { y = d.f(x) }\n" + OWN + "f (a) => (b) { b = d.f(a) }"
    )
    result = run_pass(proto, InlineFunctions())
    assert result.declined == ("calls itself",)
    assert [node.op_type for node in result.model.graph] == ["f"]


def test_sequence_values_pass_through() -> None:
    proto, result = inlined(
        """g (float[4] x) => (float[2] y) <int64 two = {2}, int64 one = {1}> {
            s = SplitToSequence<axis = 0>(x, two)
            t, u = d.f(s)
            y = SequenceAt(u, one)
        }
        """
        + OWN
        + "f (a) => (b, a) { b = SequenceLength(a) }"
    )
    assert result.op_types == ["SplitToSequence", "SequenceLength", "SequenceAt"]
    assert_as_specified(proto, result.model, [random_feeds(proto)])
