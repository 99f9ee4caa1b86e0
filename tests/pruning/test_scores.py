"""What channels are worth: closed forms on small linear networks, and what fits of layers get back."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.data import Feeds
from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, nodes
from onnxopt.passes.prune.prune_channels import PruneChannels
from onnxopt.pruning.scores import score_channels
from onnxopt.pruning.structure import survey
from tests.pruning.nets import Net
from tests.support import execute, random_feeds, run_pass, sqnr


def linear(hidden: np.ndarray, read: np.ndarray, activation: str = "Identity") -> onnx.ModelProto:
    """y = read * activation(hidden * x); x float[N, inputs]."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "u"], ["a"]),
            helper.make_node(activation, ["a"], ["b"]),
            helper.make_node("MatMul", ["b", "v"], ["y"]),
        ],
        "linear",
        [info("x", TensorProto.FLOAT, ["N", len(hidden)])],
        [info("y", TensorProto.FLOAT, ["N", read.shape[1]])],
        [
            numpy_helper.from_array(array.astype(np.float32), name)
            for array, name in ((hidden, "u"), (read, "v"))
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def scores(proto: onnx.ModelProto, score: str, samples: list[Feeds]) -> np.ndarray:
    model = ir.from_proto(proto)
    (found,) = score_channels(survey(model), score, model=model, samples=samples)
    return found


def white(count: int, channels: int) -> np.ndarray:
    """Columns of mean 0 and mean square 1, none of which tells of another; float32 [count, channels]."""
    rng = np.random.default_rng(0)
    rows = np.linalg.qr(np.column_stack([np.ones(count), rng.standard_normal((count, channels))]))[0]
    return np.asarray(rows[:, 1:] * count**0.5, np.float32)


def test_obs_of_channels_that_tell_nothing_of_each_other_is_their_share_of_the_energy() -> None:
    scale, read = np.array([1.0, 2, 3, 4]), np.array([[8.0], [3], [2.5], [0.5]])
    found = scores(linear(np.diag(scale), read), "obs", [{"x": white(512, 4)}])
    variance = scale**2
    share = read[:, 0] ** 2 * (variance + 0.01 * variance.mean()) / (read[:, 0] ** 2 * variance).sum()
    last = share.argmax()  # has nobody left to be compared with
    saved = 0.25  # of the multiply-accumulates, with any of four channels
    np.testing.assert_allclose(np.delete(found, last), np.delete(share, last) / saved**0.5, rtol=1e-3)
    assert found.argmax() == last


def test_obs_spares_the_small_channel_that_no_other_makes_up_for() -> None:
    """Of a, b and a + b one goes for nothing; c is small, and nothing else tells of it."""
    hidden = np.array([[1.0, 0, 1, 0], [0, 1, 1, 0], [0, 0, 0, 0.5]])
    proto = linear(hidden, np.ones((4, 2)))
    samples: list[Feeds] = [{"x": white(512, 3)}]
    assert scores(proto, "l2", samples).argmin() == 3
    found = scores(proto, "obs", samples)
    assert found.argmin() < 3
    assert found.min() < found[3] / 4
    kept = []
    for score in ("l2", "obs"):
        one = PruneChannels(ratio=0.25, multiple=1, score=score, samples=samples)
        (want,), (have,) = execute(proto, samples[0]), execute(run_pass(proto, one).model, samples[0])
        kept.append(sqnr(want, have))
    assert kept[0] < 20
    assert kept[1] > 60


def test_obs_of_channels_whose_readers_cannot_tell_is_their_share_of_the_weights() -> None:
    """A ConvTranspose that pads by itself reads them, and a layer that is there twice reads zeros, too."""
    net = Net(0)
    inner = net.op("Conv", "x", net.constant(np.diag([1.0, 2, 3, 5]).reshape(4, 4, 1, 1).astype(np.float32)))
    y = net.op("ConvTranspose", inner, net.weight(4, 3, 2, 2), strides=[2, 2], auto_pad="SAME_UPPER")
    zeros = net.op("Constant", value=numpy_helper.from_array(np.zeros((1, 4, 1, 1), np.float32)))
    weight = net.weight(3, 4, 1, 1)
    y = net.op(
        "Add", y, net.op("Add", net.op("Conv", zeros, weight), net.op("Conv", "x", weight, strides=[2, 2]))
    )
    proto = net.model(y, ("N", 4, 1, 1), ("N", 3, 2, 2))
    found = scores(proto, "obs", [random_feeds(proto)])
    np.testing.assert_allclose(found / found.sum(), np.array([1, 4, 9, 25]) / 39, rtol=1e-6)


def test_energy_is_the_mean_square_of_what_is_read() -> None:
    scale, x = np.array([1.0, 2, 3, 4]), white(512, 4)
    proto = linear(np.diag(scale) - 5 * np.eye(4)[3], np.ones((4, 2)), "Relu")
    found = scores(proto, "energy", [{"x": x[:256]}, {"x": x[256:]}])
    squares = (np.maximum(x @ (np.diag(scale) - 5 * np.eye(4)[3]), 0) ** 2).mean(0)
    np.testing.assert_allclose(found, squares / squares.mean(), rtol=1e-4)


def test_energy_of_convolutions_in_groups_finds_the_silent_channels() -> None:
    net = Net(0)
    bias = np.where(np.arange(16) % 4, 1.0, -100.0).astype(np.float32)
    x = net.op("Relu", net.op("Conv", "x", net.weight(16, 3, 3, 3), net.constant(bias), pads=[1] * 4))
    y = net.conv(net.conv(x, 16, 16, group=16), 16, 5)
    proto = net.model(y, ("N", 3, 8, 8), ("N", 5, 8, 8))
    found = scores(proto, "energy", [random_feeds(proto)])
    assert (np.argsort(found)[:4] % 4 == 0).all()


@pytest.mark.parametrize("score", ["energy", "obs"])
def test_scores_on_samples_need_some(score: str) -> None:
    proto = linear(np.eye(4), np.ones((4, 2)))
    with pytest.raises(UsageError, match=f"{score} looks at what channels carry: give samples"):
        run_pass(proto, PruneChannels(score=score))


def test_layers_that_are_fitted_get_a_bias_where_they_have_none() -> None:
    """What went had a mean: others make up for the rest, and the bias for the mean."""
    net = Net(0)
    x = net.op("Add", "x", net.constant(np.array(3, np.float32)))
    wide = net.op("Conv", x, net.weight(16, 3, 1, 1))
    deep = net.op("Conv", wide, net.weight(16, 1, 3, 3), pads=[1] * 4, group=16)
    y = net.op("Conv", deep, net.weight(4, 16, 1, 1))
    proto = net.model(y, ("N", 3, 8, 8), ("N", 4, 8, 8))
    samples = [random_feeds(proto, seed, {"N": 4}) for seed in range(3)]
    done = run_pass(proto, PruneChannels(ratio=0.5, multiple=1, score="l2", samples=samples))
    convs = [node for node in nodes(done.model) if node.op_type == "Conv"]
    shapes = [[constant_array(value).shape for value in node.inputs[1:]] for node in convs]  # type: ignore[union-attr]
    assert shapes == [[(8, 3, 1, 1), (8,)], [(8, 1, 3, 3)], [(4, 8, 1, 1), (4,)]]
    plain = run_pass(proto, PruneChannels(ratio=0.5, multiple=1, score="l2"))
    (want,) = execute(proto, samples[0])
    (fitted,), (cut,) = (execute(one.model, samples[0]) for one in (done, plain))
    assert sqnr(want, fitted) > sqnr(want, cut) + 6


def test_groups_without_a_scale_are_in_the_way_of_bn_gamma_unless_they_are_kept() -> None:
    net = Net(0)
    x = net.op("Relu", net.batchnorm(net.op("Conv", "x", net.weight(16, 3, 1, 1)), 16))
    inner = net.op("Conv", x, net.weight(12, 16, 1, 1))
    proto = net.model(net.conv(inner, 12, 5), ("N", 3, 8, 8), ("N", 5, 8, 8))
    with pytest.raises(UsageError, match="has no BatchNormalization to score by; take another score, keep"):
        run_pass(proto, PruneChannels(ratio=0.5, score="bn-gamma"))
    done = run_pass(proto, PruneChannels(ratio=0.5, score="bn-gamma", keep=(inner,)))
    sizes = [node.inputs[1].shape[0] for node in nodes(done.model) if node.op_type == "Conv"]  # type: ignore[union-attr,index]
    assert sizes == [8, 12, 5]
