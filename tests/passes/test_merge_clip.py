"""merge-clip against the runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.passes.merge.merge_clip import MergeClip
from tests.support import assert_equivalent, run_pass, text_model

SHARED = "the value in between is read elsewhere too"

Bound = float | None
Op = tuple[str, Bound, Bound]


def chain(ops: list[Op], opset: int = 17, dtype: type = np.float32, shape: str = "n") -> onnx.ModelProto:
    """Clip (both bounds or none), Relu, Max (its low) and Min (its high)."""
    nodes, constants = [], []
    for i, (op_type, low, high) in enumerate(ops):
        inputs, attributes = [f"v{i}"], dict[str, Any]()
        if op_type == "Clip" and opset < 11:
            attributes = {
                name: float(bound) for name, bound in (("min", low), ("max", high)) if bound is not None
            }
        elif op_type != "Relu":
            wanted = {"Clip": (low, high), "Max": (low,), "Min": (high,)}[op_type]
            for place, bound in enumerate(wanted):
                inputs.append("" if bound is None else f"c{i}_{place}")
                if bound is not None:
                    constants.append(numpy_helper.from_array(np.array(bound, dtype), f"c{i}_{place}"))
        nodes.append(helper.make_node(op_type, inputs, [f"v{i + 1}"], **attributes))
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("v0", kind, shape.split(","))],
        [helper.make_tensor_value_info(f"v{len(ops)}", kind, None)],
        initializer=constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=7)


def numbers(dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Zeros, infinities, the largest values, NaN and more; longer than a vector register."""
    if np.dtype(dtype).kind in "iu":
        limits = np.iinfo(dtype)
        return {"v0": np.array([limits.min, limits.max, 0, 1, 2, 3, 5, 6, 7, 10, 11, 100] * 3, dtype)}
    values = [
        np.nan,
        np.inf,
        -np.inf,
        -0.0,
        0.0,
        *np.arange(-12, 12, 0.5),
        np.finfo(dtype).max,
        np.finfo(dtype).min,
    ]
    return {"v0": np.array(values * 3).astype(dtype)}


CLIPS: list[Op] = [
    ("Clip", 0, 6),
    ("Clip", -5, -2),
    ("Clip", 6, 10),
    ("Clip", 4, 1),
    ("Clip", None, 3),
    ("Clip", -1, None),
    ("Clip", None, None),
]


@pytest.mark.parametrize("opset", [6, 11, 17])
@pytest.mark.parametrize("second", [*CLIPS, ("Relu", None, None)])
@pytest.mark.parametrize("first", [*CLIPS, ("Relu", None, None)])
def test_pair(first: Op, second: Op, opset: int) -> None:
    if opset < 11 and ("Clip", 4, 1) in (first, second):
        first, second = (("Clip", 1, 4) if op == ("Clip", 4, 1) else op for op in (first, second))
    model = chain([first, second], opset)
    after = run_pass(model, MergeClip())
    assert (len(after.op_types), after.declined) == (1, ())
    assert_equivalent(model, after.model, numbers())


@pytest.mark.parametrize(
    "dtype", [np.float32, np.float64, np.float16, np.int8, np.uint8, np.int32, np.int64, np.uint64]
)
@pytest.mark.parametrize("second", [("Clip", 3, 10), ("Clip", None, 5), ("Clip", 7, None)])
def test_types(second: Op, dtype: type) -> None:
    model = chain([("Clip", 2, 6), second, ("Min", None, 100)], dtype=dtype)
    after = run_pass(model, MergeClip())
    assert after.op_types == ["Clip"]
    assert_equivalent(model, after.model, numbers(dtype))


def test_large_integers_stay_exact() -> None:
    low, high = 2**62 + 1, 2**62 + 3
    model = chain([("Clip", low, None), ("Clip", None, high)], dtype=np.int64)
    after = run_pass(model, MergeClip())
    assert after.op_types == ["Clip"]
    assert_equivalent(model, after.model, {"v0": np.arange(2**62, 2**62 + 5)})


@pytest.mark.parametrize(
    ("ops", "left"),
    [
        ([("Max", 5, None), ("Min", None, 2)], ["Clip"]),
        ([("Relu", None, None), ("Min", None, 6)], ["Clip"]),
        ([("Relu", None, None), ("Max", -1, None)], ["Relu"]),
        ([("Relu", None, None), ("Max", 2, None)], ["Max"]),
        ([("Max", 3, None), ("Relu", None, None)], ["Max"]),
        ([("Min", None, 3), ("Min", None, 2)], ["Min"]),
        ([("Max", 1, None), ("Clip", None, 3)], ["Clip"]),
        ([("Relu", None, None), ("Relu", None, None), ("Relu", None, None)], ["Relu"]),
    ],
)
def test_min_and_max(ops: list[Op], left: list[str]) -> None:
    model = chain(ops)
    after = run_pass(model, MergeClip())
    assert after.op_types == left
    assert_equivalent(model, after.model, numbers())


def test_min_and_max_of_what_is_no_scalar() -> None:
    model = text_model(
        """agraph (float[n] x, float[n] v) => (float[a, b] z) <float[1, 1] one = {1}, float[2] two = {1, 2}> {
          y = Relu (x)
          w = Min (one, y)
          u = Relu (w)
          t = Max (u, two)
          s = Min (t, v)
          z = Relu (s)
        }"""
    )
    after = run_pass(model, MergeClip())
    assert after.changes == 0
    assert set(after.declined) == {"a bound is no scalar"}
    assert_equivalent(model, after.model)


def test_bound_in_front_of_a_value_of_its_rank() -> None:
    model = text_model(
        """agraph (float[1, n] x) => (float[1, n] z) <float[1, 1] six = {6}> {
          y = Relu (x)
          z = Min (six, y)
        }"""
    )
    after = run_pass(model, MergeClip())
    assert after.op_types == ["Clip"]
    assert_equivalent(model, after.model)


