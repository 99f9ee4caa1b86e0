"""retarget-gemm against the runtime, in both directions, and there and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.model import load
from onnxopt.passes.retarget.retarget_gemm import RetargetGemm
from tests.passes.layers import Sketch
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

GEMM, MATMUL = RetargetGemm(), RetargetGemm(form="matmul")
OVERRIDABLE = "is a graph input (overridable; --freeze-initializers folds it)"


def changed(model: onnx.ModelProto, one: RetargetGemm, *ops: str) -> onnx.ModelProto:
    after = run_pass(model, one)
    assert after.op_types == list(ops)
    assert after.declined == ()
    feeds = random_feeds(model, sizes={"n": 3})
    assert_equivalent(model, after.model, feeds, kind="reorder")
    return model


def kept(model: onnx.ModelProto | str, one: RetargetGemm, *reasons: str) -> None:
    after = run_pass(model, one)
    assert (after.changes, after.declined) == (0, reasons)


def product(
    shape: Sequence[int], rows: Sequence[int | str] = ("n",), first: bool = False, op: str = "Add"
) -> Sketch:
    sketch = Sketch((*rows, 5))
    value = sketch.op("MatMul", ["x", sketch.constant("w", (5, 4))], "m")
    b = sketch.constant("b", shape)
    sketch.op(op, [b, value] if first else [value, b], "y")
    return sketch


@pytest.mark.parametrize("op", ["Add", "Sum"])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("shape", [(), (1,), (4,), (1, 4), (1, 1)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_bias(dtype: str, shape: tuple[int, ...], first: bool, op: str) -> None:
    sketch = product(shape, first=first, op=op)
    sketch.dtype = dtype
    sketch.constants = {name: array.astype(dtype) for name, array in sketch.constants.items()}
    changed(sketch.model(), GEMM, "Gemm")


@pytest.mark.parametrize("opset", [7, 9, 11, 13])
def test_opsets(opset: int) -> None:
    changed(product((4,)).model(opset=opset, ir_version=8), GEMM, "Gemm")


@pytest.mark.parametrize("rows", [(2, 3), (), ("n", 3)])
def test_other_ranks_stay(rows: tuple[int | str, ...]) -> None:
    kept(product((4,), rows).model(), GEMM)


def test_an_unknown_rank_stays() -> None:
    kept(
        """agraph (float[K] v, int64[R] s) => (float[M,N] y) <float[2,1] w = {1, 2}, float[1] b = {3}>
        { x = Reshape(v, s) m = MatMul(x, w) y = Add(m, b) }""",
        GEMM,
    )


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ((3, 4), "what is added is not known to fit the product's shape"),
        ((1, 1, 4), "what is added to the product has more axes"),
    ],
)
def test_a_bias_that_may_be_larger_stays(shape: tuple[int, ...], reason: str) -> None:
    kept(product(shape).model(), GEMM, reason)


def test_a_bias_with_as_many_rows() -> None:
    changed(product((3, 4), (3,)).model(), GEMM, "Gemm")


@pytest.mark.parametrize("kind", ["int32", "int64", "uint32"])
def test_integers_stay(kind: str) -> None:
    kept(
        f"""agraph ({kind}[2,3] x, {kind}[3,4] w, {kind}[4] b) => ({kind}[2,4] y)
            {{ m = MatMul(x, w) y = Add(m, b) }}""",
        GEMM,
        "the product is not known to be of floating point, as runtimes want it of a Gemm",
    )


def test_a_product_that_is_read_twice_or_given_out_stays() -> None:
    sketch = product((4,))
    kept(sketch.model(outputs=["m", "y"]), GEMM, "the output of the MatMul is also a graph output")
    sketch.op("Relu", ["m"], "r")
    kept(sketch.model(outputs=["r", "y"]), GEMM, "the output of the MatMul is also read elsewhere")


def test_an_overridable_bias_can_still_be_overridden() -> None:
    model = product((4,)).model(overridable=["b", "w"])
    after = run_pass(model, GEMM)
    assert after.op_types == ["Gemm"]
    feeds = random_feeds(model, sizes={"n": 3})
    feeds["b"] = feeds["x"][0, :4]
    assert_equivalent(model, after.model, feeds, kind="reorder")


@pytest.mark.parametrize("opset", [9, 17])
def test_transposes_of_run_time_values(opset: int) -> None:
    model = text_model(f"""<ir_version: 8, opset_import: ["" : {opset}]>
        agraph (float[5,n] x, float[4,5] w) => (float[n,4] y)
        {{ t = Transpose(x) u = Transpose<perm=[1,0]>(w) y = MatMul(t, u) }}""")
    model = onnx.shape_inference.infer_shapes(model)
    if opset < 11:
        kept(model, GEMM)
    else:
        changed(model, GEMM, "Gemm")


def test_a_step_of_a_recurrent_cell() -> None:
    model = text_model("""
        agraph (float[1,3] x, float[1,2] h, float[3,8] v, float[2,8] w, float[8] b) => (float[1,8] y)
        { m = MatMul(x, v) n = MatMul(h, w) s = Add(m, n) y = Add(s, b) }""")
    after = run_pass(onnx.shape_inference.infer_shapes(model), GEMM)
    assert after.op_types == ["MatMul", "Gemm", "Add"]
    assert_equivalent(model, after.model, kind="reorder")


@pytest.mark.parametrize("bias", [None, (), (1,), (4,), (1, 4), (3, 1), (3, 4)])
@pytest.mark.parametrize(
    ("transpose", "alpha", "beta"), [(0, 1.0, 1.0), (1, 1.0, 1.0), (1, 0.5, 2.0), (0, -1.5, 1.0)]
)
def test_as_matmul(transpose: int, alpha: float, beta: float, bias: tuple[int, ...] | None) -> None:
    sketch = Sketch((3, 5))
    inputs = ["x", sketch.constant("w", (4, 5) if transpose else (5, 4))]
    inputs += [] if bias is None else [sketch.constant("b", bias)]
    sketch.op("Gemm", inputs, "y", transB=transpose, alpha=alpha, beta=beta)
    changed(sketch.model(), MATMUL, *(["MatMul"] if bias is None else ["MatMul", "Add"]))


@pytest.mark.parametrize(
    ("body", "ops"),
    [
        ("y = Gemm(x, w, c)", ("MatMul", "Add")),
        ("y = Gemm<transA=1>(k, w)", ("MatMul",)),
        ("y = Gemm<transA=1, alpha=2.0>(k, w)", ("MatMul",)),
        ("y = Gemm<transA=1, transB=1>(k, v, c)", None),
        ("y = Gemm<transB=1>(x, v)", None),
        ("y = Gemm<transA=1>(u, w)", None),
        ("y = Gemm<alpha=2.0>(x, w)", None),
        ("y = Gemm<beta=2.0>(x, w, c)", None),
    ],
)
def test_as_matmul_of_run_time_values(body: str, ops: tuple[str, ...] | None) -> None:
    model = text_model(f"""
        agraph (float[2,3] x, float[3,4] w, float[4,3] v, float[3,2] u, float[4] c) => (float[2,4] y)
        <float[3,2] k = {{1, 2, 3, 4, 5, 6}}> {{ {body} }}""")
    if ops is None:
        what = "scaled bias" if "beta" in body else "transposed or scaled operand"
        kept(model, MATMUL, f"the {what} is computed at run time")
    else:
        changed(model, MATMUL, *ops)


def test_an_overridable_weight_is_not_transposed() -> None:
    sketch = Sketch((3, 5))
    sketch.op("Gemm", ["x", sketch.constant("w", (4, 5))], "y", transB=1)
    kept(sketch.model(overridable=["w"]), MATMUL, f"the transposed or scaled operand {OVERRIDABLE}")


@pytest.mark.parametrize("size", [4, 600])
def test_shared_weights(size: int) -> None:
    sketch = Sketch((2, size))
    sketch.op("Gemm", ["x", sketch.constant("w", (size, size))], "y", transB=1)
    sketch.op("Relu", ["w"], "r")
    model = sketch.model(outputs=["y", "r"])
    if size == 4:
        changed(model, MATMUL, "MatMul", "Relu")
    else:
        kept(model, MATMUL, "the operand is shared and too large to duplicate")


def test_a_product_of_nothing_stays() -> None:
    kept(
        "agraph (float[3,0] a, float[0,4] b, float[4] v) => (float[3,4] y) { y = Gemm(a, b, v) }",
        MATMUL,
        "the product sums up nothing",
    )


def test_a_large_external_weight_is_read_late(tmp_path: Path) -> None:
    sketch = Sketch((2, 600))
    sketch.op("Gemm", ["x", sketch.constant("w", (512, 600))], "y", transB=1)
    path = tmp_path / "m.onnx"
    onnx.save(sketch.model(), path, save_as_external_data=True, location="m.data", size_threshold=1024)
    graph = load(path)
    MATMUL(graph)
    assert [node.op_type for node in graph.graph] == ["MatMul"]
    assert_equivalent(sketch.model(), graph, kind="reorder")


def test_in_a_body_and_in_a_function() -> None:
    model = text_model("""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[3,2] x, bool go) => (float[3,2] y) <float[2,2] w = {1, 2, 3, 4}, float[2] b = {5, 6}> {
            y = If (go) <
                then_branch = yes () => (float[3,2] t) { m = MatMul(x, w) t = Add(b, m) },
                else_branch = no () => (float[3,2] e) { e = my.f (x) }>
        }
        <opset_import: ["" : 17], domain: "my">
        f (x) => (y) { w = Constant<value = float[2,2] {1, 2, 3, 4}>()
            b = Constant<value = float[2] {5, 6}>() y = Gemm<transB=1>(x, w, b) }""")
    for one, left in ((GEMM, {"Gemm": 2, "MatMul": 0}), (MATMUL, {"Gemm": 0, "MatMul": 2})):
        after = run_pass(model, one)
        assert {op: after.count(op) for op in left} == left
        feeds = [random_feeds(model) | {"go": onnx.numpy_helper.to_array(flag)} for flag in flags()]
        assert_equivalent(model, after.model, feeds, kind="reorder")


def flags() -> list[onnx.TensorProto]:
    return [onnx.helper.make_tensor("", onnx.TensorProto.BOOL, (), [value]) for value in (0, 1)]


@settings(derandomize=True, max_examples=30, deadline=None)
@given(st.data())
def test_there_and_back(data: st.DataObject) -> None:
    """A chain of layers keeps its numbers as Gemms, and as MatMuls again."""
    sketch, value, width = Sketch(("n", 5)), "x", 5
    for i in range(data.draw(st.integers(1, 3))):
        out = data.draw(st.integers(1, 4))
        value = sketch.op("MatMul", [value, sketch.constant(f"w{i}", (width, out))], f"m{i}")
        bias = data.draw(st.sampled_from([(), (1,), (out,), (1, out)]))
        value = sketch.op("Add", [value, sketch.constant(f"b{i}", bias)], f"a{i}")
        width = out
        if data.draw(st.booleans()):
            value = sketch.op("Relu", [value], f"r{i}")
    model = sketch.model()
    feeds = random_feeds(model, sizes={"n": 2})
    there = run_pass(model, GEMM)
    assert there.count("MatMul") == 0
    assert_equivalent(model, there.model, feeds, kind="reorder")
    MATMUL(there.model)
    assert "Gemm" not in there.op_types
    assert_equivalent(model, there.model, feeds, kind="reorder")
