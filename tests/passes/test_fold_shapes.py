"""fold-shapes against the runtime."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.graph import constant_array
from onnxopt.passes.fold.fold_shapes import FoldShapes
from tests.support import Rewritten, assert_equivalent, random_feeds, run_pass, text_model

OPEN = "the shape has a size that is neither a number nor one of the input"
ZERO = "a size beside the one that would have to be -1 may be 0"
CONSTANTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] three = {3},
  int64[1] open = {-1}, int64[2] heads = {4, 16}, int64[1] all = {64}, int64[3] twice = {1, 1, 2}"""
SHAPE = "s = Shape (x)\n b = Gather (s, zero)\n t = Gather (s, one)\n"
UNREAD = {"Gather", "Shape"}
"""What SHAPE leaves that a test does not use."""


def model(nodes: str, rank: int = 3, inputs: str = "float[B, S, 64] x") -> onnx.ModelProto:
    dims = ", ".join(f"q{axis}" for axis in range(rank))
    return text_model(f"agraph ({inputs}) => (float[{dims}] y) <{CONSTANTS}> {{ {nodes} }}")


def live(done: Rewritten) -> list[str]:
    """The operators of nodes that are read."""
    return [n.op_type for n in done.model.graph if any(v.uses() or v.is_graph_output() for v in n.outputs)]


def feeds(proto: onnx.ModelProto) -> list[Mapping[str, np.ndarray]]:
    return [
        random_feeds(proto, sizes={"B": batch, "S": length}) for batch, length in ((2, 3), (1, 5), (4, 1))
    ]


@pytest.mark.parametrize(
    ("nodes", "rank", "shape"),
    [
        (SHAPE + "n = Concat <axis = 0> (b, t, heads)\n y = Reshape (x, n)", 4, [0, 0, 4, 16]),
        (SHAPE + "n = Concat <axis = 0> (b, open)\n y = Reshape (x, n)", 2, [0, -1]),
        (SHAPE + "n = Concat <axis = 0> (open, all)\n y = Reshape (x, n)", 2, [-1, 64]),
        (SHAPE + "r = Mul (b, t)\n n = Concat <axis = 0> (r, all)\n y = Reshape (x, n)", 2, [-1, 64]),
        (SHAPE + "n = Concat <axis = 0> (zero, t, heads)\n y = Reshape (x, n)", 4, [0, 0, 4, 16]),
        (
            SHAPE + "n = Concat <axis = 0> (b, t, heads)\n y = Reshape <allowzero = 1> (x, n)",
            4,
            [0, 0, 4, 16],
        ),
        (
            """z = Transpose <perm = [1, 0, 2]> (x)
            s = Shape (z)
            b = Slice (s, zero, one)
            t = Slice (s, one, two)
            n = Concat <axis = 0> (t, b, heads)
            y = Reshape (x, n)""",
            4,
            [0, 0, 4, 16],
        ),
    ],
)
def test_reshape_to_a_computed_shape(nodes: str, rank: int, shape: list[int]) -> None:
    proto = model(nodes, rank)
    done = run_pass(proto, FoldShapes())
    assert set(live(done)) - UNREAD == {"Reshape"}
    node = next(node for node in done.model.graph if node.op_type == "Reshape")
    target = constant_array(node.inputs[1])
    assert target is not None
    assert target.tolist() == shape
    assert_equivalent(proto, done.model, feeds(proto))


@pytest.mark.parametrize(
    "nodes",
    [
        SHAPE + "y = Reshape (x, s)",
        SHAPE + "n = Concat <axis = 0> (b, t, all)\n y = Reshape (x, n)",
        SHAPE + "n = Concat <axis = 0> (b, open, all)\n y = Reshape (x, n)",
        "r = Relu (x)\n s = Shape (r)\n y = Expand (x, s)",
        "r = Relu (x)\n s = Shape (r)\n n = Slice (s, one, two)\n y = Slice (x, zero, n, one)",
        SHAPE + "d = Div (s, s)\n y = Tile (x, d)",
    ],
)
def test_what_keeps_the_shape_keeps_all(nodes: str) -> None:
    proto = model(nodes.replace("y =", "w =") + "\n y = Neg (w)")
    done = run_pass(proto, FoldShapes())
    assert set(live(done)) - UNREAD == {"Neg"}
    assert_equivalent(proto, done.model, feeds(proto))


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("y = Slice (x, open, minus, one, open)", "Slice"),  # reversed
        ("s = Shape (z)\n y = Expand (x, s)", "Expand"),
        ("s = Shape (z)\n t = Slice (s, one, two)\n y = Slice (x, zero, t, one)", "Slice"),
        ("y = Tile (x, twice)", "Tile"),
    ],
)
def test_what_may_change_the_shape_stays(nodes: str, left: str) -> None:
    proto = model(nodes, inputs="float[B, S, 64] x, float[C, D, 64] z")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-100]), "minus"))
    done = run_pass(proto, FoldShapes())
    assert left in done.op_types


