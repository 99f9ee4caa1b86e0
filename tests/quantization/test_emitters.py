"""What is written for each target and scheme: types, places and refusals, and the numbers that they give."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from onnx import numpy_helper

import onnxopt
from onnxopt.api.checks import new_error
from onnxopt.calibration import calibrate, exposable
from onnxopt.cli import main
from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, domains
from onnxopt.inspection.lints import lint
from onnxopt.model import clone
from onnxopt.protobuf import dump
from onnxopt.quantization.choose import choose, prices_of_work
from onnxopt.quantization.emit import emit
from onnxopt.quantization.formats import dequantize, find_format, params_from_range, quantize
from onnxopt.quantization.plan import Plan, params_of_tensors
from onnxopt.quantization.saturation import find_saturation
from onnxopt.quantization.sensitivity import Source
from onnxopt.quantization.static import Settings
from onnxopt.quantization.units import LAYERS, survey
from onnxopt.reporting.quantization import QuantizationReport
from onnxopt.runtimes import open_session
from onnxopt.targets import PLACEMENTS, Placement, find_target
from tests.quantization.quantizing import judge_without_emulator
from tests.random_graphs import random_model
from tests.support import execute, sqnr, text_model

TENSORRT, ARM, X86 = (PLACEMENTS[name] for name in ("tensorrt", "arm", "x86"))
AS_WRITTEN = Settings(TENSORRT, timed=False).session_config

RESIDUAL = """<ir_version: 8, opset_import: ["" : 17]> agraph (float[1,16,4,4] x) => (float[2,10] y) {
    a = Conv<pads=[1,1,1,1]>(x, w1, b1)
    r = Relu(a)
    c = Conv<pads=[1,1,1,1]>(r, w2, b2)
    s = Add(c, x)
    t = Relu(s)
    n = Conv(t, w3)
    u = ConvTranspose(t, w4, b4)
    p = Reshape(u, rows)
    z = Gemm(p, w5, b5)
    m = ReduceMean<axes=[0, 1, 2, 3], keepdims=0>(n)
    y = Add(z, m)
}"""
SHAPES = {
    "w1": (16, 16, 3, 3),
    "b1": (16,),
    "w2": (16, 16, 3, 3),
    "b2": (16,),
    "w3": (8, 16, 1, 1),
    "w4": (16, 32, 1, 1),
    "b4": (32,),
    "w5": (256, 10),
    "b5": (10,),
}
ATTENTION = """agraph (float[1,4,64,32] q, float[1,4,32,64] k, float[1,4,64,32] v) => (float[1,4,64,32] y) {
    a = MatMul(q, k)
    p = Softmax(a)
    y = MatMul(p, v)
}"""


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def residual_net() -> onnx.ModelProto:
    """Two convolutions with a residual, then a narrow one, a ConvTranspose and a Gemm of two rows."""
    proto = text_model(RESIDUAL)
    for seed, (name, shape) in enumerate(SHAPES.items()):
        fan = int(np.prod(shape)) / shape[0 if name != "w5" else 1]
        array = random(*shape, seed=seed) / np.float32(np.sqrt(fan if len(shape) > 1 else 4))
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([2, 256]), "rows"))
    return proto


def samples(proto: onnx.ModelProto, count: int = 12) -> list[Feeds]:
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in proto.graph.input}
    return [{name: random(*shape, seed=100 + n) for name, shape in shapes.items()} for n in range(count)]


def quantized(
    proto: onnx.ModelProto | None = None, *, bench: bool = False, **options: Any
) -> tuple[ir.Model, QuantizationReport]:
    """The result for the residual net by default, and its report; without measurements by default."""
    proto = proto or residual_net()
    result = onnxopt.quantize(proto, data=samples(proto), bench=bench, **options)
    return result.graph, result.report


def written(proto: onnx.ModelProto | None = None, **options: Any) -> ir.Graph:
    """The result's graph, quantized with a budget that allows everything."""
    model, report = quantized(proto, metric="sqnr", max_drop=1000.0, **options)
    assert report.ok, report.reason
    return model.graph


