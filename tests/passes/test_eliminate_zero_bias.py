"""eliminate-zero-bias against the runtime: each operator, what is not zero, and what may not go."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.eliminate.eliminate_zero_bias import EliminateZeroBias
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

W = "float[2,3,1] w = {1, 2, 3, 4, 5, 6}"
CASES = {
    "Conv": f"""agraph (float[1,3,4] x) => (float[1,2,4] y) <{W}, float[2] b = {{0, 0}}>
        {{ y = Conv(x, w, b) }}""",
    "ConvTranspose": f"""agraph (float[1,2,4] x) => (float[1,3,4] y) <{W}, float[3] b = {{0, 0, -0}}>
        {{ y = ConvTranspose<strides=[1]>(x, w, b) }}""",
    "Gemm": """agraph (float[3,2] x) => (float[3,1] y) <float[2,1] w = {1, 2}, float[3,1] b = {0, 0, 0}>
        { y = Gemm<beta=2.0>(x, w, b) }""",
    "LayerNormalization": """agraph (float[3,2] x) => (float[3,2] y)
        <float[2] w = {1, 2}, float[2] b = {0, 0}> { y = LayerNormalization(x, w, b) }""",
    "QLinearConv": """agraph (uint8[1,1,3] x) => (uint8[1,1,3] y) <float s = {0.5}, uint8 z = {3},
        int8 v = {0}, int8[1,1,1] w = {2}, int32[1] b = {0}>
        { y = QLinearConv(x, s, z, w, s, v, s, z, b) }""",
}


@pytest.mark.parametrize("op_type", CASES)
def test_each_operator(op_type: str) -> None:
    model = text_model(CASES[op_type])
    after = run_pass(model, EliminateZeroBias())
    assert after.changes == 1
    assert all(value is None or value.name != "b" for value in after.model.graph[0].inputs)
    assert_equivalent(model, after.model)


def test_deform_conv_keeps_its_mask() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 19]>
        agraph (float[1,1,2,2] x, float[1,2,2,2] o, float[1,1,2,2] m) => (float[1,1,2,2] y)
        <float[1,1,1,1] w = {2}, float[1] b = {0}> { y = DeformConv(x, w, o, b, m) }""")
    after = run_pass(model, EliminateZeroBias())
    assert [value and value.name for value in after.model.graph[0].inputs] == ["x", "w", "o", None, "m"]
    assert_equivalent(model, after.model)


def test_a_bias_that_is_not_zero_stays() -> None:
    model = text_model(CASES["Conv"].replace("{0, 0}", "{0, 1e-30}"))
    assert run_pass(model, EliminateZeroBias()).changes == 0


def test_a_bias_that_is_computed_or_missing_stays() -> None:
    model = text_model(
        f"agraph (float[1,3,4] x, float[2] b) => (float[1,2,4] y) <{W}> {{ y = Conv(x, w, b) }}"
    )
    assert run_pass(model, EliminateZeroBias()).changes == 0
    model = text_model(f"agraph (float[1,3,4] x) => (float[1,2,4] y) <{W}> {{ y = Conv(x, w) }}")
    assert run_pass(model, EliminateZeroBias()).changes == 0


def test_an_overridable_bias_can_still_be_overridden() -> None:
    model = text_model(CASES["Conv"])
    model.graph.input.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, [2]))
    after = run_pass(model, EliminateZeroBias())
    assert after.changes == 0
    assert after.declined == ("the bias is a graph input (overridable; --freeze-initializers folds it)",)


def test_a_gemm_of_old_has_to_have_one() -> None:
    model = text_model('<ir_version: 8, opset_import: ["" : 9]>' + CASES["Gemm"])
    after = run_pass(model, EliminateZeroBias())
    assert (after.changes, after.declined) == (0, ("a Gemm before opset 11 has to have a bias",))


def test_a_layer_norm_with_statistics_stays() -> None:
    text = CASES["LayerNormalization"].replace("y = Layer", "y, mean = Layer")
    assert run_pass(text_model(text), EliminateZeroBias()).changes == 0


def test_in_a_body_and_in_a_function() -> None:
    model = text_model("""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[1,1,3] x, bool go) => (float[1,1,3] y) <float[1,1,1] w = {2}, float[1] b = {0}> {
            y = If (go) <
                then_branch = yes () => (float[1,1,3] t) { t = Conv(x, w, b) },
                else_branch = no () => (float[1,1,3] e) { e = my.f (x) }>
        }
        <opset_import: ["" : 17], domain: "my">
        f (x) => (y) {
            w = Constant<value = float[1,1,1] {3}>()
            b = Constant<value_floats = [0.0]>() y = Conv(x, w, b) }""")
    after = run_pass(model, EliminateZeroBias())
    assert after.changes == 2
    feeds = [random_feeds(model) | {"go": np.array(go)} for go in (True, False)]
    assert_equivalent(model, after.model, feeds)


@settings(derandomize=True, max_examples=30, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from([0.0, -0.0, 1.0, 1e-40]), min_size=2, max_size=2), min_size=1, max_size=4
    )
)
def test_a_chain_of_layers(biases: Sequence[Sequence[float]]) -> None:
    """Of Convs in a row, those lose their bias that have none in effect."""
    nodes, tensors, value = [], [], "x"
    for i, bias in enumerate(biases):
        tensors.append(onnx.numpy_helper.from_array(np.full((2, 2, 1), 0.5 + i, np.float32), f"w{i}"))
        tensors.append(onnx.numpy_helper.from_array(np.array(bias, np.float32), f"b{i}"))
        nodes.append(onnx.helper.make_node("Conv", [value, f"w{i}", f"b{i}"], [f"y{i}"]))
        value = f"y{i}"
    x, y = (onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, [1, 2, 3]) for n in ("x", value))
    graph = onnx.helper.make_graph(nodes, "g", [x], [y], tensors)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=10)
    after = run_pass(model, EliminateZeroBias())
    assert after.changes == sum(not any(bias) for bias in biases)
    assert_equivalent(model, after.model)
