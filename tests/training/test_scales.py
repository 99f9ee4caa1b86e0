"""Which scales stay equal: those that the graph needs so, not those that a tool merged for being equal."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx import numpy_helper

from onnxopt.errors import ModelError
from onnxopt.model import load
from onnxopt.training import to_torch, train_qat, write_back
from onnxopt.training.scales import learn_scales, scale_groups, untie_scales
from tests.support import execute, text_model
from tests.training.test_qat import qdq_net, tensors

torch.set_num_threads(1)


PAIR = ("QuantizeLinear", "DequantizeLinear")


def merged(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same, one initializer for all that are equal: as exporters do that merge them."""
    first: dict[bytes, str] = {}
    renamed = {}
    for one in model.graph.initializer:
        content = numpy_helper.to_array(one).tobytes() + bytes([one.data_type]) + repr(one.dims).encode()
        renamed[one.name] = first.setdefault(content, one.name)
    kept = [one for one in model.graph.initializer if renamed[one.name] == one.name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    for node in model.graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]
    return model


def two_layers(*, bias: tuple[int, int] = (0, 0)) -> onnx.ModelProto:
    """x, a Conv, MaxPool, another Conv: all activations in steps of 1/16, all weights of 1/64."""
    rng = np.random.default_rng(0)
    model = text_model(
        """<ir_version: 10, opset_import: ["": 21]> net (float[n, 2, 6, 6] x) => (float[n, 2, 2, 2] y) {
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s2, z)
            w1 = DequantizeLinear(w1q, t1)
            b1 = DequantizeLinear(b1q, u1)
            c1 = Conv<pads = [1, 1, 1, 1]>(xd, w1, b1)
            cq = QuantizeLinear(c1, s3, z)
            cd = DequantizeLinear(cq, s4, z)
            p = MaxPool<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(cd)
            pq = QuantizeLinear(p, s5, z)
            pd = DequantizeLinear(pq, s6, z)
            w2 = DequantizeLinear(w2q, t2)
            b2 = DequantizeLinear(b2q, u2)
            y0 = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(pd, w2, b2)
            yq = QuantizeLinear(y0, s7, z)
            y = DequantizeLinear(yq, s8, z)
        }"""
    )
    held: dict[str, Any] = {f"s{n}" if n > 1 else "s": np.float32(2**-4) for n in range(1, 9)}
    held |= {"t1": np.float32(2**-6), "t2": np.float32(2**-6), "z": np.int8(3)}
    held |= {"u1": np.float32(2**-10), "u2": np.float32(2**-10)}
    held |= {f"b{n}q": np.full(2, bias[n - 1], np.int32) for n in (1, 2)}
    held |= {f"w{n}q": rng.integers(-100, 100, (2, 2, 3, 3)).astype(np.int8) for n in (1, 2)}
    model.graph.initializer.extend(numpy_helper.from_array(np.asarray(a), name) for name, a in held.items())
    return model


def by_output(model: ir.Model) -> dict[str, np.ndarray]:
    """The scale of each QuantizeLinear and DequantizeLinear."""
    return {
        node.outputs[0].name or "": node.inputs[1].const_value.numpy()  # type: ignore[union-attr]
        for node in model.graph
        if node.op_type in PAIR
    }


def test_merged_scales_are_drawn_apart_where_the_graph_does_not_need_them_equal() -> None:
    plain, shared = load(two_layers()), load(merged(two_layers()))
    assert len(shared.graph.initializers) == 7
    untie_scales(shared)

    def groups(model: ir.Model) -> list[set[str]]:
        firsts = scale_groups(model)
        found: dict[str, set[str]] = {}
        for node in model.graph:
            name = node.inputs[1].name if len(node.inputs) > 1 and node.inputs[1] is not None else None
            if name in firsts and node.op_type in PAIR:
                found.setdefault(firsts[name], set()).add(node.outputs[0].name or "")
        return sorted(found.values(), key=sorted)

    assert groups(shared) == groups(plain)
    assert groups(shared) == sorted(
        [{"xq", "xd"}, {"w1"}, {"cq", "cd", "pq", "pd"}, {"w2"}, {"yq", "y"}], key=sorted
    )
    x = {"x": np.random.default_rng(1).normal(size=(3, 2, 6, 6)).astype(np.float32)}
    np.testing.assert_array_equal(execute(shared, x)[0], execute(two_layers(), x)[0])


def test_nothing_is_drawn_apart_that_need_not_be() -> None:
    model = load(qdq_net())
    before = tensors(model)
    untie_scales(model)
    assert tensors(model).keys() == before.keys()


@pytest.mark.parametrize("bias", [(0, 0), (40, -70)])
def test_biases_of_merged_scales_follow_their_own_layers(bias: tuple[int, int]) -> None:
    model = load(merged(two_layers(bias=bias)))
    untie_scales(model)
    module = to_torch(model)
    learned = learn_scales(module, scale_groups(model))
    assert len(learned) == 5
    with torch.no_grad():
        for factor, one in enumerate(learned.values(), 1):
            one.log.fill_(0.1 * factor)
    after = write_back(module, model)
    scales = by_output(after)
    for layer, source in (("1", "xd"), ("2", "pd")):
        np.testing.assert_array_equal(scales[f"b{layer}"], scales[source] * scales[f"w{layer}"])
    assert scales["b1"] != scales["b2"]
    x = {"x": np.random.default_rng(1).normal(size=(3, 2, 6, 6)).astype(np.float32)}
    with torch.no_grad():
        np.testing.assert_allclose(module(x)["y"].numpy(), execute(after, x)[0], atol=0.3)