def ops(graph: ir.Graph, op_type: str) -> list[ir.Node]:
    return [node for node in graph if node.op_type == op_type]


def maker(value: ir.Value | None) -> str:
    """The operator that gives a value; empty for inputs and constants."""
    producer = value.producer() if value is not None else None
    return producer.op_type if producer is not None else ""


def kinds(graph: ir.Graph) -> set[str]:
    """The types of what is dequantized, by name of the zero point's or the constant's type."""
    found = set()
    for node in ops(graph, "DequantizeLinear"):
        zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else constant_array(node.inputs[0])
        assert zero is not None
        found.add(str(zero.dtype))
    return found


# --------------------------------------------------------------------- TensorRT
def test_tensorrt_gets_symmetric_int8_in_front_of_layers_and_residuals_alone() -> None:
    model, report = quantized(target="tensorrt")
    graph = model.graph
    assert kinds(graph) == {"int8"}
    for node in (*ops(graph, "QuantizeLinear"), *ops(graph, "DequantizeLinear")):
        zero = constant_array(node.inputs[2]) if len(node.inputs) > 2 else np.zeros(1)
        assert zero is not None
        assert not zero.any()
    first, second, narrow = ops(graph, "Conv")
    for layer in (first, second, *ops(graph, "ConvTranspose"), *ops(graph, "Gemm")):
        assert [maker(value) for value in layer.inputs] == ["DequantizeLinear", "DequantizeLinear", ""]
        bias = constant_array(layer.inputs[2])
        assert bias is not None
        assert bias.dtype == np.float32
    assert [maker(value) for value in narrow.inputs] == ["Relu", ""]
    assert {node.op_type for node, _ in first.outputs[0].uses()} == {"Relu"}
    residual = next(
        node for node in ops(graph, "Add") if first in _ancestors(node) and "Conv" in _makers(node)
    )
    assert sorted(_makers(residual)) == ["Conv", "DequantizeLinear"]
    axes = {
        node.op_type: node.inputs[1].producer().attributes["axis"].as_int()  # type: ignore[union-attr]
        for node in (first, *ops(graph, "ConvTranspose"), *ops(graph, "Gemm"))
    }
    assert axes == {"Conv": 0, "ConvTranspose": 1, "Gemm": 1}
    left = "Conv: it has fewer than 16 channels, for which the target has no fast integers"
    assert list(report.left) == [left]
    assert lint(model, "tensorrt") == () == report.findings


def _makers(node: ir.Node) -> list[str]:
    return [maker(value) for value in node.inputs]


def _ancestors(node: ir.Node) -> list[ir.Node]:
    found, work = [], [node]
    while work:
        for value in work.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is not None and producer not in found:
                found.append(producer)
                work.append(producer)
    return found


def test_tensorrt_is_judged_here_and_not_timed() -> None:
    proto = residual_net()
    model, report = quantized(proto, bench=True, target="tensorrt")
    assert report.ok
    assert report.timing is None
    assert report.kernels == {}
    assert any(note.startswith("speed not measured: tensorrt: ") for note in report.notes)
    feeds = random(1, 16, 4, 4, seed=7)
    with open_session(model, session_config=AS_WRITTEN) as session:
        found = session.run({"x": feeds})["y"]
    assert sqnr(execute(proto, {"x": feeds})[0], found) > 25


def test_both_computed_operands_of_attention_are_quantized() -> None:
    graph = written(text_model(ATTENTION), target="tensorrt")
    for product in ops(graph, "MatMul"):
        assert _makers(product) == ["DequantizeLinear", "DequantizeLinear"]
    assert _makers(ops(graph, "Softmax")[0]) == ["MatMul"]


