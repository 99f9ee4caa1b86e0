"""fuse-softmax and fuse-mean against the runtime, and reductions that drop their axes."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.fuse.fuse_layernorm import FuseLayernorm
from onnxopt.passes.fuse.fuse_mean import FuseMean
from onnxopt.passes.fuse.fuse_softmax import FuseSoftmax
from tests.passes.expressions import Dim, expression_model
from tests.support import assert_equivalent, random_feeds, run_pass, text_model


def shaped(text: str, shape: tuple[Dim, ...] = (2, 3, 8), opset: int = 17, **more: object) -> onnx.ModelProto:
    """The expression's model with inferred shapes."""
    return onnx.shape_inference.infer_shapes(expression_model(text, shape=shape, opset=opset, **more))  # type: ignore[arg-type]


def softmax(
    axis: int = -1, opset: int = 17, top: str = "{}", total: str = "{}", keepdims: int = 1
) -> dict[str, str]:
    """Spellings by what they become; `top` and `total` wrap the two reductions."""
    keep = f", keepdims={keepdims}"
    by_input = f"[{axis}]{keep}"
    by_attribute = f"axes=[{axis}]{keep}"
    largest = top.format(f"ReduceMax(x, {by_input if opset >= 18 else by_attribute})")
    shifted = f"Sub(x, {largest})"
    summed = total.format(f"ReduceSum(Exp({shifted}), {by_input if opset >= 13 else by_attribute})")
    return {
        "Softmax": f"Div(Exp({shifted}), {summed})",
        "Softmax by a reciprocal": f"Mul(Reciprocal({summed}), Exp({shifted}))",
        "LogSoftmax": f"Sub({shifted}, Log({summed}))",
    }


@pytest.mark.parametrize("name", softmax())
@pytest.mark.parametrize(
    ("axis", "opset"), [(-1, 11), (2, 12), (-1, 13), (0, 13), (-2, 17), (1, 18), (-1, 22)]
)
def test_parts(name: str, axis: int, opset: int) -> None:
    model = shaped(softmax(axis, opset)[name], opset=opset)
    done = run_pass(model, FuseSoftmax())
    assert (done.op_types, done.declined) == ([name.split()[0]], ())
    x = random_feeds(model)["x"] * 20
    x[0, 0] = [1, -np.inf, 3e38, -3e38, 0, 0, 0, 0]
    assert_equivalent(model, done.model, {"x": x}, kind="reorder")


@pytest.mark.parametrize("dtype", [np.float16, np.float64])
@pytest.mark.parametrize("name", softmax())
def test_types(name: str, dtype: type) -> None:
    model = shaped(softmax()[name], dtype=dtype)
    done = run_pass(model, FuseSoftmax())
    assert done.op_types == [name.split()[0]]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize("name", softmax())
@pytest.mark.parametrize(
    ("wrapper", "axis", "shape"),
    [
        ("Unsqueeze({}, [2])", -1, (2, 3, 8)),
        ("Reshape({}, [0, 0, 1])", -1, ("N", 3, 8)),
        ("Reshape({}, [-1, 3, 1])", -1, ("N", 3, 8)),
        ("Reshape({}, [0, 1, 8])", 1, ("N", 3, 8)),
        ("Reshape({}, [-1, 1, 8])", 1, ("N", 3, 8)),
    ],
)
def test_a_dropped_axis_that_is_put_back(name: str, wrapper: str, axis: int, shape: tuple[Dim, ...]) -> None:
    model = shaped(softmax(axis, 17, wrapper, wrapper, 0)[name], shape)
    done = run_pass(model, FuseSoftmax())
    assert [one for one in done.op_types if one != "Constant"] == [name.split()[0]]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("text", "shape", "reason"),
    [
        (softmax(-1, 17, "{}", "{}", 0)["Softmax"], (8, 8), "drops its axes"),
        (softmax(-1, 17, "Unsqueeze({}, [0])", "Unsqueeze({}, [1])", 0)["Softmax"], (8, 8), "drops its axes"),
        (
            softmax(-1, 17, "Reshape({}, [1, 8])", "Reshape({}, [8, 1])", 0)["Softmax"],
            (8, 8),
            "drops its axes",
        ),
        (softmax(0, 12)["Softmax"], (8, 8), "last one before opset 13"),
        (softmax()["Softmax"].replace("[-1]", "[-1, -2]"), (2, 8, 8), "more than one axis"),
        (
            softmax()["Softmax"].replace("ReduceMax(x, axes=[-1]", "ReduceMax(x, axes=[0]"),
            (8, 8),
            "different axes",
        ),
    ],
)
def test_refusals(text: str, shape: tuple[Dim, ...], reason: str) -> None:
    opset = 12 if "ReduceSum(Exp(Sub(x, ReduceMax(x, axes=[0], keepdims=1))), axes=" in text else 17
    done = run_pass(shaped(text, shape, opset), FuseSoftmax())
    assert done.changes == 0
    assert len(done.declined) == 1
    assert reason in done.declined[0]


