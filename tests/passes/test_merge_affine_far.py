"""merge-affine and fold-batchnorm past nodes that move, join and pool, against the runtime."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.fold.fold_batchnorm import FoldBatchnorm
from onnxopt.passes.merge.merge_affine import MergeAffine
from tests.passes.layers import KINDS, Kind, Shape, Sketch
from tests.support import Rewritten, assert_equivalent, execute, random_feeds, run_pass, text_model

CONV = Kind("Conv", (2, 3, 8, 6), (4, 3, 3, 3), 4, 3)
ACROSS = "the constant does not run along the channels of the layer"
STEPS: dict[str, tuple[str, Sequence[Any], dict[str, Any], int]] = {
    "transpose": ("Transpose", (), {"perm": [0, 2, 3, 1]}, 3),
    "transpose_default": ("Transpose", (), {}, 2),
    "unsqueeze": ("Unsqueeze", ([0, -1],), {}, 2),
    "flatten_tail": ("Reshape", ([2, 4, 24],), {}, 1),
    "split_channels": ("Reshape", ([2, 2, 2, 6, 4],), {}, 2),
    "insert_one": ("Reshape", ([2, 1, 4, 1, 24],), {}, 2),
    "average": ("AveragePool", (), {"kernel_shape": [2, 2], "pads": [1, 0, 1, 0]}, 1),
    "global_average": ("GlobalAveragePool", (), {}, 1),
    "max": ("MaxPool", (), {"kernel_shape": [2, 2], "pads": [1, 1, 0, 0]}, 1),
    "global_max": ("GlobalMaxPool", (), {}, 1),
    "mean": ("ReduceMean", (), {"axes": [2, -1], "keepdims": 0}, 1),
    "mean_first": ("ReduceMean", (), {"axes": [0], "keepdims": 0}, 0),
    "mean_kept": ("ReduceMean", (), {"axes": [3]}, 1),
    "reduce_max": ("ReduceMax", (), {"axes": [-1], "keepdims": 0}, 1),
}
MAXIMA = ("max", "global_max", "reduce_max")


def step(sketch: Sketch, name: str, source: str, output: str) -> str:
    op_type, constants, attributes, _ = STEPS[name]
    inputs = [source]
    for i, values in enumerate(constants):
        sketch.constants[f"{output}_{i}"] = np.array(values)
        inputs.append(f"{output}_{i}")
    return sketch.op(op_type, inputs, output, **attributes)


def merged(model: onnx.ModelProto, gone: Sequence[str], one: MergeAffine | FoldBatchnorm) -> Rewritten:
    after = run_pass(model, one)
    assert not set(gone) & set(after.op_types)
    assert after.declined == ()
    assert_equivalent(model, after.model, kind="reorder")
    return after


def kept(model: onnx.ModelProto, *reasons: str, one: MergeAffine | FoldBatchnorm | None = None) -> None:
    after = run_pass(model, one or MergeAffine())
    assert (after.changes, after.declined) == (0, reasons)


def along(axis: int, rank: int, size: int) -> tuple[int, ...]:
    return (size, *(1,) * (rank - axis - 1))


def rank_after(name: str) -> int:
    sketch = Sketch((2, 4, 6, 4))
    step(sketch, name, "x", "y")
    return len(sketch.model().graph.output[0].type.tensor_type.shape.dim)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Neg"])
@pytest.mark.parametrize("name", STEPS)
def test_after_a_layer(name: str, op: str, bias: bool) -> None:
    axis, rank = STEPS[name][3], rank_after(name)
    size = 2 if name == "split_channels" else 4
    for shape in ((), (1,), along(axis, rank, size)):
        sketch = Sketch(CONV.x)
        value = step(sketch, name, sketch.layer(CONV, "x", "c", bias), "s")
        operands = [value] if op == "Neg" else [value, sketch.constant("k", shape, 0.5, 2)]
        sketch.op(op, operands, "y")
        if op == "Neg" and name in MAXIMA:
            kept(sketch.model(), f"a scale that is not positive does not pass a {STEPS[name][0]}")
        else:
            merged(sketch.model(), [op], MergeAffine())


@pytest.mark.parametrize("name", [name for name in STEPS if "Mean" not in STEPS[name][0]])
def test_a_negative_constant_and_maxima(name: str) -> None:
    sketch = Sketch(CONV.x)
    value = step(sketch, name, sketch.layer(CONV, "x", "c"), "s")
    sketch.op("Mul", [value, sketch.constant("k", (), -2, -1)], "y")
    if name in MAXIMA:
        kept(sketch.model(), f"a scale that is not positive does not pass a {STEPS[name][0]}")
    else:
        merged(sketch.model(), ["Mul"], MergeAffine())


BELOW: dict[str, tuple[tuple[str, Sequence[Any], dict[str, Any]], str, Shape, Shape]] = {
    "flatten": (("Flatten", (), {}), "gemm", (4,), (4, 24)),
    "flatten_default_axis": (("Flatten", (), {"axis": 1}), "gemm", (4, 2, 3), (4, 24)),
    "reshape": (("Reshape", ([-1, 24],), {}), "matmul", (4, 6), (24, 5)),
    "transpose": (("Transpose", (), {"perm": [0, 2, 1]}), "conv1d", (5, 4), (3, 4, 2)),
    "squeeze": (("Squeeze", ([3],), {}), "conv1d", (4, 5, 1), (3, 4, 2)),
    "global": (("GlobalAveragePool", (), {}), "conv2d", (4, 5, 2), (3, 4, 1, 1)),
    "max": (("MaxPool", (), {"kernel_shape": [2]}), "conv1d", (4, 7), (3, 4, 2)),
    "reduce": (("ReduceMean", (), {"axes": [2], "keepdims": 0}), "gemm", (4, 3), (3, 4)),
}


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Norm"])
@pytest.mark.parametrize("name", BELOW)
def test_before_a_layer(name: str, op: str) -> None:
    (move, constants, attributes), layer, rest, weight = BELOW[name]
    channels = 4
    if name.startswith("flatten") and len(rest) == 1:
        rest = (4, 6)
    shape = (3, *rest)
    axis = 2 if name == "transpose" else 1
    sketch = Sketch(shape)
    if op == "Norm":
        if axis != 1:
            return
        sketch.norm(channels, "x", "a")
    else:
        k = sketch.constant("k", along(axis, len(shape), channels), 0.5, 2)
        sketch.op(op, ["x", k], "a")
    inputs = ["a"]
    for i, values in enumerate(constants):
        sketch.constants[f"m{i}"] = np.array(values)
        inputs.append(f"m{i}")
    sketch.op(move, inputs, "m", **attributes)
    kind = KINDS[layer]
    options = {"transB": 1} if kind.op_type == "Gemm" else {}
    sketch.layer(
        Kind(kind.op_type, (), weight, weight[-1] if layer == "matmul" else weight[0], 0, options),
        "m",
        "y",
        True,
    )
    gone = ["BatchNormalization"] if op == "Norm" else [op] if layer != "matmul" or op != "Add" else []
    after = merged(sketch.model(), gone, FoldBatchnorm() if op == "Norm" else MergeAffine())
    assert after.changes == 1


def test_a_padded_layer_takes_no_shift() -> None:
    for op in ("Add", "Mul"):
        sketch = Sketch((1, 4, 6))
        sketch.op(op, ["x", sketch.constant("k", (4, 1), 0.5, 1)], "a")
        sketch.op("MaxPool", ["a"], "m", kernel_shape=[2])
        sketch.layer(Kind("Conv", (), (3, 4, 3), 3, 4, {"pads": [1, 1]}), "m", "y")
        if op == "Mul":
            merged(sketch.model(), ["Mul"], MergeAffine())
        else:
            kept(sketch.model(), "the padding of the Conv would need the shift")


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize("op", ["Add", "Mul", "Sub", "Norm"])
def test_after_a_concat(op: str, axis: int) -> None:
    """On the channels each layer gets its part; on another axis all get the same."""
    sketch = Sketch((1, 3, 5, 5))
    for i, width in enumerate((2, 3) if axis == 1 else (3, 3)):
        sketch.layer(Kind("Conv", (), (width, 3, 2, 2), width, 3), "x", f"c{i}", bias=bool(i))
    sketch.op("Transpose", ["c1"], "t", perm=[0, 1, 2, 3])
    sketch.op("Concat", ["c0", "t"], "c", axis=axis)
    channels = 5 if axis == 1 else 3
    if op == "Norm":
        sketch.norm(channels, "c", "y")
        after = merged(sketch.model(), ["BatchNormalization"], FoldBatchnorm())
    else:
        sketch.op(op, ["c", sketch.constant("k", (channels, 1, 1), 0.5, 1)], "y")
        after = merged(sketch.model(), [op], MergeAffine())
    assert after.op_types == ["Conv", "Conv", "Transpose", "Concat"]


def test_joined_with_what_comes_from_no_layer() -> None:
    sketch = Sketch((1, 3, 5))
    sketch.layer(Kind("Conv", (), (2, 3, 1), 2, 3), "x", "c")
    sketch.op("Concat", ["c", "x"], "j", axis=1)
    sketch.op("Mul", ["j", sketch.constant("k", (5, 1))], "y")
    kept(sketch.model())


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("op", ["Add", "Mul", "Norm"])
@pytest.mark.parametrize("single", [False, True])
def test_before_a_concat(op: str, place: int, single: bool) -> None:
    """What is scaled before it is joined becomes a part of the layer's inputs."""
    sketch = Sketch((2, 3, 5))
    sketch.op("Relu", ["x"], "r")
    if op == "Norm":
        sketch.norm(3, "x", "a")
    else:
        sketch.op(op, ["x", sketch.constant("k", () if single else (3, 1), 0.5, 1)], "a")
    sketch.op("Concat", ["a", "r"] if place == 0 else ["r", "a"], "j", axis=1)
    sketch.layer(Kind("Conv", (), (4, 6, 2), 4, 6), "j", "y")
    gone = "BatchNormalization" if op == "Norm" else op
    merged(sketch.model(), [gone], FoldBatchnorm() if op == "Norm" else MergeAffine())


