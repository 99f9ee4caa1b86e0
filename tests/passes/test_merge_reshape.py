"""merge-reshape against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from onnxopt.passes.merge.merge_reshape import MergeReshape
from tests.support import assert_equivalent, execute, run_pass, text_model

SHARED = "the value in between is read elsewhere too"
DYNAMIC = "the shape is no constant"
ZERO = "a 0 in the shape copies a size that is not known to be positive"
FRONT = "the axes in front of Flatten's cut are not those before the first change of shape"


def reshapes(
    first: list[int], second: list[int], shape: str = "n, 3, 4", attributes: str = ""
) -> onnx.ModelProto:
    return text_model(
        f"""agraph (float[{shape}] x) => (float z)
        <int64[{len(first)}] s = {{{", ".join(map(str, first))}}},
         int64[{len(second)}] t = {{{", ".join(map(str, second))}}}> {{
          y = Reshape {attributes} (x, s)
          z = Reshape (y, t)
        }}"""
    )


def unranked(model: onnx.ModelProto) -> onnx.ModelProto:
    """Results whose shape nobody knows."""
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    return model


def feeds(*sizes: int) -> list[dict[str, np.ndarray]]:
    return [{"x": np.arange(size * 12, dtype=np.float32).reshape(size, 3, 4)} for size in sizes]


@pytest.mark.parametrize("shape", ["n, 3, 4", "2, 3, 4"])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([-1, 12], [-1, 2, 6]),
        ([0, -1], [0, 4, 3]),
        ([4, -1, 3], [0, -1, 1]),
        ([-1, 0, 2, 2], [-1, 0, 4]),
        ([-1, 6], [-1]),
        ([-1, 1, 12], [3, -1, 4]),
    ],
)
def test_two_reshapes(first: list[int], second: list[int], shape: str) -> None:
    model = unranked(reshapes(first, second, shape))
    after = run_pass(model, MergeReshape())
    assert (after.op_types, after.declined) == (["Reshape"], ())
    assert_equivalent(model, after.model, feeds(2))


def test_copied_size_is_not_the_input_s() -> None:
    model = unranked(reshapes([4, -1, 3], [0, -1, 1]))
    after = run_pass(model, MergeReshape())
    node = after.model.graph.node(0)
    assert node.inputs[1] is not None
    assert node.inputs[1].const_value is not None
    assert node.inputs[1].const_value.numpy().tolist() == [4, -1, 1]


@pytest.mark.parametrize(("first", "second"), [([-1, 12], [0, 4, 3]), ([3, -1, 4], [3, 0, 2, 2])])
def test_copy_of_an_inferred_size_is_declined(first: list[int], second: list[int]) -> None:
    assert run_pass(unranked(reshapes(first, second)), MergeReshape()).declined == (ZERO,)


def test_copy_of_a_recorded_size() -> None:
    model = unranked(reshapes([-1, 12], [0, 4, 3], "2, 3, 4"))
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 12]))
    after = run_pass(model, MergeReshape())
    assert after.op_types == ["Reshape"]
    assert_equivalent(model, after.model, feeds(2))


def test_copy_of_an_empty_recorded_size_is_declined() -> None:
    model = unranked(reshapes([-1, 12], [0, 4, 3], "0, 3, 4"))
    model.graph.value_info.append(helper.make_tensor_value_info("y", TensorProto.FLOAT, [0, 12]))
    assert run_pass(model, MergeReshape()).declined == (ZERO,)


@pytest.mark.parametrize("allowzero", [0, 1])
def test_shape_at_run_time(allowzero: int) -> None:
    model = unranked(
        text_model(
            f"""agraph (float[n, 3, 4] x, int64[2] t) => (float z) <int64[2] s = {{-1, 12}}> {{
              y = Reshape (x, s)
              z = Reshape <allowzero = {allowzero}> (y, t)
            }}"""
        )
    )
    after = run_pass(model, MergeReshape())
    assert after.count("Reshape") == 2 - allowzero
    assert after.declined == (() if allowzero else (DYNAMIC,))
    sample = {"x": np.ones((0, 3, 4), np.float32), "t": np.array([0, 5] if allowzero else [0, 12])}
    assert_equivalent(model, after.model, [{**feeds(2)[0], "t": np.array([4, 6])}, sample])


def test_first_shape_at_run_time_does_not_matter() -> None:
    model = unranked(
        text_model(
            """agraph (float[n, 3, 4] x, int64[2] s) => (float z) <int64[2] t = {-1, 6}> {
              y = Reshape (x, s)
              z = Reshape (y, t)
            }"""
        )
    )
    after = run_pass(model, MergeReshape())
    assert after.op_types == ["Reshape"]
    assert_equivalent(model, after.model, {**feeds(2)[0], "s": np.array([4, 6])})


def test_first_allows_zero() -> None:
    model = unranked(reshapes([0, 5], [0, -1], "n, 3, 4", "<allowzero = 1>"))
    assert run_pass(model, MergeReshape()).declined == (ZERO,)


@pytest.mark.parametrize("shared", ["y", ""])
def test_overridable_and_shared(shared: str) -> None:
    result = "float[a, b] y, float z" if shared else "float z"
    given = "float[n, 3, 4] x" if shared else "float[n, 3, 4] x, int64[1] t"
    model = text_model(
        f"""agraph ({given}) => ({result}) <int64[2] s = {{-1, 12}}, int64[1] t = {{-1}}> {{
          y = Reshape (x, s)
          z = Reshape (y, t)
        }}"""
    )
    model.graph.output[-1].type.tensor_type.ClearField("shape")
    after = run_pass(model, MergeReshape())
    assert (after.changes, after.declined) == (0, (SHARED if shared else DYNAMIC,))


@pytest.mark.parametrize(
    ("view", "target"),
    [
        ("Flatten (x)", [0, 4, 3]),
        ("Flatten <axis = 2> (x)", [-1, 2, 2]),
        ("Unsqueeze (x, one)", [0, -1]),
        ("Unsqueeze (x, one)", [-1, 0, 12]),
        ("Squeeze (x1, one)", [0, -1]),
        ("Squeeze (x1, minus)", [0, 2, 6]),
        ("Squeeze (x1)", [-1, 6]),
    ],
)
def test_other_views_before_reshape(view: str, target: list[int]) -> None:
    model = unranked(
        text_model(
            f"""agraph (float[n, 3, 4] x) => (float z)
            <int64[{len(target)}] t = {{{", ".join(map(str, target))}}},
             int64[1] one = {{1}}, int64[1] minus = {{-3}}, int64[4] s = {{0, 1, 3, 4}}> {{
              x0 = Reshape (x, s)
              x1 = Abs (x0)
              y = {view}
              z = Reshape (y, t)
            }}"""
        )
    )
    model.graph.value_info.append(helper.make_tensor_value_info("x1", TensorProto.FLOAT, ["n", 1, 3, 4]))
    after = run_pass(model, MergeReshape())
    assert after.op_types == ["Reshape", "Abs", "Reshape"]
    assert after.declined == ()
    assert_equivalent(model, after.model, feeds(2))


@pytest.mark.parametrize(
    ("view", "axis", "reason"),
    [
        ("Reshape (x, keep)", 1, None),
        ("Reshape (x, sized)", 1, FRONT),
        ("Reshape (x, fold)", 1, FRONT),
        ("Reshape (x, fold)", 0, None),
        ("Unsqueeze (x, last)", 2, None),
        ("Unsqueeze (x, one)", 2, FRONT),
        ("Flatten (x)", 1, None),
        ("Flatten <axis = 2> (x)", 1, FRONT),
        ("Reshape (x, keep)", -1, "Flatten's axis counts from the end"),
    ],
)
def test_flatten(view: str, axis: int, reason: str | None) -> None:
    model = unranked(
        text_model(
            f"""agraph (float[n, 3, 4] x) => (float z)
            <int64[3] keep = {{0, -1, 2}}, int64[3] sized = {{0, 6, 2}}, int64[2] fold = {{-1, 6}},
             int64[1] one = {{1}}, int64[1] last = {{3}}> {{
              y = {view}
              z = Flatten <axis = {axis}> (y)
            }}"""
        )
    )
    after = run_pass(model, MergeReshape())
    assert after.declined == (() if reason is None else (reason,))
    assert len(after.op_types) == (1 if reason is None else 2)
    assert_equivalent(model, after.model, feeds(2))


@pytest.mark.parametrize(
    ("target", "op_type", "axes", "merged"),
    [
        ([-1, 12], "Unsqueeze", [0, 2], [1, -1, 1, 12]),
        ([-1, 12], "Unsqueeze", [-3], [1, -1, 12]),
        ([0, 4, 3], "Unsqueeze", [1], [0, 1, 4, 3]),
        ([0, 4, 3], "Unsqueeze", [0], None),
        ([-1, 1, 12, 1], "Squeeze", [1, -1], [-1, 12]),
        ([1, 0, -1], "Squeeze", [0], None),
    ],
)
def test_squeeze_and_unsqueeze_after_reshape(
    target: list[int], op_type: str, axes: list[int], merged: list[int] | None
) -> None:
    model = unranked(
        text_model(
            f"""agraph (float[n, 3, 4] x) => (float z)
            <int64[{len(target)}] s = {{{", ".join(map(str, target))}}},
             int64[{len(axes)}] axes = {{{", ".join(map(str, axes))}}}> {{
              y = Reshape (x, s)
              z = {op_type} (y, axes)
            }}"""
        )
    )
    after = run_pass(model, MergeReshape())
    if merged is None:
        assert after.declined == (ZERO,)
        return
    node = after.model.graph.node(0)
    assert node.inputs[1] is not None
    assert node.inputs[1].const_value is not None
    assert node.inputs[1].const_value.numpy().tolist() == merged
    assert_equivalent(model, after.model, feeds(2))


def test_squeeze_of_an_inferred_size_is_declined() -> None:
    model = unranked(
        text_model(
            """agraph (float[1, 3, 4] x) => (float z) <int64[2] s = {-1, 12}, int64[1] axes = {0}> {
              y = Reshape (x, s)
              z = Squeeze (y, axes)
            }"""
        )
    )
    assert run_pass(model, MergeReshape()).declined == ("a size that Squeeze takes out is not given as 1",)


def test_attribute_forms() -> None:
    model = text_model(
        """<ir_version: 7, opset_import: ["" : 11]>
        agraph (float[2, 3, 4] x) => (float[2, 12] z) <int64[2] s = {-1, 12}, int64[2] t = {2, 12}> {
          y = Reshape (x, s)
          w = Unsqueeze <axes = [0, 3]> (y)
          v = Squeeze <axes = [0]> (w)
          z = Reshape (v, t)
        }"""
    )
    after = run_pass(model, MergeReshape())
    assert after.op_types == ["Reshape"]
    assert_equivalent(model, after.model)


def test_below_opset_5_nothing_happens() -> None:
    model = text_model(
        """<ir_version: 3, opset_import: ["" : 4]>
        agraph (float[2, 3] x) => (float[6] z) {
          y = Reshape <shape = [3, 2]> (x)
          z = Reshape <shape = [6]> (y)
        }"""
    )
    assert run_pass(model, MergeReshape()).changes == 0


def test_inside_a_branch_and_a_function() -> None:
    model = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
        agraph (bool c, float[2, 3] x) => (float[a] z) {
          z = If (c) <
            then_branch = yes () => (float[a] t) { t = local.flat (x) },
            else_branch = no () => (float[a] e) {
              s = Constant <value = int64[2] {3, 2}> ()
              one = Constant <value = int64[1] {-1}> ()
              y = Reshape (x, s)
              e = Reshape (y, one)
            }
          >
        }
        <domain: "local", opset_import: ["" : 17]>
        flat (x) => (z) {
          s = Constant <value = int64[2] {3, 2}> ()
          t = Constant <value = int64[2] {0, 2}> ()
          one = Constant <value = int64[1] {-1}> ()
          y = Reshape (x, s)
          w = Reshape (y, t)
          z = Reshape (w, one)
        }"""
    )
    after = run_pass(model, MergeReshape())
    assert (after.count("Reshape"), after.declined) == (2, ())
    samples = [{"c": np.array(c), "x": np.ones((2, 3), np.float32)} for c in (True, False)]
    assert_equivalent(model, after.model, samples)


