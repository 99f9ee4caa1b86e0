"""merge-squeeze against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxopt.passes.merge.merge_squeeze import MergeSqueeze
from tests.support import assert_equivalent, run_pass, text_model

SHARED = "the value in between is read elsewhere too"
UNKNOWN = "an axis counts from the end of an unknown number of axes"

Step = tuple[str, list[int] | None]


def chain(steps: list[Step], opset: int, shape: list[Any] | None) -> onnx.ModelProto:
    """Squeezes and Unsqueezes between an Abs and a Neg."""
    nodes, constants = [helper.make_node("Abs", ["x"], ["v0"])], []
    for i, (op_type, axes) in enumerate(steps):
        inputs, attributes = [f"v{i}"], dict[str, Any]()
        if axes is not None and opset >= 13:
            inputs.append(f"axes{i}")
            constants.append(numpy_helper.from_array(np.array(axes, np.int64), f"axes{i}"))
        elif axes is not None:
            attributes["axes"] = axes
        nodes.append(helper.make_node(op_type, inputs, [f"v{i + 1}"], **attributes))
    nodes.append(helper.make_node("Neg", [f"v{len(steps)}"], ["z"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        initializer=constants,
        value_info=[helper.make_tensor_value_info("v0", TensorProto.FLOAT, shape)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def numbers(*shape: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize(
    ("steps", "left"),
    [
        ([("Unsqueeze", [0]), ("Unsqueeze", [0])], ["Unsqueeze"]),
        ([("Unsqueeze", [1, 3]), ("Unsqueeze", [0, 4])], ["Unsqueeze"]),
        ([("Unsqueeze", [2]), ("Unsqueeze", [1])], ["Unsqueeze"]),
        ([("Squeeze", [1]), ("Squeeze", [1])], ["Squeeze"]),
        ([("Squeeze", [2]), ("Squeeze", [1])], ["Squeeze"]),
        ([("Squeeze", [1]), ("Squeeze", None)], ["Squeeze"]),
        ([("Squeeze", None), ("Squeeze", None)], ["Squeeze"]),
        ([("Unsqueeze", [0]), ("Squeeze", None)], ["Squeeze"]),
        ([("Unsqueeze", [0, 2]), ("Squeeze", [0, 2])], []),
        ([("Unsqueeze", [-1]), ("Squeeze", [-1])], []),
        ([("Squeeze", [1, 2]), ("Unsqueeze", [1, 2])], []),
        ([("Squeeze", [-3]), ("Unsqueeze", [-3])], []),
        ([("Unsqueeze", [0, 3]), ("Squeeze", [0])], ["Unsqueeze"]),
        ([("Unsqueeze", [0]), ("Squeeze", [0, 2, 3])], ["Squeeze"]),
        ([("Squeeze", [1]), ("Unsqueeze", [0])], ["Squeeze", "Unsqueeze"]),
        ([("Unsqueeze", [0]), ("Squeeze", [2])], ["Unsqueeze", "Squeeze"]),
    ],
)
def test_pair(steps: list[Step], left: list[str], known: bool, opset: int) -> None:
    model = chain(steps, opset, [2, 1, 1, 3] if known else None)
    after = run_pass(model, MergeSqueeze())
    assert after.op_types == ["Abs", *left, "Neg"]
    assert after.declined == ()
    assert_equivalent(model, after.model, numbers(2, 1, 1, 3))


@pytest.mark.parametrize("known", [True, False])
def test_axes_from_the_end_need_the_rank(known: bool) -> None:
    model = chain([("Unsqueeze", [-1]), ("Squeeze", [2])], 13, ["a", "b"] if known else None)
    after = run_pass(model, MergeSqueeze())
    assert after.declined == (() if known else (UNKNOWN,))
    assert after.op_types == (["Abs", "Neg"] if known else ["Abs", "Unsqueeze", "Squeeze", "Neg"])
    assert_equivalent(model, after.model, numbers(2, 3))


def test_same_numbers_from_front_and_end_are_no_pair() -> None:
    model = chain([("Squeeze", [0]), ("Unsqueeze", [2])], 13, [1, 2, 3])
    after = run_pass(model, MergeSqueeze())
    assert (after.changes, after.declined) == (0, ())


def test_squeeze_of_all_first_is_declined() -> None:
    model = chain([("Squeeze", None), ("Unsqueeze", [0])], 13, [1, 2])
    assert run_pass(model, MergeSqueeze()).declined == ("the first Squeeze names no axes",)


@pytest.mark.parametrize(("second", "left"), [("Squeeze (y, a)", 1), ("Unsqueeze (y, a)", 2)])
def test_shared_value_goes_only_if_both_do(second: str, left: int) -> None:
    model = text_model(
        f"""agraph (float[2, 3] x) => (float[1, 2, 3] y, float z) <int64[1] a = {{0}}> {{
          y = Unsqueeze (x, a)
          w = {second}
          z = Neg (w)
        }}"""
    )
    model.graph.output[1].type.tensor_type.ClearField("shape")
    after = run_pass(model, MergeSqueeze())
    assert after.count("Squeeze") + after.count("Unsqueeze") == left
    assert after.declined == (() if left == 1 else (SHARED,))
    assert_equivalent(model, after.model)


def test_axes_that_can_be_overridden_are_declined() -> None:
    model = text_model(
        """agraph (float[2, 3] x, int64[1] a) => (float[1, 1, 2, 3] z) <int64[1] a = {0}, int64[1] b = {0}> {
          y = Unsqueeze (x, a)
          z = Unsqueeze (y, b)
        }"""
    )
    assert run_pass(model, MergeSqueeze()).declined == ("the axes are no constant",)


@pytest.mark.parametrize("reference", [False, True])
def test_inside_a_function(reference: bool) -> None:
    axes = "axes : ints = @a" if reference else "axes = [1]"
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : 11, "local" : 1]>
        agraph (float[2, 3] x) => (float[a, b] z) {{ z = local.f <a = [1]> (x) }}
        <domain: "local", opset_import: ["" : 11]>
        f <a> (x) => (z) {{
          y = Unsqueeze <{axes}> (x)
          w = Squeeze <axes = [1]> (y)
          z = Neg (w)
        }}"""
    )
    after = run_pass(model, MergeSqueeze())
    assert len(after.op_types) == (4 if reference else 2)
    assert after.declined == (("an attribute refers to one of the enclosing function",) if reference else ())
    assert_equivalent(model, after.model)


@given(data=st.data())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_random_chains(data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.sampled_from([0, 1, 1, 2]), min_size=0, max_size=4))
    sizes, steps = list(shape), list[Step]()
    for _ in range(data.draw(st.integers(2, 4))):
        ones = [axis for axis, size in enumerate(sizes) if size == 1]
        if len(ones) > 0 and data.draw(st.booleans()):
            axes = data.draw(st.lists(st.sampled_from(ones), min_size=1, unique=True))
            rank = len(sizes)
            sizes = [size for axis, size in enumerate(sizes) if axis not in axes]
            op_type = "Squeeze"
        else:
            rank = len(sizes) + data.draw(st.integers(1, 2))
            axes = data.draw(st.permutations(list(range(rank))))[: rank - len(sizes)]
            for axis in sorted(axes):
                sizes.insert(axis, 1)
            op_type = "Unsqueeze"
        steps.append((op_type, [axis - rank if data.draw(st.booleans()) else axis for axis in axes]))
    model = chain(steps, data.draw(st.sampled_from([11, 13])), shape if data.draw(st.booleans()) else None)
    after = run_pass(model, MergeSqueeze())
    assert_equivalent(model, after.model, numbers(*shape))