def test_joined_along_another_axis_not_all_is_scaled() -> None:
    sketch = Sketch((2, 3, 5))
    sketch.op("Mul", ["x", sketch.constant("k", (3, 1))], "a")
    sketch.op("Concat", ["a", "x"], "j", axis=2)
    sketch.layer(Kind("Conv", (), (4, 3, 2), 4, 3), "j", "y")
    kept(sketch.model(), "what is joined with it along another axis is not scaled")


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("op", ["Add", "Mul", "Div"])
def test_a_table(op: str, axis: int) -> None:
    model = text_model(
        f"""agraph (int64[2] i) => (float[A,B,C] y)
        <float[3,4,3] table = {{{", ".join(map(str, range(36)))}}}, float[3] k = {{1, 2, 3}},
         float[4,1] h = {{1, 2, 3, 4}}, float s = {{2}}>
        {{ g = Gather<axis={axis}>(table, i) a = {op}(g, s) b = {op}(a, {"h" if axis == -1 else "k"})
           c = Neg(b) y = Relu(c) }}"""
    )
    after = run_pass(onnx.shape_inference.infer_shapes(model), MergeAffine())
    if axis == -1:
        assert after.op_types == ["Gather", op, "Neg", "Relu"]
        assert after.declined == ("the constant does not run along the entries of the table",)
    else:
        assert after.op_types == ["Gather", "Relu"]
    feeds = {"i": np.array([2, 0])}
    assert_equivalent(model, after.model, feeds, kind="reorder")


