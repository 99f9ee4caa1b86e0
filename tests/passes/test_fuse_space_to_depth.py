"""fuse-space-to-depth against the runtime."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from onnxopt.passes.fuse.fuse_space_to_depth import FuseSpaceToDepth
from tests.support import assert_equivalent, run_pass

END = 2**63 - 1


def model(
    order: list[tuple[int, int]],
    block: int = 2,
    *,
    ends: tuple[int, int] = (END, END),
    axes: tuple[int, int] = (2, 3),
    dtype: int = TensorProto.FLOAT,
    height: int | str | None = None,
    axis: int = 1,
) -> onnx.ModelProto:
    """The Concat of the strided Slices that begin at these rows and columns."""
    lists = {"ends": ends, "axes": axes, "steps": (block, block)}
    held = [numpy_helper.from_array(np.array(numbers, np.int64), name) for name, numbers in lists.items()]
    nodes, turned = [], axes[0] % 4 == 3
    for number, (row, column) in enumerate(order):
        starts = np.array((column, row) if turned else (row, column), np.int64)
        held.append(numpy_helper.from_array(starts, f"o{number}"))
        nodes.append(helper.make_node("Slice", ["x", f"o{number}", *lists], [f"s{number}"]))
    nodes.append(helper.make_node("Concat", [f"s{number}" for number in range(len(order))], ["y"], axis=axis))
    x = helper.make_tensor_value_info("x", dtype, [2, 3, height or 2 * block, 3 * block])
    y = helper.make_tensor_value_info("y", dtype, ["n", "c", "h", "w"])
    graph = helper.make_graph(nodes, "g", [x], [y], held)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(proto)


def offsets(block: int) -> list[tuple[int, int]]:
    return [(row, column) for row in range(block) for column in range(block)]


@pytest.mark.parametrize("block", [2, 3])
@pytest.mark.parametrize("axes", [(2, 3), (3, 2), (-2, -1)])
@pytest.mark.parametrize("axis", [1, -3])
def test_rows_first(block: int, axes: tuple[int, int], axis: int) -> None:
    proto = model(offsets(block), block, axes=axes, axis=axis)
    done = run_pass(proto, FuseSpaceToDepth())
    assert done.op_types == ["SpaceToDepth"]
    assert_equivalent(proto, done.model)


@pytest.mark.parametrize("order", list(itertools.permutations(offsets(2)))[1::5])
def test_any_order(order: tuple[tuple[int, int], ...]) -> None:
    proto = model(list(order))
    done = run_pass(proto, FuseSpaceToDepth())
    assert done.op_types == ["SpaceToDepth", "Gather"]
    assert_equivalent(proto, done.model)


@pytest.mark.parametrize(
    "proto",
    [
        model([(0, 0), (0, 1), (1, 0), (1, 0)]),
        model([(0, 0), (0, 1), (1, 0), (2, 1)]),
        model(offsets(2), ends=(3, END)),
        model(offsets(2), height=5),
        model(offsets(2), height="H"),
        model(offsets(2), dtype=TensorProto.INT64),
        model(offsets(2), axis=0),
        model(offsets(2)[:3]),
        model(offsets(2), block=3),
        model(offsets(2), axes=(1, 3)),
    ],
)
def test_what_is_no_space_to_depth_stays(proto: onnx.ModelProto) -> None:
    assert run_pass(proto, FuseSpaceToDepth()).changes == 0
