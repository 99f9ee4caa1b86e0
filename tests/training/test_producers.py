"""Quantized graphs in the layouts of the tools that write them, by a writer of the same layouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from models.builder import Builder
from onnxopt.errors import ModelError
from onnxopt.graph import walk
from onnxopt.model import load
from onnxopt.protobuf import dump, serialize
from onnxopt.runtimes import open_session
from onnxopt.training import to_torch, train_qat, write_back
from onnxopt.training.scales import learn_scales, scale_groups

torch.set_num_threads(1)


@dataclass(frozen=True)
class Layout:
    """How a tool writes.

    activations, weights: element types; of activations "" leaves them in float. by_channel: so are those in
    front of a depthwise Conv. by: how weights are scaled: "tensor", "channel", or blocks of so many inputs.
    floats: they are floats in front of QuantizeLinear. bias: float, or int32 with a scale of its own. last:
    the axis of the last layer's channels; of a Gemm with transB where it is 0 or -2.
    """

    activations: str = "UINT8"
    weights: str = "INT8"
    by: str | int = "channel"
    bias: str = "FLOAT"
    last: int = 0
    floats: bool = False
    by_channel: bool = False
    zeros: bool = True
    domain: str = ""
    opset: int = 17


LAYOUTS = {
    "ONNX Runtime": Layout(bias="INT32"),
    "ONNX Runtime, one scale": Layout("INT8", by="tensor", bias="INT32", last=1),
    "ONNX Runtime, uint8 weights": Layout(weights="UINT8", bias="INT32"),
    "ONNX Runtime, 16 bit, its own domain": Layout("UINT16", bias="INT32", domain="com.microsoft"),
    "ONNX Runtime, int4 in blocks": Layout("", "UINT4", by=4, last=1, opset=21),
    "NNCF": Layout(by_channel=True, last=-2),
    "NNCF, weights alone": Layout("", "UINT8", last=-1, opset=21),
    "NNCF, one scale": Layout("INT8", by="tensor", last=-1),
    "onnxsim": Layout(last=1),
    "onnxsim, whole graph": Layout(by="tensor", bias="INT32"),
    "onnxsim, int4 in blocks": Layout("", "INT4", by=4, last=1, zeros=False, opset=21),
    "AIMET": Layout(last=1, bias="FLOAT"),
    "AIMET, floats": Layout(floats=True, bias="INT32"),
    "ModelOpt": Layout("INT8", floats=True, last=1, opset=19),
    "ModelOpt, fp8 weights": Layout("", "FLOAT8E4M3FN", floats=True, last=1, opset=19),
    "Quark": Layout(by="tensor", bias="INT32"),
    "Quark, 16 bit": Layout("INT16", bias="INT32", opset=21),
    "int16 weights, no zero points": Layout(weights="INT16", zeros=False, opset=21),
    "two bits": Layout("", "INT2", by="tensor", opset=25),
}


class Writer(Builder):
    """A Conv, a depthwise Conv, a linear layer. Scales are powers of two, and sums of products exact."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout

    def net(self) -> onnx.ModelProto:
        layout = self.layout
        value = self.conv(self.activation("x", zero=100), (8, 4, 3, 3))
        value = self.activation(self.add("Relu", value), channels=8 if layout.by_channel else 0)
        value = self.activation(self.conv(value, (8, 1, 3, 3), group=8))
        value = self.activation(self.add("Flatten", self.add("GlobalMaxPool", value)))
        if layout.last in (0, -2):
            value = self.add("Gemm", value, *self.weights((5, 8), layout.last), transB=1)
        else:
            weight, bias = self.weights((8, 5), layout.last)
            value = self.add("Add", self.add("MatMul", value, weight), bias)
        self.add("Identity", value, outputs=["y"])
        model = self.model("net", [("x", ["n", 4, 6, 6])], [("y", ["n", 5])], opset=layout.opset)
        model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
        model.ir_version = 13 if layout.opset > 21 else 10
        return model

    def conv(self, value: str, shape: Sequence[int], **attributes: Any) -> str:
        return self.add("Conv", value, *self.weights(shape, 0), pads=[1, 1, 1, 1], **attributes)

    def activation(self, value: str, *, zero: int = 0, channels: int = 0) -> str:
        """Quantized and dequantized, with a step of 1/16, or 1/512 of 16 bits."""
        kind = self.layout.activations
        if not kind:
            return value
        scale = np.full((channels,) if channels else (), self.step)
        grain = {"axis": 1} if channels else {}
        port = self.scaled(kind, scale, zero if kind.startswith("U") else 0)
        return self.dequantized(
            self.add("QuantizeLinear", value, *port, domain=self.layout.domain, **grain), port, grain
        )

    @property
    def step(self) -> float:
        return 2.0**-9 if self.layout.activations.endswith("16") else 2.0**-4

    def weights(self, shape: Sequence[int], axis: int) -> tuple[str, str]:
        """A weight, and the bias behind it."""
        layout, kind, along = self.layout, self.layout.weights, 1 if len(shape) > 2 else 0
        sizes: tuple[int, ...] = ()
        grain: dict[str, int] = {}
        if layout.by == "channel":
            sizes, grain = (shape[axis],), {"axis": axis}
        elif isinstance(layout.by, int):
            sizes = tuple(-(-n // layout.by) if i == along else n for i, n in enumerate(shape))
            grain = {"axis": along, "block_size": layout.by}
        scale = 2.0 ** -self.rng.integers(5, 7, sizes)
        low, high, zero = (
            (1, 14, [6, 7, 8]) if kind.startswith("U") else (-1, 1, 0) if kind == "INT2" else (-7, 7, 0)
        )
        port = self.scaled(kind, scale, zero)
        array = self.rng.integers(low, high + 1, shape)
        if layout.floats:
            aligned = scale.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])
            held = self.constant((array + self.rng.uniform(-0.4, 0.4, shape)) * aligned)
            stored = self.add("QuantizeLinear", held, *port, domain=layout.domain, **grain)
        else:
            stored = self.typed(kind, array)
        weight = self.dequantized(stored, port, grain)
        if layout.bias == "FLOAT":
            return weight, self.constant(self.rng.integers(-50, 50, shape[axis]) / 256)
        own = self.scaled("INT32", scale * self.step, 0)
        bias = self.typed("INT32", self.rng.integers(-500, 500, shape[axis]))
        return weight, self.dequantized(bias, own, {"axis": 0} if sizes else {})

    def dequantized(self, value: str, port: Sequence[str], grain: dict[str, int]) -> str:
        return self.add("DequantizeLinear", value, *port, domain=self.layout.domain, **grain)

    def scaled(self, kind: str, scale: np.ndarray, zero: int | list[int]) -> list[str]:
        """Scale and, where the layout has them, zero point."""
        found = [self.constant(scale)]
        if self.layout.zeros or kind.startswith("UINT"):
            found.append(self.typed(kind, np.resize(zero, scale.shape)))
        return found

    def typed(self, kind: str, array: np.ndarray) -> str:
        name = f"{kind}_{len(self.initializers)}"
        dtype = getattr(onnx.TensorProto, kind)
        self.initializers.append(onnx.helper.make_tensor(name, dtype, array.shape, array.reshape(-1)))
        return name