@pytest.mark.parametrize(
    ("scheme", "activation", "rule"),
    [
        ("int8", "uint8", "uint8-quantization"),
        ("int8", "int16", "unsupported-type"),
        ("float8", "float8e5m2", "unsupported-type"),
    ],
)
def test_what_tensorrt_refuses_is_not_given(scheme: str, activation: str, rule: str) -> None:
    _, report = quantized(target="tensorrt", scheme=scheme, activation=activation)
    assert not report.ok
    assert report.reason.startswith(f"tensorrt refuses it, rule {rule}: ")
    assert rule in {finding["rule"] for finding in report.to_dict()["lint"]}


def test_what_was_refused_before_is_said_and_no_reason() -> None:
    proto = text_model(
        "agraph (float[2,16] x) => (float[2,16] y) { h = Det(m) a = Add(x, h) y = MatMul(a, w) }"
    )
    proto.graph.initializer.extend(
        [numpy_helper.from_array(random(16, 16), "w"), numpy_helper.from_array(random(2, 2), "m")]
    )
    found = lint(proto, "tensorrt")
    assert [one.rule for one in found] == ["unsupported-operator"]
    assert new_error(found, proto, find_target("tensorrt")) == ""
    assert new_error(found * 2, proto, find_target("tensorrt")).startswith("tensorrt refuses it, rule unsup")


@pytest.mark.parametrize(
    ("text", "residual"),
    [
        ("c = Conv(x, w) y = Add(c, x)", "x"),
        ("c = Conv(x, w) y = Add(x, c)", "x"),
        ("c = Conv(x, w) d = Conv(x, w) y = Add(d, c)", "c"),
        ("c = Conv(x, w) d = Relu(c) y = Add(d, x)", None),
        ("c = Conv(x, w) y = Add(c, c)", None),
        ("c = Conv(x, w) y = Add(c, w)", None),
        ("c = Conv(x, x) y = Add(c, x)", None),
        ("c = Neg(x) y = Add(c, x)", None),
    ],
)
def test_the_residual_is_the_operand_that_is_there_first(text: str, residual: str | None) -> None:
    proto = text_model(f"agraph (float[1,16,1,1] x) => (float[1,16,1,1] y) {{ {text} }}")
    proto.graph.initializer.append(numpy_helper.from_array(random(16, 16, 1, 1), "w"))
    model = ir.from_proto(proto)
    sums = [unit for unit in survey(model, TENSORRT, exposable(model)).units if unit.node.op_type == "Add"]
    assert [unit.sources[0].name for unit in sums] == ([residual] if residual else [])
    assert all(unit.layer is not None and unit.layer.op_type == "Conv" for unit in sums)
    without = survey(model, replace(TENSORRT, residual=False), exposable(model)).units
    assert all(unit.node.op_type == "Conv" for unit in without)


@pytest.mark.parametrize(
    ("node", "weight", "shape", "taken"),
    [
        ("Conv", (16, 16, 1, 1), "1,16,4,4", True),
        ("Conv", (15, 16, 1, 1), "1,15,4,4", False),
        ("Conv", (16, 15, 1, 1), "1,16,4,4", False),
        ("Conv<group=16>", (16, 1, 1, 1), "1,16,4,4", True),
        ("Conv<group=8>", (16, 1, 1, 1), "1,16,4,4", False),
        ("ConvTranspose<group=4>", (16, 4, 1, 1), "1,16,4,4", True),
        ("ConvTranspose<group=2>", (16, 4, 1, 1), "1,8,4,4", False),
        ("MatMul", (16, 4), "2,4", True),
        ("MatMul", (16, 1), "2,1", False),
        ("Gemm", (16, 4), "1,4", False),
    ],
)
def test_narrow_layers_stay_in_float_for_tensorrt(
    node: str, weight: tuple[int, ...], shape: str, taken: bool
) -> None:
    channels = weight[1] if node == "Conv" else int(node[-3:-1].strip("=")) if node == "Conv<group=8>" else 16
    inputs = f"{shape.split(',')[0]},16" if len(weight) == 2 else f"1,{channels},4,4"
    text = f"agraph (float[{inputs}] x) => (float[{shape}] y) {{ y = {node}(x, w) }}"
    proto = text_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(random(*weight), "w"))
    model = ir.from_proto(proto)
    assert len(survey(model, TENSORRT, exposable(model)).units) == taken
    assert len(survey(model, replace(TENSORRT, narrow=0), exposable(model)).units) == 1