@given(data=st.data())
@settings(derandomize=True, max_examples=150, deadline=None)
def test_random_chains(data: st.DataObject) -> None:
    """Whatever the original can run, empty tensors too, the merged graph runs to the same result."""
    shape = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4]), min_size=1, max_size=3))
    known = data.draw(st.sampled_from(["sizes", "rank", "nothing"]))
    nodes, constants, x = [], [], np.arange(int(np.prod(shape)), dtype=np.float32).reshape(shape)
    value, flowing = "x", list(shape)
    for i in range(data.draw(st.integers(2, 3))):
        op_type = data.draw(st.sampled_from(["Reshape", "Reshape", "Flatten", "Unsqueeze", "Squeeze"]))
        inputs, attributes = [value], dict[str, Any]()
        if op_type == "Flatten":
            attributes["axis"] = data.draw(st.integers(0, len(flowing)))
        elif op_type == "Reshape":
            entries = st.sampled_from([-1, 0, 0, 1, 2, 3, 4, 5, 6])
            target = data.draw(
                st.lists(entries, min_size=1, max_size=3).filter(lambda sizes: sizes.count(-1) <= 1)
            )
            attributes["allowzero"] = data.draw(st.sampled_from([0, 0, 1]))
            inputs.append(f"c{i}")
            constants.append(numpy_helper.from_array(np.array(target, np.int64), f"c{i}"))
        else:
            rank = len(flowing) + (op_type == "Unsqueeze")
            axis = data.draw(st.integers(-rank, rank - 1))
            inputs.append(f"c{i}")
            constants.append(numpy_helper.from_array(np.array([axis], np.int64), f"c{i}"))
        nodes.append(helper.make_node(op_type, inputs, [f"v{i}"], **attributes))
        value = f"v{i}"
        partial = _model(nodes, constants, value, shape, "rank")
        try:
            flowing = list(execute(partial, {"x": x})[0].shape)
        except (Fail, InvalidArgument, RuntimeException):
            assume(False)
        assume(len(flowing) > 0)
    model = _model(nodes, constants, value, shape, known)
    after = run_pass(model, MergeReshape())
    assert_equivalent(model, after.model, {"x": x})


def _model(
    nodes: list[onnx.NodeProto], constants: list[onnx.TensorProto], result: str, shape: list[int], known: str
) -> onnx.ModelProto:
    symbols = [f"d{i}" for i in range(len(shape))]
    spellings: dict[str, list[Any] | None] = {"sizes": shape, "rank": symbols, "nothing": None}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, spellings[known])],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None)],
        initializer=constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