def test_tables_that_stay() -> None:
    body = "g = Gather(t, i) y = Mul(g, k)"
    for text, reasons in (
        (f"agraph (int64[2] i, float[3] t) => (float[2] y) <float k = {{2}}> {{ {body} }}", ()),
        (f"agraph (int64[2] i) => (int64[2] y) <int64[3] t = {{1, 2, 3}}, int64 k = {{2}}> {{ {body} }}", ()),
    ):
        kept(text_model(text), *reasons)
    model = text_model(
        f"agraph (int64[2] i) => (float[2] y) <float[3] t = {{1, 2, 3}}, float k = {{2}}> {{ {body} }}"
    )
    model.graph.input.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [3]))
    kept(model, "the table is a graph input (overridable; --freeze-initializers folds it)")
    del model.graph.input[-1]
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones(300_000, np.float32), "t"))
    assert run_pass(model, MergeAffine()).changes == 1
    model.graph.node.append(onnx.helper.make_node("ReduceSum", ["t"], ["r"]))
    model.graph.output.append(onnx.helper.make_tensor_value_info("r", onnx.TensorProto.FLOAT, [1]))
    kept(model, "the table is shared and too large to duplicate")


@pytest.mark.parametrize(
    ("move", "op", "reason"),
    [
        ("m = Pad(c, p)", "Mul", None),
        ("m = Pad(c, p)", "Add", "a shift does not pass a Pad"),
        ("m = Pad(c, p, k)", "Mul", "a scale does not pass a Pad of other values than 0"),
        ('m = Pad<mode="edge">(c, p)', "Mul", "a Pad of another mode than constant"),
        ("m = Pad(c, q)", "Mul", "a Pad adds channels"),
        ("m = Relu(c)", "Mul", None),
        ("m = Relu(c)", "Add", "a shift does not pass a Relu"),
        ("m = LeakyRelu(c)", "Div", None),
        ("m = ReduceSum<keepdims=1>(c, last)", "Mul", None),
        ("m = ReduceSum<keepdims=1>(c, last)", "Add", "a shift does not pass a ReduceSum"),
        ("m = Squeeze(c)", "Mul", "the axes that a node drops are unknown"),
        ("m = AveragePool<kernel_shape=[2], pads=[1,0], count_include_pad=1>(c)", "Mul", None),
        ("m = AveragePool<kernel_shape=[2], pads=[1,0]>(c)", "Add", None),
        ("m = AveragePool<kernel_shape=[2], count_include_pad=1>(c)", "Add", None),
        (
            "m = AveragePool<kernel_shape=[2], pads=[1,0], count_include_pad=1>(c)",
            "Add",
            "a shift does not pass a AveragePool",
        ),
        ("m = Sigmoid(c)", "Mul", ""),
        ("m, i = MaxPool<kernel_shape=[2]>(c)", "Mul", ""),
    ],
)
def test_what_passes(move: str, op: str, reason: str | None) -> None:
    model = text_model(
        f"""agraph (float[1,2,4] x) => (float[A,B,C] y)
        <float[2,2,1] w = {{1, -2, 3, -4}}, float[2,1] k2 = {{2, 3}}, float k = {{1}}, int64[1] last = {{2}},
         int64[6] p = {{0, 0, 1, 0, 0, 2}}, int64[6] q = {{0, 1, 0, 0, 0, 0}}>
        {{ c = Conv(x, w) {move} y = {op}(m, {"k2" if "q)" not in move else "k3"}) }}""".replace(
            "float k = {1}", "float k = {1}, float[3,1] k3 = {1, 2, 3}"
        )
    )
    model = onnx.shape_inference.infer_shapes(model)
    if reason is None:
        merged(model, [op], MergeAffine())
    else:
        kept(model, *([reason] if reason else []))


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("t = Transpose<perm=[0,2,1]>(c) y = Mul(t, k4)", ACROSS),
        ("t = Reshape(c, s) y = Mul(t, k8)", "a Reshape mixes the channels with other axes"),
        ("t = Reshape(c, r) y = Mul(t, k4)", ACROSS),
        ("t = GlobalMaxPool(c) y = Mul(t, k4)", "the constant does not run along the channels alone"),
        ("t = MaxPool<kernel_shape=[1]>(c) y = Mul(t, k4)", "the constant runs along an axis that is pooled"),
        ("t = Transpose<perm=[0,2,1]>(c) y = Div(k2, t)", "the constant is divided by the run-time value"),
        (
            "t = Transpose<perm=[0,2,1]>(c) y = Mul(t, k5)",
            "the constant makes the result larger, or the number of axes is unknown",
        ),
    ],
)
def test_constants_that_run_elsewhere(body: str, reason: str) -> None:
    body = body.replace("k4)", "k4a)") if "Transpose" in body else body
    model = text_model(f"""agraph (float[1,2,4] x) => (float y)
        <float[2,2,1] w = {{1, -2, 3, -4}}, float[4,1] k4a = {{2, 3, 4, 5}}, float[4] k4 = {{2, 3, 4, 5}},
         float[8] k8 = {{1, 2, 3, 4, 5, 6, 7, 8}}, float[2] k2 = {{1, 2}}, float[1,1,1,1] k5 = {{1}},
         int64[2] s = {{1, 8}}, int64[3] r = {{1, 2, 4}}>
        {{ c = Conv(x, w) {body.replace("y =", "z =")} y = ReduceSum<keepdims=0>(z) }}""")
    kept(onnx.shape_inference.infer_shapes(model), reason)


