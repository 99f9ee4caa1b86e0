"""dequantize: the floats that integers stand for, held against the float graph written by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.quantize.dequantize import Dequantize
from tests.support import Rewritten, assert_equivalent, execute, run_pass, text_model

RNG = np.random.default_rng(0)
CONSTANTS = """float s = {0.1}, uint8 z = {120}, int8 i8 = {-5}, float two = {2}, float[3] bx = {0.1, -0.2,
        0.3}, float t = {0.2}, uint8 y0 = {100},
    float lo = {-12}, float hi = {13.5}, float tlo = {-20}, float thi = {31}, int8[3,2,1,1] w = {1, 2, -3,
    4, 5, -128},
    float[3,2,1,1] wf = {0.01, 0.02, -0.06, 0.08, 0.15, -3.84}, float[3] ws = {0.01, 0.02, 0.03},
    int8[3] wz = {0, 0, 0},
    int32[3] b = {100, -200, 300}, float[3] bf = {0.1, -0.4, 0.9}, float one = {0.01}, int8 zero = {0},
    int8[2,3] m = {1, 2, 3, -4, 5, 127}, float[2,3] mf = {0.01, 0.04, 0.09, -0.04, 0.1, 3.81},
    int64[2] row = {-1, 2},
    float[2,3] m1 = {0.01, 0.02, 0.03, -0.04, 0.05, 1.27}, bool c = {1},
    int64[8] pads = {0, 0, 1, 0, 0, 0, 0, 2}, float[1] s1 = {0.1},
    float[2] sx = {0.1, 0.2},
    uint8[2] zx = {120, 120}"""
HEAD = '<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>'
CLIPPED = "Clip(x, lo, hi)"


def model(body: str, shape: str = "1,2,3,3", out: str = "float y", head: str = HEAD) -> onnx.ModelProto:
    made = text_model(f"{head} agraph (float[{shape}] x) => ({out}) <{CONSTANTS}> {{ {body} }}")
    made.graph.output[0].type.tensor_type.ClearField("shape")
    return onnx.shape_inference.infer_shapes(made)


def feeds(shape: str = "1,2,3,3") -> dict[str, np.ndarray]:
    return {"x": np.linspace(-16, 18, 18, dtype=np.float32).reshape([int(n) for n in shape.split(",")])}


def becomes(body: str, expected: str, shape: str = "1,2,3,3") -> Rewritten:
    done = run_pass(model(body, shape), Dequantize())
    assert_equivalent(model(expected, shape), done.model, feeds(shape), kind="reorder")
    return done


Q = "q = QuantizeLinear(x, s, z) "
AROUND = [
    ("QLinearConv(q, s, z, w, ws, wz, t, y0)", "Conv(r, wf)"),
    ("QLinearConv(q, s, z, w, ws, wz, t, y0, b)", "Conv(r, wf, bf)"),
    ("com.microsoft.QLinearAdd(q, s, z, q, s, z, t, y0)", "Add(r, r)"),
    ("com.microsoft.QLinearMul(q, s, z, q, s, z, t, y0)", "Mul(r, r)"),
    ("com.microsoft.QLinearWhere(c, q, s, z, q, s, z, t, y0)", "Where(c, r, r)"),
    ("com.microsoft.QLinearSigmoid(q, s, z, t, y0)", "Sigmoid(r)"),
    ("com.microsoft.QLinearLeakyRelu<alpha=0.3>(q, s, z, t, y0)", "LeakyRelu<alpha=0.3>(r)"),
    ("com.microsoft.QLinearSoftmax<opset=13>(q, s, z, t, y0)", "Softmax(r)"),
    (
        "com.microsoft.QLinearAveragePool<kernel_shape=[2,2]>(q, s, z, t, y0)",
        "AveragePool<kernel_shape=[2,2]>(r)",
    ),
    ("com.microsoft.QLinearGlobalAveragePool(q, s1, z, t, y0)", "GlobalAveragePool(r)"),
    ("com.microsoft.QLinearConcat<axis=1>(t, y0, q, s, z, q, s, z)", "Concat<axis=1>(r, r)"),
]


@pytest.mark.parametrize(("quantized", "plain"), AROUND)
def test_quantized_operators(quantized: str, plain: str) -> None:
    body = f"{Q} k = {quantized} y = DequantizeLinear(k, t, y0)"
    done = becomes(body, f"r = {CLIPPED} k = {plain} y = Clip(k, tlo, thi)")
    assert done.declined == ()
    kept = run_pass(model(body), Dequantize(form="qdq"))
    assert kept.count("QuantizeLinear") == 2
    want, have = (execute(one, feeds())[0] for one in (model(body), kept.model))
    assert np.abs(want - have).max() <= 0.2 * 1.001  # one step of the result


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (
            "k = QLinearMatMul(q, s, z, m, ws, wz, t, y0) y = DequantizeLinear(k, t, y0)",
            "k = MatMul(r, mf) y = Clip(k, tlo, thi)",
        ),
        (
            "y = com.microsoft.QGemm<alpha=0.5>(q, s, z, m, one, zero)",
            "h = MatMul(r, m1) y = Div(h, two)",
        ),
        (
            "k = com.microsoft.QGemm(q, s, z, m, one, zero, b, t, y0) y = DequantizeLinear(k, t, y0)",
            "k = Gemm(r, m1, bx) y = Clip(k, tlo, thi)",
        ),
        (
            "y = com.microsoft.MatMulIntegerToFloat(q, m, s, ws, z, wz, bf)",
            "k = MatMul(r, mf) y = Add(k, bf)",
        ),
        ("y = com.microsoft.DynamicQuantizeMatMul(x, m, one, zero, bf)", "k = MatMul(x, m1) y = Add(k, bf)"),
        (
            """d, a, o = DynamicQuantizeLinear(x) i = MatMulInteger(d, m, o, zero) f = Cast<to=1>(i)
                p = Mul(a, ws) y = Mul(f, p)""",
            "y = MatMul(x, mf)",
        ),
        (
            """d, a, o = DynamicQuantizeLinear(x) i = MatMulInteger(d, m, o) f = Cast<to=1>(i)
                p = Mul(f, one) y = Mul(p, a)""",
            "y = MatMul(x, m1)",
        ),
    ],
)
def test_products(body: str, expected: str) -> None:
    quantized = Q if "(q" in body else ""
    done = becomes(quantized + body, f"r = {CLIPPED} {expected}", "9,2")
    assert not {one for one in done.op_types if "Quantize" in one or "Integer" in one}


def test_integer_convolution() -> None:
    moved = """q, a, o = DynamicQuantizeLinear(x) k = Transpose(q) i = ConvInteger(k, v, o) f = Cast<to=1>(i)
        p = Mul(a, one)"""
    becomes(
        f"v = Constant<value = int8[1,3,1,1] {{1, 2, -3}}>() {moved} y = Mul(p, f)",
        "v = Constant<value = float[1,3,1,1] {0.01, 0.02, -0.03}>() k = Transpose(x) y = Conv(k, v)",
    )
    body = """q, a, o = DynamicQuantizeLinear(x) i = ConvInteger(q, w, o, zero) f = Cast<to=1>(i)
        p = Mul(a, {}) y = Mul(f, p)"""
    becomes(
        "k = Constant<value = float[1,3,1,1] {0.01, 0.02, 0.03}>() " + body.format("k"), "y = Conv(x, wf)"
    )
    done = run_pass(model(body.format("one").replace("Mul(a, one)", "Mul(one, one)")), Dequantize())
    assert "its first operand has another scale or zero point" in done.declined


@pytest.mark.parametrize(
    ("move", "plain"),
    [
        ("MaxPool<kernel_shape=[2,2]>(q)", "MaxPool<kernel_shape=[2,2]>(r)"),
        ("Concat<axis=1>(q, q)", "Concat<axis=1>(r, r)"),
        ("Transpose(q)", "Transpose(r)"),
        ("Pad(q, pads, z)", "Pad(r, pads)"),
        ("Reshape(q, row)", "Reshape(r, row)"),
    ],
)
def test_integers_that_are_moved(move: str, plain: str) -> None:
    becomes(f"{Q} k = {move} y = DequantizeLinear(k, s, z)", f"r = {CLIPPED} y = {plain}")


def test_a_relu_that_saturation_stood_for_stays() -> None:
    before = model(
        "u = Constant<value = uint8 {0}>() q = QuantizeLinear(x, s, u) y = DequantizeLinear(q, s, u)"
    )
    done = run_pass(before, Dequantize())
    np.testing.assert_allclose(execute(done.model, feeds())[0], feeds()["x"].clip(0, 25.5), rtol=1e-6)


def test_before_opset_11_bounds_are_attributes() -> None:
    head = '<ir_version: 8, opset_import: ["" : 10]>'
    done = run_pass(model(f"{Q} y = DequantizeLinear(q, s, z)", head=head), Dequantize())
    np.testing.assert_allclose(execute(done.model, feeds())[0], feeds()["x"].clip(-12, 13.5), rtol=1e-6)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = QuantizeLinear(x, s, z)", "a graph output is quantized"),
        (Q + "y = DequantizeLinear(q, t, z)", "scale or zero point differ"),
        (
            "q = QuantizeLinear<axis=1>(x, sx, zx) y = DequantizeLinear<axis=1>(q, sx, zx)",
            "activations are quantized by channel",
        ),
        (Q + "y = MatMulInteger(q, q)", "no float form of MatMulInteger is known"),
        (
            Q + "k = Pad(q, pads) y = DequantizeLinear(k, s, z)",
            "it is padded with 0, whatever that stands for",
        ),
        (Q + "k = Cast<to=3>(q) y = DequantizeLinear(k, s, i8)", "Cast makes the integers"),
        (
            Q + "k = com.microsoft.QLinearSoftmax<opset=12>(q, s, z, t, y0) y = DequantizeLinear(k, t, y0)",
            "it is the Softmax of another opset",
        ),
        (
            """a = ReduceMax<keepdims=0>(x) e = Clip(a, one, t) q = QuantizeLinear(x, e, z)
                y = DequantizeLinear(q, e, z)""",
            "scale or zero point are computed at run time",
        ),
        (
            """a = ReduceMax<keepdims=0>(x) e = Clip(a, one, t) q = QuantizeLinear(x, e, z)
                k = com.microsoft.QLinearSigmoid(q, e, z, t, y0)
                y = DequantizeLinear(k, t, y0)""",
            "scale or zero point are computed at run time",
        ),
    ],
)
def test_what_is_left_is_named(body: str, reason: str) -> None:
    out = {"y = Q": "uint8 y", "y = M": "int32 y"}.get(body[body.index("y = ") :][:5], "float y")
    done = run_pass(model(body, out=out), Dequantize())
    assert reason in done.declined


def test_an_input_of_integers_stays() -> None:
    before = text_model(
        f"agraph (uint8[2] q) => (float[2] y) <{CONSTANTS}> {{ y = DequantizeLinear(q, s, z) }}"
    )
    done = run_pass(before, Dequantize())
    assert done.declined == ("a graph input or a constant of an unknown type is quantized",)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("columns", [32, 40])
def test_weights_in_blocks(bits: int, zeros: bool, columns: int) -> None:
    rows, size = 3, 16
    blocks = -(-columns // size)
    held: dict[str, np.ndarray] = {
        "b": RNG.integers(0, 256, (rows, blocks, size * bits // 8)).astype(np.uint8),
        "e": RNG.uniform(0.1, 1, (rows, blocks)).astype(np.float32).reshape(-1),
        "o": RNG.integers(0, 256, (rows, -(-blocks * bits // 8))).astype(np.uint8).reshape(-1),
    }
    how = f"K={columns}, N={rows}, bits={bits}, block_size={size}"
    before = text_model(f"""{HEAD} agraph (float[5,{columns}] x) => (float[5,{rows}] y) {{
        y = com.microsoft.MatMulNBits<{how}>(x, b, e{", o" if zeros else ""}) }}""")
    before.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in held.items())
    done = run_pass(before, Dequantize())
    assert done.op_types == ["MatMul"]
    feed = {"x": RNG.normal(size=(5, columns)).astype(np.float32)}
    assert_equivalent(before, done.model, feed, kind="reorder")


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_stored_weights_of_any_type(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["int8", "uint8", "int16", "int4", "uint4", "int32", "float8e4m3fn"]))
    block = data.draw(st.sampled_from([0, 2])) if kind != "int32" else 0
    axis = data.draw(st.sampled_from([0, 1, -1]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    sizes = [4, 6] if block else [(4, 6)[axis]]
    if block:
        sizes[axis] //= 2
    elem = getattr(onnx.TensorProto, kind.upper())
    dtype = onnx.helper.tensor_dtype_to_np_dtype(elem)
    w, z = rng.integers(0, 7, (4, 6)).astype(dtype), rng.integers(0, 7, sizes).astype(dtype)
    given_zero = data.draw(st.booleans()) and kind not in ("int32", "float8e4m3fn")
    how = f"<axis={axis}{f', block_size={block}' if block else ''}>"
    before = text_model(f"""<ir_version: 10, opset_import: ["" : 21]> agraph (float[4,6] x)
        => (float[4,6] y) {{
        d = DequantizeLinear{how}(w, s{", z" if given_zero else ""}) y = Add(x, d) }}""")
    for name, array in {"w": w, "s": rng.uniform(0.1, 1, sizes).astype(np.float32), "z": z}.items():
        if name != "z" or given_zero:
            before.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    done = run_pass(before, Dequantize())
    assert done.op_types == ["Add"]
    assert_equivalent(before, done.model, {"x": np.zeros((4, 6), np.float32)})
