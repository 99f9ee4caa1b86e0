"""fold-batchnorm against the runtime: the product of layer, bias, type, opset, sharing and place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper
from onnx.reference import ReferenceEvaluator

from onnxopt.passes.fold.fold_batchnorm import FoldBatchnorm
from onnxopt.protobuf import dump
from tests.passes.layers import KINDS, Kind, Sketch
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

OVERRIDABLE = "is a graph input (overridable; --freeze-initializers folds it)"


def folded(model: onnx.ModelProto, left: Sequence[str]) -> ir.Model:
    """All BatchNormalization is folded, `left` are the ops that remain, the numbers hold."""
    after = run_pass(model, FoldBatchnorm())
    assert after.op_types == list(left)
    assert after.declined == ()
    assert_equivalent(model, after.model, kind="reorder")
    return after.model


def kept(model: onnx.ModelProto, *reasons: str) -> None:
    after = run_pass(model, FoldBatchnorm())
    assert after.changes == 0
    assert sorted(after.declined) == sorted(reasons)


def left_of(kind: Kind, bias: bool = True) -> list[str]:
    return ["MatMul", "Add"] if kind.op_type == "MatMul" and bias else [kind.op_type]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_after_each_layer(kind: Kind, bias: bool) -> None:
    sketch = Sketch(kind.x)
    sketch.norm(kind.outputs, sketch.layer(kind, "x", "c", bias), "y", epsilon=0.01)
    model = folded(sketch.model(), left_of(kind))
    node = model.graph[0]
    assert node.name == ("c_product_node" if bias and kind.op_type == "MatMul" else "c_node")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_before_each_layer(kind: Kind, bias: bool) -> None:
    sketch = Sketch(kind.x)
    channels = kind.x[1]
    sketch.layer(kind, sketch.norm(channels, "x", "n"), "y", bias)
    model = sketch.model()
    if kind.op_type == "ConvTranspose":
        kept(model, "the shift does not reach all outputs of a ConvTranspose alike")
    elif "pads" in kind.attributes:
        kept(model, "the padding of the Conv would need the shift")
    elif "transA" in kind.attributes:
        kept(model, "the Gemm transposes what it reads")
    else:
        folded(model, [*left_of(kind), "Add"] if bias and kind.op_type == "MatMul" else left_of(kind))


@pytest.mark.parametrize("name", ["conv2d_pads", "transposed_group", "transposed1d"])
def test_before_a_padded_layer_without_shift(name: str) -> None:
    kind = KINDS[name]
    sketch = Sketch(kind.x)
    sketch.layer(kind, sketch.norm(kind.inputs, "x", "n"), "y", bias=True)
    sketch.constants["n_mean"][:] = sketch.constants["n_bias"][:] = 0
    folded(sketch.model(), [kind.op_type])


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "folds"),
    [(8, 2, 2, True), (7, 2, 2, False), (9, 3, 3, True), (8, 3, 1, False)],
)
@pytest.mark.parametrize("auto_pad", ["SAME_UPPER", "SAME_LOWER"])
def test_before_a_conv_that_pads_to_the_same_size(
    size: int, kernel: int, stride: int, folds: bool, auto_pad: str
) -> None:
    sketch = Sketch((1, 3, size))
    attributes = {"auto_pad": auto_pad, "strides": [stride]}
    kind = Kind("Conv", (1, 3, size), (4, 3, kernel), 4, 3, attributes)
    sketch.layer(kind, sketch.norm(3, "x", "n"), "y")
    if folds:
        folded(sketch.model(), ["Conv"])
    else:
        kept(sketch.model(), "the padding of the Conv would need the shift")


C_SHAPES: list[tuple[int, ...]] = [(), (1,), (4,), (1, 1), (1, 4), (3, 1), (3, 4)]


@pytest.mark.parametrize("trans", [(0, 0), (0, 1), (1, 0), (1, 1)])
@pytest.mark.parametrize("factors", [(1.0, 1.0), (0.5, 2.0), (-2.0, 0.0)])
@pytest.mark.parametrize("shape", C_SHAPES, ids=str)
def test_gemm(shape: tuple[int, ...], factors: tuple[float, float], trans: tuple[int, int]) -> None:
    sketch = Sketch((5, 3) if trans[0] else (3, 5))
    inputs = ["x", sketch.constant("w", (4, 5) if trans[1] else (5, 4)), sketch.constant("k", shape)]
    alpha, beta = factors
    sketch.op("Gemm", inputs, "c", alpha=alpha, beta=beta, transA=trans[0], transB=trans[1])
    sketch.norm(4, "c", "y")
    folded(sketch.model(), ["Gemm"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 17])
def test_types_and_opsets(opset: int, dtype: str) -> None:
    for kind in (KINDS["gemm"], *([KINDS["conv2d_group"]] if dtype != "float64" else [])):
        sketch = Sketch(kind.x, dtype)
        sketch.norm(kind.outputs, sketch.layer(kind, "x", "c", bias=True), "y")
        model = folded(sketch.model(opset=opset), [kind.op_type])
        assert {str(v.dtype) for v in model.graph.initializers.values() if v.uses()} == {
            str(ir.DataType.from_numpy(np.dtype(dtype)))
        }


@pytest.mark.parametrize("name", ["conv2d_group", "transposed2d"])
def test_double_convolutions_by_the_reference(name: str) -> None:
    kind = KINDS[name]
    sketch = Sketch(kind.x, "float64")
    sketch.norm(kind.outputs, sketch.layer(kind, "x", "c"), "y")
    model = sketch.model()
    after = dump(run_pass(model, FoldBatchnorm()).model)
    assert [node.op_type for node in after.graph.node] == [kind.op_type]
    feeds = random_feeds(model)
    want, have = (list(ReferenceEvaluator(m).run(None, feeds)) for m in (model, after))
    np.testing.assert_allclose(have, want, rtol=1e-10, atol=1e-10)


def test_bfloat16_stays() -> None:
    model = text_model(
        """agraph (bfloat16[2, 2] x) => (bfloat16[2, 2] y)
        <bfloat16[2, 2] w = {16256, 16256, 16256, 16256}, bfloat16[2] s = {16384, 16384},
         bfloat16[2] b = {16256, 16256}, bfloat16[2] m = {0, 0}, bfloat16[2] v = {16256, 16256}>
        { c = Gemm (x, w)  y = BatchNormalization <epsilon = 0.0> (c, s, b, m, v) }"""
    )
    after = run_pass(model, FoldBatchnorm())
    assert after.op_types == ["Gemm"]
    weight, bias = (value.const_value for value in after.model.graph[0].inputs[1:] if value is not None)
    assert weight is not None
    assert bias is not None
    assert weight.dtype == bias.dtype == ir.DataType.BFLOAT16
    assert (weight.numpy() == 2).all()
    assert (bias.numpy() == 1).all()


@pytest.mark.parametrize("ends", [("y",), ("y", "z")])
def test_two_layers_share_a_weight(ends: tuple[str, ...]) -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x)
    sketch.norm(4, sketch.layer(kind, "x", "c"), "y")
    sketch.op("Conv", ["x", "c_w"], "d", **kind.attributes)
    if "z" in ends:
        sketch.norm(4, "d", "z")
    model = sketch.model(outputs=[*ends, *(["d"] if "z" not in ends else [])])
    folded(model, ["Conv", "Conv"])


def test_a_large_shared_weight_is_not_duplicated() -> None:
    sketch = Sketch((1, 600))
    sketch.op("Gemm", ["x", sketch.constant("w", (600, 600))], "c")
    sketch.norm(600, "c", "y")
    sketch.op("Gemm", ["x", "w"], "z")
    kept(sketch.model(outputs=["y", "z"]), "the weight is shared and too large to duplicate")
    sketch.nodes.pop()
    folded(sketch.model(), ["Gemm"])


def test_an_unrelated_initializer_has_the_name_of_the_new_bias() -> None:
    kind = KINDS["conv1d"]
    sketch = Sketch(kind.x)
    sketch.norm(4, sketch.layer(kind, "x", "c"), "n")
    sketch.op("Mul", ["n", sketch.constant("c_w_bias", (1, 4, 1))], "y")
    folded(sketch.model(), ["Conv", "Mul"])


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("c_w", "weight"),
        ("c_b", "bias"),
        ("y_scale", "scale of the BatchNormalization"),
        ("y_bias", "bias of the BatchNormalization"),
        ("y_mean", "mean of the BatchNormalization"),
        ("y_var", "variance of the BatchNormalization"),
    ],
)
@pytest.mark.parametrize("kind", ["conv2d", "transposed2d", "gemm_scaled", "matmul"])
def test_an_overridable_initializer(name: str, what: str, kind: str) -> None:
    sketch = Sketch(KINDS[kind].x)
    sketch.norm(4, sketch.layer(KINDS[kind], "x", "c", bias=True), "y")
    kept(sketch.model(overridable=[name]), f"the {what} {OVERRIDABLE}")


def test_all_initializers_are_inputs_below_ir_version_4() -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x)
    sketch.norm(4, sketch.layer(kind, "x", "c"), "y")
    model = sketch.model(opset=8, ir_version=3, overridable=list(sketch.constants))
    kept(model, f"the weight {OVERRIDABLE}")


def test_constant_nodes_below_ir_version_4() -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x)
    sketch.norm(4, sketch.layer(kind, "x", "c", bias=True), "y")
    made = [
        helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(array, name))
        for name, array in sketch.constants.items()
    ]
    sketch.nodes[:0] = made
    sketch.constants.clear()
    folded(sketch.model(opset=8, ir_version=3), ["Constant", "Constant", "Conv"])


def test_what_lies_between_is_read_elsewhere() -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x)
    sketch.norm(4, sketch.layer(kind, "x", "c"), "y")
    kept(sketch.model(outputs=["c", "y"]), "the output of the Conv is also a graph output")
    sketch.op("Relu", ["c"], "z")
    kept(sketch.model(outputs=["y", "z"]), "the output of the Conv is also read elsewhere")


def test_the_product_below_a_bias_is_read_elsewhere() -> None:
    sketch = Sketch((3, 5))
    sketch.norm(4, sketch.layer(KINDS["matmul"], "x", "c", bias=True), "y")
    kept(sketch.model(outputs=["c_product", "y"]), "the output of the MatMul is also a graph output")


def test_before_a_layer_where_others_read_it_too() -> None:
    kind = KINDS["conv1d"]
    sketch = Sketch(kind.x)
    sketch.layer(kind, sketch.norm(3, "x", "n"), "y")
    sketch.op("Relu", ["n"], "z")
    kept(sketch.model(outputs=["y", "z"]), "the output of the BatchNormalization is also read elsewhere")


def test_after_is_tried_first_and_before_where_it_is_declined() -> None:
    kind = Kind("Conv", (1, 3, 6), (3, 3, 2), 3, 3)
    sketch = Sketch(kind.x)
    sketch.layer(kind, sketch.norm(3, sketch.layer(kind, "x", "c"), "n"), "y")
    folded(sketch.model(), ["Conv", "Conv"])
    after = run_pass(model := sketch.model(outputs=["c", "y"]), FoldBatchnorm())
    assert after.op_types == ["Conv", "Conv"]
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize("more", [["m", "v"], ["m", "v", "sm", "sv"]])
def test_training_mode(more: list[str]) -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x)
    sketch.norm(4, sketch.layer(kind, "x", "c"), "y", **({"training_mode": 1} if len(more) == 2 else {}))
    sketch.nodes[-1].output.extend(more)
    reason = "the BatchNormalization is in training mode: it computes batch statistics"
    kept(sketch.model(opset=15 if len(more) == 2 else 9, outputs=["y"]), reason)


def test_old_forms() -> None:
    kind = KINDS["conv2d"]
    training = Sketch(kind.x)
    training.norm(4, training.layer(kind, "x", "c"), "y")
    model = training.model(opset=6, ir_version=4)
    kept(model, "the BatchNormalization is in training mode: it computes batch statistics")
    inference = Sketch(kind.x)
    inference.norm(4, inference.layer(kind, "x", "c"), "y", is_test=1)
    model = inference.model(opset=6, ir_version=4)
    after = run_pass(model, FoldBatchnorm())
    assert after.op_types == ["Conv"]
    spatial = Sketch(kind.x)
    spatial.norm(4, spatial.layer(kind, "x", "c"), "y", spatial=0)
    kept(spatial.model(opset=7), "the BatchNormalization has parameters for each position (spatial=0)")


def test_matmul_needs_a_matrix() -> None:
    reason = "the MatMul's result is not known to be a matrix, with the channels on axis 1"
    sketch = Sketch((2, 4, 5))
    sketch.norm(4, sketch.layer(KINDS["matmul"], "x", "c"), "y")
    kept(sketch.model(), reason)
    before = Sketch((2, 5, 5))
    before.layer(KINDS["matmul"], before.norm(5, "x", "n"), "y")
    kept(before.model(), reason)


def test_weights_that_are_no_constants() -> None:
    model = text_model(
        """agraph (float[1, 2, 4] x, float[2, 2, 1] w, float[2] b) => (float[1, 2, 4] y, float[1, 2, 4] z)
        <float[2] s = {1, 2}, float[2] t = {1, 2}, float[2] m = {1, 2}, float[2] v = {1, 2},
         float[2, 2, 1] k = {1, 2, 3, 4}>
        { c = Conv (x, w)  y = BatchNormalization (c, s, t, m, v)
          d = Conv (x, k, b)  z = BatchNormalization (d, s, t, m, v) }"""
    )
    kept(model, "the weight is computed at run time", "the bias is computed at run time")


@pytest.mark.parametrize(
    ("variance", "scale", "reason"),
    [
        (-1.0, 1.0, "a variance of the BatchNormalization is not positive"),
        (np.nan, 1.0, "a variance of the BatchNormalization is not positive"),
        (1.0, np.inf, "scale or shift are not finite"),
        (1e-9, 60000.0, "the folded constants would not be finite in FLOAT16"),
    ],
)
def test_parameters_that_cannot_be_folded(variance: float, scale: float, reason: str) -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x, "float16")
    sketch.norm(4, sketch.layer(kind, "x", "c"), "y")
    sketch.constants["y_var"][:] = variance
    sketch.constants["y_scale"][:] = scale
    kept(sketch.model(), reason)


def test_the_bias_of_a_gemm_does_not_grow_beyond_its_weight() -> None:
    sketch = Sketch((30, 2))
    sketch.op("Gemm", ["x", sketch.constant("w", (2, 4)), sketch.constant("k", (30, 1))], "c")
    sketch.norm(4, "c", "y")
    kept(sketch.model(), "the bias would be larger than the weight")


def test_elsewhere_it_is_left_without_a_word() -> None:
    sketch = Sketch((1, 3, 6))
    sketch.norm(3, sketch.op("Relu", ["x"], "r"), "n")
    sketch.op("MaxPool", ["n"], "y", kernel_shape=[2])
    kept(sketch.model())


def test_in_a_function() -> None:
    model = text_model(
        """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        agraph (float[2, 3] x) => (float[2, 2] y) { y = local.layer (x) }
        <opset_import: ["" : 17], domain: "local">
        layer (x) => (y) {
            w = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> ()
            s = Constant <value = float[2] {1, 2}> ()
            b = Constant <value_floats = [3.0, 4.0]> ()
            c = Gemm (x, w)
            y = BatchNormalization (c, s, b, b, s)
        }"""
    )
    folded(model, ["layer", "Constant", "Constant", "Gemm"])


def test_an_attribute_that_is_a_parameter_of_the_function() -> None:
    model = text_model(
        """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        agraph (float[2, 3] x) => (float[2, 2] y) { y = local.layer <alpha = 2.0> (x) }
        <opset_import: ["" : 17], domain: "local">
        layer <alpha> (x) => (y) {
            w = Constant <value = float[3, 2] {1, 2, 3, 4, 5, 6}> ()
            s = Constant <value = float[2] {1, 2}> ()
            c = Gemm <alpha: float = @alpha> (x, w)
            y = BatchNormalization (c, s, s, s, s)
        }"""
    )
    kept(model, "an attribute of the layer is a parameter of the function")


IF = """agraph (bool p, float[2, 3] x) => (float[2, 2] y)
<float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] s = {1, 2}>
{ %s y = If (p) <
    then_branch = one () => (float[2, 2] a) { %s a = BatchNormalization (c, s, s, s, s) },
    else_branch = two () => (float[2, 2] b) { b = Gemm (x, w) }> }"""


@pytest.mark.parametrize("holds", [False, True])
def test_in_a_branch(holds: bool) -> None:
    model = text_model(IF % ("", "c = Gemm (x, w)"))
    after = run_pass(model, FoldBatchnorm())
    assert after.op_types == ["If", "Gemm", "Gemm"]
    feeds = {"p": np.array(holds), "x": np.ones((2, 3), np.float32)}
    assert_equivalent(model, after.model, feeds, kind="reorder")


def test_across_graphs() -> None:
    kept(text_model(IF % ("c = Gemm (x, w)", "")), "the output of the Gemm is also read in another graph")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_layers(data: st.DataObject) -> None:
    draw = data.draw
    group, rank = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    a, b = group * draw(st.integers(1, 3)), group * draw(st.integers(1, 3))
    transposed, before = draw(st.booleans()), draw(st.booleans())
    kernel = tuple(draw(st.integers(1, 3)) for _ in range(rank))
    pads = [draw(st.integers(0, 1)) if k > 1 else 0 for k in kernel] * 2
    attributes = {"group": group, "pads": pads, "strides": [draw(st.integers(1, 2)) for _ in kernel]}
    x = (draw(st.integers(1, 2)), a, *(draw(st.integers(4, 6)) for _ in kernel))
    w = (a, b // group, *kernel) if transposed else (b, a // group, *kernel)
    kind = Kind("ConvTranspose" if transposed else "Conv", x, w, b, a, attributes)
    sketch = Sketch(x, seed=draw(st.integers(0, 99)))
    epsilon, bias = draw(st.sampled_from([1e-5, 1e-3, 0.1])), draw(st.booleans())
    if before:
        sketch.layer(kind, sketch.norm(a, "x", "n", epsilon=epsilon), "y", bias)
    else:
        sketch.norm(b, sketch.layer(kind, "x", "c", bias), "y", epsilon=epsilon)
    norm = "n" if before else "y"
    sketch.constants[f"{norm}_var"] *= np.float32(draw(st.sampled_from([1, 1e-3, 1e-9, 0])))
    if draw(st.booleans()):
        sketch.constants[f"{norm}_mean"][:] = sketch.constants[f"{norm}_bias"][:] = 0
    shifts = bool(sketch.constants[f"{norm}_mean"].any())
    model = sketch.model()
    after = run_pass(model, FoldBatchnorm())
    stays = before and shifts and (transposed or any(pads))
    assert after.count("BatchNormalization") == stays
    assert len(after.declined) == stays
    assert_equivalent(model, after.model, kind="reorder")