def samples(count: int = 48) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    x = rng.integers(-60, 60, (count, 4, 6, 6)) / 32
    return {"x": x.astype(np.float32), "t": rng.normal(size=(count, 5)).astype(np.float32)}


def executed(model: Any, x: np.ndarray, level: Any = "none") -> np.ndarray:
    with open_session(model, level=level) as session:
        found: np.ndarray = session.run({"x": x})["y"]
    return found


@pytest.fixture(params=LAYOUTS)
def model(request: pytest.FixtureRequest) -> onnx.ModelProto:
    return Writer(LAYOUTS[request.param]).net()


def test_an_idle_trip_changes_nothing(model: onnx.ModelProto) -> None:
    module = to_torch(model)
    learn_scales(module, scale_groups(load(model)))
    assert serialize(dump(write_back(module, model))) == serialize(dump(load(model)))


def test_the_module_is_what_the_runtime_computes(model: onnx.ModelProto) -> None:
    x = samples()["x"]
    want = executed(model, x)
    assert len(np.unique(want)) > 10
    with torch.no_grad():
        have = to_torch(model)({"x": x})["y"].numpy()
    np.testing.assert_allclose(have, want, rtol=1e-6, atol=1e-6)


def test_gradients_reach_every_weight_bias_and_scale(model: onnx.ModelProto) -> None:
    module, held = to_torch(model), {one.name for one in model.graph.initializer}
    assert len(list(module.parameters())) == 6  # weight and bias of each layer
    learned = learn_scales(module, scale_groups(load(model)))
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert len(learned) == 3 + sum(node.input[0] not in held for node in quantizers)
    with torch.no_grad():  # where integers are exact, scales have no gradient
        for one in module.parameters():
            one.add_(0.02 * torch.randn_like(one))
    module(x=samples()["x"])["y"].square().mean().backward()
    for name, one in module.named_parameters():
        assert one.grad is not None, name
        assert one.grad.any(), name


