"""merge-slice against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from onnxopt.passes.merge.merge_slice import MergeSlice
from tests.support import assert_equivalent, run_pass, text_model

SHARED = "the value in between is read elsewhere too"
UNKNOWN = "both cut the same axis, whose size is unknown"
DISPUTED = "a negative step to the largest integer, on which runtimes disagree"
END = np.iinfo(np.int64).max
START = np.iinfo(np.int64).min

Cuts = dict[int, tuple[int, int, int]]


def chain(steps: list[Cuts], opset: int, shape: list[Any] | None, dtype: str = "int64") -> onnx.ModelProto:
    """Slices, each of them {axis: (start, end, step)}."""
    nodes, constants = [], []
    for i, cuts in enumerate(steps):
        lists = {"starts": 0, "ends": 1, "steps": 2}
        columns: dict[str, Any] = {
            name: [cut[place] for cut in cuts.values()] for name, place in lists.items()
        }
        columns = {
            "starts": columns["starts"],
            "ends": columns["ends"],
            "axes": list(cuts),
            "steps": columns["steps"],
        }
        if opset < 10:
            del columns["steps"]
            nodes.append(helper.make_node("Slice", [f"v{i}"], [f"v{i + 1}"], **columns))
            continue
        for name, column in columns.items():
            constants.append(numpy_helper.from_array(np.array(column, dtype), f"{name}{i}"))
        nodes.append(helper.make_node("Slice", [f"v{i}", *(f"{name}{i}" for name in columns)], [f"v{i + 1}"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(f"v{len(steps)}", TensorProto.FLOAT, None)],
        initializer=constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def numbers(*shape: int) -> dict[str, np.ndarray]:
    return {"v0": np.arange(np.prod(shape), dtype=np.float32).reshape(shape)}


@pytest.mark.parametrize("opset", [1, 9, 10, 17])
@pytest.mark.parametrize("shape", [None, ["a", "b"], [5, 6]])
def test_different_axes(shape: list[Any] | None, opset: int) -> None:
    model = chain([{0: (1, -1, 1)}, {1: (-3, END, 1)}], opset, shape)
    after = run_pass(model, MergeSlice())
    assert (after.op_types, after.declined) == (["Slice"], ())
    assert_equivalent(model, after.model, [numbers(5, 6), *([] if shape == [5, 6] else [numbers(1, 2)])])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ((1, 9, 1), (2, -1, 1)),
        ((-7, -1, 2), (0, 2, 1)),
        ((END, START, -1), (END, START, -1)),
        ((8, START, -2), (1, END, 2)),
        ((0, END, 3), (-1, START, -1)),
        ((3, 3, 1), (0, 5, 1)),
        ((0, 10, 1), (20, 30, 1)),
        ((-20, 3, 1), (-20, 2, 1)),
        ((-20, START, -1), (0, 1, 1)),
        ((7, 2, -1), (3, 0, -1)),
        ((2, END, END), (0, 1, 1)),
    ],
)
def test_one_axis_of_known_size(first: tuple[int, int, int], second: tuple[int, int, int]) -> None:
    model = chain([{1: first}, {-1: second}], 13, [2, 10])
    after = run_pass(model, MergeSlice())
    assert (after.op_types, after.declined) == (["Slice"], ())
    assert_equivalent(model, after.model, numbers(2, 10))


@pytest.mark.parametrize("size", [0, 1, 3, 4, 7, 20])
@pytest.mark.parametrize(
    ("first", "second"), [((2, 9), (1, 4)), ((0, END), (3, END)), ((5, 2), (0, 9)), ((1, 3), (4, 6))]
)
def test_one_axis_of_unknown_size(first: tuple[int, int], second: tuple[int, int], size: int) -> None:
    model = chain([{0: (*first, 1)}, {0: (*second, 1)}], 13, ["n"])
    after = run_pass(model, MergeSlice())
    assert (after.op_types, after.declined) == (["Slice"], ())
    assert_equivalent(model, after.model, numbers(size))


@pytest.mark.parametrize("second", [(0, -1, 1), (-3, END, 1), (0, 4, 2), (END, START, -1)])
def test_what_an_unknown_size_forbids(second: tuple[int, int, int]) -> None:
    model = chain([{0: (2, 9, 1)}, {0: second}], 13, ["n"])
    after = run_pass(model, MergeSlice())
    assert (after.changes, after.declined) == (0, (UNKNOWN,))


@pytest.mark.parametrize("end", [END, 2**31 - 1])
def test_disputed_end(end: int) -> None:
    model = chain([{0: (4, end, -1)}, {0: (0, 2, 1)}], 13, [5])
    after = run_pass(model, MergeSlice())
    assert (after.changes, after.declined) == (0, (DISPUTED,))
    other = chain([{0: (4, end, -1)}, {1: (0, 2, 1)}], 13, [5, 3])
    after = run_pass(other, MergeSlice())
    assert after.op_types == ["Slice"]
    assert_equivalent(other, after.model, numbers(5, 3))


@pytest.mark.parametrize("second", [{-1: (1, 3, 1)}, {-1: (1, 3, 1), 0: (0, 2, 1)}])
@pytest.mark.parametrize("first", [{0: (1, 3, 1)}, {0: (1, 3, 1), -1: (0, 2, 1)}])
def test_axes_from_the_end_need_the_rank(first: Cuts, second: Cuts) -> None:
    model = chain([first, second], 13, None)
    reason = "an axis counts from the end of an unknown number of axes"
    assert run_pass(model, MergeSlice()).declined == (reason,)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_four_at_once_and_left_out_inputs(dtype: str) -> None:
    model = text_model(
        """agraph (float[6, 7, 8] x) => (float[a, b, c] z)
        <int64[1] one = {1}, int64[1] four = {4},
         int64[2] ends = {9, 5}, int64[2] starts = {0, 2}, int64[2] steps = {2, 1}> {
          y = Slice (x, one, four)
          w = Slice (y, starts, ends)
          v = Slice (w, starts, ends, , steps)
          z = Slice (v, one, four, one)
        }"""
    )
    after = run_pass(model, MergeSlice())
    assert after.op_types == ["Slice"]
    assert_equivalent(model, after.model)
    model = chain([{0: (0, 4, 1)}, {1: (1, 3, 1)}], 13, [5, 5], dtype)
    after = run_pass(model, MergeSlice())
    assert after.op_types == ["Slice"]
    assert_equivalent(model, after.model, numbers(5, 5))


@pytest.mark.parametrize(
    ("given", "results", "reason"),
    [
        ("float[6] x", "float[3] y, float[a] z", SHARED),
        ("float[6] x, int64[1] one", "float[a] z", "starts are no constant"),
    ],
)
def test_declines(given: str, results: str, reason: str) -> None:
    model = text_model(
        f"""agraph ({given}) => ({results}) <int64[1] one = {{1}}, int64[1] four = {{4}}> {{
          y = Slice (x, one, four)
          z = Slice (y, one, four)
        }}"""
    )
    after = run_pass(model, MergeSlice())
    assert (after.changes, after.declined) == (0, (reason,))


def test_inside_a_branch() -> None:
    model = text_model(
        """agraph (bool c, float[6] x) => (float[a] z) <int64[1] one = {1}, int64[1] four = {4}> {
          z = If (c) <
            then_branch = yes () => (float[a] t) { y = Slice (x, one, four) t = Slice (y, one, four) },
            else_branch = no () => (float[a] e) { e = Neg (x) }
          >
        }"""
    )
    after = run_pass(model, MergeSlice())
    assert after.op_types == ["If", "Slice", "Neg"]
    assert_equivalent(model, after.model, {"c": np.array(True), "x": np.arange(6, dtype=np.float32)})


@given(data=st.data())
@settings(derandomize=True, max_examples=100, deadline=None)
def test_random_chains(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    shape = data.draw(st.lists(st.integers(0, 6), min_size=rank, max_size=rank))
    opset = data.draw(st.sampled_from([9, 10, 13]))
    bound = st.one_of(st.integers(-8, 8), st.sampled_from([END, START + 1]))
    step = st.just(1) if opset == 9 else st.sampled_from([1, 1, 2, 3, -1, -2])
    signed = opset > 9 and data.draw(st.booleans())
    steps = []
    for _ in range(data.draw(st.integers(2, 3))):
        axes = data.draw(st.lists(st.integers(0, rank - 1), min_size=1, unique=True))
        steps.append({a - rank if signed else a: data.draw(st.tuples(bound, bound, step)) for a in axes})
    known = data.draw(st.sampled_from(["sizes", "rank", "nothing"]))
    spellings: dict[str, list[Any] | None] = {
        "sizes": shape,
        "rank": [f"d{i}" for i in range(rank)],
        "nothing": None,
    }
    model = chain(steps, opset, spellings[known])
    after = run_pass(model, MergeSlice())
    if known == "sizes" and len(steps) == 2:
        assert after.op_types == ["Slice"] or after.declined == (DISPUTED,)
    assert_equivalent(model, after.model, numbers(*shape))


def squeezed(cuts: Cuts, axes: list[int], opset: int) -> onnx.ModelProto:
    """A Slice of [5, 6], the axes taken away."""
    proto = chain([cuts], opset, [5, 6])
    attributes: dict[str, Any] = {"axes": axes} if opset < 13 else {}
    inputs = ["v1"] if opset < 13 else ["v1", "gone"]
    proto.graph.node.append(helper.make_node("Squeeze", inputs, ["y"], **attributes))
    if opset >= 13:
        proto.graph.initializer.append(numpy_helper.from_array(np.array(axes, np.int64), "gone"))
    result = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["q"])
    proto.graph.output[0].CopyFrom(result)
    return proto


@pytest.mark.parametrize("opset", [9, 10, 11, 13, 17])
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("cut", [(0, 1, 1), (3, 4, 1), (-1, END, 1), (4, END, 1), (-2, -1, 1)])
def test_one_element_is_gathered(cut: tuple[int, int, int], axis: int, opset: int) -> None:
    model = squeezed({axis: cut if cut[0] != 4 or axis == 0 else (5, END, 1)}, [axis], opset)
    after = run_pass(model, MergeSlice())
    fires = cut in ((0, 1, 1), (3, 4, 1)) or (cut == (-1, END, 1) and opset >= 11)
    assert after.op_types == (["Gather"] if fires else ["Slice", "Squeeze"])
    assert_equivalent(model, after.model, numbers(5, 6))


@pytest.mark.parametrize(
    ("cuts", "axes"), [({0: (0, 1, 1), 1: (0, 3, 1)}, [0]), ({0: (0, 1, 1), 1: (0, 1, 1)}, [1])]
)
def test_slices_of_more_than_one_axis_stay(cuts: Cuts, axes: list[int]) -> None:
    assert run_pass(squeezed(cuts, axes, 17), MergeSlice()).op_types == ["Slice", "Squeeze"]
