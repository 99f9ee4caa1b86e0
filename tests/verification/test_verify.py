"""The proof: what it lets pass, what it catches, and what it admits it cannot show."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxopt import runtimes
from onnxopt.errors import ModelError, UsageError
from onnxopt.runtimes import UnsupportedModelError
from onnxopt.verification import Baseline, Kind, Verdict, verify
from onnxopt.verification import baseline as baseline_module

RNG = np.random.default_rng(7)


def parse(text: str, domains: str = "") -> onnx.ModelProto:
    return onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21{domains}]>\n' + text)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def cnn() -> onnx.ModelProto:
    """Three convolutions, a pool and a classifier, with biases that matter little."""
    model = parse(
        """cnn (float[N, 3, 16, 16] x) => (float[N, 10] logits) {
            a = Conv <pads: ints = [1, 1, 1, 1]> (x, w1, b1)
            b = Relu(a)
            c = Conv <pads: ints = [1, 1, 1, 1]> (b, w2, b2)
            d = Relu(c)
            e = GlobalAveragePool(d)
            f = Flatten(e)
            logits = Gemm(f, w3, b3)
        }"""
    )
    shapes = {
        "w1": (16, 3, 3, 3),
        "b1": (16,),
        "w2": (16, 16, 3, 3),
        "b2": (16,),
        "w3": (16, 10),
        "b3": (10,),
    }
    rng = np.random.default_rng(1)
    for name, shape in shapes.items():
        scale = 0.05 if name[0] == "b" else math.prod(shape[1:]) ** -0.5
        array = (rng.standard_normal(shape) * scale).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(array, name))
    return model


CNN_FEEDS = [{"x": floats(2, 3, 16, 16)}, {"x": floats(1, 3, 16, 16)}]


def edited(name: str, change: Callable[[np.ndarray], np.ndarray]) -> onnx.ModelProto:
    model = cnn()
    for tensor in model.graph.initializer:
        if tensor.name == name:
            tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
    return model


def swap_channels(weights: np.ndarray) -> np.ndarray:
    weights[[0, 1]] = weights[[1, 0]]
    return weights


def test_a_model_is_itself_whatever_it_comes_as(tmp_path: Path) -> None:
    model = cnn()
    path = tmp_path / "cnn.onnx"
    path.write_bytes(model.SerializeToString())
    sources: list[Any] = [
        path,
        str(path),
        path.read_bytes(),
        io.BytesIO(path.read_bytes()),
        ir.from_proto(model),
    ]
    for source in sources:
        verdict = verify(source, model, feeds=CNN_FEEDS, kind="exact")
        assert verdict.ok
        assert verdict.sqnr == math.inf
        assert verdict.required == math.inf
        assert (verdict.feeds, verdict.shapes) == (2, 2)
        assert verdict.summary.startswith("proved: bit-equal on 2 feeds (2 shapes), onnxruntime")
        assert verdict.summary.endswith(" cpu")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("b1", np.zeros_like),
        ("b3", np.zeros_like),
        ("w2", swap_channels),
        ("w1", lambda w: w[:, ::-1]),
        ("w3", lambda w: w * np.float32(1.001)),
        ("w3", lambda w: w.astype(np.float16).astype(np.float32)),
    ],
    ids=["bias dropped", "last bias dropped", "channels swapped", "input channels reversed", "drift", "half"],
)
def test_real_damage_is_caught(name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    baseline = Baseline.measure(cnn(), CNN_FEEDS)
    verdict = baseline.compare(edited(name, change), kind="reorder")
    assert verdict.status == "failed"
    assert verdict.sqnr is not None
    assert verdict.sqnr < 90
    assert verdict.reason.startswith("output 'logits': SQNR")
    assert baseline.compare(cnn()).ok, "the baseline is not used up"


def test_reassociation_passes_as_reorder_and_fails_as_exact() -> None:
    model = parse(
        "g (float[8, 64] x, float[64, 64] w) => (float[8, 64] y) { a = MatMul(x, w) y = Mul(a, x) }"
    )
    after = parse(
        "g (float[8, 64] x, float[64, 64] w) => (float[8, 64] y) { a = MatMul(x, w) y = Mul(x, a) }"
    )
    scaled = parse(
        """g (float[8, 64] x, float[64, 64] w) => (float[8, 64] y) <float t = {3}> {
            v = Mul(w, t) a = MatMul(x, v) b = Div(a, t) y = Mul(b, x)
        }"""
    )
    baseline = Baseline.measure(model, [{"x": floats(8, 64), "w": floats(64, 64)} for _ in range(2)])
    assert baseline.compare(after, kind="exact").ok
    reordered = baseline.compare(scaled, kind="reorder")
    assert reordered.ok
    assert reordered.required == 100
    assert reordered.sqnr is not None
    assert 100 < reordered.sqnr < 160
    assert f"SQNR {reordered.sqnr:.0f} dB >= 100 dB on 2 feeds" in reordered.summary
    exact = baseline.compare(scaled, kind="exact")
    assert exact.status == "failed"
    assert "bit-equality is needed" in exact.reason


def test_the_bound_is_the_noise_of_the_runtime_less_6_db() -> None:
    """The runtime fuses BatchNormalization into Conv; the sine of a large angle amplifies what that moves."""
    model = parse(
        """g (float[1, 3, 12, 12] x) => (float[1, 4, 10, 10] y) <float big = {1000}> {
            c = Conv(x, w) n = BatchNormalization(c, s, b, m, v) l = Mul(n, big) y = Sin(l)
        }"""
    )
    arrays = {
        "w": floats(4, 3, 3, 3),
        "s": floats(4),
        "b": floats(4),
        "m": floats(4),
        "v": abs(floats(4)) + 1,
    }
    model.graph.initializer.extend(numpy_helper.from_array(a, n) for n, a in arrays.items())
    baseline = Baseline.measure(model, [{"x": floats(1, 3, 12, 12)} for _ in range(3)])
    verdict = baseline.compare(model)
    assert verdict.floor is not None
    assert 40 < verdict.floor < 100
    assert verdict.required == pytest.approx(verdict.floor - 6)


def test_lossy_is_measured_and_not_judged() -> None:
    half = edited("w3", lambda w: w.astype(np.float16).astype(np.float32))
    verdict = verify(cnn(), half, feeds=CNN_FEEDS, kind="lossy")
    assert (verdict.status, verdict.ok, verdict.required) == ("measured", True, None)
    assert verdict.sqnr is not None
    assert 50 < verdict.sqnr < 90
    assert verdict.outputs[0].top1 == 1
    assert verdict.outputs[0].cosine == pytest.approx(1, abs=1e-5)


def test_another_shape_or_type_fails_whatever_the_kind() -> None:
    before = parse("g (float[N] x) => (float[M] y) { y = Relu(x) }")
    after = parse("g (float[N] x) => (float[M] y) { r = Relu(x) y = Concat <axis: int = 0> (r, r) }")
    kinds: tuple[Kind, ...] = ("exact", "reorder", "lossy")
    for kind in kinds:
        verdict = verify(before, after, feeds=[{"x": floats(3)}, {"x": floats(4)}], kind=kind)
        assert verdict.status == "failed"
        assert "shape [3] became [6]" in verdict.reason


SIGNATURE = "g (float[N, 4] x, float[4] k) => (float[N, 4] y, float[N, 4] z) { y = Add(x, k) z = Mul(x, k) }"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            SIGNATURE.replace("(float[N, 4] x, float[4] k)", "(float[4] k, float[N, 4] x)"),
            "inputs (x, k) became (k, x)",
        ),
        (SIGNATURE.replace("k", "kk"), "inputs (x, k) became (x, kk)"),
        (
            SIGNATURE.replace(", float[N, 4] z)", ")").replace("z = Mul(x, k)", ""),
            "outputs (y, z) became (y)",
        ),
        (SIGNATURE.replace("(float[N, 4] x", "(float[1, 4] x"), "input 'x': axis 0 was N and became 1"),
        (SIGNATURE.replace("(float[N, 4] y", "(float[N, 5] y"), "output 'y': axis 1 was 4 and became 5"),
        (SIGNATURE.replace("(float[N, 4] y", "(float[N] y"), "output 'y': rank 2 became 1"),
        (SIGNATURE.replace("float[", "double["), "input 'x': type FLOAT became DOUBLE"),
    ],
)
def test_the_signature_is_part_of_the_claim(text: str, said: str) -> None:
    feeds = [{"x": floats(2, 4), "k": floats(4)}]
    verdict = verify(parse(SIGNATURE), parse(text), feeds=feeds)
    assert verdict.status == "failed"
    assert said in verdict.reason


def test_a_more_precise_output_shape_is_no_contradiction() -> None:
    loose = parse("g (float[3, 4] x) => (float[A, B] y) { y = Relu(x) }")
    tight = parse("g (float[3, 4] x) => (float[3, 4] y) { y = Relu(x) }")
    assert verify(loose, tight, feeds=[{"x": floats(3, 4)}, {"x": floats(3, 4)}]).ok


OVERRIDABLE = "g (float[3] x, float[3] b) => (float[3] y) <float[3] b = {0, 0, 0}> { y = Add(x, b) }"


def test_an_overridable_initializer_must_still_work() -> None:
    feeds = [{"x": floats(3)}, {"x": floats(3)}]
    ignored = OVERRIDABLE.replace("y = Add(x, b)", "y = Identity(x)")
    fixed = "g (float[3] x) => (float[3] y) { y = Identity(x) }"
    baseline = Baseline.measure(parse(OVERRIDABLE), feeds)
    kept = baseline.compare(parse(OVERRIDABLE), kind="exact")
    assert kept.ok
    assert kept.feeds == 3
    assert "one sample overrides the initializers that may be overridden" in kept.notes
    broken = baseline.compare(parse(ignored), kind="exact")
    assert broken.status == "failed"
    assert broken.reason.endswith("with initializers overridden")
    lost = baseline.compare(parse(fixed), kind="exact")
    assert lost.reason == "initializers that could be overridden no longer can: (b)"
    frozen = baseline.compare(parse(fixed), kind="exact", frozen=True)
    assert frozen.ok
    assert frozen.feeds == 2


def test_integers_must_be_equal_and_the_fraction_is_said() -> None:
    before = parse("g (float[N, 5] x) => (int64[N] y) { y = ArgMax <axis: int = 1, keepdims: int = 0> (x) }")
    after = parse(
        "g (float[N, 5] x) => (int64[N] y) { z = Neg(x) y = ArgMax <axis: int = 1, keepdims: int = 0> (z) }"
    )
    x = np.eye(5, dtype=np.float32)
    verdict = verify(before, after, feeds=[{"x": x}, {"x": x[::-1]}])
    assert verdict.status == "failed"
    assert verdict.reason == "output 'y': 100.00% of the elements differ"
    assert verify(before, before, feeds=[{"x": x}, {"x": x[::-1]}]).ok


def test_outputs_that_cannot_show_anything_prove_nothing() -> None:
    zero = parse("g (float[4] x) => (float[4] y) { n = Abs(x) m = Neg(n) y = Relu(m) }")
    same = parse("g (float[4] x) => (float[4] y) { s = Abs(x) t = Sign(s) y = Softmax(t) }")
    empty = parse("g (float[N] x) => (float[N] y) { y = Relu(x) }")
    feeds = [{"x": floats(4)}, {"x": floats(4)}]
    for model, sight in ((zero, "zero"), (same, "constant")):
        verdict = verify(model, model, feeds=feeds)
        assert (verdict.status, verdict.ok) == ("unproved", False)
        assert verdict.outputs[0].sight == sight
        assert f"'y' is {sight}" in verdict.summary
    verdict = verify(empty, empty, feeds=[{"x": floats(0)}])
    assert (verdict.status, verdict.outputs[0].sight) == ("unproved", "empty")


def test_one_blind_output_is_called_out_beside_others() -> None:
    model = parse(
        "g (float[4] x) => (float[4] y, float[4] z) { y = Relu(x) a = Abs(x) b = Neg(a) z = Relu(b) }"
    )
    verdict = verify(model, model, feeds=[{"x": floats(4)}, {"x": floats(4)}])
    assert verdict.ok
    assert "output 'z' is zero" in verdict.notes


def test_a_constant_that_no_input_reaches_is_compared() -> None:
    def constant(value: float) -> onnx.ModelProto:
        return parse(
            f"""g (float[4] x) => (float y, int64[1] s) {{
                y = Constant <value_float: float = {value}> ()
                s = Shape(x)
            }}"""
        )

    feeds = [{"x": floats(4)}, {"x": floats(4)}]
    assert verify(constant(2.0), constant(2.0), feeds=feeds, kind="exact").status == "proved"
    assert verify(constant(2.0), constant(2.5), feeds=feeds, kind="lossy").outputs[0].mismatch == 1
    assert verify(constant(2.0), constant(2.5), feeds=feeds).status == "failed"
    assert verify(constant(0.0), constant(0.0), feeds=feeds).status == "proved"


def test_random_outputs_are_compared_in_shape_and_type_only() -> None:
    text = "g (float[64] x) => (float[64] y, float[64] z) { y = RandomNormalLike(x) z = Relu(x) }"
    feeds = [{"x": floats(64)}, {"x": floats(64)}]
    verdict = verify(parse(text), parse(text), feeds=feeds)
    assert verdict.ok
    assert verdict.outputs[0].sight == "random"
    assert "output 'y' is random" in verdict.notes
    only = parse("g (float[64] x) => (float[64] y) { y = RandomNormalLike(x) }")
    assert verify(only, only, feeds=feeds).status == "unproved"


def test_nan_of_the_original_is_told_and_must_stay_in_its_place() -> None:
    before = parse("g (float[4] x) => (float[4] y) { y = Sqrt(x) }")
    after = parse("g (float[4] x) => (float[4] y) { a = Abs(x) y = Sqrt(a) }")
    feeds = [{"x": np.array([4, -1, 9, 2], np.float32)}, {"x": np.array([1, 2, 3, 5], np.float32)}]
    same = verify(before, before, feeds=feeds)
    assert same.ok
    assert any("NaN or infinity in 1 elements of the original" in note for note in same.notes)
    changed = verify(before, after, feeds=feeds)
    assert "1 elements are NaN or infinite where" in changed.reason


QUANTIZED = """g (float[1, 8] x) => (float[1, 8] y) <float s = {0.1}, uint8 z = {128}> {
    q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = BODY
}"""


def test_quantized_activations_demand_bit_equality() -> None:
    before = parse(QUANTIZED.replace("BODY", "Mul(d, s)"))
    after = parse(QUANTIZED.replace("BODY", "Div(d, t)").replace("uint8 z", "float t = {10}, uint8 z"))
    feeds = [{"x": floats(1, 8)}, {"x": floats(1, 8)}]
    verdict = verify(before, after, feeds=feeds)
    assert verdict.status == "failed"
    assert "bit-equality is needed" in verdict.reason
    assert any(note.startswith("activations are quantized") for note in verdict.notes)
    assert verify(before, before, feeds=feeds).ok
    weights = parse("g (float[2] x) => (float[2] y) <int8[2] w = {1, 2}, float s = {0.1}> "
                    "{ d = DequantizeLinear(w, s) y = Mul(x, d) }")  # fmt: skip
    assert not any("quantized" in note for note in verify(weights, weights, feeds=[{"x": floats(2)}]).notes)


def test_the_result_must_open_and_run() -> None:
    before = parse("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }")
    feeds = [{"x": floats(2, 4)}, {"x": floats(3, 4)}]
    alien = parse("g (float[N, 4] x) => (float[N, 4] y) { y = a.b.Frobnicate(x) }", ', "a.b": 1')
    verdict = verify(before, alien, feeds=feeds)
    assert verdict.status == "failed"
    assert verdict.reason.startswith("the result does not run: model: onnxruntime cannot open it: ")
    narrow = parse(
        "g (float[N, 4] x) => (float[N, 4] y) <float[2, 1] k = {0, 0}> { r = Relu(x) y = Add(r, k) }"
    )
    verdict = verify(before, narrow, feeds=feeds)
    assert "the result does not run: model: the run on [x float32[3, 4]] failed" in verdict.reason


def test_samples_that_the_original_refuses_are_left_out() -> None:
    model = parse("g (float[N, 4] x) => (float[N, 4] y) <float[4] k = {1, 2, 3, 4}> { y = Add(x, k) }")
    good, bad = {"x": floats(2, 4)}, {"x": floats(2, 5)}
    verdict = verify(model, model, feeds=[good, bad])
    assert verdict.ok
    assert verdict.feeds == 1
    assert any(note.startswith("sample 1 is left out, the original fails on it") for note in verdict.notes)
    verdict = verify(model, model, feeds=[bad])
    assert verdict.status == "unproved"
    assert "the original ran on no sample" in verdict.reason
    assert verify(model, model, feeds=[]).reason == "there is no sample to run"


SPLINE = "g (float[4] x) => (float[4] y) { a = Relu(x) y = Add(a, x) }"


def test_the_reference_evaluator_stands_in_for_a_runtime_without_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuses(*_: object, **__: object) -> runtimes.Session:
        raise UnsupportedModelError("model: onnxruntime cannot open it: no kernel")

    monkeypatch.setattr(baseline_module, "open_session", refuses)
    feeds = [{"x": floats(4)}, {"x": floats(4)}]
    verdict = verify(parse(SPLINE), parse(SPLINE), feeds=feeds)
    assert verdict.ok
    assert verdict.runtime.startswith("onnx.reference")
    assert any("both sides run on ONNX's reference evaluator" in note for note in verdict.notes)
    assert verdict.outputs[0].sqnr_default is None
    broken = verify(parse(SPLINE), parse(SPLINE.replace("Add(a, x)", "Sub(a, x)")), feeds=feeds)
    assert broken.status == "failed"


def test_when_no_runtime_opens_the_original_nothing_is_proved() -> None:
    alien = parse("g (float[4] x) => (float[4] y) { y = a.b.Frobnicate(x) }", ', "a.b": 1')
    verdict = verify(alien, alien, feeds=[{"x": floats(4)}])
    assert verdict.status == "unproved"
    assert not verdict.ok


def test_outputs_of_subgraphs_depend_on_what_they_capture() -> None:
    model = parse(
        """g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] a) { a = Relu(x) },
                else_branch = e () => (float[2] b) { b = Neg(x) }
            >
        }"""
    )
    feeds = [{"c": np.array(flag), "x": floats(2)} for flag in (True, False)]
    baseline = Baseline.measure(model, feeds)
    assert baseline.contract.dependent == {"y"}
    assert baseline.compare(model, kind="exact").ok


def test_a_verdict_is_safe_as_json() -> None:
    verdict: Verdict = verify(cnn(), cnn(), feeds=CNN_FEEDS)
    plain = json.loads(json.dumps(verdict.to_dict(), allow_nan=False))
    assert plain["status"] == "proved"
    assert plain["sqnr"] == "inf"
    assert plain["outputs"][0]["name"] == "logits"
    assert plain["feeds"] == 2


def test_wrong_use_is_an_error_not_a_verdict(tmp_path: Path) -> None:
    baseline = Baseline.measure(cnn(), CNN_FEEDS)
    with pytest.raises(UsageError, match="did you mean 'reorder'"):
        baseline.compare(cnn(), kind="reorders")  # type: ignore[arg-type]
    with pytest.raises(ModelError):
        verify(tmp_path / "none.onnx", cnn(), feeds=CNN_FEEDS)
    with pytest.raises(ModelError):
        baseline.compare(b"no model")


def test_samples_are_made_where_none_are_given() -> None:
    verdict = verify(cnn(), cnn(), seed=3)
    assert verdict.ok
    assert verdict.feeds >= 2


def test_16_bit_floats_are_not_asked_to_be_bit_equal() -> None:
    text = """agraph (float16[64,64] x) => (float16[64,64] y) <float16[64,64] w> {
        a = MatMul(x, w)
        b = Transpose(a)
        c = Transpose(b)
        y = Softmax(c)
    }"""
    before = parse(text)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    before.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    after = onnx.ModelProto()
    after.CopyFrom(before)
    del after.graph.node[1:3]
    after.graph.node[1].input[0] = "a"
    verdict = verify(before, after, kind="exact")
    assert verdict.status == "proved"
    assert any("16-bit floats" in note for note in verdict.notes)


@pytest.mark.parametrize(
    "body",
    ["z = Neg(x)\n w = Abs(z)\n v = Neg(w)\n n = Sub(v, one)\n y = Log(n)", "y = Slice(x, zero, zero)"],
)
def test_outputs_without_a_finite_number_do_not_stop_the_others(body: str) -> None:
    text = f"""agraph (float[2,4] x) => (float y, float[2,4] e)
        <float[1] one = {{1}}, int64[1] zero = {{0}}> {{ {body}\n e = Exp(x) }}"""
    model = parse(text)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert verify(model, model).status == "proved"


@pytest.mark.parametrize(
    ("body", "wrong"),
    [
        ("s = Mul(x, k)\n y = Sin(s)", "s = Mul(x, k)\n y = Cos(s)"),
        ("s = Mul(x, k)\n r = Round(s)\n y = Sub(r, k)", "s = Mul(x, k)\n r = Abs(s)\n y = Sub(r, k)"),
    ],
)
def test_rough_16_bit_functions_are_still_judged(body: str, wrong: str) -> None:
    def model(inner: str) -> onnx.ModelProto:
        head = "agraph (float16[8,8] x) => (float16[8,8] y) <float[1] kf = {2000}>"
        return parse(f"{head} {{ k = Cast<to = 10>(kf)\n {inner} }}")

    assert verify(model(body), model(body)).status == "proved"
    assert verify(model(body), model(wrong)).status == "failed"
