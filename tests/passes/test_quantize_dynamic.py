"""Products in 8-bit integers, scaled at run time: the numbers, the fused kernels, and what is left."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnxopt.passes.quantize.quantize_dynamic import QuantizeDynamic
from onnxopt.protobuf import dump
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.weights import quantize_weight
from tests.support import Rewritten, execute, random_feeds, run_pass, sqnr, text_model


def model_of(text: str, **weights: tuple[int, ...]) -> onnx.ModelProto:
    model = text_model(text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        array = rng.standard_normal(shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


def fused(done: Rewritten, folder: Path) -> list[str]:
    """The operators that the runtime makes of a model."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(dump(done.model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def product(x: np.ndarray, w: np.ndarray, one: QuantizeDynamic) -> np.ndarray:
    """x w as the operators are specified to compute it."""
    axis, limit = 1 if one.per_channel else None, 64 if one.reduce_range else None
    ints, params = quantize_weight(w, find_format("int8"), axis=axis, limit=limit)
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255)
    whole = np.clip(np.rint(x / step) + zero, 0, 255) - zero
    result: np.ndarray = whole.astype(np.int64) @ ints.astype(np.int64) * (step * params.scale)
    return result.astype(np.float32)


@pytest.mark.parametrize(
    "one", [QuantizeDynamic(), QuantizeDynamic(per_channel=False), QuantizeDynamic(reduce_range=True)]
)
@pytest.mark.parametrize(
    ("call", "shape", "alpha", "bias"),
    [
        ("MatMul(x, w)", (32, 6), 1, 0),
        ("Gemm(x, w)", (32, 6), 1, 0),
        ("Gemm(x, w, c)", (32, 6), 1, 1),
        ("Gemm<transB = 1, alpha = -0.5>(x, w, c)", (6, 32), -0.5, 1),
    ],
)
def test_a_product_is_what_its_operators_say(
    call: str, shape: tuple[int, ...], alpha: float, bias: int, one: QuantizeDynamic, tmp_path: Path
) -> None:
    model = model_of(f"agraph (float[5, 32] x) => (float[5, 6] y) {{ y = {call} }}", w=shape, c=(6,))
    done, feeds = run_pass(model, one), random_feeds(model)
    w, c = map(numpy_helper.to_array, model.graph.initializer)
    want = alpha * product(feeds["x"], w if shape == (32, 6) else w.T, one) + bias * c
    assert sqnr(want, execute(done.model, feeds)[0]) > 110
    assert fused(done, tmp_path) == ["DynamicQuantizeMatMul"]


def test_products_of_one_activation_share_its_integers(tmp_path: Path) -> None:
    model = model_of(
        """agraph (float[2, 5, 32] x) => (float[2, 5, 6] y, float[2, 5, 6] z) {
            y = MatMul(x, w)
            t = MatMul(x, v)
            z = Add(t, c)
        }""",
        w=(32, 6),
        v=(32, 6),
        c=(6,),
    )
    done, feeds = run_pass(model, QuantizeDynamic()), random_feeds(model)
    assert (done.count("DynamicQuantizeLinear"), done.count("MatMulInteger")) == (1, 2)
    assert sorted(fused(done, tmp_path)) == ["DynamicQuantizeLinear", *["MatMulIntegerToFloat"] * 2]
    for want, have in zip(execute(model, feeds), execute(done.model, feeds), strict=True):
        assert sqnr(want, have) > 35


def test_an_activation_is_quantized_in_the_branch_that_reads_it() -> None:
    model = model_of(
        """agraph (float[5, 32] x, bool b) => (float[5, 6] y) {
            y = If (b) <
                then_branch = yes () => (float[5, 6] p) { p = MatMul(x, w) },
                else_branch = no () => (float[5, 6] q) { q = MatMul(x, v) }
            >
        }""",
        w=(32, 6),
        v=(32, 6),
    )
    done = run_pass(model, QuantizeDynamic())
    assert (done.changes, done.count("DynamicQuantizeLinear")) == (2, 2)
    feeds = {**random_feeds(model), "b": np.array(True)}
    assert sqnr(execute(model, feeds)[0], execute(done.model, feeds)[0]) > 35


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("direction", ["forward", "reverse", "bidirectional"])
@pytest.mark.parametrize("more", ["", ", b", ", b, lengths, h, c", ", , , h, c, p"])
def test_an_lstm_keeps_its_meaning(more: str, direction: str, per_channel: bool) -> None:
    d = 2 if direction == "bidirectional" else 1
    model = model_of(
        f"""agraph (float[6, 3, 8] x) => (float[6, {d}, 3, 10] y, float[{d}, 3, 10] end)
        <int32[3] lengths = {{6, 2, 4}}> {{
            y, end = LSTM<hidden_size = 10, direction = "{direction}">(x, w, r{more})
        }}""",
        w=(d, 40, 8),
        r=(d, 40, 10),
        b=(d, 80),
        h=(d, 3, 10),
        c=(d, 3, 10),
        p=(d, 30),
    )
    done, feeds = run_pass(model, QuantizeDynamic(per_channel)), random_feeds(model)
    assert done.op_types == ["DynamicQuantizeLSTM"]
    for want, have in zip(execute(model, feeds), execute(done.model, feeds), strict=True):
        assert sqnr(want, have) > 25


