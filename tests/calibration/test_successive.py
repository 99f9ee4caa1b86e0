"""Layers in turn: what each reads and lacks, and what is held of the samples."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.calibration import successive
from onnxopt.calibration.successive import in_turn
from tests.passes.weighted import weight_of
from tests.support import execute, text_model

NET = """agraph (float[N, 6] x) => (float[N, 4] y) <float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}> {
    a = Gemm(x, u, b)  r = Relu(a)  c = MatMul(r, v)  s = Add(c, r)  y = MatMul(s, w)
}"""


def net() -> onnx.ModelProto:
    model = text_model(NET)
    for seed, (name, shape) in enumerate({"u": (6, 8), "v": (8, 8), "w": (8, 4)}.items()):
        model.graph.initializer.append(numpy_helper.from_array(weight_of(shape, seed), name))
    return model


def samples(count: int = 40) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return [{"x": rng.standard_normal((9, 6)).astype(np.float32)} for _ in range(count)]


def layers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in ("Gemm", "MatMul")]


def test_a_layer_that_loses_weights_is_made_up_for_by_those_behind_it() -> None:
    """Behind a lost third of the first weight, layers take the target."""
    lost = []
    for fitted in range(3):
        model = ir.from_proto(net())
        for number, turn in enumerate(in_turn(model, layers(model), samples())):
            half = np.where(np.indices(turn.rows.shape).sum(0) % 3 == 0, 0, turn.rows)
            turn.store(half if number == 0 else turn.target if number <= fitted else turn.rows)
        test = {"x": np.random.default_rng(1).standard_normal((500, 6)).astype(np.float32)}
        lost.append(np.square(execute(model, test)[0] - execute(net(), test)[0]).mean())
    assert lost[1] < 0.95 * lost[0]
    assert lost[2] < 0.95 * lost[0]


def test_how_many_positions_are_looked_at() -> None:
    x = np.ones((1, 1, 100, 100), np.float32)
    model = ir.from_proto(
        text_model("agraph (float[N, 1, 100, 100] x) => (float[N, 1, 98, 98] y) { y = Conv(x, w) }")
    )
    value = next(iter(model.graph)).inputs[1]
    assert value is not None
    value.const_value = ir.tensor(np.ones((1, 1, 3, 3), np.float32))
    model.graph.register_initializer(value)
    found = []
    for times in (1, 2, 4):
        (turn,) = in_turn(model, list(model.graph), [{"x": x}], times=times)
        found.append(turn.moments[0, 0, 1])
    np.testing.assert_allclose(found, [4096, 8192, 98 * 98])


def test_the_bias_keeps_the_mean() -> None:
    model = ir.from_proto(net())
    (gemm, *_) = layers(model)
    for turn in in_turn(model, [gemm], samples()):
        turn.store(0 * turn.rows)
    x = np.concatenate([feeds["x"] for feeds in samples()])
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in net().graph.initializer}
    want = (x @ arrays["u"]).mean(0) + np.arange(1, 9)
    bias = model.graph.initializers["b"].const_value
    assert bias is not None
    np.testing.assert_allclose(bias.numpy(), want, rtol=1e-5)


def test_a_bias_that_is_an_output_stays() -> None:
    proto = net()
    proto.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, [8]))
    model = ir.from_proto(proto)
    (turn,) = in_turn(model, layers(model)[:1], samples(4))
    assert turn.bias is None


def test_nothing_is_missing_where_nothing_changed() -> None:
    model = ir.from_proto(net())
    for turn in in_turn(model, layers(model), samples(4)):
        np.testing.assert_array_equal(turn.target, turn.rows)


def test_what_hardly_varies_has_moments_about_its_mean() -> None:
    """Single-precision sums of its squares about zero are off by more than the moments are."""
    model = ir.from_proto(net())
    far = [{"x": feeds["x"] / 8 + np.float32(1000)} for feeds in samples()]
    (turn,) = in_turn(model, layers(model)[:1], far)
    x = np.concatenate([feeds["x"] for feeds in far]).astype(np.float64)
    wanted = np.cov(x.T, bias=True) * len(x)
    np.testing.assert_allclose(turn.moments[0], wanted + 0.2 * np.diag(np.diag(wanted)), atol=0.01)
    np.testing.assert_allclose(turn.mean[0, :, 0], x.mean(0))


@pytest.mark.parametrize("memory", [0, 1 << 30])
def test_fewer_samples_are_held_where_they_need_much(monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    monkeypatch.setattr(successive, "_MEMORY", memory)
    model = ir.from_proto(net())
    energy = [float(np.trace(turn.moments[0])) for turn in in_turn(model, layers(model), samples())]
    monkeypatch.undo()
    whole = [float(np.trace(turn.moments[0])) for turn in in_turn(model, layers(model), samples())]
    assert energy[0] == whole[0]
    assert (energy[1] < whole[1] / 20) == (memory == 0)
