"""Weak borders of kernels go, and no position moves."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.errors import UsageError
from onnxopt.graph import constant_array, ints_attr, nodes
from onnxopt.passes.prune.shrink_kernels import ShrinkKernels
from tests.support import Rewritten, assert_equivalent, execute, random_feeds, run_pass, sqnr


def conv(
    weight: np.ndarray,
    sizes: tuple[int | str, ...] = (9, 8),
    op_type: str = "Conv",
    bias: bool = True,
    **attributes: Any,
) -> onnx.ModelProto:
    """A layer with this weight, on images of these sizes."""
    group = attributes.get("group", 1)
    channels = len(weight) if op_type == "ConvTranspose" else weight.shape[1] * group
    outputs = weight.shape[1] * group if op_type == "ConvTranspose" else len(weight)
    constants = {"w": weight.astype(np.float32)}
    if bias:
        constants["b"] = np.arange(outputs, dtype=np.float32)
    node = helper.make_node(op_type, ["x", *constants], ["y"], **attributes)
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node],
        "g",
        [value("x", onnx.TensorProto.FLOAT, [2, channels, *sizes])],
        [value("y", onnx.TensorProto.FLOAT, [None] * (2 + len(sizes)))],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def bordered(shape: tuple[int, ...], borders: list[tuple[int, int]], seed: int = 0) -> np.ndarray:
    """A random weight whose kernel is zero on so many slices at each side of each axis."""
    weight = np.random.default_rng(seed).uniform(0.5, 1, shape)
    for axis, (front, behind) in enumerate(borders, 2):
        moved = np.moveaxis(weight, axis, 0)
        moved[:front] = 0
        moved[len(moved) - behind :] = 0
    return weight


def kernel_of(done: Rewritten) -> tuple[int, ...]:
    [node] = nodes(done.model)
    weight = constant_array(node.inputs[1])
    assert weight is not None
    assert ints_attr(node, "kernel_shape") == weight.shape[2:]
    return weight.shape[2:]


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_zero_borders_change_no_number(data: st.DataObject) -> None:
    rank, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2]))
    op_type = data.draw(st.sampled_from(["Conv", "ConvTranspose"]))
    kernel = tuple(data.draw(st.integers(1, 4)) for _ in range(rank))
    borders = [(data.draw(st.integers(0, k - 1)), 0) for k in kernel]
    borders = [(f, data.draw(st.integers(0, k - 1 - f))) for (f, _), k in zip(borders, kernel, strict=True)]
    attributes: dict[str, Any] = {"group": group}
    strides = attributes["strides"] = [data.draw(st.integers(1, 3)) for _ in kernel]
    dilations = attributes["dilations"] = [data.draw(st.integers(1, 2)) for _ in kernel]
    mode = data.draw(st.sampled_from(["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if op_type == "ConvTranspose" or (mode.startswith("SAME") and max(dilations) > 1):
        mode = "NOTSET"
    pads = [data.draw(st.integers(0, 4 if op_type == "Conv" else 1)) for _ in range(2 * rank)]
    attributes |= {"pads": pads} if mode == "NOTSET" else {"auto_pad": mode}
    sizes = tuple(data.draw(st.integers(8, 10)) for _ in kernel)
    proto = conv(bordered((4, 2, *kernel), borders), sizes, op_type, **attributes)
    done = run_pass(proto, ShrinkKernels())
    assert_equivalent(proto, done.model, kind="reorder")
    assert done.changes <= 1
    if mode == "NOTSET":
        room = [[pads[i] // d, pads[i + rank] // d] for i, d in enumerate(dilations)]
        gone = [min(f, r[0]) + min(b, r[1]) for (f, b), r in zip(borders, room, strict=True)]
        found = kernel_of(done) if done.changes else kernel
        assert found == tuple(k - cut for k, cut in zip(kernel, gone, strict=True))
    if mode.startswith("SAME") and strides == [1] * rank:
        assert len(done.declined) == 0


def test_borders_go_one_side_at_a_time_with_their_padding() -> None:
    proto = conv(bordered((4, 3, 3, 5), [(1, 0), (0, 2)]), pads=[1, 2, 1, 2])
    done = run_pass(proto, ShrinkKernels())
    [node] = nodes(done.model)
    assert (kernel_of(done), ints_attr(node, "pads")) == ((2, 3), (0, 2, 1, 0))
    assert_equivalent(proto, done.model, kind="reorder")


def test_an_all_zero_kernel_shrinks_as_far_as_its_padding() -> None:
    done = run_pass(conv(np.zeros((4, 3, 3, 3)), pads=[1, 1, 1, 0]), ShrinkKernels())
    assert kernel_of(done) == (1, 2)


def test_a_border_goes_by_its_share_of_the_whole() -> None:
    weight = np.ones((1, 1, 3, 1))
    weight[0, 0, :, 0] = [0.1, 1, 0.2]  # shares 0.0095 and 0.038, then 0.0385 of what is left
    proto = conv(weight, pads=[1, 0, 1, 0])
    for energy, kernel in ((0.991, 3), (0.99, 2), (0.961, 1)):
        done = run_pass(proto, ShrinkKernels(energy=energy))
        assert kernel_of(done)[0] == kernel if done.changes else kernel == 3
        if energy == 0.99:  # what is lost is 0.1 x of the row above
            feeds = random_feeds(proto)
            lost = np.pad(feeds["x"], ((0, 0), (0, 0), (1, 0), (0, 0)))[:, :, :-1] * 0.1
            [want], [have] = execute(proto, feeds), execute(done.model, feeds)
            assert sqnr(lost, want - have) > 80


def test_a_shared_weight_stays_as_it_is_for_others() -> None:
    proto = conv(bordered((3, 3, 3, 3), [(1, 1), (1, 1)]), pads=[1, 1, 1, 1], bias=False)
    proto.graph.node.append(helper.make_node("Conv", ["y", "w"], ["z"]))
    proto.graph.output[0].name = "z"
    done = run_pass(proto, ShrinkKernels())
    assert (done.changes, done.declined) == (1, ("there is less padding than would go with the border",))
    assert_equivalent(proto, done.model, kind="reorder")


def test_float16_keeps_its_elements() -> None:
    proto = conv(bordered((2, 2, 3, 3), [(1, 1), (0, 1)]), pads=[1, 1, 1, 1], bias=False)
    half = numpy_helper.to_array(proto.graph.initializer[0]).astype(np.float16)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(half, "w"))
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    done = run_pass(proto, ShrinkKernels())
    [node] = nodes(done.model)
    np.testing.assert_array_equal(constant_array(node.inputs[1]), half[:, :, 1:2, 0:2])
    assert_equivalent(proto, done.model, kind="reorder")


ZERO = bordered((2, 2, 3, 3), [(1, 1), (1, 1)])


@pytest.mark.parametrize(
    ("proto", "reason"),
    [
        (conv(ZERO), "there is less padding than would go with the border"),
        (conv(ZERO, pads=[1] * 4, dilations=[2, 2]), "there is less padding than would go with the border"),
        (conv(ZERO, auto_pad="VALID"), "there is less padding than would go with the border"),
        (
            conv(ZERO, ("H", 8), auto_pad="SAME_UPPER", strides=[2, 1]),
            "auto_pad makes pads of a size that is not known",
        ),
        (
            conv(ZERO, op_type="ConvTranspose", auto_pad="SAME_UPPER"),
            "a ConvTranspose that makes pads of its own",
        ),
        (
            conv(ZERO, op_type="ConvTranspose", output_shape=[9, 8]),
            "a ConvTranspose that makes pads of its own",
        ),
        (conv(np.full((2, 2, 3, 3), np.inf), pads=[1] * 4), "the weight is not finite"),
    ],
)
def test_what_is_declined(proto: onnx.ModelProto, reason: str) -> None:
    done = run_pass(proto, ShrinkKernels())
    assert (done.changes, done.declined) == (0, (reason,))


def test_an_unknown_size_does_not_matter_without_a_stride() -> None:
    proto = conv(ZERO, ("H", "W"), auto_pad="SAME_UPPER")
    done = run_pass(proto, ShrinkKernels())
    assert kernel_of(done) == (1, 1)
    assert_equivalent(proto, done.model, random_feeds(proto, sizes={"H": 6, "W": 5}), kind="reorder")


def test_a_weight_that_the_user_may_override_stays() -> None:
    proto = conv(ZERO, pads=[1] * 4)
    info = helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [2, 2, 3, 3])
    proto.graph.input.append(info)
    done = run_pass(proto, ShrinkKernels())
    assert done.declined == ("the weight is a graph input (overridable; --freeze-initializers folds it)",)


def test_strong_borders_are_no_pattern() -> None:
    done = run_pass(conv(np.ones((2, 2, 3, 3)), pads=[1] * 4), ShrinkKernels())
    assert (done.changes, done.declined) == (0, ())


@pytest.mark.parametrize("energy", [0.0, 1.1, float("nan")])
def test_a_share_is_a_share(energy: float) -> None:
    with pytest.raises(UsageError, match=r"shrink-kernels: energy is .*; expected a share, above 0"):
        ShrinkKernels(energy=energy)