@pytest.mark.parametrize(
    ("layers", "made"),
    [
        ((), {"MatMulInteger": 2, "DynamicQuantizeLSTM": 1}),
        (("LSTM",), {"MatMul": 1, "Gemm": 1, "DynamicQuantizeLSTM": 1}),
        (("Gemm", "MatMul"), {"MatMulInteger": 2, "LSTM": 1}),
        (("Gemm",), {"MatMul": 1, "MatMulInteger": 1, "LSTM": 1}),
    ],
)
def test_only_the_layers_that_are_asked_for(layers: tuple[str, ...], made: dict[str, int]) -> None:
    model = model_of(
        """agraph (float[8, 8, 8] x, float[8, 8] z) => (float[8, 1, 8, 8] a, float[8, 8] b, float[8, 8] c) {
            a, e = LSTM<hidden_size = 8>(x, lstm, lstm)
            b = MatMul(z, w)
            c = Gemm(z, w)
            k = Conv(x, kernel)
        }""",
        w=(8, 8),
        lstm=(1, 32, 8),
        kernel=(8, 8, 1),
    )
    done = run_pass(model, QuantizeDynamic(layers=layers))
    products = ("MatMul", "Gemm", "LSTM", "MatMulInteger", "DynamicQuantizeLSTM")
    assert {name: done.count(name) for name in products if done.count(name)} == made
    assert len(done.declined) == (not layers)  # the convolution


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("y = MatMul(x, z)", "the weight is computed at run time"),
        ("y = MatMul(w, x)", "the constant is the first factor; integers are for the second one"),
        ("y = MatMul(x, stack)", "the weight has rank 3; it is not one matrix"),
        ("y = MatMul(x, small)", "the weight has fewer than 64 elements"),
        ("y = Gemm<transA = 1>(x, w)", "the Gemm transposes what it multiplies, or scales its bias"),
        ("y = Gemm<beta = 2.0>(x, w, z)", "the Gemm transposes what it multiplies, or scales its bias"),
        (
            "y = Conv(image, kernel)",
            "a convolution of activations that are quantized at run time is slower than in float",
        ),
        ("y = ConvTranspose(image, kernel)", "there is no ConvTranspose of integers"),
        ("y, e = GRU<hidden_size = 8>(steps, gru, gru)", "the runtime has no GRU of integers"),
        (
            "y, e = LSTM<hidden_size = 8, layout = 1>(steps, lstm, lstm)",
            "DynamicQuantizeLSTM has no layout 1",
        ),
    ],
)
def test_what_is_left_in_float(body: str, reason: str) -> None:
    dims = {"MatMul(x, stack)": 3, "LSTM": 4, "GRU": 4, "Conv": 4}
    rank = next((rank for word, rank in dims.items() if word in body), 2)
    model = model_of(
        f"""agraph (float[8, 8] x, float[8, 8] z, float[1, 8, 4, 4] image, float[8, 8, 8] steps)
        => (float[{", ".join("?" * rank)}] y) {{ {body} }}""",
        w=(8, 8),
        stack=(2, 8, 8),
        small=(8, 1),
        kernel=(8, 8, 3, 3),
        gru=(1, 24, 8),
        lstm=(1, 32, 8),
    )
    done = run_pass(model, QuantizeDynamic())
    assert (done.changes, done.declined) == (0, (reason,))


def test_an_older_opset_and_another_type_are_declined() -> None:
    old = model_of(
        """<ir_version: 5, opset_import: ["": 10]>
        agraph (float[8, 8] x) => (float[8, 8] y) { y = MatMul(x, w) }""",
        w=(8, 8),
    )
    old.graph.input.append(onnx.helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, (8, 8)))
    assert run_pass(old, QuantizeDynamic()).declined == (
        "the weight is a graph input (overridable; --freeze-initializers folds it)",
    )
    del old.graph.input[-1]
    assert run_pass(old, QuantizeDynamic()).declined == ("DynamicQuantizeLinear came with opset 11",)
    double = model_of("agraph (double[8, 8] x) => (double[8, 8] y) { y = MatMul(x, w) }", w=(8, 8))
    array = numpy_helper.to_array(double.graph.initializer[0]).astype(np.float64)
    double.graph.initializer[0].CopyFrom(numpy_helper.from_array(array, "w"))
    assert run_pass(double, QuantizeDynamic()).declined == ("integers are for float32, not DOUBLE",)