@pytest.mark.parametrize(
    ("given", "bound", "reason"),
    [
        ("float[n] x", "float[1] b = {1}", "a bound is no scalar"),
        ("float[n] x", "float b = {nan}", "a bound is no number"),
        ("float[n] x, float b", "float b = {1}", "a bound is no constant"),
    ],
)
def test_bounds_that_are_declined(given: str, bound: str, reason: str) -> None:
    model = text_model(
        f"""agraph ({given}) => (float[n] z) <float c = {{2}}, {bound.replace("nan", "0")}> {{
          y = Clip (x, b)
          z = Clip (y, c)
        }}"""
    )
    if "nan" in bound:
        model.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(np.nan, np.float32), "b"))
    after = run_pass(model, MergeClip())
    assert (after.changes, after.declined) == (0, (reason,))


def test_unknown_type() -> None:
    model = chain([("Relu", None, None), ("Relu", None, None), ("Relu", None, None)])
    model.graph.node[0].domain, model.graph.node[2].domain = "custom", "custom"
    model.graph.node.insert(2, helper.make_node("Relu", ["v2"], ["w"]))
    model.graph.node[3].input[0] = "w"
    model.opset_import.append(helper.make_opsetid("custom", 1))
    assert run_pass(model, MergeClip()).declined == ("the type is unknown",)


@pytest.mark.parametrize(("second", "left"), [("Relu (y)", 1), ("Clip (y, four)", 2)])
def test_shared_value_goes_only_if_the_second_does_nothing(second: str, left: int) -> None:
    model = text_model(
        f"""agraph (float[n] x) => (float[n] y, float[n] z) <float two = {{2}}, float four = {{4}}> {{
          y = Clip (x, two)
          w = {second}
          z = Neg (w)
        }}"""
    )
    after = run_pass(model, MergeClip())
    assert after.count("Clip") + after.count("Relu") == left
    assert after.declined == (() if left == 1 else (SHARED,))
    assert_equivalent(model, after.model)


def test_two_chains_on_one_input() -> None:
    model = text_model(
        """agraph (float[n] x) => (float[n] z) <float two = {2}, float four = {4}, float six = {6}> {
          a = Relu (x)
          b = Clip (a, , four)
          c = Relu (x)
          d = Clip (c, two, six)
          z = Add (b, d)
        }"""
    )
    after = run_pass(model, MergeClip())
    assert after.op_types == ["Clip", "Clip", "Add"]
    assert_equivalent(model, after.model)


@pytest.mark.parametrize("reference", [False, True])
def test_inside_a_function(reference: bool) -> None:
    low = "min : float = @m" if reference else "min = 1.0"
    model = text_model(
        f"""<ir_version: 10, opset_import: ["" : 10, "local" : 1]>
        agraph (float[n] x) => (float[n] z) {{ z = local.f <m = 1.0> (x) }}
        <domain: "local", opset_import: ["" : 10]>
        f <m> (x) => (z) {{
          y = Clip <{low}> (x)
          z = Clip <max = 3.0> (y)
        }}"""
    )
    after = run_pass(model, MergeClip())
    reason = "an attribute refers to one of the enclosing function" if reference else "the type is unknown"
    assert (after.changes, after.declined) == (0, (reason,))


def test_inside_a_branch() -> None:
    model = text_model(
        """agraph (bool c, float[n] x) => (float[n] z) <float six = {6}> {
          z = If (c) <
            then_branch = yes () => (float[n] t) { y = Relu (x) t = Clip (y, , six) },
            else_branch = no () => (float[n] e) { e = Neg (x) }
          >
        }"""
    )
    after = run_pass(model, MergeClip())
    assert after.op_types == ["If", "Clip", "Neg"]
    assert_equivalent(model, after.model, {"c": np.array(True), "x": numbers()["v0"]})


@pytest.mark.parametrize("opset", [11, 12])
def test_a_clip_of_doubles_needs_opset_12(opset: int) -> None:
    model = chain([("Max", 0, None), ("Min", None, 6)], opset, np.float64)
    after = run_pass(model, MergeClip())
    assert after.op_types == (["Max", "Min"] if opset < 12 else ["Clip"])
    assert_equivalent(model, after.model, {"v0": numbers()["v0"].astype(np.float64)})


bounds = st.one_of(st.none(), st.integers(-6, 8), st.sampled_from([-np.inf, np.inf, 0.1, -0.0]))
ops = st.one_of(
    st.tuples(st.just("Clip"), bounds, bounds),
    st.just(("Relu", None, None)),
    st.tuples(st.just("Max"), st.integers(-6, 8), st.none()),
    st.tuples(st.just("Min"), st.none(), st.integers(-6, 8)),
)


@given(steps=st.lists(ops, min_size=2, max_size=5), opset=st.sampled_from([8, 11, 17]))
@settings(derandomize=True, max_examples=100, deadline=None)
def test_random_chains(steps: list[Op], opset: int) -> None:
    if opset < 11:  # there, the runtime takes no Clip whose bounds are crossed
        limit = float(np.finfo(np.float32).max)
        assume(all(_or(low, -limit) <= _or(high, limit) for op_type, low, high in steps if op_type == "Clip"))
    model = chain(steps, opset)
    after = run_pass(model, MergeClip())
    if not any(bound in (np.inf, -np.inf) for _, *both in steps for bound in both):
        assert len(after.op_types) == 1 or "Clip" not in after.op_types
    assert_equivalent(model, after.model, numbers())


def _or(bound: Bound, default: float) -> float:
    return default if bound is None else bound
