"""merge-pieces and merge-split against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxopt.claims import Pass
from onnxopt.passes.merge.merge_pieces import MergePieces
from onnxopt.passes.merge.merge_split import MergeSplit
from tests.passes.movements import Movements
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

NUMBERS = ", ".join(f"int64[1] k{number} = {{{number}}}" for number in range(9))
HELD = f"""{NUMBERS}, int64[1] last = {{-1}}, int64[1] end = {{9223372036854775807}}, int64 four = {{4}},
  int64[2] rows = {{2, 3}}, int64[2] apart = {{0, 2}}, int64[2] two = {{2, 4}},
  int64[2, 1] at2 = {{2, 3}}, int64[1, 1] at0 = {{0}}, int64[1, 1] at1 = {{1}}, int64[1, 1] below = {{-1}},
  int64[2, 1] twice = {{2, 2}}, int64[2, 3] columns = {{2, 2, 2, 3, 3, 3}},
  int64[2, 3] mixed = {{2, 2, 2, 3, 3, 4}}"""


def model(
    nodes: str, inputs: str = "float[6, 3] x", results: str = "float[p, q] y", opset: int = 17
) -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    text = f"{head} agraph ({inputs}) => ({results}) <{HELD}> {{ {nodes} }}"
    return onnx.shape_inference.infer_shapes(text_model(text))


def check(proto: onnx.ModelProto, one: Pass | None = None) -> Rewritten:
    done = run_pass(proto, one or MergePieces())
    assert_equivalent(proto, done.model, random_feeds(proto))
    return done


TWO = "float[2, 3] a, float[4, 3] b"
JOIN = "j = Concat <axis = 0> (a, b)\n"


X, XA = "float[6, 3] x", "float[6, 3] x, float[2, 3] a"
ROWS = "float[2, 3] x, float[1, 3] a, float[1, 3] b"
SPLIT = "u, t = Split <axis = 0> (x, two)\n"


@pytest.mark.parametrize(
    ("nodes", "inputs", "left"),
    [
        # what a Slice or Gather takes of a Concat
        (JOIN + "s = Slice (j, k2, k6)", TWO, []),
        (JOIN + "s = Slice (j, k3, end, k0, k1)", TWO, ["Slice"]),
        (JOIN + "s = Slice (j, k1, k3)", TWO, ["Concat", "Slice"]),
        (
            JOIN + "u = Slice (j, k0, k2)\n t = Slice (j, k2, k6)\n s = Concat <axis = 0> (t, u)",
            TWO,
            ["Concat"],
        ),
        (JOIN + "s = Gather <axis = 0> (j, rows)", TWO, ["Slice"]),
        (JOIN + "u = Gather <axis = 0> (j, four)\n s = Unsqueeze (u, k0)", TWO, ["Gather", "Unsqueeze"]),
        (JOIN + "s = Gather <axis = 0> (j, apart)", TWO, ["Concat", "Gather"]),
        (JOIN + "s = Slice (j, last, k0, k0, last)", TWO, ["Concat", "Slice"]),
        # what is joined again
        (SPLIT + "s = Concat <axis = -2> (u, t)", X, []),
        (SPLIT + "s = Concat <axis = 0> (t, u)", X, ["Split", "Concat"]),
        ("u = Slice (x, k1, k3)\n t = Slice (x, k3, k5)\n s = Concat <axis = 0> (u, t)", X, ["Slice"]),
        ("u = Slice (x, k1, k3, k1)\n t = Slice (x, k0, k1, k1)\n s = Concat <axis = 1> (t, u)", X, []),
        # what is written over
        ("t = ScatterND (x, at2, a)\n s = Slice (t, k2, k4)", XA, []),
        ("t = ScatterND (x, at2, a)\n s = Slice (t, k4, k6)", XA, ["Slice"]),
        ("t = ScatterND (x, at0, a)\n s = ScatterND (t, at1, b)", ROWS, ["Concat"]),
        ("t = ScatterND (x, at0, a)\n s = ScatterND (t, below, b)", ROWS, ["Concat"]),
        ("s = ScatterND (x, at2, a)", XA, ["ScatterND"]),
        ('t = ScatterND <reduction = "add"> (x, at2, a)\n s = Slice (t, k2, k4)', XA, ["ScatterND", "Slice"]),
        ("t = ScatterND (x, twice, a)\n s = Slice (t, k2, k3)", XA, ["ScatterND", "Slice"]),
        ("t = ScatterElements <axis = 0> (x, columns, a)\n s = Slice (t, k2, k4)", XA, []),
        ("t = ScatterElements (x, mixed, a)\n s = Slice (t, k2, k4)", XA, ["ScatterElements", "Slice"]),
    ],
)
def test_pieces(nodes: str, inputs: str, left: list[str]) -> None:
    assert check(model(f"{nodes}\n y = Neg (s)", inputs)).op_types == [*left, "Neg"]


def test_split_of_what_was_joined() -> None:
    nodes = (
        JOIN
        + "s, t = Split <axis = 0> (j, two)\n u = Add (t, b)\n v = Concat <axis = 0> (u, s)\n y = Neg (v)"
    )
    assert check(model(nodes, TWO)).op_types == ["Add", "Concat", "Neg"]


def test_indices_that_are_computed() -> None:
    """The whole of a value is written over; the indices are not folded, since they are large."""
    nodes = """r = Range (z, n, i)
      u = Unsqueeze (r, k1)
      s = ScatterND (x, u, a)
      y = Neg (s)"""
    proto = model(nodes, "float[6, 3] x, float[6, 3] a")
    for name, number in (("z", 0), ("n", 6), ("i", 1)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(number), name))
    assert check(proto).op_types == ["Neg"]


def test_a_concat_that_is_read_elsewhere() -> None:
    nodes = JOIN + "s = Slice (j, k2, k6)\n y = Neg (s)\n z = Neg (j)"
    done = check(model(nodes, TWO, "float[p, q] y, float[r, s] z"))
    assert sorted(done.op_types) == ["Concat", "Neg", "Neg"]


def test_dynamic_sizes_stay() -> None:
    nodes = JOIN + "s = Slice (j, k2, k6)\n y = Neg (s)"
    assert check(model(nodes, "float[N, 3] a, float[4, 3] b")).changes == 0


def test_empty_parts() -> None:
    nodes = JOIN + "s = Slice (j, k3, k3)\n u = Concat <axis = 0> (s, a)\n y = Neg (u)"
    assert check(model(nodes, TWO)).op_types == ["Neg"]
    assert check(model(JOIN + "s = Slice (j, k3, k3)\n y = Neg (s)", TWO)).changes == 0


def test_a_graph_output_keeps_its_name() -> None:
    nodes = JOIN + "y = Slice (j, k2, k6)"
    done = check(model(nodes, TWO))
    assert done.declined == ("is a graph output whose value comes from outside the graph",)


def test_in_a_body() -> None:
    text = f"""agraph (float[2, 3] a, float[4, 3] b, bool flag) => (float[p, q] y) <{HELD}> {{
      j = Concat <axis = 0> (a, b)
      y = If (flag) <
        then_branch = t () => (float[p, q] u) {{ s = Slice (j, k2, k6)  u = Neg (s) }},
        else_branch = e () => (float[p, q] v) {{ r = Slice (j, k0, k2)  v = Relu (r) }}>
    }}"""
    proto = onnx.shape_inference.infer_shapes(text_model(text))
    done = run_pass(proto, MergePieces())
    assert done.op_types == ["If", "Neg", "Relu"]
    feeds = {"a": np.ones((2, 3), np.float32), "b": np.zeros((4, 3), np.float32)}
    assert_equivalent(proto, done.model, [{**feeds, "flag": np.array(flag)} for flag in (True, False)])


CUTS = "a = Slice (x, {}, {}, k0)\n b = Slice (x, {}, {}, k0)\n"


@pytest.mark.parametrize(
    ("cuts", "left"),
    [
        (("k0", "k3", "k3", "k6"), ["Split", "Add"]),
        (("k3", "end", "k0", "k3"), ["Split", "Add"]),
        (("k3", "k6", "k3", "k6"), ["Slice", "Slice", "Add"]),
        (("k0", "k3", "k2", "k5"), ["Slice", "Slice", "Add"]),
        (("k0", "k2", "k2", "k4"), ["Slice", "Slice", "Add"]),
    ],
)
@pytest.mark.parametrize("opset", [13, 17, 18])
def test_slices_become_one_split(cuts: tuple[str, ...], left: list[str], opset: int) -> None:
    done = check(model(CUTS.format(*cuts) + "y = Add (a, b)", opset=opset), MergeSplit())
    assert done.op_types == left
    assert done.declined == (() if "Split" in left else ("the Slices do not make up the value",))


def test_split_before_opset_13_has_its_sizes_as_an_attribute() -> None:
    done = check(
        model(CUTS.format("k0", "k2", "k2", "end") + "c = Neg (a)\n y = Concat <axis = 0> (b, c)", opset=11),
        MergeSplit(),
    )
    assert list(done.model.graph.node(0).attributes["split"].as_ints()) == [2, 4]


def test_split_of_three_in_any_order_among_others() -> None:
    nodes = """a = Slice (x, k4, k6, k0)
      o = Slice (x, k0, k2, k1)
      b = Slice (x, k0, k2, k0)
      c = Slice (x, k2, k4, k0)
      d = Mul (a, b)
      e = Sub (d, c)
      f = ReduceSum (o)
      y = Add (e, f)"""
    done = check(model(nodes), MergeSplit())
    assert sorted(done.op_types) == sorted(["Split", "Slice", "Mul", "Sub", "ReduceSum", "Add"])


def test_split_of_other_types_is_declined() -> None:
    nodes = CUTS.format("k0", "k3", "k3", "k6") + "y = And (a, b)"
    done = run_pass(model(nodes, "bool[6, 3] x", "bool[p, q] y"), MergeSplit())
    assert done.declined == ("not each runtime has a Split for the type",)


def test_split_in_a_body() -> None:
    text = f"""agraph (float[6, 3] x, bool flag) => (float[p, q] y) <{HELD}> {{
      o = Slice (x, k0, k3, k0)
      y = If (flag) <
        then_branch = t () => (float[p, q] u) {{ {CUTS.format("k0", "k3", "k3", "k6")} u = Add (a, b) }},
        else_branch = e () => (float[p, q] v) {{ v = Relu (o) }}>
    }}"""
    proto = onnx.shape_inference.infer_shapes(text_model(text))
    done = run_pass(proto, MergeSplit())
    assert done.op_types == ["Slice", "If", "Split", "Add", "Relu"]
    x = np.arange(18, dtype=np.float32).reshape(6, 3)
    assert_equivalent(proto, done.model, [{"x": x, "flag": np.array(flag)} for flag in (True, False)])


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    proto = Movements(data).model("CCSSSPPGXXuc", 10)
    assume(proto is not None)
    assert proto is not None
    for one in (MergePieces(), MergeSplit()):
        done = run_pass(proto, one, rounds=8)
        assert len(done.op_types) <= len(proto.graph.node)
        assert_equivalent(proto, done.model)
