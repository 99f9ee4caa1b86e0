"""retarget-quantized: other integers, other zero points, the same numbers bit by bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, nodes
from onnxopt.passes.retarget.retarget_quantized import RetargetQuantized
from onnxopt.recipe import parse_pass
from tests.support import Rewritten, assert_equivalent, run_pass, text_model

RNG = np.random.default_rng(0)
IMAGE = {"x": RNG.normal(size=(1, 2, 6, 6)).astype(np.float32) * 9}
TENSORRT = RetargetQuantized(activations="int8", weights="int8", symmetric=True, biases="float")
CONSTANTS = """float s = {0.1}, float t = {0.05}, float ws = {0.01}, float[1] one = {0.1}, int8 z = {-3},
    int8 zero = {0}, uint8 u = {131}, uint8 mid = {128}, int8 five = {5}, float[3] sc = {0.1, 0.2, 0.3},
    int8[3] zc = {-1, 0, 1}, int64[4] flat = {1, 1, 2, -1}, int64[2] row = {1, -1},
    int64[8] pads = {0, 0, 1, 0, 0, 0, 0, 2}, float[4] sizes = {1, 1, 2, 2},
    int64[1] axis = {1}, int64[1] from = {0}, int64[1] to = {1},
    int8[1,2,6,6] more = {%s}, uint8[2,2,1,1] w = {1, 255, 128, 0}, int8[2,2,1,1] v = {1, -128, 127, 0},
    int32[2] b = {100, -200}, uint8[3,2] m = {0, 255, 3, 128, 5, 6}, uint8[3] mc = {127, 128, 129},
    int64[2] pair = {0, 1}, int64[2] pair3 = {2, 3}, int64[2] pairs = {-1, 2}, int64[1] zero2 = {0},
        int64[1] two = {2}""" % ", ".join(  # noqa: UP031
    str(int(i)) for i in RNG.integers(-128, 128, 72)
)


def types_of(done: Rewritten, op_type: str, place: int) -> set[str]:
    """Types of an input of all nodes of an operator."""
    found = [node.inputs[place] for node in nodes(done.model) if node.op_type == op_type]
    return {value.dtype.name for value in found if value is not None and value.dtype is not None}


def rewritten(
    body: str, one: RetargetQuantized | None = None, *, out: str = "float y", opset: int = 17
) -> Rewritten:
    text = f"""<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]>
        agraph (float[1,2,6,6] x) => ({out}) <{CONSTANTS}> {{ {body} }}"""
    before = text_model(text)
    before.graph.output[0].type.tensor_type.ClearField("shape")
    before = onnx.shape_inference.infer_shapes(before)
    done = run_pass(before, one or RetargetQuantized())
    assert_equivalent(before, done.model, IMAGE)
    return done


MOVES = [
    "Transpose<perm=[0,2,3,1]>(q)",
    "Reshape(q, flat)",
    "Flatten(q)",
    "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1], strides=[2,2]>(q)",
    "Concat<axis=1>(q, more)",
    "Concat<axis=1>(more, q, q)",
    "Slice(q, from, to, axis)",
    "Gather<axis=1>(q, axis)",
    'Resize<mode="nearest">(q, , sizes)',
    "Pad(q, pads, five)",
    'Pad<mode="reflect">(q, pads)',
    "Pad(q, pads)",
    "Pad(q, pads, z)",
    "Max(q, more)",
    "ReduceMax<axes=[2], keepdims=0>(q)",
    "DepthToSpace<blocksize=1>(q)",
    "Identity(q)",
]


@pytest.mark.parametrize("move", MOVES)
def test_all_that_moves_integers_moves_the_others(move: str) -> None:
    done = rewritten(f"q = QuantizeLinear(x, s, z) p = {move} y = DequantizeLinear(p, s, z)")
    assert (done.changes, done.declined) == (1, ())
    assert types_of(done, "DequantizeLinear", 0) == types_of(done, "DequantizeLinear", 2) == {"UINT8"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) y = Identity(q)",
            "read as an output of its graph",
        ),
        ("q = QuantizeLinear(x, s, z) c = Cast<to=1>(q) y = Mul(c, s)", "read by Cast"),
        (
            "q = QuantizeLinear(x, s, z) c = Cast<to=1>(q) d = Cast<to=3>(c) y = DequantizeLinear(d, s, z)",
            "made by Cast",
        ),
        (
            'q = QuantizeLinear(x, s, z) p = Resize<mode="linear">(q, , sizes) y = DequantizeLinear(p, s, z)',
            "by Resize",
        ),
    ],
)
def test_what_does_not_know_the_other_type_keeps_it(body: str, reason: str) -> None:
    done = rewritten(body, out="int8 y" if "y = Identity" in body else "float y")
    assert done.changes == 0
    assert any(reason in one for one in done.declined)


def test_a_graph_input_of_integers_stays_and_what_does_not_touch_it_goes() -> None:
    before = text_model(f"""agraph (int8[1,2,6,6] q) => (float y) <{CONSTANTS}> {{
        a = DequantizeLinear(q, s, z) r = Relu(a) p = QuantizeLinear(r, t, z) y = DequantizeLinear(p, t, z)
        }}""")
    before.graph.output[0].type.tensor_type.ClearField("shape")
    done = run_pass(before, RetargetQuantized())
    assert done.changes == 1
    assert done.declined == ("quantized values are made outside of the graph: an input keeps its type",)
    feed = {"q": RNG.integers(-128, 128, (1, 2, 6, 6)).astype(np.int8)}
    assert_equivalent(before, done.model, feed)


def test_zero_points_computed_at_run_time_stay() -> None:
    done = rewritten("""f = ReduceMax<keepdims=0>(x) c = Clip(f, s, s) k = QuantizeLinear(c, s, zero)
        q = QuantizeLinear(x, s, k) y = DequantizeLinear(q, s, k)""")
    assert "a zero point is computed at run time" in done.declined


def test_dynamic_quantization_gives_no_int8() -> None:
    done = rewritten("q, a, o = DynamicQuantizeLinear(x) y = DequantizeLinear(q, a, o)", TENSORRT)
    assert done.declined == ("a zero point is computed at run time",)


@pytest.mark.parametrize(
    ("weight", "zero", "bias", "changes"),
    [("w", ", mid", "", 2), ("w", "", ", c", 2), ("v", ", zero", "", 1), ("v", "", ", c", 1)],
)
def test_weights_of_a_convolution(weight: str, zero: str, bias: str, changes: int) -> None:
    done = rewritten(f"""q = QuantizeLinear(x, s, z) a = DequantizeLinear(q, s, z) c = DequantizeLinear(b, t)
        f = DequantizeLinear({weight}, ws{zero}) y = Conv(a, f{bias})""")
    assert done.changes == changes
    assert types_of(done, "DequantizeLinear", 0) - {"INT32"} == {"INT8", "UINT8"}


PAIR = "h = Gather<axis=3>(x, pair) "
WEIGHTS = [
    "f = DequantizeLinear(w, ws, mid) y = ConvTranspose(x, f)",
    PAIR + "k = DequantizeLinear(m, ws, mid) f = Transpose(k) y = MatMul(h, f)",
    PAIR + "k = Transpose(m) f = DequantizeLinear(k, ws, mid) y = MatMul(h, f)",
    PAIR + "k = Reshape(m, pair3) f = DequantizeLinear<axis=1>(k, sc, mc) y = MatMul(h, f)",
    PAIR + "g = Reshape(h, pairs) f = DequantizeLinear<axis=0>(m, sc, mc) y = Gemm<transB=1>(g, f)",
    PAIR + "c = Constant<value = uint8[2,2] {1,2,3,255}>() f = DequantizeLinear(c, ws) y = MatMul(h, f)",
    PAIR
    + """k = Transpose(m) f = DequantizeLinear(k, ws, mid) e = DequantizeLinear(k, t, mid)
        p = MatMul(h, f) o = MatMul(h, e) y = Add(p, o)""",
    PAIR
    + """k = Transpose(m) q, a, o = DynamicQuantizeLinear(h) i = MatMulInteger(q, k, o, mid) c = Cast<to=1>(i)
        y = Mul(c, a)""",
    PAIR + "k = Transpose(m) q, a, o = DynamicQuantizeLinear(h) i = MatMulInteger(q, k) y = Cast<to=1>(i)",
    PAIR + "k = Transpose(m) y = com.microsoft.DynamicQuantizeMatMul(h, k, ws, mid)",
]


@pytest.mark.parametrize("body", WEIGHTS)
def test_stored_weights_become_signed(body: str) -> None:
    done = rewritten(body)
    assert (done.changes, done.declined) == (1, ())
    held = [value for value in done.model.graph.initializers.values() if value.name in ("w", "m")]
    held += [node.outputs[0] for node in nodes(done.model) if node.op_type == "Constant"]
    read = [value for value in held if value.uses()]
    assert read
    assert {value.dtype for value in read} == {ir.DataType.INT8}


def test_weights_of_integer_convolutions_become_unsigned() -> None:
    body = "q, a, o = DynamicQuantizeLinear(x) i = ConvInteger(q, {}, o, {}) c = Cast<to=1>(i) y = Mul(c, a)"
    done = rewritten(body.format("v", "five"))
    assert (done.changes, types_of(done, "ConvInteger", 1)) == (1, {"UINT8"})
    done = rewritten(body.format("w", "mid"))
    assert (done.changes, types_of(done, "ConvInteger", 1)) == (0, {"UINT8"})


def test_a_weight_that_is_an_activation_too_stays() -> None:
    done = rewritten(
        PAIR
        + """k = Slice(m, zero2, two) f = DequantizeLinear(k, ws, mid) p = MatMul(h, f)
            r = ReduceMax<keepdims=0>(f) y = Add(p, r)""",
        RetargetQuantized(activations="keep"),
    )
    assert done.declined == ("a stored operand is read as a weight and as an activation",)


def test_a_weight_that_the_user_may_set_stays() -> None:
    before = text_model(f"""agraph (float[1,2,6,6] x, uint8[2,2,1,1] w) => (float y) <{CONSTANTS}> {{
        f = DequantizeLinear(w, ws, mid) y = Conv(x, f) }}""")
    before.graph.output[0].type.tensor_type.ClearField("shape")
    done = run_pass(before, RetargetQuantized())
    assert done.declined == ("quantized values are made outside of the graph: an input keeps its type",)


def test_quantized_operators_change_as_a_whole() -> None:
    done = rewritten("""q = QuantizeLinear(x, s, z) c = QLinearConv(q, s, z, v, ws, zero, t, five, b)
        a = com.microsoft.QLinearAdd(q, s, z, c, t, five, s, five)
        p = com.microsoft.QLinearGlobalAveragePool(a, s,
        five, t, z) g = com.microsoft.QLinearSigmoid(p, t, z, s, zero)
        k = com.microsoft.QLinearConcat<axis=1>(s, z,
        g, s, zero, p, t, z) y = DequantizeLinear(k, s, z)""")
    assert (done.changes, done.declined) == (1, ())
    assert types_of(done, "QLinearConv", 0) == types_of(done, "QLinearConcat", 5) == {"UINT8"}
    assert types_of(done, "QLinearConv", 3) == {"INT8"}


def test_unsigned_weights_of_a_quantized_operator_go_first() -> None:
    body = """q = QuantizeLinear(x, s, mid) c = QLinearConv(q, s, mid, w, ws, mid, t, mid)
        y = DequantizeLinear(c, t, mid)"""
    done = rewritten(body, TENSORRT)
    assert types_of(done, "QLinearConv", 0) == types_of(done, "QLinearConv", 3) == {"INT8"}
    done = rewritten(body, RetargetQuantized(activations="int8", weights="keep"))
    assert done.declined == ("no operator multiplies int8 activations by uint8 weights",)


def test_for_tensorrt_only_what_needs_no_rounding() -> None:
    body = """q = QuantizeLinear(x, s, {0}) a = DequantizeLinear(q, s, {0}) f = DequantizeLinear(w, ws, mid)
        c = DequantizeLinear(b, t) y = Conv(a, f, c)"""
    done = rewritten(body.format("mid"), TENSORRT)
    assert types_of(done, "DequantizeLinear", 0) == {"INT8"}
    zeros = [
        constant_array(node.inputs[2]) for node in nodes(done.model) if node.op_type == "DequantizeLinear"
    ]
    assert all(zero is not None and not zero.any() for zero in zeros)
    done = rewritten(body.format("u"), TENSORRT)
    assert done.declined == ("the zero point would not be 0, which takes rounding anew",)
    done = rewritten(body.format("five"), TENSORRT)
    assert "the zero point would not be 0, which takes rounding anew" in done.declined


def test_bodies_and_functions_are_graphs_too() -> None:
    before = text_model("""<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (float[1,2] x, bool c) => (float[1,2] y) <float s = {0.1}, int8 z = {7}> {
            q = QuantizeLinear(x, s, z)
            b = If (c) <
                then_branch = yes () => (float[1,2] a) { a = DequantizeLinear(q, s, z) },
                else_branch = no () => (float[1,2] d) { n = Neg(x) p = QuantizeLinear(n, s, z)
                    d = DequantizeLinear(p, s, z) }>
            y = local.twice(b)
        }
        <opset_import: ["" : 17], domain: "local"> twice (x) => (y) {
            s = Constant<value = float {0.2}>() z = Constant<value = int8 {-9}>()
            q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }""")
    done = run_pass(before, RetargetQuantized())
    assert (done.changes, done.declined) == (3, ())
    for c in (True, False):
        feed = {"x": np.array([[-3, 5]], np.float32), "c": np.array(c)}
        assert_equivalent(before, done.model, feed)


def test_the_type_may_be_an_attribute() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]> agraph (float[2,3] x) => (float y)
        <float[3] s = {0.1, 0.2, 0.3}> { q = QuantizeLinear<axis=1, output_dtype=3>(x, s)
        y = DequantizeLinear<axis=1>(q, s) }"""
    before = text_model(text)
    before.graph.output[0].type.tensor_type.ClearField("shape")
    done = run_pass(before, RetargetQuantized())
    assert types_of(done, "DequantizeLinear", 0) == types_of(done, "DequantizeLinear", 2) == {"UINT8"}
    assert_equivalent(before, done.model, {"x": RNG.normal(size=(2, 3)).astype(np.float32) * 20})