def test_training_improves_the_same_graph(model: onnx.ModelProto) -> None:
    result = train_qat(model, samples(), labels="t", loss="mse", epochs=2, holdout=0, workers=0)
    final = result.report.final
    assert final.start is not None
    assert final.after > final.start, result.report.reason
    before, after = load(model), load(result.model)
    assert [node.op_type for node in walk(after.graph)] == [node.op_type for node in walk(before.graph)]
    old, new = (
        {name: (value.dtype, value.shape) for name, value in one.graph.initializers.items()}
        for one in (before, after)
    )
    assert old == new
    x = samples()["x"]
    with torch.no_grad():
        have = to_torch(result.model)({"x": x})["y"].numpy()
    want = executed(result.model, x)
    assert np.mean(np.abs(have - want) < 1e-5) > 0.99
    assert np.isfinite(executed(result.model, x, "all")).all()


def test_scales_along_the_wrong_axis_are_told() -> None:
    """As NNCF 3.4.0 writes an embedding in blocks; ONNX Runtime refuses to run that, too."""
    model = Writer(LAYOUTS["onnxsim, int4 in blocks"]).net()
    node = [one for one in model.graph.node if one.op_type == "DequantizeLinear"][-1]
    node.attribute[0].i = 1 - node.attribute[0].i
    with pytest.raises(ModelError) as error:
        to_torch(model)
    told = "a scale of shape [2, 5] does not fit [8, 5] along axis 1 in blocks of 4"
    assert str(error.value) == f"training: DequantizeLinear {node.output[0]!r}: {told}"


def test_weights_behind_bytes_learn_like_others() -> None:
    """An input 256 times as large makes weights so much smaller; the steps have to follow."""

    def first_loss(size: int) -> float:
        model, data = Writer(LAYOUTS["ONNX Runtime"]).net(), samples()
        held = {one.name: one for one in model.graph.initializer}
        makers = {name: node for node in model.graph.node for name in node.output}
        conv = next(node for node in model.graph.node if node.op_type == "Conv")
        for value, factor in zip(conv.input, (size, 1 / size), strict=False):
            scale = held[makers[value].input[1]]
            array = onnx.numpy_helper.to_array(scale) * np.float32(factor)
            scale.CopyFrom(onnx.numpy_helper.from_array(array, scale.name))
        data["x"] *= size
        how: dict[str, Any] = {"labels": "t", "loss": "mse", "lr": 1e-2, "batch_size": "8"}
        found = train_qat(model, data, epochs=1, holdout=0, workers=0, **how)
        return found.report.curves["loss"][0]

    assert first_loss(256) == pytest.approx(first_loss(1), rel=0.05)
