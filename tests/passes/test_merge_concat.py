"""merge-concat against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from onnxopt.passes.merge.merge_concat import MergeConcat
from tests.support import assert_equivalent, run_pass, text_model

SHARED = "the value in between is read elsewhere too"


@pytest.mark.parametrize("inner", [1, -2])
@pytest.mark.parametrize("outer", [1, -2])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_same_axis(inner: int, outer: int, place: int) -> None:
    names = ["a", "c"]
    names.insert(place, "y")
    model = text_model(
        f"""agraph (float[2, 1, 3] a, float[2, n, 3] b, float[2, 2, 3] c) => (float[i, j, k] z) {{
          y = Concat <axis = {inner}> (b, a)
          z = Concat <axis = {outer}> ({", ".join(names)})
        }}"""
    )
    after = run_pass(model, MergeConcat())
    assert (after.op_types, after.declined) == (["Concat"], ())
    assert_equivalent(model, after.model)


@pytest.mark.parametrize(("inner", "outer"), [(0, 1), (0, -1), (-1, -2)])
def test_other_axis_stays(inner: int, outer: int) -> None:
    model = text_model(
        f"""agraph (float[2, 2] a) => (float[i, j] z) {{
          y = Concat <axis = {inner}> (a, a)
          w = Concat <axis = {outer}> (y, y)
          z = Neg (w)
        }}"""
    )
    after = run_pass(model, MergeConcat())
    assert (after.changes, after.declined) == (0, ())


def test_one_reader_may_read_it_twice() -> None:
    model = text_model(
        """agraph (float[2] a, float[1] b) => (float[n] z) {
          y = Concat <axis = 0> (a, b)
          z = Concat <axis = 0> (y, a, y)
        }"""
    )
    after = run_pass(model, MergeConcat())
    assert after.op_types == ["Concat"]
    assert_equivalent(model, after.model)


def test_only_what_nobody_else_reads() -> None:
    model = text_model(
        """agraph (float[2] a, float[1] b) => (float[n] z, float[3] y) {
          y = Concat <axis = 0> (a, b)
          w = Concat <axis = 0> (b, b)
          z = Concat <axis = 0> (y, w)
        }"""
    )
    after = run_pass(model, MergeConcat())
    assert after.count("Concat") == 2
    assert after.declined == (SHARED,)
    assert_equivalent(model, after.model)


def test_unknown_rank_is_declined() -> None:
    model = text_model(
        """agraph (float[2, 1] a) => (float[i, j] z) {
          y = Concat <axis = 1> (a, a)
          z = Concat <axis = -1> (y, a)
        }"""
    )
    model.graph.input[0].type.tensor_type.ClearField("shape")
    model.graph.output[0].type.tensor_type.ClearField("shape")
    reason = "an axis counts from the end of an unknown number of axes"
    assert run_pass(model, MergeConcat()).declined == (reason,)


def test_outer_value_is_not_taken_into_a_branch() -> None:
    model = text_model(
        """agraph (bool c, float[2] a) => (float[n] z) {
          y = Concat <axis = 0> (a, a)
          z = If (c) <
            then_branch = yes () => (float[n] t) { t = Concat <axis = 0> (y, a) },
            else_branch = no () => (float[n] e) { u = Concat <axis = 0> (a, a) e = Concat <axis = 0> (u, a) }
          >
        }"""
    )
    after = run_pass(model, MergeConcat())
    assert (after.count("Concat"), after.declined) == (3, (SHARED,))
    feeds = [{"c": np.array(c), "a": np.ones(2, np.float32)} for c in (True, False)]
    assert_equivalent(model, after.model, feeds)


@given(data=st.data())
@settings(derandomize=True, max_examples=40, deadline=None)
def test_random_trees(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    dims = data.draw(st.lists(st.integers(0, 2), min_size=rank, max_size=rank))
    known = data.draw(st.booleans())
    values, nodes = ["x"], []
    for i in range(data.draw(st.integers(2, 5))):
        inputs = data.draw(st.lists(st.sampled_from(values), min_size=1, max_size=2)) + values[-1:]
        axis = data.draw(st.sampled_from([0, -rank]))
        nodes.append(helper.make_node("Concat", inputs, [f"v{i}"], axis=axis))
        values.append(f"v{i}")
    nodes.append(helper.make_node("Neg", values[-1:], ["z"]))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, dims if known else None)],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
    )
    model: onnx.ModelProto = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10
    )
    after = run_pass(model, MergeConcat())
    assert_equivalent(model, after.model, {"x": np.arange(np.prod(dims), dtype=np.float32).reshape(dims)})