def test_one_name_per_option() -> None:
    assert str(TENSORRT) == "retarget-quantized{activations=int8,symmetric=true,biases=float}"
    with pytest.raises(UsageError, match="int8 activations by uint8 weights"):
        parse_pass("retarget-quantized{activations=int8,weights=uint8}")


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=50)
def test_any_types_and_zero_points_give_the_same_bits(data: st.DataObject) -> None:
    kinds: tuple[type[np.int8 | np.uint8], ...] = (np.int8, np.uint8)
    act, weight = data.draw(st.sampled_from(kinds)), data.draw(st.sampled_from(kinds))
    channels = data.draw(st.booleans())
    form = data.draw(st.sampled_from(["Conv", "MatMul", "ConvTranspose"]))
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))

    def integers(kind: type[np.int8 | np.uint8], shape: tuple[int, ...]) -> np.ndarray:
        info = np.iinfo(kind)
        return rng.integers(info.min, info.max + 1, shape).astype(kind)

    w = integers(weight, (3, 3, 2, 2) if form != "MatMul" else (3, 3))
    held = {
        "s": np.float32(rng.uniform(0.01, 0.2)),
        "z": integers(act, ()),
        "w": w,
        "ws": rng.uniform(0.01, 0.2, 3 if channels else ()).astype(np.float32),
        "wz": integers(weight, (3,) if channels else ()),
        "t": np.float32(rng.uniform(0.01, 2)),
        "y0": integers(act, ()),
    }
    axis = {"Conv": 0, "ConvTranspose": 1, "MatMul": 1}[form]
    graph = text_model(f"""agraph (float[1,3,3,3] x) => (float y) {{ q = QuantizeLinear(x, s, z)
        a = DequantizeLinear(q, s, z) f = DequantizeLinear<axis={axis}>(w, ws, wz) p = {form}(a, f)
        r = Relu(p) o = QuantizeLinear(r, t, y0) m = Concat<axis=1>(o, o) y = DequantizeLinear(m, t, y0)
        }}""")
    graph.graph.initializer.extend(onnx.numpy_helper.from_array(np.asarray(v), k) for k, v in held.items())
    graph.graph.output[0].type.tensor_type.ClearField("shape")
    one = data.draw(st.sampled_from([RetargetQuantized(), TENSORRT, RetargetQuantized("uint8", "uint8")]))
    done = run_pass(graph, one)
    assert_equivalent(graph, done.model, {"x": rng.normal(size=(1, 3, 3, 3)).astype(np.float32) * 9})
    if not one.symmetric:
        assert types_of(done, "QuantizeLinear", 2) == {"UINT8"}
        assert str(done.model.graph.initializers["w"].dtype) == one.weights.upper()


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, feeds: list[dict[str, np.ndarray]]) -> None:
        self._left = iter(feeds)

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self._left, None)