def test_a_product_without_bias_takes_a_shift_as_a_matrix_only() -> None:
    for rows, fits in (((6,), True), ((2, 3), False)):
        sketch = Sketch((*rows, 5))
        sketch.op("MatMul", ["x", sketch.constant("w", (5, 4))], "m")
        sketch.constants["s"] = np.array([2, 3, 4, 1])
        sketch.op("Reshape", ["m", "s"], "r")
        sketch.op("Add", ["r", sketch.constant("k", (4, 1))], "y")
        if fits:
            assert merged(sketch.model(), [], MergeAffine()).op_types == ["MatMul", "Add", "Reshape"]
        else:
            kept(sketch.model(), "the MatMul has no bias that could take the shift")


def test_what_lies_between_is_read_elsewhere() -> None:
    for extra in ("c", "t"):
        sketch = Sketch((1, 3, 5))
        sketch.layer(Kind("Conv", (), (2, 3, 1), 2, 3), "x", "c")
        sketch.op("Transpose", ["c"], "t", perm=[0, 2, 1])
        sketch.op("Mul", ["t", sketch.constant("k", (2,))], "y")
        sketch.op("Relu", [extra], "r")
        kept(sketch.model(outputs=["y", "r"]))
        del sketch.nodes[-1]
        kept(sketch.model(outputs=["y", extra]))


