"""merge-parallel against the runtime: what is alike, biases, activations, options, sharing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.model import load
from onnxopt.passes.merge.merge_parallel import MergeParallel
from tests.passes.layers import Sketch
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

FREE = MergeParallel(channels=0, rows=0)
CONV: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "pointwise": ((1, 1), {}),
    "strides": ((3, 3), {"strides": [2, 1], "pads": [1, 0, 1, 2]}),
    "dilations": ((3, 2), {"dilations": [2, 1], "auto_pad": "VALID"}),
    "same": ((3, 3), {"auto_pad": "SAME_UPPER", "kernel_shape": [3, 3]}),
    "conv1d": ((3,), {}),
    "conv3d": ((1, 2, 2), {}),
}
GEMM: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"alpha": 0.5, "beta": -2.0},
    "transB": {"transB": 1},
    "both": {"transA": 1, "transB": 1, "alpha": 2.0},
}


def convs(
    widths: Sequence[int], kernel: tuple[int, ...], attributes: Mapping[str, Any], bias: Sequence[bool]
) -> tuple[Sketch, list[str]]:
    sketch, outputs = Sketch((2, 3, *(7,) * len(kernel))), []
    for i, (width, biased) in enumerate(zip(widths, bias, strict=True)):
        inputs = ["x", sketch.constant(f"w{i}", (width, 3, *kernel))]
        inputs += [sketch.constant(f"b{i}", (width,))] if biased else []
        outputs.append(sketch.op("Conv", inputs, f"y{i}", **attributes))
    return sketch, outputs


def products(widths: Sequence[int], bias: Sequence[bool], rows: Sequence[int | str] = (3,)) -> Sketch:
    sketch = Sketch((*rows, 5))
    for i, (width, biased) in enumerate(zip(widths, bias, strict=True)):
        product = sketch.op("MatMul", ["x", sketch.constant(f"w{i}", (5, width))], f"m{i}")
        sketch.op(
            "Add", [product, sketch.constant(f"b{i}", (width,))] if biased else [product, product], f"y{i}"
        )
    return sketch


def merged(model: onnx.ModelProto, ops: Sequence[str], one: MergeParallel = FREE) -> Rewritten:
    after = run_pass(model, one)
    assert after.op_types == list(ops)
    assert after.declined == ()
    assert_equivalent(model, after.model, kind="reorder")
    return after


def kept(model: onnx.ModelProto, *reasons: str, one: MergeParallel = FREE) -> None:
    after = run_pass(model, one)
    assert (after.changes, after.declined) == (0, reasons)


@pytest.mark.parametrize("bias", [(False, False, False), (True, True, True), (False, True, False)])
@pytest.mark.parametrize("widths", [(1, 1, 1), (4, 1, 3)])
@pytest.mark.parametrize("name", CONV)
def test_convs(name: str, widths: tuple[int, ...], bias: tuple[bool, ...]) -> None:
    sketch, outputs = convs(widths, *CONV[name], bias)
    merged(sketch.model(outputs=outputs), ["Conv", "Split"])


@pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 4)])
@pytest.mark.parametrize("name", GEMM)
def test_gemms(name: str, bias: tuple[int, ...] | None) -> None:
    attributes = GEMM[name]
    sketch = Sketch((5, 3) if "transA" in attributes else (3, 5))
    for i in range(3):
        inputs = ["x", sketch.constant(f"w{i}", (4, 5) if "transB" in attributes else (5, 4))]
        if bias is not None:
            inputs.append(sketch.constant(f"b{i}", bias))
        sketch.op("Gemm", inputs, f"y{i}", **attributes)
    merged(sketch.model(outputs=["y0", "y1", "y2"]), ["Gemm", "Split"])


@pytest.mark.parametrize("rows", [(), (3,), (1, 2), (2, 1, 3), ("n", 2)])
def test_products_with_bias(rows: tuple[int | str, ...]) -> None:
    model = products((2, 3), (True, True), rows).model(outputs=["y0", "y1"])
    merged(model, ["MatMul", "Add", "Split"])


def test_an_add_that_is_no_bias_stays() -> None:
    model = products((2, 3, 2), (True, False, True)).model(outputs=["y0", "y1", "y2"])
    merged(model, ["MatMul", "Add", "Split", "Add"])


@pytest.mark.parametrize("opset", [7, 9, 11, 13, 18])
def test_opsets(opset: int) -> None:
    model = products((2, 3), (True, True), (2, 3)).model(outputs=["y0", "y1"], opset=opset, ir_version=8)
    merged(model, ["MatMul", "Add", "Split"])


def test_what_makes_no_fewer_nodes_stays() -> None:
    kept(products((2, 3), (False, False)).model(outputs=["m0", "m1", "y0", "y1"]))


@pytest.mark.parametrize(
    ("ops", "ending"),
    [
        ("y{i} = Relu(c{i})", ["Relu"]),
        ("y{i} = LeakyRelu<alpha=0.2>(c{i})", ["LeakyRelu"]),
        ("y{i} = Clip(c{i}, low{i}, high)", ["Clip"]),
        ("y{i} = Clip(c{i}, , high)", ["Clip"]),
        ("s{i} = Sigmoid(c{i}) y{i} = Mul(c{i}, s{i})", ["Sigmoid", "Mul"]),
        ("s{i} = HardSigmoid<alpha=0.5>(c{i}) y{i} = Mul(s{i}, c{i})", ["HardSigmoid", "Mul"]),
        (
            "r{i} = Relu(c{i}) s{i} = Sigmoid(r{i}) p{i} = Mul(s{i}, r{i}) y{i} = Tanh(p{i})",
            ["Relu", "Sigmoid", "Mul", "Tanh"],
        ),
    ],
)
def test_activations_go_along(ops: str, ending: list[str]) -> None:
    model = text_model(f"""
        agraph (float[1,2,4] x) => (float[1,1,4] y0, float[1,2,4] y1)
        <float[1,2,1] w0 = {{1, 2}}, float[2,2,1] w1 = {{3, 4, 5, 6}}, float low0 = {{-1}},
         float low1 = {{-1}}, float high = {{2}}>
        {{ c0 = Conv(x, w0) c1 = Conv(x, w1) {ops.format(i=0)} {ops.format(i=1)} }}""")
    merged(model, ["Conv", *ending, "Split"])


@pytest.mark.parametrize(
    "ops",
    [
        "y0 = Relu(c0) y1 = Tanh(c1)",
        "y0 = LeakyRelu<alpha=0.1>(c0) y1 = LeakyRelu<alpha=0.2>(c1)",
        "y0 = Clip(c0, zero) y1 = Clip(c1, one)",
        "y0 = Clip(c0, zero) y1 = Clip(c1)",
        "y0 = Relu(c0) y1 = Add(c1, c1)",
        "s0 = Sigmoid(c0) y0 = Mul(c0, s0) y1 = Sigmoid(c1)",
        "s0 = Sigmoid(c0) y0 = Mul(s0, s0) t0 = Neg(c0) s1 = Sigmoid(c1) y1 = Mul(s1, s1) t1 = Neg(c1)",
        "s0 = Sigmoid(c0) y0 = Mul(c0, s0) t0 = Neg(s0) s1 = Sigmoid(c1) y1 = Mul(c1, s1) t1 = Neg(s1)",
        "y0 = Softmax<axis=1>(c0) y1 = Softmax<axis=1>(c1)",
    ],
)
def test_activations_that_differ_stay_behind_the_split(ops: str) -> None:
    model = text_model(f"""
        agraph (float[1,2,4] x) => (float[1,1,4] y0, float[1,2,4] y1)
        <float[1,2,1] w0 = {{1, 2}}, float[2,2,1] w1 = {{3, 4, 5, 6}}, float zero = {{0}}, float one = {{1}}>
        {{ c0 = Conv(x, w0) c1 = Conv(x, w1) {ops} }}""")
    after = run_pass(model, FREE)
    assert after.op_types[:2] == ["Conv", "Split"]
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("strides=[2]", "strides=[1]"),
        ("pads=[1,1]", "pads=[0,2]"),
        ("dilations=[2]", "dilations=[1]"),
        ('auto_pad="VALID"', 'auto_pad="SAME_LOWER"'),
        ("group=2", "group=2"),
    ],
)
def test_convs_that_differ_stay(first: str, second: str) -> None:
    shape = "2,1,2" if "group" in first else "2,2,2"
    count = 4 if "group" in first else 8
    body = f"c0 = Conv<{first}>(x, v) c1 = Conv<{second}>(x, w) y0 = Relu(c0) y1 = Relu(c1)"
    weights = [f"float[{shape}] {name} = {{{', '.join(map(str, range(count)))}}}" for name in "vw"]
    kept(
        text_model(
            f"agraph (float[1,2,6] x) => (float[1,2,n] y0, float[1,2,m] y1) <{', '.join(weights)}> {{{body}}}"
        )
    )


def test_kernels_inputs_and_types_that_differ_stay() -> None:
    sketch = Sketch((1, 3, 6))
    for i, kernel in enumerate((1, 2)):
        sketch.op("Conv", ["x", sketch.constant(f"w{i}", (2, 3, kernel))], f"y{i}")
    sketch.op("Relu", ["x"], "r")
    sketch.op("Conv", ["r", sketch.constant("w2", (2, 3, 1))], "y2")
    kept(sketch.model(outputs=["y0", "y1", "y2"]))


@pytest.mark.parametrize(("channels", "left"), [(0, 2), (3, 2), (2, 3), (1, 3)])
def test_wide_convs_stay(channels: int, left: int) -> None:
    sketch, outputs = convs((2, 3), *CONV["pointwise"], (True, True))
    after = run_pass(sketch.model(outputs=outputs), MergeParallel(channels=channels))
    assert ("Split" in after.op_types) == (left == 2)
    reason = ("the Convs have more channels than pay (option channels)",)
    assert after.declined == (() if left == 2 else reason)


def test_narrow_convs_merge_beside_a_wide_one() -> None:
    sketch, outputs = convs((2, 30, 3), *CONV["pointwise"], (True, True, True))
    model = sketch.model(outputs=outputs)
    after = run_pass(model, MergeParallel())
    assert after.op_types == ["Conv", "Split", "Conv"]
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize(
    ("rows", "fits"),
    [((4,), True), ((2, 2), True), ((), True), ((5,), False), (("n",), False), ((2, 3), False)],
)
def test_many_rows_stay(rows: tuple[int | str, ...], fits: bool) -> None:
    model = products((2, 3), (True, True), rows).model(outputs=["y0", "y1"])
    reason = "the product has more rows than pay, or an unknown number (option rows)"
    if fits:
        merged(model, ["MatMul", "Add", "Split"], MergeParallel(rows=4))
    else:
        kept(model, reason, one=MergeParallel(rows=4))


def test_rows_of_a_gemm_that_transposes() -> None:
    sketch = Sketch((5, 3))
    for i in range(3):
        sketch.op("Gemm", ["x", sketch.constant(f"w{i}", (5, 2))], f"y{i}", transA=1)
    model = sketch.model(outputs=["y0", "y1", "y2"])
    merged(model, ["Gemm", "Split"], MergeParallel(rows=3))
    assert run_pass(model, MergeParallel(rows=2)).changes == 0


def test_an_overridable_weight_stays() -> None:
    sketch, outputs = convs((2, 3), *CONV["pointwise"], (False, False))
    kept(
        sketch.model(outputs=outputs, overridable=["w1"]),
        "the weight is a graph input (overridable; --freeze-initializers folds it)",
    )


def test_an_overridable_bias_of_a_conv_stays_and_one_of_a_product_is_added_behind() -> None:
    sketch, outputs = convs((2, 3), *CONV["pointwise"], (True, True))
    kept(
        sketch.model(outputs=outputs, overridable=["b1"]),
        "the bias is a graph input (overridable; --freeze-initializers folds it)",
    )
    model = products((2, 3, 2), (True, True, True)).model(outputs=["y0", "y1", "y2"], overridable=["b1"])
    merged(model, ["MatMul", "Add", "Split", "Add"])


def test_a_weight_that_is_computed_is_no_layer() -> None:
    kept(
        text_model("""
        agraph (float[1,2] x, float[2,3] v, float[2,3] w) => (float[1,3] a, float[1,3] b)
        { m = MatMul(x, v) n = MatMul(x, w) a = Relu(m) b = Relu(n) }""")
    )


def test_a_bias_by_row_stays() -> None:
    sketch = Sketch((3, 5))
    for i in range(3):
        sketch.op("Gemm", ["x", sketch.constant(f"w{i}", (5, 2)), sketch.constant(f"b{i}", (3, 1))], f"y{i}")
    kept(sketch.model(outputs=["y0", "y1", "y2"]), "the bias of a Gemm differs by row")


@pytest.mark.parametrize("size", [4, 600])
def test_shared_weights(size: int) -> None:
    sketch = Sketch((1, size))
    shared = sketch.constant("w", (size, size))
    for i in range(3):
        weight = shared if i == 0 else sketch.constant(f"w{i}", (size, size))
        sketch.op("MatMul", ["x", weight], f"y{i}")
    sketch.op("Transpose", [shared], "t")
    model = sketch.model(outputs=["y0", "y1", "y2", "t"])
    if size == 4:
        merged(model, ["MatMul", "Split", "Transpose"])
    else:
        kept(model, "a weight is shared and too large to duplicate")


def test_one_weight_twice() -> None:
    sketch = Sketch((1, 4))
    sketch.constant("w", (4, 4))
    for i in range(3):
        sketch.op("MatMul", ["x", "w"], f"y{i}")
    merged(sketch.model(outputs=["y0", "y1", "y2"]), ["MatMul", "Split"])


def test_branches_in_a_body_and_readers_in_a_body() -> None:
    model = text_model("""
        agraph (float[1,2] x, bool go) => (float[1,3] y)
        <float[2,1] a = {1, 2}, float[2,1] b = {3, 4}, float[2,1] c = {5, 6}>
        {
            p = MatMul(x, a) q = MatMul(x, b) r = MatMul(x, c)
            y = If (go) <
                then_branch = yes () => (float[1,3] t) { t = Concat<axis=1>(p, q, r) },
                else_branch = no () => (float[1,3] e) {
                    d = MatMul(x, c) f = MatMul(x, b) g = MatMul(x, a) e = Concat<axis=1>(d, f, g) }>
        }""")
    after = run_pass(model, FREE)
    assert sorted(after.op_types) == ["Concat"] * 2 + ["If"] + ["MatMul"] * 2 + ["Split"] * 2
    feeds = [random_feeds(model) | {"go": np.array(go)} for go in (True, False)]
    assert_equivalent(model, after.model, feeds, kind="reorder")


def test_in_a_function_constants_are_nodes() -> None:
    model = text_model("""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[1,2] x) => (float[1,1] p, float[1,1] q, float[1,1] r) { p, q, r = my.three(x) }
        <opset_import: ["" : 17], domain: "my">
        three (x) => (p, q, r) {
            a = Constant<value = float[2,1] {1, 2}>() b = Constant<value = float[2,1] {3, 4}>()
            p = MatMul(x, a) q = MatMul(x, b) r = MatMul(x, a)
        }""")
    after = run_pass(model, FREE)
    assert (after.count("MatMul"), after.count("Split")) == (1, 1)
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize(
    ("bound", "op_types"),
    [
        ("Constant<value_float = 0.5>()", ["MatMul", "Clip", "Split"]),
        ("ReduceMin<keepdims = 0>(x)", ["MatMul", "MatMul", "ReduceMin", "Clip", "Clip"]),
    ],
)
def test_bounds_that_come_after_the_first_layer(bound: str, op_types: list[str]) -> None:
    model = text_model(f"""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[1,2] x) => (float[1,1] p, float[1,1] q) {{ p, q = my.three(x) }}
        <opset_import: ["" : 17], domain: "my">
        three (x) => (p, q) {{
            a = Constant<value = float[2,1] {{1, 2}}>() b = Constant<value = float[2,1] {{3, 4}}>()
            m = MatMul(x, a) n = MatMul(x, b) low = {bound} p = Clip(m, low) q = Clip(n, low)
        }}""")
    after = run_pass(model, FREE)
    assert [one for one in after.op_types if one not in ("Constant", "three")] == op_types
    assert_equivalent(model, after.model, kind="reorder")


def test_float16() -> None:
    sketch = Sketch((1, 4), "float16")
    for i in range(3):
        sketch.op("MatMul", ["x", sketch.constant(f"w{i}", (4, 2))], f"y{i}")
    merged(sketch.model(outputs=["y0", "y1", "y2"]), ["MatMul", "Split"])


def test_large_external_weights_are_read_late(tmp_path: Path) -> None:
    sketch = Sketch((1, 512))
    for i in range(3):
        sketch.op("MatMul", ["x", sketch.constant(f"w{i}", (512, 600))], f"y{i}")
    model = sketch.model(outputs=["y0", "y1", "y2"])
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="m.data", size_threshold=1024)
    graph = load(path)
    MergeParallel()(graph)
    assert [node.op_type for node in graph.graph] == ["MatMul", "Split"]
    assert_equivalent(sketch.model(outputs=["y0", "y1", "y2"]), graph, kind="reorder")


def test_bisection_stops_after_any_merge() -> None:
    sketch = products((2, 3), (True, True))
    sketch.op("Relu", ["y0"], "r")
    for i in (2, 3, 4):
        sketch.op("MatMul", ["r", sketch.constant(f"w{i}", (2, 2))], f"y{i}")
    model = sketch.model(outputs=["r", "y1", "y2", "y3", "y4"])
    after = merged(model, ["MatMul", "Add", "Split", "Relu", "MatMul", "Split"])
    assert after.changes == 2


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_random_branches(data: st.DataObject) -> None:
    """Layers of several kinds on one value, with whatever activations, give the same numbers merged."""
    name = data.draw(st.sampled_from(list(CONV)))
    kernel, attributes = CONV[name]
    count = data.draw(st.integers(2, 4))
    widths = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    bias = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    sketch, outputs = convs(widths, kernel, attributes, bias)
    results = []
    for i, value in enumerate(outputs):
        op = data.draw(st.sampled_from(["", "Relu", "Sigmoid", "Gate", "Keep"]))
        if op == "Gate":
            value = sketch.op("Mul", [value, sketch.op("Sigmoid", [value], f"s{i}")], f"g{i}")
        elif op == "Keep":
            results.append(value)
            value = sketch.op("Relu", [value], f"k{i}")
        elif op:
            value = sketch.op(op, [value], f"a{i}")
        results.append(value)
    model = sketch.model(outputs=results)
    after = run_pass(model, MergeParallel(channels=data.draw(st.sampled_from([0, 3]))))
    assert_equivalent(model, after.model, kind="reorder")