@pytest.mark.parametrize("form", [QuantFormat.QDQ, QuantFormat.QOperator])
@pytest.mark.parametrize("kind", [QuantType.QInt8, QuantType.QUInt8])
def test_a_file_of_the_quantizer_of_the_runtime(form: QuantFormat, kind: QuantType, tmp_path: Path) -> None:
    float_model = text_model(f"""agraph (float[1,2,6,6] x) => (float[1,3,3,3] y)
        <float[3,2,3,3] k = {{{", ".join(f"{i:.3f}" for i in RNG.normal(size=54))}}},
         float[3] b = {{0.1, -0.2, 0.3}}, float[3,3,1,1] n = {{1, -1, 2, 0.5, 0.3, 3, 2, 1, -2}}> {{
        c = Conv<pads=[1,1,1,1]>(x, k, b) r = Relu(c) p = MaxPool<kernel_shape=[2,2], strides=[2,2]>(r)
        d = Conv(p, n, b) y = Add(d, p) }}""")
    onnx.save(float_model, tmp_path / "float.onnx")
    feeds = [{"x": RNG.normal(size=(1, 2, 6, 6)).astype(np.float32)} for _ in range(4)]
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "int8.onnx",
        Reader(feeds),
        quant_format=form,
        activation_type=kind,
        weight_type=kind,
    )
    before = onnx.load(tmp_path / "int8.onnx")
    done = run_pass(before, RetargetQuantized())
    assert_equivalent(before, done.model, feeds)
    assert types_of(done, "QuantizeLinear", 2) == {"UINT8"}
    held = [t for t in done.model.graph.initializers.values() if t.name and t.name.endswith("_quantized")]
    assert {value.dtype for value in held} >= {ir.DataType.INT8}
    assert ir.DataType.UINT8 not in {value.dtype for value in held}
