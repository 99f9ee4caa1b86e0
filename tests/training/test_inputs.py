"""Inputs of types that numpy or torch does not have."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper, numpy_helper

from onnxopt.cli import main
from onnxopt.errors import UsageError
from onnxopt.training import distill, finetune, train_qat
from tests.support import text_model

TYPES = {
    "bfloat16": (T.BFLOAT16, ml_dtypes.bfloat16),
    "float16": (T.FLOAT16, np.float16),
    "float8": (T.FLOAT8E4M3FN, ml_dtypes.float8_e4m3fn),
}


def linear(kind: int, w: np.ndarray, *, out: int = T.FLOAT) -> onnx.ModelProto:
    """y = w x, in float32 between inputs and outputs of these types."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=T.FLOAT),
        helper.make_node("MatMul", ["wide", "w"], ["product"]),
        helper.make_node("Cast", ["product"], ["y"], to=out),
    ]
    inputs = [helper.make_tensor_value_info("x", kind, ["n", 4])]
    outputs = [helper.make_tensor_value_info("y", out, ["n", 3])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, [numpy_helper.from_array(w, "w")])
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_inputs_of_few_bits_are_trained_on(kind: str) -> None:
    code, dtype = TYPES[kind]
    w, x = random(4, 3), random(64, 4, seed=1).astype(dtype)
    data = {"x": x, "t": x.astype(np.float32) @ (1.5 * w)}
    report = finetune(linear(code, w), data, labels="t", loss="mse", epochs=6, lr=0.05).report
    assert report.final.after > 0.2 * report.final.before  # both negative


def test_outputs_of_bfloat16_are_scored() -> None:
    w, x = random(4, 3), random(64, 4, seed=1).astype(ml_dtypes.bfloat16)
    data = {"x": x, "t": x.astype(np.float32) @ (1.5 * w)}
    model = linear(T.BFLOAT16, w, out=T.BFLOAT16)
    report = finetune(model, data, labels="t", loss="mse", epochs=6, lr=0.05, holdout=0).report
    wanted = x.astype(np.float32) @ w
    error = np.square(wanted.astype(ml_dtypes.bfloat16).astype(np.float32) - data["t"]).mean()
    assert report.final.before == pytest.approx(-error, rel=1e-3)
    assert report.final.after > 0.4 * report.final.before


@pytest.mark.parametrize(
    ("dtype", "mine", "theirs"),
    [(ml_dtypes.bfloat16, T.BFLOAT16, T.BFLOAT16), (np.float16, T.FLOAT16, T.FLOAT)],
)
@pytest.mark.parametrize("place", ["onnxruntime", "torch"])
def test_teachers_are_fed_in_their_type(place: str, dtype: Any, mine: int, theirs: int) -> None:
    w, x = random(4, 3), random(64, 4, seed=1).astype(dtype)
    student, teacher = linear(mine, w), linear(theirs, 1.5 * w)
    report = distill(student, {"x": x}, teacher=teacher, teacher_in=place, epochs=6, lr=0.05).report
    assert report.final.after > 0.4 * report.final.before


def test_a_fixed_batch_is_calibrated_on_and_compared() -> None:
    """Feeds have as many samples as a run takes; the last one is filled up."""
    model = linear(T.FLOAT, random(4, 3))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = 5
    x = random(33, 4, seed=1)
    data = {"x": x, "t": x @ random(4, 3)}
    how: dict[str, Any] = {"labels": "t", "loss": "mse", "epochs": 1}
    found = train_qat(model, data, calibration=4, batch_size="8", holdout=0, **how).report
    assert found.final.start is not None
    assert 0 < -found.final.start < 0.1
    assert finetune(model, data, metric="agreement", lr=0.0, **how).report.final.after == 1


def test_half_precision_of_halves() -> None:
    """They are held in 32 bits while they are trained, so that losses can be scaled."""
    model = linear(T.FLOAT, random(4, 3))
    w = model.graph.initializer[0]
    w.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(w).astype(np.float16), "w"))
    model.graph.node[0].attribute[0].i = T.FLOAT16
    x = random(32, 4)
    data = {"x": x, "t": x @ random(4, 3, seed=5)}
    report = finetune(model, data, labels="t", loss="mse", precision="float16", lr=0.05, epochs=20).report
    assert report.ok
    assert report.final.after > 0.5 * report.final.before


TEXT = """<ir_version: 8, opset_import: ["": 17, "ai.onnx.ml": 2]> g (string[n, 1] x) => (float[n, 1, 2] y)
    <float[2, 2] w = {1, 2, 3, 4}> {
        i = ai.onnx.ml.LabelEncoder<keys_strings = ["a", "b"], values_int64s = [0, 1]>(x)
        y = Gather(w, i)
    }"""


def test_text_is_told_in_one_line(tmp_path: object, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"x": np.array([["a"], ["b"]] * 8), "t": np.zeros((16, 1, 2), np.float32)}
    told = "data: input 'x' is text: cut the graph where it has become numbers"
    with pytest.raises(UsageError) as error:
        finetune(text_model(TEXT), data, labels="t", loss="mse")
    assert str(error.value) == told
    onnx.save(text_model(TEXT), f"{tmp_path}/m.onnx")
    np.savez(f"{tmp_path}/d.npz", x=data["x"], t=data["t"])
    arguments = f"train finetune {tmp_path}/m.onnx -o {tmp_path}/o.onnx --data {tmp_path}/d.npz --labels t"
    with pytest.raises(SystemExit) as code:
        main(f"{arguments} --loss mse".split())
    assert code.value.code == 2
    assert told in capsys.readouterr().err.replace("\n", " ")