def test_overridable_weights_and_constants_stay() -> None:
    sketch = Sketch((1, 3, 5))
    sketch.layer(Kind("Conv", (), (2, 3, 1), 2, 3), "x", "c")
    sketch.op("Transpose", ["c"], "t", perm=[0, 2, 1])
    sketch.op("Mul", ["t", sketch.constant("k", (2,))], "y")
    for name, what in (("c_w", "weight"), ("k", "constant")):
        model = sketch.model(overridable=[name])
        kept(model, f"the {what} is a graph input (overridable; --freeze-initializers folds it)")


def test_the_end_of_a_normalization_stays() -> None:
    model = text_model("""agraph (float[2,6] x, float[2,6] n) => (float[1,2] y)
        <float[6] g = {1, 2, 3, 4, 5, 6}, int64[2] s = {1, 12},
         float[12,2] w = {1,2,3,4,5,6,7,8,9,10,11,12,1,2,3,4,5,6,7,8,9,10,11,12}>
        { d = Div(x, n) m = Mul(d, g) r = Reshape(m, s) y = MatMul(r, w) }""")
    reason = "it ends a normalization or activation, which runtimes know as a whole"
    kept(onnx.shape_inference.infer_shapes(model), reason)


def test_a_bias_is_not_carried_on() -> None:
    """The Add after a MatMul is its bias; a Relu between two layers is no reason to look at it."""
    sketch = Sketch((2, 3))
    sketch.op("MatMul", ["x", sketch.constant("w", (3, 4))], "m")
    sketch.op("Add", ["m", sketch.constant("b", (4,))], "a")
    sketch.op("Relu", ["a"], "r")
    sketch.layer(Kind("Gemm", (), (4, 2), 2, 4), "r", "y", bias=True)
    kept(sketch.model())


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_neg_beside_each_layer(kind: Kind) -> None:
    sketch = Sketch(kind.x)
    sketch.op("Neg", [sketch.layer(kind, sketch.op("Neg", ["x"], "n"), "c", bias=True)], "y")
    merged(sketch.model(), ["Neg"], MergeAffine())


