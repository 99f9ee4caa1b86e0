"""quantize-relu: the same integers where nothing was held at the end of the range."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.graph import nodes
from onnxopt.passes.quantize.quantize_relu import QuantizeRelu
from tests.support import Rewritten, execute, run_pass, text_model

CONSTANTS = """float s = {0.1}, float t = {0.2}, int8 z = {0}, uint8 mid = {128}, int8 other = {5},
    float low = {0.5}, float six = {6}, int8[1,4] held = {1, 2, 3, 4}"""
SMALL = {"x": np.array([[-3, 0.14, 2, 12.7]], np.float32)}
LARGE = {"x": np.array([[-3, 12.9, 25.4, 30]], np.float32)}


def made(body: str, out: str = "float[1,4] y") -> onnx.ModelProto:
    before = text_model(f"agraph (float[1,4] x) => ({out}) <{CONSTANTS}> {{ {body} }}")
    before.graph.output[0].type.tensor_type.ClearField("shape")
    return before


def zero_types(done: Rewritten) -> list[ir.DataType | None]:
    ends = ("QuantizeLinear", "DequantizeLinear")
    return [node.inputs[2].dtype for node in nodes(done.model) if node.op_type in ends and node.inputs[2]]


@pytest.mark.parametrize("zero", ["z", "mid"])
def test_integers_stay_and_the_range_doubles(zero: str) -> None:
    before = made(f"r = Relu(x) q = QuantizeLinear(r, s, {zero}) y = DequantizeLinear(q, s, {zero})")
    done = run_pass(before, QuantizeRelu())
    assert (done.changes, zero_types(done)) == (1, [ir.DataType.UINT8] * 2)
    np.testing.assert_array_equal(execute(before, SMALL)[0], execute(done.model, SMALL)[0])
    np.testing.assert_allclose(execute(before, LARGE)[0], [[0, 12.7, 12.7, 12.7]], rtol=1e-6)
    np.testing.assert_allclose(execute(done.model, LARGE)[0], [[0, 12.9, 25.4, 25.5]], rtol=1e-6)


@pytest.mark.parametrize(
    "steps",
    [
        "r = Sigmoid(x)",
        "r = Clip(x, low, six)",
        "p = Relu(x) r = Transpose(p)",
        "p = Relu(x) k = Add(p, p) r = Mul(k, p)",
        "p = Relu(x) r = Concat<axis=1>(p, p)",
        "p = Relu(x) k = QuantizeLinear(p, t, z) m = Identity(k) r = DequantizeLinear(m, t, z)",
    ],
)
def test_what_stays_above_zero(steps: str) -> None:
    done = run_pass(
        made(f"{steps} q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"), QuantizeRelu()
    )
    assert set(zero_types(done)) == {ir.DataType.UINT8}


@pytest.mark.parametrize(
    "steps",
    ["r = Neg(x)", "r = Clip(x, , six)", "p = Relu(x) r = Add(p, x)", "p = Relu(x) r = Concat<axis=0>(p, x)"],
)
def test_what_may_be_negative_stays(steps: str) -> None:
    done = run_pass(
        made(f"{steps} q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"), QuantizeRelu()
    )
    assert (done.changes, done.declined) == (0, ())


@pytest.mark.parametrize(
    ("body", "out", "reason"),
    [
        ("y = QuantizeLinear(r, s, z)", "int8 y", "read as an output of its graph"),
        ("q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, other)", "float y", "zero points differ"),
        (
            "q = QuantizeLinear(r, s, z) c = Concat<axis=0>(q, held) y = DequantizeLinear(c, s, z)",
            "float y",
            "stored",
        ),
    ],
)
def test_what_cannot_change(body: str, out: str, reason: str) -> None:
    done = run_pass(made(f"r = Relu(x) {body}", out), QuantizeRelu())
    assert done.changes == 0
    assert reason in done.declined[0]


def test_rounding_in_front_of_a_relu_goes() -> None:
    body = """p = QuantizeLinear(x, t, z) d = DequantizeLinear(p, t, z) r = Relu(d)
        q = QuantizeLinear(r, s, z) y = DequantizeLinear(q, s, z)"""
    done = run_pass(made(body), QuantizeRelu())
    assert done.op_types == ["Relu", "QuantizeLinear", "DequantizeLinear"]
    np.testing.assert_allclose(execute(done.model, SMALL)[0], [[0, 0.1, 2, 12.7]], rtol=1e-6)
    kept = run_pass(made(body.replace("Relu(d)", "Relu(d) o = Neg(d)")), QuantizeRelu())
    assert "the value in between is read elsewhere too" in kept.declined
    last = run_pass(
        made("p = QuantizeLinear(x, t, z) d = DequantizeLinear(p, t, z) y = Relu(d)"), QuantizeRelu()
    )
    assert last.changes == 0