@pytest.mark.parametrize(
    ("group", "weight", "axis"),
    [(1, (16, 24, 3, 3), 1), (2, (32, 12, 3, 3), None), (16, (16, 1, 3, 3), None), (16, (16, 2, 3, 3), None)],
)
def test_transposed_convolutions_have_scales_that_no_groups_share(
    group: int, weight: tuple[int, ...], axis: int | None
) -> None:
    """Against the runtime, as ONNX's reference evaluator gives other numbers than the standard for groups."""
    outputs = weight[1] * group
    proto = text_model(
        f"""agraph (float[1,{weight[0]},5,5] x) => (float[1,{outputs},10,10] y) {{
            y = ConvTranspose<group={group}, strides=[2,2], pads=[1,1,1,1], output_padding=[1,1]>(x, w, b)
        }}"""
    )
    array = random(*weight) * np.geomspace(0.2, 1, weight[1]).astype(np.float32)[:, None, None]
    proto.graph.initializer.append(numpy_helper.from_array(array, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(random(outputs), "b"))
    graph = written(proto, target="tensorrt")
    (layer,) = ops(graph, "ConvTranspose")
    read = layer.inputs[1].producer()  # type: ignore[union-attr]
    assert read is not None
    scale = constant_array(read.inputs[1])
    assert scale is not None
    assert read.attributes.get_int("axis", None) == axis
    assert scale.shape == (() if axis is None else (weight[1],))
    ints = constant_array(read.inputs[0])
    assert ints is not None
    by_channel = scale if axis is None else scale[:, None, None]
    assert np.abs(ints * by_channel - array).max() <= 0.5001 * scale.max()
    feeds = samples(proto, 1)[0]
    expected, found = execute(proto, feeds)[0], execute(ir.Model(graph, ir_version=10), feeds)[0]
    for before, after in zip(np.split(expected, outputs, 1), np.split(found, outputs, 1), strict=True):
        assert sqnr(before, after) > 25


def test_an_add_in_integers_needs_its_layer_in_integers() -> None:
    proto = onnx.shape_inference.infer_shapes(residual_net())
    model = ir.from_proto(proto)
    units = survey(model, TENSORRT, exposable(model)).units
    with open_session(model) as session:
        assert session.run(samples(proto, 1)[0])["y"].shape == (2, 10)

    def sizes(value: ir.Value) -> tuple[int, ...]:
        return tuple(value.shape.numpy()) if value.shape is not None else ()

    def chosen(noise: dict[Source, float]) -> frozenset[str]:
        return choose(model.graph, units, prices_of_work(sizes), noise, 1.0, outputs=False).nodes

    assert chosen({}) == {"a", "c", "s", "u", "z", "y"}
    assert chosen({Source("weight", "c"): 1e12}) == {"a", "u", "z", "y"}
    assert chosen({Source("weight", "a"): 1e12, Source("weight", "z"): 1e12}) == {"c", "s", "u"}


# ------------------------------------------------------------- random graphs
def everything(
    model: ir.Model, feeds: Sequence[Feeds], placement: Placement, form: str | None
) -> ir.Model | None:
    """The model with all that can be quantized, with ranges as they are; None where there is nothing."""
    names = list(exposable(model))
    statistics = calibrate(model, feeds, names)
    known = {name: one for name, one in statistics.items() if one.count and not one.nonfinite}
    units = survey(model, placement, known).units
    if not any(unit.node.op_type in LAYERS for unit in units):
        return None
    ranges = {name: (one.minimum, one.maximum) for name, one in known.items()}
    params = params_of_tensors(units, ranges, placement, activation=form)
    weight = find_format(form or placement.weight)
    plan = Plan(frozenset(unit.site for unit in units), frozenset(params), params, weight)
    made = clone(model)
    emit(made, survey(made, placement, params).units, plan, placement)
    return made


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(2, 6), family=st.sampled_from(("all", "layers")))
@settings(
    max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much]
)
def test_tensorrt_takes_whatever_is_emitted(seed: int, steps: int, family: str) -> None:
    model = random_model(seed, steps, family)
    opset = model.proto.opset_import[0].version
    assume(opset >= 13)
    plain = ir.from_proto(onnx.shape_inference.infer_shapes(model.proto))
    form = "float8e4m3fn" if opset >= 19 and seed % 2 else None
    made = everything(plain, model.feeds, replace(TENSORRT, narrow=0), form)
    assume(made is not None)
    assert made is not None
    assert new_error(lint(made, "tensorrt"), model.proto, find_target("tensorrt")) == ""
    onnx.checker.check_model(dump(made))
    with open_session(made, session_config=AS_WRITTEN) as session:
        for feeds in model.feeds:
            assert set(session.run(feeds)) == {value.name for value in plain.graph.outputs}