@pytest.mark.parametrize("low", [-np.inf, -1.0])
def test_a_maximum_that_has_a_lower_bound(low: float) -> None:
    text = softmax(top="Max(low, {})")["Softmax"]
    model = shaped(text, weights={"low": np.array(low, np.float32)})
    done = run_pass(model, FuseSoftmax())
    assert (done.op_types == ["Softmax"]) == np.isinf(low)
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("Div(Exp(x), ReduceSum(Exp(x), [-1]))", "Softmax"),
        ("Log(Softmax(x, axis=1))", "LogSoftmax"),
        ("Sub(x, Log(ReduceSum(Exp(x), [-1])))", "LogSoftmax"),
    ],
)
def test_parts_that_overflow_only_when_asked_for(text: str, result: str) -> None:
    model = shaped(text)
    kept = run_pass(model, FuseSoftmax())
    assert kept.changes == 0
    assert "stable=true allows it" in kept.declined[0]
    done = run_pass(model, FuseSoftmax(stable=True))
    assert done.op_types == [result]
    assert_equivalent(model, done.model, kind="reorder")


def test_the_logarithm_of_a_sum_of_powers() -> None:
    model = shaped("Sub(x, ReduceLogSumExp(x, axes=[-1]))")
    done = run_pass(model, FuseSoftmax())
    assert done.op_types == ["LogSoftmax"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    "text",
    [
        softmax()["LogSoftmax"].replace("ReduceMax", "ReduceMin").replace("Exp(", "Neg("),
        "Div(Exp(x), ReduceSum(Abs(x), [-1]))",
        "Sub(x, Log(ReduceSum(Exp(Neg(x)), [-1])))",
    ],
)
def test_what_is_something_else_stays(text: str) -> None:
    done = run_pass(shaped(text), FuseSoftmax())
    assert (done.changes, done.declined) == (0, ())


def test_a_power_that_is_read_elsewhere() -> None:
    model = text_model("""agraph (float[2,4] x) => (float[2,4] y, float[2,4] e) <int64[1] a = {-1}> {
        m = ReduceMax<axes = [-1]>(x) d = Sub(x, m) e = Exp(d) s = ReduceSum(e, a) y = Div(e, s) }""")
    assert run_pass(model, FuseSoftmax()).declined == ("the output of its Exp is also a graph output",)


@pytest.mark.parametrize("opset", [12, 13, 18])
@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize(("axes", "count"), [([-1], 8), ([1], 3), ([0, 2], 16)])
@pytest.mark.parametrize("form", ["Mul({}, {})", "Mul({1}, {0})", "Div({}, {})"])
def test_means(opset: int, keepdims: int, axes: list[int], count: int, form: str) -> None:
    given_axes = f"axes={axes}" if opset < 13 else f"{axes}"
    factor = float(np.float32(1 / count)) if form[0] == "M" else float(count)
    text = form.format(f"ReduceSum(x, {given_axes}, keepdims={keepdims})", factor)
    model = shaped(text, opset=opset)
    done = run_pass(model, FuseMean())
    assert done.op_types == ["ReduceMean"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        ("Mul(ReduceSum(x, [-1]), 0.126)", (2, 8), np.float32),
        ("Div(ReduceSum(x, [-1]), 7.0)", (2, 8), np.float32),
        ("Div(ReduceSum(x, [0]), 8.0)", (2, 8), np.float32),
        ("Div(ReduceSum(x), 16.0)", (2, 8), np.float32),
        ("Div(ReduceSum(x, [-1]), 8)", (2, 8), np.int64),
        ("Mul(ReduceSum(x, [-1]), 0.0)", (2, 0), np.float32),
        ("Div(8.0, ReduceSum(x, [-1]))", (2, 8), np.float32),
    ],
)
def test_what_is_no_mean(text: str, shape: tuple[int, ...], dtype: type) -> None:
    done = run_pass(shaped(text, shape, dtype=dtype), FuseMean())
    assert (done.changes, done.declined) == (0, ())


def test_a_mean_over_an_unknown_size() -> None:
    done = run_pass(shaped("Div(ReduceSum(x, [0, 1]), 8.0)", ("N", 8)), FuseMean())
    assert done.declined == ("the size of an axis is not known",)


def test_a_layer_normalization_whose_means_drop_the_axis() -> None:
    mean = "ReduceMean(x, axes=[-1], keepdims=0)"
    moments = f"Relu(Sub(ReduceMean(Mul(x, x), axes=[-1], keepdims=0), Mul({mean}, {mean})))"
    root = f"Sqrt(Add(Reshape({moments}, [0, 1]), 1e-5))"
    text = f"Mul(Sub(x, Reshape({mean}, [0, 1])), Div(gamma, {root}))"
    model = shaped(text, ("N", 8), weights={"gamma": np.linspace(1, 2, 8, dtype=np.float32)})
    done = run_pass(model, FuseLayernorm())
    assert done.op_types == ["LayerNormalization", "Mul"]
    assert_equivalent(model, done.model, kind="reorder")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 4),
    axis=st.integers(0, 3),
    negative=st.booleans(),
    opset=st.sampled_from([11, 13, 17, 18, 22]),
    name=st.sampled_from(sorted(softmax())),
    share=st.booleans(),
    keepdims=st.booleans(),
)
def test_any_rank_and_axis(
    rank: int, axis: int, negative: bool, opset: int, name: str, share: bool, keepdims: bool
) -> None:
    axis = min(axis, rank - 1)
    place = f"[{axis}]" if opset >= 13 else f"axes=[{axis}]"
    wrapper = "{}" if keepdims else f"Unsqueeze({{}}, {place})"
    text = softmax(axis - rank if negative else axis, opset, wrapper, wrapper, int(keepdims))[name]
    model = shaped(text, (2, 3, 4, 5)[:rank], opset, share=share)
    done = run_pass(model, FuseSoftmax())
    possible = (opset >= 13 or axis == rank - 1) and (share or name != "Softmax")
    if possible and share:
        assert name.split()[0] in done.op_types
    assert_equivalent(model, done.model, kind="reorder")