@pytest.mark.parametrize("name", ["conv2d_pads", "transposed1d", "transposed_group", "depthwise"])
@pytest.mark.parametrize("shift", ["Add({0}, t)", "Add(t, {0})", "Sub({0}, t)", "Sub(t, {0})"])
@pytest.mark.parametrize("scale", ["Mul(x, s)", "Mul(s, x)", "Div(x, s)", "Neg(x)"])
def test_a_scale_passes_a_shift_that_a_layer_cannot_take(scale: str, shift: str, name: str) -> None:
    kind = KINDS[name]
    kind = replace(
        kind, attributes={"pads": [1] * 4, **kind.attributes} if name == "depthwise" else kind.attributes
    )
    for s, t in ((1, 1), (1, kind.inputs), (kind.inputs, 1), (kind.inputs, kind.inputs)):
        sketch = Sketch(kind.x)
        for key, size in (("s", s), ("t", t)):
            sketch.constant(key, along(1, len(kind.x), size), 0.5, 2)
        for text, output in ((scale, "a"), (shift.format("a"), "b")):
            op_type, inputs = text.rstrip(")").split("(")
            sketch.op(op_type, inputs.split(", "), output)
        sketch.layer(kind, "b", "y", bias=True)
        after = run_pass(sketch.model(), MergeAffine())
        assert after.op_types == ["Add", kind.op_type]
        assert_equivalent(sketch.model(), after.model, kind="reorder")


def test_a_scale_of_zero_does_not_pass_a_shift() -> None:
    sketch = Sketch((1, 2, 4))
    sketch.op("Mul", ["x", sketch.constant("s", (2, 1), 0, 0)], "a")
    sketch.op("Add", ["a", sketch.constant("t", (2, 1))], "b")
    sketch.layer(Kind("Conv", (), (2, 2, 3), 2, 2, {"pads": [1, 1]}), "b", "y")
    after = run_pass(sketch.model(), MergeAffine())
    assert (after.changes, len(after.declined)) == (0, 2)
    assert "the folded constants would not be finite in FLOAT" in after.declined


@pytest.mark.parametrize("extra", ["a", "b"])
def test_a_scale_that_is_read_elsewhere_does_not_pass_a_shift(extra: str) -> None:
    sketch = Sketch((1, 2, 4))
    sketch.op("Mul", ["x", sketch.constant("s", (2, 1))], "a")
    sketch.op("Add", ["a", sketch.constant("t", (2, 1))], "b")
    sketch.layer(Kind("Conv", (), (2, 2, 3), 2, 2, {"pads": [1, 1]}), "b", "y")
    sketch.op("Relu", [extra], "r")
    after = run_pass(sketch.model(outputs=["y", "r"]), MergeAffine())
    assert after.changes == 0
    assert f"the output of the {'Mul' if extra == 'a' else 'Add'} is also read elsewhere" in after.declined