# ------------------------------------------------------------------ ARM, others
def test_arm_gets_int8_activations_with_any_zero_point(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    proto = residual_net()
    model, report = quantized(proto, bench=True, target="arm")
    assert report.ok
    assert report.timing is None
    assert report.kernels == {}
    assert "speed not measured and no fusion proved: this is no ARM processor but x86_64" in report.notes
    graph = model.graph
    assert kinds(graph) == {"int8", "int32"}
    zeros = [constant_array(node.inputs[2]) for node in ops(graph, "QuantizeLinear")]
    assert {int(zero) for zero in zeros if zero is not None} >= {-128}
    feeds = {"x": random(1, 16, 4, 4, seed=7)}
    assert sqnr(execute(proto, feeds)[0], execute(model, feeds)[0]) > 25


def test_generic_is_standard_onnx() -> None:
    for scheme in ("int8", "dynamic", "weight-int8", "weight-int4"):
        model, _ = quantized(target="generic", scheme=scheme, goal="size", metric="sqnr", max_drop=1000.0)
        assert domains(model) == {""}


@pytest.mark.parametrize(
    ("scheme", "target", "why"),
    [
        ("int8", "cuda", "its provider has no integer kernels for Conv, Gemm and MatMul"),
        ("int16", "tensorrt", "it has no kernels for 16-bit activations"),
        ("float8", "cpu", "only TensorRT has kernels for 8-bit floats"),
        ("float8", "cuda", "only TensorRT has kernels for 8-bit floats"),
        ("dynamic", "tensorrt", "ranges that are found at run time are for the CPU's kernels"),
        ("dynamic", "cuda", "ranges that are found at run time are for the CPU's kernels"),
    ],
)
def test_a_scheme_that_the_target_has_no_kernels_for_is_refused(scheme: str, target: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"scheme {scheme} is not offered for target {target}: {why}"):
        quantized(scheme=scheme, target=target)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation": "float8e4m3fn"}, "scheme int8 takes activations in integers of 8 or 16 bits"),
        ({"activation": "int4"}, "scheme int8 takes activations in integers of 8 or 16 bits, not int4"),
        (
            {"scheme": "float8", "target": "tensorrt", "activation": "int8"},
            "scheme float8 takes activations in 8-bit floats, not int8",
        ),
        ({"scheme": "dynamic", "symmetric": True}, "scheme dynamic has no use for --symmetric"),
        ({"scheme": "weight-int8", "activation": "int8"}, "scheme weight-int8 has no use for --activation"),
    ],
)
def test_options_that_do_not_fit_the_scheme_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        quantized(**options)


@pytest.mark.parametrize("scheme", ["float16", "weight-int8", "weight-int4"])
def test_cuda_gets_halves_and_stored_weights(scheme: str) -> None:
    _, report = quantized(scheme=scheme, target="cuda", metric="sqnr", max_drop=1000.0)
    assert report.ok
    assert report.timing is None