def test_training_draws_merged_scales_apart() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(32, 2, 6, 6)).astype(np.float32)
    (y,) = execute(two_layers(), {"x": x})
    how: dict[str, Any] = {"labels": "t", "loss": "mse", "epochs": 2, "lr": 0.01, "holdout": 0}
    found = train_qat(merged(two_layers()), {"x": x, "t": 1.5 * y}, batch_size="8", **how)
    assert found.report.ok, found.report.reason
    scales = by_output(found.graph)
    assert scales["xq"] == scales["xd"] != scales["yq"]
    assert scales["cq"] == scales["pd"] != scales["xq"]
    assert scales["w1"] != scales["w2"]


def with_scale(name: str, array: Any) -> onnx.ModelProto:
    model = qdq_net()
    held = next(one for one in model.graph.initializer if one.name == name)
    held.CopyFrom(numpy_helper.from_array(np.asarray(array, np.float32), name))
    return model


@pytest.mark.parametrize(
    ("name", "array", "told"),
    [
        ("x_scale", 0, "qat: QuantizeLinear 'x_q': the scale 'x_scale' is 0"),
        ("r_scale", -1, "qat: QuantizeLinear 'r_q': the scale 'r_scale' is -1"),
        ("b_scale_dq", np.nan, "qat: DequantizeLinear 'b_dq': the scale 'b_scale_dq' is nan"),
        ("a_w_scale", [1, 1, 0, 1], "qat: DequantizeLinear 'a_w_dq': the scale 'a_w_scale' is 0"),
        ("p_scale", np.inf, "qat: QuantizeLinear 'p_q': the scale 'p_scale' is inf"),
    ],
)
def test_scales_that_cannot_be_learned_are_told_with_their_node(name: str, array: Any, told: str) -> None:
    data = {"x": np.ones((16, 2, 6, 6), np.float32), "t": np.ones((16, 3, 3, 3), np.float32)}
    with pytest.raises(ModelError) as error:
        train_qat(with_scale(name, array), data, labels="t", loss="mse", epochs=1)
    assert str(error.value) == f"{told}; expected finite numbers above 0"


@pytest.mark.parametrize(
    ("name", "size", "told"),
    [
        ("x_scale", 3, "QuantizeLinear 'x_q': a scale of shape [3] does not fit [5, 2, 6, 6] along axis 1"),
        (
            "p_scale_dq",
            3,
            "DequantizeLinear 'p_dq': a scale of shape [3] does not fit [5, 4, 3, 3] along axis 1",
        ),
        (
            "a_w_scale",
            3,
            "DequantizeLinear 'a_w_dq': a scale of shape [3] does not fit [4, 2, 3, 3] along axis 0",
        ),
    ],
)
def test_scales_of_a_wrong_size_are_told_with_their_node(name: str, size: int, told: str) -> None:
    with pytest.raises(ModelError) as error:
        to_torch(with_scale(name, np.ones(size)))(x=np.ones((5, 2, 6, 6), np.float32))
    assert str(error.value) == f"training: {told}"


@pytest.mark.parametrize(
    ("operator", "apart"),
    [
        ("Concat<axis = 1>(xd, ad)", False),
        ("Max(xd, ad)", False),
        ("Pad(xd, pads)", False),
        ("Transpose<perm = [0, 1, 3, 2]>(xd)", False),
        ("GlobalAveragePool(xd)", True),
        ("Add(xd, ad)", True),
    ],
)
def test_what_moves_numbers_keeps_one_scale_and_what_computes_does_not(operator: str, apart: bool) -> None:
    model = text_model(
        f"""<ir_version: 10, opset_import: ["": 21]> net (float[n, 2, 6, 6] x) => (float[n, a, b, c] y)
        <float s = {{0.0625}}, int8 z = {{3}}, int64[8] pads = {{0, 0, 1, 1, 0, 0, 1, 1}}> {{
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            r = Relu(x)
            aq = QuantizeLinear(r, s, z)
            ad = DequantizeLinear(aq, s, z)
            m = {operator}
            yq = QuantizeLinear(m, s, z)
            y = DequantizeLinear(yq, s, z)
        }}"""
    )
    shared = load(model)
    untie_scales(shared)
    groups = scale_groups(shared)
    both = "ad)" in operator
    held = {node.outputs[0].name: node.inputs[1] for node in shared.graph if node.op_type in PAIR}
    assert held["xq"] == held["xd"]
    assert (held["yq"] != held["xq"]) == apart
    assert (held["aq"] != held["xq"]) == (apart or not both)
    assert len(set(groups.values())) == (1 if both else 2) + apart * (2 if both else 1)