def test_a_long_way_is_not_walked() -> None:
    sketch, value = Sketch((1, 3, 5)), "c"
    sketch.layer(Kind("Conv", (), (2, 3, 1), 2, 3), "x", "c")
    for i in range(9):
        value = sketch.op("Transpose", [value], f"t{i}", perm=[0, 2, 1])
    sketch.op("Neg", [value], "y")
    kept(sketch.model())


def test_in_a_body_and_in_a_function() -> None:
    model = text_model("""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[1,2,3] x, bool go) => (float[1,3,2] y) <float[2,2,1] w = {2, 3, 4, 5}> {
            y = If (go) <
                then_branch = yes () => (float[1,3,2] t) {
                    c = Conv(x, w) s = Transpose<perm=[0,2,1]>(c) t = Neg(s) },
                else_branch = no () => (float[1,3,2] e) { e = my.f (x) }>
        }
        <opset_import: ["" : 17], domain: "my">
        f (x) => (y) {
            w = Constant<value = float[2,2,1] {3, 4, 5, 6}>()
            c = Conv(x, w) s = Transpose<perm=[0,2,1]>(c) y = Neg(s) }""")
    after = run_pass(model, MergeAffine())
    assert after.count("Neg") == 0
    feeds = [random_feeds(model) | {"go": np.array(go)} for go in (True, False)]
    assert_equivalent(model, after.model, feeds, kind="reorder")


def test_names_of_outputs_stay() -> None:
    sketch = Sketch((1, 3, 5))
    sketch.layer(Kind("Conv", (), (2, 3, 1), 2, 3), "x", "c")
    sketch.op("Transpose", ["c"], "t", perm=[0, 2, 1])
    sketch.op("Neg", ["t"], "y")
    after = run_pass(sketch.model(), MergeAffine())
    assert [node.name for node in after.model.graph] == ["c_node", "t_node"]
    assert [value.name for value in after.model.graph.outputs] == ["y"]


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_random_ways(data: st.DataObject) -> None:
    """Whatever stands between layers and arithmetic, the numbers stay."""
    draw, sketch = data.draw, Sketch((2, 3, 6, 4))
    values = []
    for i in range(draw(st.integers(1, 2))):
        source = sketch.op("Mul", ["x", sketch.constant(f"p{i}", (3, 1, 1), 0.5, 2)], f"b{i}")
        source = step(sketch, "max", source, f"d{i}") if draw(st.booleans()) else source
        kind = Kind("Conv", (), (4, 3, 2, 2), 4, 3, {"pads": [1, 0, 1, 0]} if draw(st.booleans()) else {})
        values.append(sketch.layer(kind, source, f"c{i}", draw(st.booleans())))
    value = values[0]
    moves = ["max", "mean_kept", "Relu", "transpose", "Neg", "Mul", "Add", "Concat"]
    for i in range(draw(st.integers(1, 4))):
        shape = shape_of(sketch, value)
        move = draw(st.sampled_from(moves))
        if move in ("Mul", "Add"):
            axis = draw(st.integers(0, len(shape) - 1))
            constant = sketch.constant(f"k{i}", along(axis, len(shape), shape[axis]), 0.5, 2)
            value = sketch.op(move, [value, constant], f"v{i}")
        elif move == "Concat":
            other = values[-1]
            if shape_of(sketch, other) == shape:
                value = sketch.op(
                    "Concat", [value, other], f"v{i}", axis=draw(st.integers(0, len(shape) - 1))
                )
        elif move in ("Relu", "Neg"):
            value = sketch.op(move, [value], f"v{i}")
        elif len(shape) == 4 and min(shape[2:]) > 2:
            value = step(sketch, move, value, f"v{i}")
    sketch.op("Identity", [value], "y")
    model = sketch.model()
    assert_equivalent(model, run_pass(model, MergeAffine()).model, kind="reorder")


def shape_of(sketch: Sketch, value: str) -> tuple[int, ...]:
    model = sketch.model(outputs=[value])
    return execute(model, random_feeds(model))[0].shape
