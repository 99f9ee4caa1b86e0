"""Weights in few bits: error bounds, closed forms, and what DequantizeLinear gives for them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.quantization import weights
from onnxopt.quantization.formats import FORMATS, QuantParams, dequantize
from onnxopt.quantization.operands import find_weight
from onnxopt.quantization.weights import block_axis, quantize_weight, ternarize, weight_axis
from tests.support import text_model

INTEGERS = ("int8", "int7", "uint8", "int16", "int4", "int3", "uint4", "int2", "uint2")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * rng.uniform(0.01, 3, (shape[0], *[1] * (len(shape) - 1)))).astype(
        np.float32
    )


def spread(params: QuantParams, shape: tuple[int, ...]) -> np.ndarray:
    """The scale of each element."""
    zero = np.zeros_like(params.zero_point)
    return dequantize(
        np.ones(shape, np.int32), QuantParams(params.scale, zero, FORMATS["int8"], params.axis, params.block)
    )


@given(
    st.sampled_from(INTEGERS), st.booleans(), st.sampled_from([None, 0, 1]), st.integers(0, 9), st.booleans()
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_each_element_is_off_by_half_a_step_at_most(
    name: str, symmetric: bool, axis: int | None, block: int, power: bool
) -> None:
    array, form = random(5, 7), FORMATS[name]
    block = 0 if axis is None else block
    ints, params = quantize_weight(
        array, form, axis=axis, symmetric=symmetric, block=block, power_of_two=power
    )
    assert ints.dtype == form.dtype.numpy()
    wide = ints.astype(np.int32)
    assert form.low <= wide.min() <= wide.max() <= form.high
    error = np.abs(dequantize(wide, params) - array)
    assert (error <= spread(params, array.shape) * 0.5001).all()
    if power:
        assert (np.log2(params.scale) % 1 == 0).all()
    if symmetric:
        middle = 0 if form.signed else (form.high + 1) / 2
        assert (params.zero_point == middle).all()
        assert np.abs(wide - middle).max() <= form.high - middle


def test_blocks_are_tensors_of_their_own_and_the_last_one_is_shorter() -> None:
    array = random(3, 70)
    ints, params = quantize_weight(array, FORMATS["int4"], axis=1, block=32)
    assert params.scale.shape == (3, 3)
    for row in range(3):
        for number, start in enumerate((0, 32, 64)):
            part = array[row, start : start + 32]
            alone, own = quantize_weight(part, FORMATS["int4"], axis=None)
            assert own.scale == params.scale[row, number]
            np.testing.assert_array_equal(alone, ints[row, start : start + 32])


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("axis", "block"), [(0, 0), (1, 0), (0, 16), (1, 16)])
def test_a_large_weight_is_quantized_in_pieces(
    monkeypatch: pytest.MonkeyPatch, axis: int, block: int, clip: bool
) -> None:
    array = random(90, 100)
    whole = quantize_weight(array, FORMATS["int4"], axis=axis, block=block, clip=clip)
    monkeypatch.setattr(weights, "_SLAB", 500)
    pieces = quantize_weight(array, FORMATS["int4"], axis=axis, block=block, clip=clip)
    np.testing.assert_array_equal(whole[0], pieces[0])
    np.testing.assert_array_equal(whole[1].scale, pieces[1].scale)
    np.testing.assert_array_equal(whole[1].zero_point, pieces[1].zero_point)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["int8", "int4", "uint4", "float8e4m3fn"])
def test_clipping_never_adds_error_and_removes_some_at_4_bits(name: str, symmetric: bool) -> None:
    array, errors = random(8, 200), []
    for clip in (False, True):
        ints, params = quantize_weight(array, FORMATS[name], axis=0, symmetric=symmetric, clip=clip)
        wide = ints if FORMATS[name].is_float else ints.astype(np.int32)
        errors.append(np.square(dequantize(wide, params) - array).sum(1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    assert errors[1].sum() < errors[0].sum() * (0.95 if "4" in name[:5] else 1.000001)


@pytest.mark.parametrize(("name", "middle"), [("int8", 0), ("uint8", 128)])
def test_a_limit_is_reached_and_not_passed(name: str, middle: int) -> None:
    array = random(4, 50)
    ints, params = quantize_weight(array, FORMATS[name], axis=0, limit=64)
    wide = ints.astype(np.int32) - middle
    assert np.abs(wide).max(axis=1).tolist() == [64] * 4
    np.testing.assert_allclose(params.scale, np.abs(array).max(1) / 64, rtol=1e-6)


def test_binary_and_ternary_weights_have_their_closed_forms() -> None:
    array = np.array([[1, -3, 0.5, -0.1], [0, 0, 0, 0]], np.float32)
    ints, params = ternarize(array, FORMATS["int2"], axis=0)
    assert ints.astype(int).tolist() == [[1, -1, 0, 0], [1, 1, 1, 1]]  # 0.7 * 4.6 / 4 = 0.805
    np.testing.assert_allclose(params.scale, [2.0, 2.0**-100])
    ints, params = ternarize(array, FORMATS["int8"], axis=0, threshold=0)
    assert ints[0].tolist() == [1, -1, 1, -1]
    np.testing.assert_allclose(params.scale[0], 4.6 / 4)


@pytest.mark.parametrize(
    ("call", "shape", "channels", "blocks"),
    [
        ("Conv(x, w)", (6, 4, 3, 3), 0, 1),
        ("ConvTranspose(x, w)", (6, 4, 3, 3), 1, 0),
        ("ConvTranspose<group = 2>(x, w)", (6, 4, 3, 3), 1, 0),
        ("ConvTranspose<group = 6>(x, w)", (6, 1, 3, 3), 0, 1),
        ("Gemm(x, w)", (6, 4), 1, 0),
        ("Gemm<transB = 1>(x, w)", (6, 4), 0, 1),
        ("Gemm(w, x)", (6, 4), 0, 1),
        ("Gemm<transA = 1>(w, x)", (6, 4), 1, 0),
        ("MatMul(x, w)", (2, 6, 4), 2, 1),
        ("MatMul(w, x)", (2, 6, 4), 1, 2),
        ("MatMul(x, w)", (6,), None, None),
        ("Gather(w, x)", (6, 4), 0, None),
        ("Gather<axis = -1>(w, x)", (6, 4), 1, None),
        ("LSTM<hidden_size = 1>(x, w, x)", (1, 4, 3), 1, 2),
        ("com.microsoft.Attention(x, w)", (6, 4), 1, 0),
        ("Add(x, w)", (6, 4), None, None),
    ],
)
def test_axes_of_output_channels_and_of_blocks(
    call: str, shape: tuple[int, ...], channels: int | None, blocks: int | None
) -> None:
    model = ir.from_proto(
        text_model(f"agraph (float[2] x, float{list(shape)} w) => (float[2] y) {{ y = {call} }}")
    )
    node = model.graph[0]
    position = next(i for i, value in enumerate(node.inputs) if value and value.name == "w")
    assert weight_axis(node, position) == channels
    assert block_axis(node, position) == blocks


PATHS = """agraph (float[2] x, float[6, 4] over) => (float[2] y)
    <float[6, 4] w = {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23}, double[2] h = {1, 2},
     float[6, 4] over = {0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23},
     int8[2] q = {1, 2}, float s = {0.5}, int64[3] shape = {6, 2, 2}, int64[2] flat = {-1, 4}> {
        i = Identity(w)
        t = Transpose(i)
        r = Reshape(w, shape)
        rt = Transpose<perm = [2, 0, 1]>(r)
        back = Reshape(rt, flat)
        c = Cast<to = 1>(h)
        qc = Cast<to = 1>(q)
        m = Mul(qc, s)
        d = DequantizeLinear(q, s)
        n = Add(x, s)
        y = Add(x, s)
    }"""


@pytest.mark.parametrize(
    ("name", "source", "axis", "reason"),
    [
        ("w", "w", 1, ""),
        ("t", "w", 0, ""),
        ("r", "w", None, ""),
        ("rt", "w", 0, ""),
        ("c", "c", 0, ""),
        ("m", "m", 0, ""),
        ("q", "q", 0, "is of type INT8"),
        ("d", "d", 0, "is quantized already"),
        ("n", "n", 0, "is computed at run time"),
        ("x", "x", 0, "is computed at run time"),
        ("over", "over", 0, "is a graph input (overridable; --freeze-initializers folds it)"),
    ],
)
def test_where_a_weight_lives(name: str, source: str, axis: int | None, reason: str) -> None:
    model = ir.from_proto(text_model(PATHS))
    values = {value.name: value for node in model.graph for value in (*node.inputs, *node.outputs) if value}
    values["over"] = next(value for value in model.graph.inputs if value.name == "over")
    weight = find_weight(values[name])
    assert (weight.source.name, weight.reason) == (source, reason)
    if reason:
        return
    w = np.arange(24, dtype=np.float32).reshape(6, 4)
    want = {
        "w": w,
        "t": w.T,
        "r": w.reshape(6, 2, 2),
        "rt": w.reshape(6, 2, 2).transpose(2, 0, 1),
        "c": np.array([1, 2]),
        "m": np.array([0.5, 1]),
    }[name]
    np.testing.assert_array_equal(weight.array(17), want)
    assert weight.source_axis(min(1, want.ndim - 1), 17) == axis
