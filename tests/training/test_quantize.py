"""Quantization in torch is that of ONNX Runtime, bit for bit; and its gradients are those of LSQ."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto as T

from onnxopt.runtimes import open_session
from onnxopt.training import to_torch
from onnxopt.training.ops.quantize import fake_quantize

WRONG_END = 1e6
"""Above 2^31 steps ONNX Runtime saturates 4 bits, and blocks, to the wrong end."""
INTEGERS = ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4")
FLOATS = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ")


def pair(
    kind: str, scale: np.ndarray, zero: Sequence[int], shape: Sequence[int], axis: int = 1, block: int = 0
) -> onnx.ModelProto:
    """DequantizeLinear(QuantizeLinear(x)), and the integers as an output as well."""
    dtype = getattr(T, kind)
    form = onnx.numpy_helper.from_array(scale.astype(np.float32), "s")
    zeros = onnx.helper.make_tensor("z", dtype, scale.shape, zero)
    attributes: dict[str, Any] = {"axis": axis, **({"block_size": block} if block else {})}
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes),
    ]
    inputs = [onnx.helper.make_tensor_value_info("x", T.FLOAT, shape)]
    outputs = [onnx.helper.make_tensor_value_info("y", T.FLOAT, shape)]
    graph = onnx.helper.make_graph(nodes, "g", inputs, outputs, [form, zeros])
    return onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)


def hard(scale: np.ndarray, shape: Sequence[int], most: float = np.inf) -> np.ndarray:
    """Ties on both sides of zero, their neighbours, what saturates, and everything between."""
    rng = np.random.default_rng(0)
    count = math.prod(shape)
    steps = rng.integers(-70_000, 70_000, count) / 2
    steps[: count // 2] = rng.integers(-300, 300, count // 2) / 2
    x = (steps * rng.choice(scale.ravel(), count)).astype(np.float32)
    x[::7] = np.nextafter(x[::7], np.float32(np.inf))
    x[::11] = rng.standard_normal(len(x[::11])).astype(np.float32) * 10.0 ** rng.integers(
        -6, 30, len(x[::11])
    )
    x[0], x[1], x[2] = 0, -0.0, 1e30
    found: np.ndarray = x.reshape(shape).clip(-most, most)
    return found


def both(model: onnx.ModelProto, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with open_session(model, level="none") as session:
        want = session.run({"x": x})["y"]
    return want, to_torch(model)({"x": x})["y"].detach().numpy()


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_pairs_are_the_runtimes_bit_for_bit(kind: str, axis: int | None) -> None:
    shape = (6, 40, 32)
    size = 1 if axis is None else shape[axis]
    rng = np.random.default_rng(1)
    scale = (rng.uniform(0.001, 0.1, size) if size > 1 else np.array(0.0173)).astype(np.float32)
    low, high = {"4": (-8, 7), "8": (-128, 127), "6": (-300, 300)}[kind[-1]]
    zero = rng.integers(max(low, 0) if kind.startswith("U") else low, high, size).tolist()
    most = WRONG_END if kind.endswith("INT4") else np.inf
    want, have = both(pair(kind, scale, zero, shape, 0 if axis is None else axis), hard(scale, shape, most))
    np.testing.assert_array_equal(have.view(np.int32), want.view(np.int32))


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("axis", [0, 1])
def test_blocks_are_the_runtimes_bit_for_bit(kind: str, axis: int) -> None:
    shape = (32, 48)
    blocks = tuple(n // 16 if i == axis else n for i, n in enumerate(shape))
    scale = np.random.default_rng(2).uniform(0.001, 0.1, blocks).astype(np.float32)
    zero = [3] * scale.size
    want, have = both(pair(kind, scale, zero, shape, axis, 16), hard(scale, shape, WRONG_END))
    np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize("kind", FLOATS)
def test_small_floats_are_the_runtimes_bit_for_bit(kind: str) -> None:
    scale = np.array(0.25, np.float32)
    want, have = both(pair(kind, scale, [0], (8, 64)), hard(scale, (8, 64)))
    np.testing.assert_array_equal(have, want)


@pytest.mark.parametrize(("kind", "low", "high"), [("INT2", -2, 1), ("UINT2", 0, 3)])
def test_two_bits_are_those_of_the_reference(kind: str, low: int, high: int) -> None:
    scale, zero = np.array(0.5, np.float32), 0 if kind == "INT2" else 1
    model = pair(kind, scale, [zero], (4, 16))
    model.opset_import[0].version, model.ir_version = 25, 13
    x = hard(scale, (4, 16))
    have = to_torch(model)({"x": x})["y"].detach().numpy()
    want = (np.clip(np.rint(x / scale) + zero, low, high) - zero) * scale
    np.testing.assert_array_equal(have, want)


def test_integers_are_an_output_of_their_own_type() -> None:
    model = pair("UINT8", np.array(0.1, np.float32), [128], (2, 3))
    model.graph.output.append(onnx.helper.make_tensor_value_info("q", T.UINT8, (2, 3)))
    x = np.array([[-100, -0.25, 0.25], [0.15, 3, 100]], np.float32)
    found = to_torch(model)({"x": x})
    assert found["q"].dtype == torch.uint8
    assert found["q"].tolist() == [[0, 126, 130], [130, 158, 255]]  # ties go to the even number


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
