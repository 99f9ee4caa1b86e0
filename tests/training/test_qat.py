"""Learned step sizes by their formula, quantized graphs equal to the runtime, and accuracy won back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.graph import constant_array
from onnxopt.model import load
from onnxopt.protobuf import dump
from onnxopt.quantization.formats import INTEGERS
from onnxopt.quantization.saturation import find_saturation
from onnxopt.quantization.scaling import balance_weights
from onnxopt.quantization.units import survey
from onnxopt.targets import PLACEMENTS
from onnxopt.training import finetune, to_torch, train_qat, write_back
from onnxopt.training.interpreter.ops.quantize import fake_quantize
from onnxopt.training.quantizers import _covering
from onnxopt.training.scales import learn_scales, scale_groups
from tests.support import execute
from tests.training.nets import build

torch.set_num_threads(1)
_T = TensorProto


REFUSED = "ONNX Runtime makes integer kernels of %s weights and refuses them then: take --activations none"


def qdq_net(*, floats: bool = False, weight: Any = _T.INT8, opset: int = 21) -> onnx.ModelProto:
    """x, quantized, Conv with a bias, Relu, quantized, MaxPool, quantized, Conv, quantized.

    floats: weights are floats in front of QuantizeLinear, else integers. Scales are powers of two, so that
    all sums are exact.
    """
    rng, nodes, held = np.random.default_rng(0), [], dict[str, onnx.TensorProto]()
    low, high = {_T.INT8: (-128, 127), _T.INT4: (-8, 7), _T.INT2: (-2, 1), _T.INT16: (-1024, 1023)}[weight]

    def hold(name: str, array: Any, kind: int = _T.FLOAT) -> str:
        held[name] = helper.make_tensor(name, kind, np.shape(array), np.asarray(array).reshape(-1))
        return name

    def pair(value: str, scale: float, zero: int, *, own: bool = True) -> str:
        names = [hold(f"{value}_scale", np.float32(scale)), hold(f"{value}_zero", zero, _T.UINT8)]
        nodes.append(helper.make_node("QuantizeLinear", [value, *names], [f"{value}_q"]))
        if own:
            names[0] = hold(f"{value}_scale_dq", np.float32(scale))
        nodes.append(helper.make_node("DequantizeLinear", [f"{value}_q", *names], [f"{value}_dq"]))
        return f"{value}_dq"

    def conv(value: str, source_scale: float, name: str, before: int, after: int) -> str:
        ints = rng.integers(low, high + 1, (after, before, 3, 3))
        scale = 2.0 ** -rng.integers(5, 8, after).astype(np.float32) * 128 / (high + 1)
        names = [hold(f"{name}_w_scale", scale), hold(f"{name}_w_zero", np.zeros(after, np.int64), weight)]
        if floats:
            noise = rng.uniform(-0.4, 0.4, ints.shape)
            array = ((ints + noise) * scale[:, None, None, None]).astype(np.float32)
            nodes.append(
                helper.make_node(
                    "QuantizeLinear", [hold(f"{name}_w", array), *names], [f"{name}_w_q"], axis=0
                )
            )
        else:
            hold(f"{name}_w_q", ints, weight)
        nodes.append(helper.make_node("DequantizeLinear", [f"{name}_w_q", *names], [f"{name}_w_dq"], axis=0))
        bias = hold(f"{name}_b_q", rng.integers(-500, 500, after), _T.INT32)
        products = hold(f"{name}_b_scale", scale * np.float32(source_scale))
        nodes.append(helper.make_node("DequantizeLinear", [bias, products], [f"{name}_b_dq"], axis=0))
        inputs = [value, f"{name}_w_dq", f"{name}_b_dq"]
        nodes.append(helper.make_node("Conv", inputs, [name], pads=[1, 1, 1, 1]))
        return name

    value = conv(pair("x", 2.0**-5, 128), 2.0**-5, "a", 2, 4)
    nodes.append(helper.make_node("Relu", [value], ["r"]))
    value = pair("r", 2.0**-3, 0, own=False)
    nodes.append(helper.make_node("MaxPool", [value], ["p"], kernel_shape=[2, 2], strides=[2, 2]))
    value = pair(conv(pair("p", 2.0**-3, 0), 2.0**-3, "b", 4, 3), 2.0**-2, 100)
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", _T.FLOAT, ["n", 2, 6, 6])],
        [helper.make_tensor_value_info("y", _T.FLOAT, None)],
        list(held.values()),
    )
    return helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", opset)])


def tensors(model: ir.Model) -> dict[str, np.ndarray]:
    return {
        name: value.const_value.numpy()
        for name, value in model.graph.initializers.items()
        if value.const_value is not None
    }


NETS: dict[str, Callable[[], onnx.ModelProto]] = {
    "integers": qdq_net,
    "floats": lambda: qdq_net(floats=True),
    "int4": lambda: qdq_net(weight=_T.INT4),
    "int16": lambda: qdq_net(weight=_T.INT16),
    "int2": lambda: qdq_net(weight=_T.INT2, opset=25),
}


@pytest.mark.parametrize("name", ["INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "INT16"])
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("zeros", [False, True])
def test_gradients_are_those_of_learned_step_sizes(name: str, by_channel: bool, zeros: bool) -> None:
    """Equation 3 of the paper, and its factor 1 / sqrt(elements * largest integer)."""
    low, high = INTEGERS[ir.DataType[name]]
    rng = np.random.default_rng(1)
    scale = rng.uniform(0.5, 2, (3, 1)) if by_channel else np.array(0.7)
    zero = rng.integers(low, high + 1, (3, 1)).astype(np.float64) if zeros else 0.0
    x = rng.uniform(-1.5 * high - 3, 1.5 * high + 3, (3, 500)) * scale
    upstream = rng.normal(size=x.shape)
    at, by = torch.tensor(x, requires_grad=True), torch.tensor(scale, requires_grad=True)
    offset = torch.tensor(zero) if zeros else 0.0
    y = fake_quantize(at, by, offset, low, high)
    y.backward(torch.tensor(upstream))
    assert at.grad is not None
    assert by.grad is not None
    v, least, most = x / scale, low - zero, high - zero
    np.testing.assert_array_equal(y.detach(), np.rint(np.clip(v, least, most)) * scale)
    np.testing.assert_array_equal(at.grad, upstream * ((v > least) & (v < most)))
    size = 500 if by_channel else 1500
    each = upstream * np.where(v <= least, least, np.where(v >= most, most, np.rint(v) - v))
    wanted = (each.sum(1, keepdims=True) if by_channel else each.sum()) / np.sqrt(size * high)
    np.testing.assert_allclose(by.grad, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("net", NETS)
def test_an_untrained_graph_is_written_back_to_the_byte(net: str) -> None:
    model = NETS[net]()
    module = to_torch(model)
    assert learn_scales(module, scale_groups(load(model)))
    written = dump(write_back(module, model)).SerializeToString(deterministic=True)
    assert written == dump(load(model)).SerializeToString(deterministic=True)


@pytest.mark.parametrize("net", NETS)
def test_what_is_trained_equals_the_runtime_bit_for_bit(net: str) -> None:
    """Before, and after weights have moved: sums are exact, as scales are powers of two."""
    model = load(NETS[net]())
    x = np.random.default_rng(2).normal(size=(3, 2, 6, 6)).astype(np.float32) * 2
    module = to_torch(model)
    learn_scales(module, scale_groups(model))
    for _ in range(2):
        (wanted,) = execute(write_back(module, model), {"x": x})
        found = module(x=torch.from_numpy(x))["y"].detach().numpy()
        np.testing.assert_array_equal(found, wanted)
        assert len(np.unique(wanted)) > 10
        with torch.no_grad():
            for name, one in module.named_parameters():
                if "_w" in name and "scale" not in name:
                    one.add_(0.02 * torch.randn_like(one))


def test_scales_that_are_equal_stay_equal_and_biases_follow() -> None:
    """By hand: activations twice as wide, weights of the first layer at half their scale."""
    model = load(qdq_net())
    module = to_torch(model)
    groups = scale_groups(model)
    assert groups["x_scale_dq"] == groups["x_scale"] == "x_scale"
    assert groups["p_scale"] == groups["p_scale_dq"] == groups["r_scale"] == "r_scale"  # MaxPool moves
    assert "a_b_scale" not in groups
    learned = learn_scales(module, groups)
    with torch.no_grad():
        learned["x_scale"].log.fill_(np.log(2))
        learned["a_w_scale"].log.fill_(np.log(0.5))
        learned["r_scale"].log.fill_(0.1)
    before, after = tensors(model), tensors(write_back(module, model))
    np.testing.assert_allclose(after["x_scale"], 2 * before["x_scale"], rtol=1e-6)
    assert after["x_scale"] == after["x_scale_dq"]
    assert after["r_scale"] == after["p_scale"] == after["p_scale_dq"]
    np.testing.assert_allclose(after["r_scale"], before["r_scale"] * np.exp(0.1), rtol=1e-6)
    np.testing.assert_array_equal(after["a_b_scale"], after["x_scale"] * after["a_w_scale"])
    np.testing.assert_allclose(after["a_b_q"], before["a_b_q"], atol=1)  # 2 * 0.5
    np.testing.assert_array_equal(after["a_w_q"], np.clip(2 * before["a_w_q"].astype(int), -128, 127))
    np.testing.assert_array_equal(after["b_w_q"], before["b_w_q"])
    np.testing.assert_allclose(
        after["b_b_q"] * after["b_b_scale"], before["b_b_q"] * before["b_b_scale"], atol=0.02
    )


def test_gradients_reach_all_scales_and_weights() -> None:
    model = load(qdq_net(weight=_T.INT4))
    module = to_torch(model)
    learned = learn_scales(module, scale_groups(model))
    with torch.no_grad():  # on the grid of integers the error of rounding is zero
        for one in module.parameters():
            one.add_(0.02 * torch.randn_like(one))
    module(x=torch.randn(3, 2, 6, 6))["y"].square().mean().backward()
    assert set(learned) == {"x_scale", "a_w_scale", "r_scale", "b_w_scale", "b_scale"}
    for name, one in module.named_parameters():
        assert one.grad is not None, name
        assert one.grad.abs().sum() > 0, name


def _samples(count: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(3)
    return {
        "x": rng.normal(size=(count, 2, 6, 6)).astype(np.float32),
        "t": rng.normal(size=(count, 3, 3, 3)).astype(np.float32),
    }


def _later_is_better() -> Callable[..., float]:
    numbers = itertools.count()
    return lambda run: float(next(numbers))


def test_observed_scales_cover_what_activations_reach() -> None:
    """One batch of all samples; the zero point of x is 128 of 255, that of the Relu 0."""
    data = _samples()
    found = train_qat(
        qdq_net(), data, labels="t", loss="mse", observe=1, epochs=1, lr=0.0, batch_size="full", holdout=0,
        metric=_later_is_better(),
    )  # fmt: skip
    after = tensors(load(found.model))
    x = data["x"]
    np.testing.assert_allclose(after["x_scale"], max(x.max() / 127, -x.min() / 128), rtol=1e-6)


@pytest.mark.parametrize(("kind", "low", "high"), [("float8_e4m3fn", -448, 448), ("int8", -128, 127)])
def test_observed_scales_are_of_the_type_of_the_zero_point(kind: str, low: int, high: int) -> None:
    text = "g (float[4] x) => (float[4] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }"
    zero = np.zeros((), getattr(ml_dtypes, kind, kind))
    node = load(build(text, {"s": np.ones((), np.float32), "z": zero})).graph.node(0)
    node.outputs[0].type = None  # files say nothing of types in between
    assert (_covering(node, 2.0 * low, high), _covering(node, low, 3.0 * high)) == (2, 3)


def test_scales_stay_after_their_epochs() -> None:
    def scales(epochs: int, limit: int) -> dict[str, np.ndarray]:
        found = train_qat(
            qdq_net(), _samples(), labels="t", loss="mse", epochs=epochs, scale_epochs=limit, holdout=0,
            metric=_later_is_better(), schedule="constant",
        )  # fmt: skip
        return {name: one for name, one in tensors(load(found.model)).items() if "scale" in name}

    one, two, free = scales(1, 0), scales(2, 1), scales(2, 0)
    assert all(np.array_equal(one[name], two[name]) for name in one if "_b_" not in name)
    assert not np.array_equal(one["x_scale"], free["x_scale"])


@pytest.fixture(scope="module")
def trained() -> tuple[Any, Mapping[str, np.ndarray], Mapping[str, np.ndarray]]:
    """A float CNN of digits, what it was trained on, and the test digits."""
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    from models.digits_depthwise import depthwise_cnn, handwritten

    train, test = handwritten(0)
    found = finetune(
        depthwise_cnn(0, width=8), train, labels="label", epochs=8, lr=1e-2, schedule="cosine",
        batchnorm=True, batch_size="64", workers=0,
    )  # fmt: skip
    return found.model, train, test


@pytest.mark.parametrize("labels", ["label", ()])
def test_three_bits_by_tensor_come_back(trained: Any, labels: Any) -> None:
    model, train, test = trained

    def accuracy(run: Any, split: str = "search") -> float:
        data = test if split == "final" else train
        return float((run({"x": data["x"]})["y"].argmax(1) == data["label"]).mean())

    data = train if labels else {"x": train["x"]}
    found = train_qat(
        model, data, labels=labels, weights="int3", per_channel=False, epochs=4, holdout=0,
        lr=5e-3, metric=accuracy, workers=0,
    )  # fmt: skip
    final = found.report.final
    assert found.report.ok, found.report.reason
    assert final.start is not None
    assert final.after >= max(final.start, final.before - 0.025)
    kinds = {value.dtype for value in load(found.model).graph.initializers.values()}
    assert ir.DataType.INT4 in kinds


def test_a_float_model_is_written_as_it_was_quantized_where_training_gains_nothing(trained: Any) -> None:
    model, train, _ = trained
    found = train_qat(model, train, labels="label", weights="int4", epochs=1, lr=0.0, workers=0)
    report = found.report
    assert report.ok
    assert report.final.after == report.final.start
    assert report.best_epoch == 0
    assert any("as it was when it began" in note for note in report.notes)
    written = load(found.model)
    assert any(value.dtype == ir.DataType.INT4 for value in written.graph.initializers.values())
    assert written.metadata_props["onnxopt.passes"].endswith("qat")


def test_few_bits_start_from_weights_that_are_rounded_for_the_samples(trained: Any) -> None:
    """As rounded to nearest, which a stream gets, they lose most of the accuracy."""
    model, train, test = trained

    def start_of(samples: int) -> float:
        def stream() -> Any:
            for x in train["x"]:
                yield {"x": x[None]}

        def accuracy(run: Any, split: str = "search") -> float:
            return float((run({"x": test["x"]})["y"].argmax(1) == test["label"]).mean())

        data = {"x": train["x"]} if samples else stream
        options: dict[str, Any] = {"weights": "int2", "activations": "none", "per_channel": False, "lr": 0.0}
        found = train_qat(
            model, data, validation={"x": train["x"]}, steps=1, metric=accuracy, workers=0, **options
        )
        assert found.report.final.start is not None
        return found.report.final.start

    assert start_of(128) > start_of(0) + 0.1


def test_two_bits_raise_the_opset_and_run(trained: Any) -> None:
    model, train, _ = trained
    found = train_qat(model, train, labels="label", weights="int2", activations="none", steps=60, workers=0)
    written = load(found.model)
    assert found.report.ok, found.report.reason
    assert written.graph.opset_imports[""] >= 25
    assert any(value.dtype == ir.DataType.INT2 for value in written.graph.initializers.values())


def float_net(channels: int = 4, kernel: int = 3, stride: int = 1) -> onnx.ModelProto:
    """x -> Conv without a bias -> y"""
    weight = np.random.default_rng(4).normal(size=(channels, 2, kernel, kernel)).astype(np.float32)
    size = (6 - kernel) // stride + 1
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"], strides=[stride, stride])],
        "g",
        [helper.make_tensor_value_info("x", _T.FLOAT, ["n", 2, 6, 6])],
        [helper.make_tensor_value_info("y", _T.FLOAT, ["n", channels, size, size])],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def test_weights_in_small_floats_are_quantized_alone() -> None:
    """No runtime has kernels of them and integers."""
    x = _samples()["x"]
    (y,) = execute(float_net(), {"x": x})
    how: dict[str, Any] = {"labels": "t", "loss": "mse", "holdout": 0, "epochs": 1}
    found = train_qat(float_net(), {"x": x, "t": y}, weights="float8e4m3fn", lr=0.0, **how)
    assert found.report.final.start is not None
    assert -0.01 < found.report.final.start < 0


@pytest.mark.parametrize("activations", ["", "none"])
def test_three_bits_are_stored_as_four_and_stay_within_eight_levels(activations: str) -> None:
    """Twice what the weights give is what they learn to give: those near the ends come to lie beyond them."""
    x = _samples()["x"]
    (y,) = execute(float_net(), {"x": x})
    found = train_qat(
        float_net(), {"x": x, "t": 2 * y}, labels="t", loss="mse", weights="int3", activations=activations,
        groups="scales{lr=0}", lr=0.05, batch_size="8", metric="loss", holdout=0,
    )  # fmt: skip
    assert found.report.ok, found.report.reason
    assert found.report.final.start is not None
    assert found.report.final.after > 0.9 * found.report.final.start
    weight = next(one for one in tensors(load(found.model)).values() if one.shape == (4, 2, 3, 3))
    assert weight.dtype == ir.DataType.INT4.numpy()
    ints = weight.astype(int)
    assert (ints.min(), ints.max()) == (-4, 3)
    assert ((ints == -4) | (ints == 3)).mean() > 0.2


@pytest.mark.parametrize(("weights", "least", "notes"), [("int8", -128, 1), ("int7", -64, 0)])
def test_where_sums_can_saturate_is_said_and_seven_bits_avoid_it(
    weights: str, least: int, notes: int
) -> None:
    """CPUs with AVX2 and no VNNI; what is learned stays within 7 bits."""
    x = _samples()["x"]
    (y,) = execute(float_net(), {"x": x})
    found = train_qat(
        float_net(), {"x": x, "t": 2 * y}, labels="t", loss="mse", weights=weights, lr=0.05, batch_size="8",
        groups="scales{lr=0}", metric="loss", holdout=0,
    )  # fmt: skip
    weight = next(one for one in tensors(load(found.model)).values() if one.shape == (4, 2, 3, 3))
    assert weight.dtype == np.int8
    assert weight.min() == least
    assert len(find_saturation(found.graph)) == notes
    said = "on CPUs without VNNI, sums of 1 layers can saturate; --weights int7 avoids it"
    assert found.report.notes.count(said) == notes


def test_weights_with_one_scale_each_are_balanced_across_layers() -> None:
    """Channels written with weights up to a and read with weights up to b have sqrt(a b) on both sides."""
    rng = np.random.default_rng(5)
    arrays = {
        "w": rng.normal(size=(4, 2, 3, 3)) * np.array([1, 100, 0.01, 5]).reshape(4, 1, 1, 1),
        "b": rng.normal(size=4),
        "v": rng.normal(size=(3, 4, 1, 1)),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["c"]),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", "v"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", _T.FLOAT, ["n", 2, 6, 6])],
        [helper.make_tensor_value_info("y", _T.FLOAT, ["n", 3, 4, 4])],
        [numpy_helper.from_array(one.astype(np.float32), name) for name, one in arrays.items()],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    x = {"x": _samples()["x"]}
    balanced = load(model)
    balance_weights(balanced, survey(balanced, PLACEMENTS["x86"], frozenset("xcry")).units)
    (wanted,), (found,) = execute(model, x), execute(balanced, x)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    held = [constant_array(one.inputs[1]) for one in balanced.graph if one.op_type == "Conv"]
    assert held[0] is not None
    assert held[1] is not None
    sizes = np.sqrt(abs(arrays["w"]).max((1, 2, 3)) * abs(arrays["v"]).max((0, 2, 3)))
    np.testing.assert_allclose(abs(held[0]).max((1, 2, 3)), sizes, rtol=1e-5)
    np.testing.assert_allclose(abs(held[1]).max((0, 2, 3)), sizes, rtol=1e-5)


def test_a_quantized_model_learns_from_a_float_one() -> None:
    """Without labels the metric is the distance to what the teacher says, negated."""
    x, teacher = _samples()["x"], float_net(channels=3, kernel=2, stride=2)
    options: dict[str, Any] = {"holdout": 0, "epochs": 4, "lr": 0.01, "batch_size": "8", "teacher": teacher}
    found = train_qat(qdq_net(), {"x": x}, **options)
    final = found.report.final
    assert (found.report.ok, final.metric, final.before) == (True, "likeness", 0)
    (wanted,), (before,), (after,) = (execute(one, {"x": x}) for one in (teacher, qdq_net(), found.graph))
    assert final.start == pytest.approx(-np.square(before - wanted).mean(), rel=1e-5)
    assert final.after == pytest.approx(-np.square(after - wanted).mean(), rel=1e-5)
    assert final.after > 0.5 * -np.square(before - wanted).mean()
    mixed = train_qat(qdq_net(), {"x": x, "t": wanted}, labels="t", loss="mse", **options)
    assert mixed.report.curves["loss"] == pytest.approx(found.report.curves["loss"], rel=0.02)


def test_fused_quantized_operators_are_trained_with_their_scales() -> None:
    text = """g (float[n, 4] x) => (float[n, 3] y) {
        q = QuantizeLinear(x, s, z)  r = QLinearMatMul(q, s, z, w, t, u, v, o)  y = DequantizeLinear(r, v, o)
    }"""
    weight = np.random.default_rng(0).integers(-128, 128, (4, 3)).astype(np.int8)
    numbers = {"s": np.float32(0.05), "t": np.float32(0.01), "v": np.float32(0.1)}
    zeros = {"z": np.uint8(120), "u": np.int8(0), "o": np.uint8(128)}
    model = build(text, {name: np.array(one) for name, one in {**numbers, **zeros, "w": weight}.items()})
    x = np.random.default_rng(1).standard_normal((64, 4)).astype(np.float32)
    data = {"x": x, "t": execute(model, {"x": x})[0] * np.float32(1.07)}
    found = train_qat(model, data, labels="t", loss="mse", epochs=20, lr=3e-3, holdout=0, workers=0)
    final, graph = found.report.final, load(found.model).graph
    assert final.start == pytest.approx(final.before, rel=0.05)
    assert final.after > 0.6 * final.before
    assert [node.op_type for node in graph].count("MatMul") == 1
    assert not any(node.op_type == "QLinearMatMul" for node in graph)
    floats = [one for one in tensors(load(found.model)).values() if one.dtype == np.float32]
    assert len(floats) >= 3
    assert not any(np.isin(one, list(numbers.values())).any() for one in floats)
    assert any("which the runtime fuses back" in note for note in found.report.notes)
    assert model.graph.node[1].op_type == "QLinearMatMul"


def test_nothing_gained_is_nothing_written(tmp_path: Path, capsys: Any) -> None:
    from onnxopt.cli.main import main

    onnx.save(qdq_net(), tmp_path / "m.onnx")
    samples = _samples()
    np.savez(tmp_path / "d.npz", x=samples["x"], t=samples["t"])
    with pytest.raises(SystemExit) as exit_code:
        main(
            f"train qat {tmp_path}/m.onnx -o {tmp_path}/o.onnx --data {tmp_path}/d.npz --labels t --loss mse"
            " --epochs 1 --lr 0".split()
        )
    assert exit_code.value.code == 1
    assert not (tmp_path / "o.onnx").exists()
    assert "training gained nothing" in capsys.readouterr().out.replace("\n", " ")


def test_a_float_model_that_loses_too_much_is_not_said_to_be_written() -> None:
    data = {"x": _samples()["x"]}
    found = train_qat(float_net(), data, weights="int4", epochs=1, lr=0.0, max_drop="1e-9")
    assert found.report.reason.endswith("max_drop is 1e-9")
    assert not any("what is written" in note for note in found.report.notes)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({}, "qat: without labels it learns from the float model: give that with --teacher"),
        (
            {"labels": "t", "calibration": 0},
            "calibration is at least 1, observe and scale_epochs are at least 0",
        ),
        ({"labels": "t", "wieghts": "int4"}, "train: unknown option 'wieghts' (did you mean 'weights'?)"),
    ],
)
def test_bad_options_are_told_in_one_line(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as error:
        train_qat(qdq_net(), _samples(), **options)
    assert str(error.value) == told


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"weights": "int5"}, "unknown quantized type 'int5' (did you mean 'int8'?)"),
        (
            {"weights": "float8e4m3fn", "activations": "uint8"},
            f"qat: {REFUSED % 'float8e4m3fn'}",
        ),
        ({"target": "cuda"}, "qat: target cuda has no integer kernels: take cpu, arm, tensorrt or generic"),
        (
            {"keep": "nothing"},
            "--keep 'nothing': no node has that name, output or operator once the model is prepared",
        ),
        (
            {"keep": "Conv", "activations": "none"},
            "qat: there is nothing in this model that could be quantized",
        ),
    ],
)
def test_a_float_model_that_cannot_be_quantized_as_asked(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError) as error:
        train_qat(float_net(), {"x": _samples()["x"]}, **options)
    assert str(error.value) == told
