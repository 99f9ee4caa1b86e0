"""Sizes with names, and what is known of the sizes in a graph."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.evaluation import Dim, Dims, divide, is_natural, named, product
from onnxopt.scope import scopes
from tests.support import execute, random_feeds, text_model

NAMES = ("a", "b", "c")


def value_of(size: Dim, numbers: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return sum(count * int(np.prod([numbers[n] for n in names], dtype=int)) for names, count in size.terms)


@st.composite
def sizes(draw: st.DrawFn) -> Dim:
    terms = draw(
        st.lists(st.tuples(st.integers(-3, 6), st.lists(st.sampled_from(NAMES), max_size=2)), max_size=3)
    )
    return sum((count * product(map(named, names)) for count, names in terms), 0)


@settings(derandomize=True, max_examples=60, deadline=None)
@given(sizes(), sizes())
def test_sums_products_and_quotients_are_those_of_the_numbers(a: Dim, b: Dim) -> None:
    quotient = divide(a, b)
    for numbers in itertools.product((1, 2, 5), repeat=3):
        where = dict(zip(NAMES, numbers, strict=True))
        x, y = value_of(a, where), value_of(b, where)
        assert value_of(a + b, where) == x + y
        assert value_of(a - b, where) == x - y
        assert value_of(a * b, where) == x * y
        assert quotient is None or y == 0 or value_of(quotient, where) * y == x
    assert (a - b == 0) == (a == b)


def test_equal_sizes_are_written_alike() -> None:
    n, m = named("n"), named("m")
    assert (n + m) * 2 - m - m == 2 * n
    assert divide(n * m * 64, m * 4) == n * 16
    assert divide(n * 3, 2) is None
    assert divide(n + m, n) is None
    assert divide(n + m, m + n) == 1
    assert divide(n, 0) is None
    assert [is_natural(size) for size in (0, -1, n, n - 1, named("?x"))] == [True, False, True, False, False]
    assert str(n * 2 + 1) == "1 + n*2"
    with pytest.raises(TypeError):
        n + "1"


def dims_in(text: str) -> tuple[Dims, dict[str, ir.Value]]:
    model = ir.from_proto(text_model(text))
    scope = next(iter(scopes(model)))
    values = {v.name: v for node in scope.graph for v in node.outputs if v.name}
    return Dims(scope), values


B, S = named("B"), named("S")
GRAPH = "agraph (float[B, S, 64] x, float[B, 3, H, W] image, int64[2] data, bool flag) => (float y)"
CONSTANTS = """int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}, int64[2] heads = {4, 16},
  int64[1] open = {-1}, int64[3] copy = {0, -1, 16}, int64[1] end = {9223372036854775807}, int64 minus = {-1},
  int64[2] both = {0, 1}, int64[4] scale = {1, 1, 2, 3}, float[64, 8] w = {0}, float[5, 3, 3, 3] k = {0}"""


FRONT = "s = Shape (x)\n b = Gather (s, both)\n"


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("y = Relu (x)", (B, S, 64)),
        ("y = Transpose (x)", (64, S, B)),
        ("y = Reshape (x, copy)", (B, S * 4, 16)),
        (f"{FRONT} t = Concat <axis = 0> (b, heads)\n y = Reshape (x, t)", (B, S, 4, 16)),
        ("s = Shape <start = 1> (x)\n t = Concat <axis = 0> (open, s)\n y = Reshape (x, t)", (B, S, 64)),
        ("y = Flatten <axis = 2> (x)", (B * S, 64)),
        ("y = Flatten <axis = -1> (x)", (B * S, 64)),
        ("y = Flatten <axis = 0> (x)", (1, B * S * 64)),
        ("u = Unsqueeze (x, both)\n y = Squeeze (u, one)", (1, B, S, 64)),
        ("y = Concat <axis = 1> (x, x)", (B, S * 2, 64)),
        ("a, y = Split <axis = -1> (x)", (B, S, 32)),
        ("y = Slice (x, one, two, zero)", None),
        ("y = Slice (x, zero, end, one)", (B, S, 64)),
        ("s = Shape (x)\n n = Slice (s, one, two)\n y = Slice (x, zero, n, one)", (B, S, 64)),
        ("y = Slice (x, one, end, two)", (B, S, 63)),
        ("y = Gather <axis = 1> (x, both)", (B, 2, 64)),
        ("y = Gather <axis = 1> (x, minus)", (B, 64)),
        ("u = Slice (x, zero, one, one)\n s = Shape (x)\n y = Expand (u, s)", (B, S, 64)),
        ("y = Tile (image, scale)", (B, 3, named("H") * 2, named("W") * 3)),
        ("y = ReduceMean <axes = [-1]> (x)", (B, S, 1)),
        ("y = ReduceMean <keepdims = 0, axes = [0]> (x)", (S, 64)),
        ("y = ReduceSum <noop_with_empty_axes = 1> (x)", (B, S, 64)),
        ("y = ReduceSum <keepdims = 0> (x)", ()),
        ("y = ArgMax <axis = 1, keepdims = 0> (x)", (B, 64)),
        ("y = MatMul (x, w)", (B, S, 8)),
        ("t = Transpose <perm = [0, 2, 1]> (x)\n y = MatMul (x, t)", (B, S, S)),
        ("f = Flatten (x)\n y = Gemm <transA = 1> (f, f)", (S * 64, S * 64)),
        ("y = Conv <pads = [1, 1, 1, 1]> (image, k)", (B, 5, named("H"), named("W"))),
        ("y = Conv (image, k)", (B, 5, named("H") - 2, named("W") - 2)),
        ("y = MaxPool <kernel_shape = [1, 1], strides = [1, 1]> (image)", (B, 3, named("H"), named("W"))),
        ("y = GlobalAveragePool (image)", (B, 3, 1, 1)),
        ("s = Shape (x)\n y = ConstantOfShape (s)", (B, S, 64)),
        ("m = ReduceMean <axes = [1]> (x)\n y = Sub (x, m)", (B, S, 64)),
        ("s = Shape (x)\n e = Equal (s, open)\n v = Where (e, minus, s)\n y = Reshape (x, v)", (B, S, 64)),
        ("s = Shape (x)\n m = Max (s)\n n = Max (m, s, s)\n y = Reshape (x, n)", (B, S, 64)),
        ("n = Size (x)\n d = Div (n, heads)\n y = Reshape (x, d)", (B * S * 16, B * S * 4)),
    ],
)  # fmt: skip
def test_shape_of_a_result(nodes: str, expected: tuple[Dim, ...] | None) -> None:
    dims, values = dims_in(f"{GRAPH} <{CONSTANTS}> {{ {nodes} }}")
    shape = dims.of(values["y"])
    if expected is None:
        assert shape is None or any("%" in str(size) for size in shape)
    else:
        assert shape == expected


def test_what_is_cut_at_a_number_fits_what_is_not() -> None:
    text = """agraph (float[B, S, 64] x) => (float y)
      <float[1, 128, 64] places = {0}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2}> {
        s = Shape (x)
        n = Slice (s, one, two)
        p = Slice (places, zero, n, one)
        y = Add (x, p)
      }"""
    dims, values = dims_in(text)
    assert dims.of(values["y"]) == (B, S, 64)
    assert dims.of(values["p"]) != (1, S, 64)


def test_names_that_say_nothing_are_not_compared() -> None:
    dims, values = dims_in(
        'agraph (float["?", 3, "?"] x, float[None, None] z) => (float y) { y = Relu (x)\n w = Relu (z) }'
    )
    for name, (i, j) in {"y": (0, 2), "w": (0, 1)}.items():
        shape = dims.of(values[name])
        assert shape is not None
        assert shape[i] != shape[j]


def test_what_nothing_else_is_known_of_has_its_name_on_record() -> None:
    text = "agraph (float[B, S] x, int64[2] data) => (float y) { y = Reshape (x, data)\n z = Relu (x) }"
    dims, values = dims_in(text)
    values["y"].shape = ir.Shape(["B", "other"])
    values["z"].shape = ir.Shape(["S", "B"])
    shape = dims.of(values["y"])
    assert shape is not None
    assert (shape[0], dims.of(values["z"])) == (B, (B, S))
    assert shape[1] not in (B, S, named("other"))


def test_integers_that_are_data_are_unknown_but_the_same() -> None:
    text = "agraph (float[B, 8] x, int64[2] data) => (float y) { y = Reshape (x, data)\n z = Relu (y) }"
    dims, values = dims_in(text)
    shape = dims.of(values["y"])
    assert shape is not None
    assert len(shape) == 2
    assert dims.of(values["z"]) == shape
    assert not set(shape) & {B, 8}


def test_record_of_a_loop_is_not_relied_on() -> None:
    text = """agraph (float[2] x, int64 n) => (float[m] y) <bool go = {1}> {
      y = Loop (n, go, x) <body = b (int64 i, bool c, float[2] s) => (bool c, float[2] t) {
        t = Concat <axis = 0> (s, s)
      }>
    }"""
    model = ir.from_proto(text_model(text))
    scope = next(iter(scopes(model)))
    body = scope.graph.node(0).attributes["body"].as_graph()
    body.node(0).outputs[0].shape = ir.Shape([4])
    assert Dims(scope).of(body.node(0).outputs[0]) is None


def test_malformed_nodes_say_nothing() -> None:
    dims, values = dims_in(
        "agraph (float[2, 3] x) => (float y) { w = Transpose <perm = [5, 1]> (x)\n y = Relu (w) }"
    )
    assert dims.of(values["w"]) is None


def test_depth_is_no_limit() -> None:
    chain = "\n".join(f"v{i + 1} = Relu (v{i})" for i in range(3000))
    dims, values = dims_in(f"agraph (float[B, S] v0) => (float y) {{ {chain}\n y = Neg (v3000) }}")
    assert dims.of(values["y"]) == (B, S)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_sizes_hold_when_the_model_runs(data: st.DataObject) -> None:
    """A random row of movements: each size, with numbers for its names, is that of the runtime."""
    lines, rank, name = [], 3, "x"
    for step in range(data.draw(st.integers(1, 4))):
        kind, new = data.draw(st.sampled_from(["T", "R", "U", "S", "C", "M"])), f"v{step}"
        axis = data.draw(st.integers(0, rank - 1))
        if kind == "T":
            lines.append(f"{new} = Transpose <perm = {data.draw(st.permutations(range(rank)))}> ({name})")
        elif kind == "R":
            lines.append(f"{new} = Reshape ({name}, open)")
            rank = 1
        elif kind == "U":
            lines.append(f"{new} = Unsqueeze ({name}, zero)")
            rank += 1
        elif kind == "S":
            lines.append(f"{new} = Slice ({name}, zero, one)")
        elif kind == "C":
            lines.append(f"{new} = Concat <axis = {axis}> ({name}, {name})")
        else:
            lines.append(f"{new} = ReduceMax <axes = [{axis}]> ({name})")
        name = new
    result = ", ".join(f"q{axis}" for axis in range(rank))
    nodes = "\n".join([*lines, f"y = Relu ({name})"])
    proto = text_model(f"agraph (float[B, S, 4] x) => (float[{result}] y) <{CONSTANTS}> {{ {nodes} }}")
    model = ir.from_proto(proto)
    scope = next(iter(scopes(model)))
    last = scope.graph.node(-1).outputs[0]
    last.shape = None
    shape = Dims(scope).of(last)
    numbers = {"B": 3, "S": 5}
    (actual,) = execute(proto, random_feeds(proto, sizes=numbers))
    assert shape is not None
    for size, number in zip(shape, actual.shape, strict=True):
        known = isinstance(size, int) or all(n in numbers for names, _ in size.terms for n in names)
        assert not known or value_of(size, numbers) == number