def test_expand_keeps_sizes_by_ones() -> None:
    nodes = """shape = Shape (x)
      b = Gather (shape, zero)
      d = Gather (shape, two)
      t = Concat <axis = 0> (two, b, three, d)
      y = Expand (x, t)"""
    proto = model(nodes, 4, "float[B, 1, 64] x")
    done = run_pass(proto, FoldShapes())
    assert done.op_types == ["Expand"]
    target = constant_array(done.model.graph.node(0).inputs[1])
    assert target is not None
    assert target.tolist() == [2, 1, 3, 64]
    assert_equivalent(proto, done.model, feeds(proto))


@pytest.mark.parametrize(
    ("nodes", "rank", "reason"),
    [
        (SHAPE + "n = Concat <axis = 0> (t, b, all)\n y = Reshape (x, n)", 3, OPEN),
        (
            "s = Shape (z)\n n = Slice (s, zero, one)\n m = Concat <axis = 0> (n, open)\n y = Reshape (x, m)",
            2,
            OPEN,
        ),
        (SHAPE + "r = Mul (t, heads4)\n n = Concat <axis = 0> (b, r, heads16)\n y = Reshape (x, n)", 3, ZERO),
        ("s = Shape (z)\n y = Expand (x, s)", 3, OPEN),
        (
            "none = Sub (all, all)\n n = Concat <axis = 0> (none, data)\n y = Reshape <allowzero = 1> (x, n)",
            3,
            "a size is 0, and means it",
        ),
    ],
)
def test_declined(nodes: str, rank: int, reason: str) -> None:
    inputs = "float[B, S, 64] x, float[C, D, E] z, int64[2] data"
    proto = model(nodes, rank, inputs)
    for name, number in (("heads4", 4), ("heads16", 16)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    done = run_pass(proto, FoldShapes())
    assert reason in done.declined


def test_an_unknown_size_is_left_over() -> None:
    """Whatever the one element that is no number stands for, the others say what it has to be."""
    proto = model(
        "n = Concat <axis = 0> (data, heads)\n y = Reshape (x, n)", inputs="float[B, S, 64] x, int64[1] data"
    )
    done = run_pass(proto, FoldShapes())
    assert done.op_types == ["Reshape"]
    x = np.ones((2, 3, 64), np.float32)
    assert_equivalent(proto, done.model, [{"x": x, "data": np.array([number])} for number in (6, -1)])


def test_overridable_shape_stays_the_users() -> None:
    text = "agraph (float[B, 8] x, int64[2] t = {-1, 4}) => (float[p, q] y) { y = Reshape (x, t) }"
    proto = text_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 4]), "t"))
    done = run_pass(proto, FoldShapes())
    assert done.changes == 0


def test_integers_that_follow() -> None:
    text = """agraph (float[B, 8] x) => (int64[1] y)
      <int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[1] open = {-1}> {
        s = Shape (x)
        e = Equal (s, open)
        c = Cast <to = 7> (e)
        w = Slice (c, one, two, zero)
        y = Neg (w)
      }"""
    proto = onnx.shape_inference.infer_shapes(text_model(text))
    done = run_pass(proto, FoldShapes())
    assert done.op_types == ["Neg"]
    assert_equivalent(proto, done.model, feeds(proto))


@pytest.mark.parametrize(
    ("nodes", "opset", "left"),
    [
        ("a = Cast <to = 6> (s)\n b = Slice (a, one, two)\n t = Cast <to = 7> (b)", 13, ["Shape", "Slice"]),
        ("a = Cast <to = 6> (s)\n b = Slice (a, one, two)\n t = Cast <to = 7> (b)", 17, ["Shape"]),
        ("a = Gather (s, zero)\n b = Gather (s, one)\n t = Concat <axis = 0> (a, b)", 17, ["Shape"]),
        ("a = Gather (s, zero)\n b = Gather (s, one)\n t = Concat <axis = 0> (a, b)", 13, ["Shape", "Slice"]),
        ("a = Gather (s, zero)\n b = Slice (s, one, three)\n t = Concat <axis = 0> (a, b)", 13, ["Shape"]),
        ("a = Gather (s, one)\n b = Gather (s, zero)\n t = Concat <axis = 0> (a, b)", 17, None),
        ("t = Gather (s, one)", 13, None),
        ("a = Gather (s, one)\n t = Mul (a, three)", 17, ["Shape", "Mul"]),
        ("a = Gather (s, one)\n t = Mul (a, three)", 13, None),
    ],
)
def test_sizes_by_a_shorter_way(nodes: str, opset: int, left: list[str] | None) -> None:
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    nodes = f"s = Shape (x)\n {nodes}\n y = Neg (t)"
    text = f"agraph (float[B, S, 64] x) => (int64[r] y) <{CONSTANTS}> {{ {nodes} }}"
    proto = onnx.shape_inference.infer_shapes(text_model(f"{head} {text}"))
    done = run_pass(proto, FoldShapes())
    assert done.changes == 0 if left is None else done.op_types == [*left, "Neg"]
    assert_equivalent(proto, done.model, feeds(proto))


