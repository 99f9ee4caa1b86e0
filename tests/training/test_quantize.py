"""Quantization in torch is that of ONNX Runtime, bit for bit; and its gradients are those of LSQ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto as T

from onnxopt.runtimes import open_session
from onnxopt.training import to_torch
from onnxopt.training.interpreter.ops.quantize import fake_quantize
from tests.support import execute, text_model

INTEGERS = ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4", "INT2", "UINT2")
FLOATS = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")
SHAPE = (32, 40)
GRAINS: dict[str, tuple[int, int, tuple[int, ...]]] = {
    "tensor": (1, 0, ()),
    "axis 0": (0, 0, (32,)),
    "axis 1": (1, 0, (40,)),
    "axis -1": (-1, 0, (40,)),
    "blocks of 16 along 0": (0, 16, (2, 40)),
    "blocks of 8 along 1": (1, 8, (32, 5)),
    "blocks of 16 along 1": (1, 16, (32, 3)),  # the last is half a block
}
"""Axis, block size, and the shape of the scales."""


def pair(kind: str, scale: np.ndarray, zero: np.ndarray | None, **options: Any) -> onnx.ModelProto:
    """DequantizeLinear(QuantizeLinear(x)) of one domain; scales are of the type of x."""
    domain, shown, grain = options.pop("domain", ""), options.pop("shown", False), {**options}
    dtype, floats = getattr(T, kind), onnx.helper.np_dtype_to_tensor_dtype(scale.dtype)
    held = [onnx.numpy_helper.from_array(scale, "s")]
    if zero is None:
        options["output_dtype"] = dtype
    else:
        held.append(onnx.helper.make_tensor("z", dtype, scale.shape, zero.reshape(-1).tolist()))
    names = [one.name for one in held]
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", *names], ["q"], domain=domain, **options),
        onnx.helper.make_node("DequantizeLinear", ["q", *names], ["y"], domain=domain, **grain),
    ]
    inputs = [onnx.helper.make_tensor_value_info("x", floats, SHAPE)]
    outputs = [onnx.helper.make_tensor_value_info("y", floats, SHAPE)]
    if shown:
        outputs.append(onnx.helper.make_tensor_value_info("q", dtype, SHAPE))
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, held)
    opsets = [onnx.helper.make_opsetid("", 25), onnx.helper.make_opsetid("com.microsoft", 1)]
    return onnx.helper.make_model(graph, opset_imports=opsets, ir_version=13)


def hard(scale: np.ndarray, most: float) -> np.ndarray:
    """Ties on both sides of zero, their neighbours, what saturates, and everything between."""
    rng = np.random.default_rng(0)
    count = math.prod(SHAPE)
    reach = rng.choice([10, 300, 70_000], count)
    x = (rng.integers(-reach, reach) / 2 * rng.choice(scale.ravel(), count)).astype(np.float32)
    x[::7] = np.nextafter(x[::7], np.float32(np.inf))
    x[::11] = rng.standard_normal(len(x[::11])) * 10.0 ** rng.integers(-6, 30, len(x[::11]))
    x[:5] = 0, -0.0, 1e30, np.inf, -np.inf
    with np.errstate(over="ignore"):
        found: np.ndarray = x.clip(-most, most).reshape(SHAPE).astype(scale.dtype)
    return found


def assert_same_bits(kind: str, floats: Any = np.float32, grain: str = "tensor", **options: Any) -> None:
    """What torch makes of a pair is what ONNX Runtime does."""
    axis, block, shape = GRAINS[grain]
    rng = np.random.default_rng(1)
    scale = np.asarray(rng.uniform(0.01, 0.1, shape), floats)
    low, high = {"T2": (-2, 1), "T4": (-8, 7), "T8": (-128, 127), "16": (-300, 300)}.get(kind[-2:], (0, 0))
    zero = (
        rng.integers(0 if kind.startswith("U") else low, high + 1, shape)
        if options.pop("zeros", True)
        else None
    )
    if block:
        options["block_size"] = block
    model = pair(kind, scale, zero if options.pop("zeros", True) else None, axis=axis, **options)
    # Above 2^31 steps ONNX Runtime saturates these to the wrong end.
    wrong = kind.startswith(("INT", "UINT")) and (block or kind[-1] in "24" or floats == np.float16)
    x = hard(scale, (1e6 if floats == np.float32 else 6e4) if wrong else np.inf)
    with open_session(model, level="none") as session:
        want = session.run({"x": x})["y"]
    have = to_torch(model)({"x": x})["y"].detach().numpy()
    assert len(np.unique(want)) > 2
    np.testing.assert_array_equal(have, want)
    np.testing.assert_array_equal(np.signbit(have[want == 0]), np.signbit(want[want == 0]))


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("grain", GRAINS)
def test_pairs_are_the_runtimes_bit_for_bit(kind: str, grain: str) -> None:
    assert_same_bits(kind, grain=grain)


@pytest.mark.skipif(
    tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 32),
    reason="ONNX Runtime divides in half precision from 1.32 on, in single precision before, as we do",
)
@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
@pytest.mark.parametrize("grain", ["tensor", "axis 1", "blocks of 16 along 1"])
def test_pairs_of_half_precision_too(kind: str, grain: str) -> None:
    assert_same_bits(kind, np.float16, grain)


@pytest.mark.parametrize("kind", [*INTEGERS, *FLOATS])
def test_the_type_may_be_an_attribute(kind: str) -> None:
    assert_same_bits(kind, zeros=False)


@pytest.mark.parametrize("kind", [*INTEGERS[:4], *FLOATS])
@pytest.mark.parametrize("grain", ["tensor", "axis 1", "blocks of 16 along 1"])
def test_integers_that_are_an_output_are_the_runtimes(kind: str, grain: str) -> None:
    """Then the two operators are two steps."""
    assert_same_bits(kind, grain=grain, shown=True)


@pytest.mark.parametrize("kind", INTEGERS[:6])
@pytest.mark.parametrize("grain", ["tensor", "axis 0", "axis 1"])
def test_those_of_the_runtimes_own_domain(kind: str, grain: str) -> None:
    assert_same_bits(kind, grain=grain, domain="com.microsoft")


def test_integers_are_an_output_of_their_own_type() -> None:
    model = pair("UINT8", np.array(0.1, np.float32), np.array(128), shown=True)
    x = np.array([[-100, -0.25, 0.25], [0.15, 3, 100]], np.float32)
    found = to_torch(model)({"x": x})
    assert found["q"].dtype == torch.uint8
    assert found["q"].tolist() == [[0, 126, 130], [130, 158, 255]]  # ties go to the even number


def test_zeros_alone_are_quantized_dynamically() -> None:
    """Their scale is 1, and products of them are 0, as with silence."""
    model = text_model(
        """<ir_version: 10, opset_import: ["": 18]> g (float[2, 3] x) => (int32[2, 2] y, float s, uint8 z)
        <uint8[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            q, s, z = DynamicQuantizeLinear(x)
            y = MatMulInteger(q, w, z)
        }"""
    )
    for x in (np.zeros((2, 3), np.float32), np.eye(2, 3, dtype=np.float32)):
        found = to_torch(model)(x=x)
        for have, want in zip(found.values(), execute(model, {"x": x}), strict=True):
            np.testing.assert_array_equal(have.numpy(), want)


def test_gradients_are_those_of_lsq() -> None:
    x = torch.tensor([-3.0, -0.26, 0.12, 0.49, 2.0], dtype=torch.float64, requires_grad=True)
    scale = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    y = fake_quantize(x, scale, 0.0, -8, 7)
    y.sum().backward()
    steps = (x / scale).detach()
    inside = (steps >= -8) & (steps <= 7)
    paper = torch.where(inside, steps.round() - steps, steps.clamp(-8, 7))
    assert x.grad is not None
    assert scale.grad is not None
    assert torch.equal(x.grad, inside.double())
    factor = (5 * 7) ** -0.5  # elements that share the scale, times the largest integer
    assert abs(scale.grad.item() - paper.sum().item() * factor) < 1e-12
