"""Operators and places that tie channels in their own way: cut is masked there too, or they stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from onnxopt.graph import nodes, static_shape
from tests.pruning.nets import Net, assert_cut_is_exact, surveyed
from tests.support import text_model


def images(net: Net, x: str, channels: int, opset: int = 18) -> onnx.ModelProto:
    """The network up to x, and a layer that reads its channels."""
    y = net.op("Flatten", net.op("GlobalAveragePool", x))
    return net.model(net.op("MatMul", y, net.weight(channels, 5)), ("N", 3, 8, 8), ("N", 5), opset)


def sizes_of_groups(proto: onnx.ModelProto) -> list[int]:
    return sorted(len(group.channels) for group in surveyed(proto)[1].groups)


@pytest.mark.parametrize("op", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("direction", ["forward", "bidirectional"])
@pytest.mark.parametrize("state", [False, True])
def test_hidden_sizes_of_recurrent_layers(op: str, direction: str, state: bool) -> None:
    net, hidden = Net(0), 6
    gates, ways = {"LSTM": 4, "GRU": 3, "RNN": 1}[op], 2 if direction == "bidirectional" else 1
    weights = [net.weight(ways, gates * hidden, size) for size in (4, hidden)]
    inputs = ["x", *weights, net.weight(ways, 2 * gates * hidden)]
    if state:
        held = net.constant(net.rng.standard_normal((ways, 2, hidden)).astype(np.float32))
        inputs += ["", *([held, held] if op == "LSTM" else [held])]
    if state and op == "LSTM":
        inputs.append(net.weight(ways, 3 * hidden))
    y = net.op(op, *inputs, hidden_size=hidden, direction=direction)
    turned = net.op("Transpose", y, perm=[0, 2, 1, 3])
    flat = net.op("Reshape", turned, net.constant(np.array([0, 0, -1], np.int64)))
    y = net.op("MatMul", flat, net.weight(ways * hidden, 5))
    proto = net.model(y, ("T", 2, 4), ("T", 2, 5))
    assert sizes_of_groups(proto) == [hidden]
    model = assert_cut_is_exact(proto)
    assert next(node for node in nodes(model) if node.op_type == op).attributes["hidden_size"].as_int() == 3


def test_a_group_normalization_loses_whole_groups() -> None:
    net = Net(0)
    rows = [net.constant(net.rng.standard_normal(12).astype(np.float32)) for _ in range(2)]
    x = net.op("GroupNormalization", net.conv("x", 3, 12), *rows, num_groups=4)
    proto = images(net, x, 12, opset=21)
    assert sizes_of_groups(proto) == [4]
    model = assert_cut_is_exact(proto)
    norm = next(node for node in nodes(model) if node.op_type == "GroupNormalization")
    assert norm.attributes["num_groups"].as_int() == 2


def test_an_instance_normalization_loses_single_channels() -> None:
    net = Net(0)
    rows = [net.constant(net.rng.standard_normal(12).astype(np.float32)) for _ in range(2)]
    proto = images(net, net.op("InstanceNormalization", net.conv("x", 3, 12), *rows), 12)
    assert sizes_of_groups(proto) == [12]
    assert_cut_is_exact(proto)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_that_becomes_space(mode: str) -> None:
    net = Net(0)
    proto = images(net, net.op("DepthToSpace", net.conv("x", 3, 24), blocksize=2, mode=mode), 6)
    assert sizes_of_groups(proto) == [6]
    assert_cut_is_exact(proto)


def test_space_that_becomes_depth() -> None:
    net = Net(0)
    proto = images(net, net.op("SpaceToDepth", net.conv("x", 3, 6), blocksize=2), 24)
    assert sizes_of_groups(proto) == [6]
    assert_cut_is_exact(proto)


@pytest.mark.parametrize(("group", "after"), [(1, 6), (2, 6), (4, 12), (8, 8)])
def test_transposed_convolutions(group: int, after: int) -> None:
    net = Net(0)
    weight = net.weight(8, after // group, 2, 2)
    x = net.op("ConvTranspose", net.conv("x", 3, 8), weight, net.weight(after), strides=[2, 2], group=group)
    proto = images(net, net.op("Relu", x), after)
    assert_cut_is_exact(proto, 0.5)
    assert_cut_is_exact(proto, 0.8, seed=1)


def test_places_that_are_looked_up() -> None:
    net = Net(0)
    grid = net.constant(net.rng.uniform(-1, 1, (2, 5, 5, 2)).astype(np.float32))
    warped = net.op("GridSample", net.conv("x", 3, 8), grid)
    rois = net.constant(np.array([[0, 0, 4, 4], [1, 1, 3, 5], [0, 2, 4, 4]], np.float32))
    found = net.op("RoiAlign", net.conv(warped, 8, 6), rois, net.constant(np.array([0, 1, 1], np.int64)))
    y = net.op("MatMul", net.op("Flatten", found), net.weight(6, 5))
    proto = net.model(y, (2, 3, 8, 8), (3, 5))
    assert sizes_of_groups(proto) == [6, 8]
    assert_cut_is_exact(proto)


def test_sizes_that_images_are_resized_to_name_their_axes() -> None:
    net = Net(0)
    sizes = net.constant(np.array([16, 12, 16], np.int64))
    proto = images(net, net.op("Resize", net.conv("x", 3, 12), "", "", sizes, axes=[2, 1, 3]), 12)
    assert sizes_of_groups(proto) == [12]
    assert_cut_is_exact(proto)


@pytest.mark.parametrize("opset", [11, 18])
def test_the_last_channel_is_not_squeezed_away(opset: int) -> None:
    net = Net(0)
    pooled = net.op("GlobalAveragePool", net.conv("x", 3, 4))
    y = net.op("MatMul", net.op("Squeeze", pooled), net.weight(4, 5))
    model = assert_cut_is_exact(net.model(y, (2, 3, 8, 8), (2, 5), opset), share=0.75)
    assert static_shape(next(node.outputs[0] for node in nodes(model) if node.op_type == "Squeeze")) == (2, 1)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_quantized_by_channel(axis: int) -> None:
    """Scales and zero points go with the channels of their axis, whether written or read."""
    net = Net(0)

    def dequantized(after: int, before: int) -> str:
        count = (after, before)[axis]
        stored = net.constant(net.rng.integers(-127, 127, (after, before, 3, 3)).astype(np.int8))
        scales = net.constant(net.rng.uniform(0.001, 0.01, count).astype(np.float32))
        return net.op("DequantizeLinear", stored, scales, net.constant(np.zeros(count, np.int8)), axis=axis)

    def quantized(x: str) -> str:
        step = [net.constant(np.array(0.05, np.float32)), net.constant(np.array(0, np.int8))]
        return net.op("DequantizeLinear", net.op("QuantizeLinear", x, *step), *step)

    x = net.op("Relu", net.op("Conv", quantized("x"), dequantized(12, 3), pads=[1] * 4))
    x = net.op("Conv", quantized(x), dequantized(10, 12), net.weight(10), pads=[1] * 4)
    proto = images(net, x, 10)
    assert sizes_of_groups(proto) == [10, 12]
    model = assert_cut_is_exact(proto)
    assert {node.op_type for node in nodes(model)} >= {"QuantizeLinear", "DequantizeLinear"}


SHARED = (
    "float[2, 4] u = {1, 2, 3, 4, 5, 6, 7, 8}, float[4, 1] v = {1, 2, 3, 4}, float[4, 1] w = {4, 3, 2, 1}"
)


def test_a_weight_of_two_layers_ties_them() -> None:
    proto = text_model(
        f"""agraph (float[N, 2] x) => (float[N, 1] y) <{SHARED}> {{
            a = MatMul(x, u)
            b = MatMul(a, v)
            z = Tanh(x)
            c = MatMul(z, u)
            d = MatMul(c, w)
            y = Add(b, d)
        }}"""
    )
    (group,) = surveyed(proto)[1].groups
    assert (len(group.channels), group.layers) == (4, ("a", "c"))
    assert_cut_is_exact(proto)


def test_a_weight_that_is_an_output_elsewhere_stays() -> None:
    proto = text_model(
        f"""agraph (float[N, 2] x) => (float[N, 1] y, float[N, 4] c) <{SHARED}> {{
            a = MatMul(x, u)
            y = MatMul(a, v)
            z = Tanh(x)
            c = MatMul(z, u)
        }}"""
    )
    structure = surveyed(proto)[1]
    assert structure.groups == ()
    assert structure.pinned["a"].reason == "is an output of the graph"


def test_weights_in_constant_nodes() -> None:
    proto = text_model(
        """agraph (float[N, 2] x) => (float[N, 1] y) {
            u = Constant<value: tensor = float[2, 4] {1, 2, 3, 4, 5, 6, 7, 8}>()
            v = Constant<value: tensor = float[4, 1] {1, 2, 3, 4}>()
            w = Constant<value_floats = [1.0, 2.0, 3.0, 4.0]>()
            a = MatMul(x, u)
            s = Add(a, w)
            b = Relu(s)
            y = MatMul(b, v)
        }"""
    )
    model = assert_cut_is_exact(proto)
    assert not model.graph.initializers
    assert sizes_of_groups(proto) == [4]


def with_branches(then: list[onnx.NodeProto], otherwise: list[onnx.NodeProto], net: Net) -> onnx.ModelProto:
    """A hidden layer h of 8, an If that gives r of any size, and a layer that reads its 6."""
    info = helper.make_tensor_value_info
    bodies = [
        helper.make_graph(body, name, [], [info("r", TensorProto.FLOAT, None)])
        for body, name in ((then, "then"), (otherwise, "else"))
    ]
    choice = net.op("Greater", net.op("ReduceSum", "x", keepdims=0), net.constant(np.array(0, np.float32)))
    net.nodes.append(
        helper.make_node("If", [choice], ["chosen"], then_branch=bodies[0], else_branch=bodies[1])
    )
    y = net.op("MatMul", "chosen", net.weight(6, 5))
    return net.model(y, (3, 4), (3, 5))


def test_channels_that_bodies_read_and_write_go_there() -> None:
    net = Net(0)
    h = net.op("Relu", net.op("MatMul", "x", net.weight(4, 8)))
    u, v, w = net.weight(8, 10), net.weight(10, 6), net.weight(8, 6)
    then = [helper.make_node("MatMul", [h, u], ["a"]), helper.make_node("MatMul", ["a", v], ["r"])]
    proto = with_branches(then, [helper.make_node("MatMul", [h, w], ["r"])], net)
    structure = surveyed(proto)[1]
    assert sorted(len(group.channels) for group in structure.groups) == [8, 10]
    assert {pin.reason for pin in structure.pinned.values()} >= {"is an output of the body of a node"}
    for seed in range(3):
        assert_cut_is_exact(proto, seed=seed)


def test_channels_that_a_body_gives_back_stay() -> None:
    net = Net(0)
    h = net.op("Relu", net.op("MatMul", "x", net.weight(4, 6)))
    bodies = [[helper.make_node(op, [h], ["r"])] for op in ("Tanh", "Sigmoid")]
    structure = surveyed(with_branches(bodies[0], bodies[1], net))[1]
    assert structure.groups == ()
    assert "is an output of the body of a node" in {pin.reason for pin in structure.pinned.values()}