def test_in_bodies_and_functions() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
    agraph (float[B, S, 64] x, bool flag) => (float[p, q, r, s] y, float[a, b, c] z)
    <int64[2] heads = {4, 16}> {
      y = If (flag) <
        then_branch = t () => (float[a, b, c, d] u) {
          s = Shape <end = 2> (x)  n = Concat <axis = 0> (s, heads)  u = Reshape (x, n)
        },
        else_branch = e () => (float[a, b, c, d] v) {
          k = Shape <end = 2> (x)  m = Concat <axis = 0> (k, heads)  v = Reshape (x, m)
        }>
      z = my.whole (x)
    }
    <domain: "my", opset_import: ["" : 17]> whole (x) => (y) {
      three = Constant <value = int64[3] {0, 0, 0}> ()
      size = Shape (three)
      one = Reshape (three, size)
      y = Reshape (x, one)
    }"""
    proto = text_model(text)
    done = run_pass(proto, FoldShapes())
    assert (done.count("Concat"), done.count("Shape"), done.count("Reshape")) == (0, 0, 3)
    sample = {"x": np.ones((1, 2, 64), np.float32)}
    assert_equivalent(proto, done.model, [{**sample, "flag": np.array(flag)} for flag in (True, False)])


@settings(derandomize=True, max_examples=40, deadline=None)
@given(
    order=st.permutations(["b", "t", "four", "sixteen"]),
    perm=st.permutations([0, 1, 2]),
    keep=st.integers(1, 4),
    allowzero=st.booleans(),
)
def test_any_order_of_sizes(order: list[str], perm: list[int], keep: int, allowzero: bool) -> None:
    parts = [*order[:keep], *(["open"] if keep < 4 and not allowzero else order[keep:])]
    attribute = "<allowzero = 1>" if allowzero else ""
    nodes = f"""{SHAPE} v = Transpose <perm = {perm}> (x)
      n = Concat <axis = 0> ({", ".join(parts)})
      y = Reshape {attribute} (v, n)"""
    proto = model(nodes, len(parts))
    for name, number in (("four", 4), ("sixteen", 16)):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array([number]), name))
    done = run_pass(proto, FoldShapes())
    assert_equivalent(proto, done.model, feeds(proto))


@pytest.mark.parametrize("kind", ["int32", "int64"])
def test_integers_that_wrap_around_are_not_followed(kind: str) -> None:
    large = np.iinfo(kind).max
    proto = text_model(
        f"""agraph (float[2,3] x) => ({kind}[2] y) <{kind} large = {{{large}}}, {kind} two = {{2}}> {{
            s = Shape(x)
            t = Cast<to = {6 if kind == "int32" else 7}>(s)
            a = Add(large, t)
            b = Div(a, two)
            y = Add(b, t)
        }}"""
    )
    after = run_pass(proto, FoldShapes()).model
    assert_equivalent(proto, after)


def test_names_on_record_are_no_proof_beside_a_slice_of_opset_10() -> None:
    """There, onnx's inference keeps the name of a size that is cut."""
    proto = text_model(
        """<ir_version: 5, opset_import: ["" : 10]>
        agraph (float[N, 3] x) => (float[A, 3] y) <int64[1] s = {1}, int64[1] e = {3}> {
            t = Slice(x, s, e)
            u = Neg(t)
            size = Shape(x)
            y = Expand(u, size)
        }"""
    )
    proto = onnx.shape_inference.infer_shapes(proto)
    assert proto.graph.value_info[0].type.tensor_type.shape.dim[0].dim_param == "N"
    done = run_pass(proto, FoldShapes())
    assert (done.count("Slice"), done.count("Expand")) == (1, 1)
    assert_equivalent(proto, done.model, random_feeds(proto, sizes={"N": 2}))
