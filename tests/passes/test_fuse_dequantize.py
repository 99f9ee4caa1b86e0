"""fuse-dequantize: one form of stored weights, bit-equal in the runtime."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.graph import constant_array
from onnxopt.passes.fuse.fuse_dequantize import FuseDequantize
from tests.support import Rewritten, assert_equivalent, execute, run_pass, text_model

CONSTANTS = """int8[2,3] w = {1, -128, 127, 0, -5, 60}, float s = {0.013}, float[3] c = {0.1, 0.02, -3},
    float[2,1] r = {0.3, 0.07}, float[1,1] o = {0.3}, float[2,3] each = {1, 2, 3, 4, 5, 6},
    float[4,1,1] far = {1, 2, 3, 4},
    float z = {7}, float[3] zc = {1, -128, 127}, float half = {0.5}, float much = {300}, float[2,3] f = {1,
    -2, 300, 0.5, 0.05, 0.15},
    uint8 u = {128}, float[3] cp = {0.1, 0.02, 3}, int8[3] zi = {1, 2, 3}"""


def rewritten(body: str, opset: int = 17) -> Rewritten:
    before = text_model(f"""<ir_version: 10, opset_import: ["" : {opset}]>
        agraph (float[2,3] x, float dyn) => (float y) <{CONSTANTS}> {{ {body} }}""")
    before.graph.output[0].type.tensor_type.ClearField("shape")
    done = run_pass(before, FuseDequantize())
    feed = {"x": np.ones((2, 3), np.float32), "dyn": np.array(0.3, np.float32)}
    assert_equivalent(before, done.model, feed)
    return done


@pytest.mark.parametrize("scale", ["s", "c", "r", "o"])
@pytest.mark.parametrize("zero", ["", "z", "zc"])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_cast_and_scaled_weight(scale: str, zero: str, swapped: bool) -> None:
    value = "b" if zero else "a"
    less = f"b = Sub(a, {zero})" if zero else ""
    product = f"Mul({scale}, {value})" if swapped else f"Mul({value}, {scale})"
    done = rewritten(f"a = Cast<to=1>(w) {less} d = {product} y = Add(x, d)")
    if (scale, zero) == ("r", "zc"):
        assert done.declined == ("the scales differ along several axes",)
    else:
        assert done.op_types == ["DequantizeLinear", "Add"]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("a = Cast<to=1>(w) y = Mul(a, dyn)", "scale or zero point are no constants"),
        ("a = Cast<to=1>(w) y = Mul(a, each)", "the scales differ along several axes"),
        ("a = Cast<to=1>(w) y = Mul(a, far)", "the scale makes the result larger than the weight"),
        (
            "a = Cast<to=1>(w) b = Sub(a, half) y = Mul(b, s)",
            "the zero point is no number of the weight's type",
        ),
        (
            "a = Cast<to=1>(w) b = Sub(a, much) y = Mul(b, s)",
            "the zero point is no number of the weight's type",
        ),
        (
            "q = QuantizeLinear(f, dyn, u) y = DequantizeLinear(q, s, u)",
            "scale or zero point are computed at run time",
        ),
    ],
)
def test_what_has_no_such_form(body: str, reason: str) -> None:
    done = rewritten(body)
    assert (done.changes, done.declined) == (0, (reason,))


def test_other_casts_are_no_weights() -> None:
    done = rewritten("a = Cast<to=11>(w) b = Cast<to=1>(a) y = Mul(b, s)")
    assert (done.changes, done.declined) == (0, ())


def test_by_channel_it_takes_opset_13() -> None:
    done = rewritten("a = Cast<to=1>(w) y = Mul(a, c)", opset=12)
    assert done.declined == ("DequantizeLinear of such a weight came with opset 13",)
    assert rewritten("a = Cast<to=1>(w) y = Mul(a, s)", opset=12).changes == 1


@pytest.mark.parametrize("zero", ["", ", u", ", zi"])
def test_a_stored_weight_that_is_quantized_when_it_runs(zero: str) -> None:
    how, scale = ("<axis=1>", "cp") if zero == ", zi" else ("", "s")
    done = rewritten(
        f"q = QuantizeLinear{how}(f, {scale}{zero}) d = DequantizeLinear{how}(q, {scale}{zero}) y = Add(x, d)"
    )
    assert done.op_types == ["DequantizeLinear", "Add"]


@given(data=st.data())
@settings(derandomize=True, deadline=None, max_examples=40)
def test_any_numbers_round_as_in_the_runtime(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 1000)))
    kind, block = data.draw(
        st.sampled_from(
            [(np.int8, 0), (np.uint8, 0), (np.int16, 0), (np.int8, 2), (ml_dtypes.float8_e4m3fn, 0)]
        )
    )
    shape = (4, 6)
    axis = data.draw(st.sampled_from([0, 1, -1]))
    sizes = [shape[axis]] if not block else [(n // 2 if i == axis % 2 else n) for i, n in enumerate(shape)]
    scale = rng.uniform(0.01, 1, sizes).astype(np.float32)
    zero = (
        np.zeros(sizes, kind) if kind not in (np.int8, np.uint8) else rng.integers(0, 99, sizes).astype(kind)
    )
    weight = np.round(rng.normal(size=shape) * 20, 2).astype(np.float32)
    weight.flat[:3] = scale.flat[0] * np.array([0.5, 1.5, -2.5], np.float32)  # halfway
    how = f"<axis={axis}{f', block_size={block}' if block else ''}>"
    before = text_model(f"""<ir_version: 10, opset_import: ["" : 21]> agraph () => (float[4,6] y) {{
        q = QuantizeLinear{how}(w, s, z) y = DequantizeLinear{how}(q, s, z) }}""")
    for name, array in {"w": weight, "s": scale, "z": zero}.items():
        before.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    done = run_pass(before, FuseDequantize())
    assert done.op_types == ["DequantizeLinear"]
    assert_equivalent(before, done.model, {})


def test_a_graph_output_of_stored_integers_stays_an_output() -> None:
    before = text_model(f"""agraph () => (uint8[2,3] y) <{CONSTANTS}> {{ y = QuantizeLinear(f, s, u) }}""")
    done = run_pass(before, FuseDequantize())
    assert done.declined == ("is a graph output whose value comes from outside the graph",)
    assert constant_array(done.model.graph.outputs[0]) is None
    assert execute(before, {})[0].dtype == np.uint8