# ---------------------------------------------------------------------- schemes
def test_float8_is_the_largest_magnitude_over_448() -> None:
    proto = residual_net()
    model, report = quantized(proto, scheme="float8", target="tensorrt")
    graph = model.graph
    assert kinds(graph) == {"float8_e4m3fn"}
    weight = ops(graph, "Conv")[0].inputs[1].producer()  # type: ignore[union-attr]
    assert weight is not None
    scale = constant_array(weight.inputs[1])
    w1 = next(numpy_helper.to_array(one) for one in proto.graph.initializer if one.name == "w1")
    assert scale is not None
    np.testing.assert_allclose(scale, abs(w1).max((1, 2, 3)) / 448, rtol=1e-6)
    assert any("session.disable_quant_qdq" in note for note in report.notes)


def test_the_runtime_computes_float8_as_the_formula_does() -> None:
    text = """<ir_version: 9, opset_import: ["" : 19]> agraph (float[1,16,4,4] x) => (float[1,16,4,4] y) {
        r = Relu(x) y = Conv(r, w)
    }"""
    proto = text_model(text)
    weight = random(16, 16, 1, 1)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    feeds = [{"x": random(1, 16, 4, 4, seed=n)} for n in range(3)]
    made = everything(ir.from_proto(proto), feeds, TENSORRT, "float8e4m3fn")
    assert made is not None
    form, rows = find_format("float8e4m3fn"), np.maximum(np.concatenate([one["x"] for one in feeds]), 0)
    of_x = params_from_range(0, rows.max(), form)
    of_w = params_from_range(weight.min((1, 2, 3)), weight.max((1, 2, 3)), form, axis=0)
    x, w = (dequantize(quantize(*pair), pair[1]) for pair in ((rows[:1], of_x), (weight, of_w)))
    with open_session(made, session_config=AS_WRITTEN) as session:
        found = session.run(feeds[0])["y"]
    np.testing.assert_allclose(found, np.einsum("oi,nihw->nohw", w[:, :, 0, 0], x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("activation", [None, "int16"])
def test_int16_is_smaller_and_exacter_with_biases_in_float(activation: str | None) -> None:
    proto = residual_net()
    model, report = quantized(proto, scheme="int16", goal="size", activation=activation)
    assert report.ok
    assert kinds(model.graph) == {activation or "uint16", "int8"}
    assert report.after.bytes < 0.4 * report.before.bytes
    assert "ONNX Runtime has no kernels for 16-bit activations on the CPU" in "".join(report.notes)
    assert model.opset_imports[""] == 21
    feeds = {"x": random(1, 16, 4, 4, seed=7)}
    assert sqnr(execute(proto, feeds)[0], execute(model, feeds)[0]) > 35


def scales(graph: ir.Graph) -> list[np.ndarray]:
    found = [
        constant_array(node.inputs[1])
        for op_type in ("QuantizeLinear", "DequantizeLinear")
        for node in ops(graph, op_type)
    ]
    return [one for one in found if one is not None]


@pytest.mark.parametrize(
    "options",
    [
        {"goal": "size"},
        {"target": "tensorrt"},
        {"goal": "size", "also_isa": ("avx2",)},
        {"goal": "size", "scheme": "weight-int8"},
    ],
)
def test_powers_of_two(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if "also_isa" in options:
        judge_without_emulator(monkeypatch)
    found = scales(written(power_of_two=True, **options))
    assert found
    for scale in found:
        mantissa, _ = np.frexp(scale)
        np.testing.assert_array_equal(mantissa, 0.5)


@pytest.mark.parametrize("options", [{"target": "tensorrt"}, {"scheme": "weight-int8", "goal": "size"}])
def test_per_tensor_weights_have_one_scale(options: dict[str, Any]) -> None:
    found = written(per_channel=False, **options)
    assert {scale.size for scale in scales(found)} == {1}


def test_symmetric_unsigned_activations_have_zero_in_the_middle_or_at_the_end() -> None:
    graph = written(symmetric=True, goal="size")
    zeros = [constant_array(node.inputs[2]) for node in ops(graph, "QuantizeLinear")]
    assert {int(zero) for zero in zeros if zero is not None} == {0, 128}


@pytest.mark.parametrize(("scheme", "levels"), [("ternary", [-1, 0, 1]), ("binary", [-1, 1])])
def test_experimental_schemes_say_so_and_what_they_keep(scheme: str, levels: list[int]) -> None:
    model, report = quantized(scheme=scheme, goal="size", metric="sqnr", max_drop=1000.0)
    weight = ops(model.graph, "DequantizeLinear")[0]
    array = constant_array(weight.inputs[0])
    assert array is not None
    assert np.unique(array).tolist() == levels
    assert any(note.startswith("experimental: few models keep their accuracy") for note in report.notes)
    assert report.judgement is not None
    assert report.judgement.score < 20


def test_what_cannot_run_here_is_not_given() -> None:
    _, report = quantized(scheme="bfloat16", goal="size")
    assert not report.ok
    assert "its accuracy cannot be judged here" in report.reason


# ------------------------------------------------------------------- saturation
def test_saturation_is_foreseen_and_avoided(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    model, report = quantized(goal="size")
    layers = len(find_saturation(model))
    assert layers >= 3
    said = f"on CPUs without VNNI, sums of {layers} layers can saturate; --also-isa avx2 avoids it"
    assert any(note.startswith(said) for note in report.notes)
    judge_without_emulator(monkeypatch)
    safe, report = quantized(goal="size", also_isa=("avx2",))
    assert len(ops(safe.graph, "DequantizeLinear")) > 3
    assert find_saturation(safe) == ()
    assert not any("VNNI" in note for note in report.notes)
    why = "weights are scaled so that no sum saturates; as they are best here, on avx2: as foreseen"
    assert why in report.notes


def test_weights_that_do_elsewhere_are_not_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = quantized(goal="size", bench=False)
    judged = judge_without_emulator(monkeypatch, within=True)
    model, report = quantized(goal="size", also_isa=("avx2",))
    assert len(judged) == 2  # the candidate, and the result
    assert len(find_saturation(model)) == len(find_saturation(plain)) >= 3
    assert "the budget holds on avx2, too, with weights as they are best here" in report.notes
    assert report.judgement is not None
    assert report.judgement.elsewhere["avx2"].ok


# ------------------------------------------------------------------ command line
@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--target", "tensorrt"), 0, "speed not measured: tensorrt:"),
        (("--target", "tensorrt", "--scheme", "float8"), 0, "speed not measured: tensorrt:"),
        (
            ("--target", "tensorrt", "--activation", "uint8"),
            1,
            "tensorrt refuses it, rule uint8-quantization:",
        ),
        (("--target", "cuda"), 2, "onnxopt: scheme int8 is not offered for target cuda: its provider has no"),
        (("--scheme", "float8"), 2, "onnxopt: scheme float8 is not offered for target cpu: only TensorRT"),
    ],
)
def test_exit_codes(
    options: tuple[str, ...], code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = residual_net()
    onnx.save(proto, tmp_path / "model.onnx")
    (tmp_path / "data").mkdir()
    for number, feeds in enumerate(samples(proto, 8)):
        np.savez(tmp_path / "data" / f"{number}.npz", x=feeds["x"])
    files = [tmp_path / name for name in ("model.onnx", "out.onnx", "data")]
    with pytest.raises(SystemExit) as ended:
        main(("quantize", str(files[0]), "-o", str(files[1]), "--data", str(files[2]), *options))
    printed = capsys.readouterr()
    assert int(ended.value.code or 0) == code
    assert said in " ".join((printed.out + printed.err).split())
    assert files[1].exists() == (code == 0)
