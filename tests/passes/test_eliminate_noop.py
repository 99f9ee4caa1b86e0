"""eliminate-noop: what is removed hands its input on for every input; all else stays."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.helper as oh
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.ledger import Ledger
from onnxopt.passes.eliminate.eliminate_noop import EliminateNoop
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

BIG = 2**63 - 1

REMOVED = [
    "t = Mul(x, one)",
    "t = Mul(one, x)",
    "t = Div(x, one)",
    "t = Add(x, zero)",
    "t = Add(zero, x)",
    "t = Sub(x, zero)",
    "t = Pow(x, one)",
    "t = Mul(x, ones3)",
    "t = Mul(x, ones11)",
    "t = Cast<to = 1>(x)",
    "t = CastLike(x, one)",
    "t = Transpose<perm = [0, 1]>(x)",
    "t = Reshape(x, shape)",
    "t = Reshape(x, copy)",
    "t = Reshape(x, rest)",
    "t = Expand(x, expand)",
    "t = Flatten<axis = 1>(x)",
    "t = Flatten<axis = -1>(x)",
    "t = Flatten(x)",
    "t = Squeeze(x)",
    "t = Unsqueeze(x, none)",
    "t = Slice(x, zeros2, ends)",
    "t = Slice(x, minus2, ends)",
    "t = Slice(x, zeros2, most, axes, steps)",
    "t = Pad(x, zeros4)",
    't = Pad<mode = "reflect">(x, zeros4)',
    "t = Concat<axis = 0>(x)",
    "t = Sum(x)",
    "t = Max(x)",
    "t = Min(x)",
    "t = Mean(x)",
    "t = Split<axis = 1>(x)",
]
KEPT = [
    "t = Mul(x, two)",
    "t = Div(one, x)",
    "t = Sub(zero, x)",
    "t = Pow(one, x)",
    "t = Add(x, one)",
    "t = Mul(x, mixed)",
    "t = Mul(x, x)",
    "u = Mul(x, ones111)\n t = Squeeze(u, first)",
    "u = Cast<to = 11>(x)\n t = Cast<to = 1>(u)",
    "u = Transpose(x)\n t = Transpose(u)",
    "u = Flatten<axis = 0>(x)\n t = Reshape(u, shape)",
    "u = Unsqueeze(x, first)\n t = Squeeze(u)",
    "u = Expand(x, higher)\n t = Squeeze(u, first)",
    "t = Slice(x, zeros2, ends, axes, minus1)",
    "u = Slice(x, zeros2, short)\n t = Expand(u, expand23)",
    "t = Pad(x, mirror)",
    "t = Concat<axis = 0>(x, zeros03)",
    "u = Reshape(x, flat)\n t = Reshape(u, shape)",
]


def model_of(body: str) -> onnx.ModelProto:
    return text_model(
        f"""<ir_version: 10, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[2, 3] y) <
            float one = {{1}}, float two = {{2}}, float zero = {{0}}, float[3] ones3 = {{1, 1, 1}},
            float[1, 1] ones11 = {{1}}, float[1, 1, 1] ones111 = {{1}}, float[3] mixed = {{1, 2, 1}},
            float[0, 3] zeros03 = {{}}, int64[2] shape = {{2, 3}}, int64[2] copy = {{0, 0}},
            int64[2] rest = {{-1, 3}}, int64[1] flat = {{-1}}, int64[2] expand = {{1, 3}},
            int64[2] expand23 = {{2, 3}}, int64[3] higher = {{1, 1, 1}}, int64[0] none = {{}},
            int64[1] first = {{0}}, int64[2] zeros2 = {{0, 0}}, int64[2] minus2 = {{-2, -3}},
            int64[2] ends = {{2, 3}}, int64[2] short = {{1, 3}}, int64[2] most = {{{BIG}, {BIG}}},
            int64[2] axes = {{0, -1}}, int64[2] steps = {{1, 1}}, int64[2] minus1 = {{-1, -1}},
            int64[4] zeros4 = {{0, 0, 0, 0}}, int64[4] mirror = {{1, 0, -1, 0}}> {{
            {body}
            y = Neg(t)
        }}"""
    )


@pytest.mark.parametrize("body", REMOVED)
def test_removed(body: str) -> None:
    proto = model_of(body)
    result = run_pass(proto, EliminateNoop())
    assert result.op_types == ["Neg"]
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize("body", KEPT)
def test_kept(body: str) -> None:
    proto = model_of(body)
    result = run_pass(proto, EliminateNoop())
    assert result.changes == 0
    assert result.op_types == [node.op_type for node in proto.graph.node]


LOGIC = [("And", 1, 1), ("Or", 0, 1), ("And", 0, 0), ("Or", 1, 0)]


@pytest.mark.parametrize(("op", "constant", "changes"), LOGIC)
@pytest.mark.parametrize("order", ["x, k", "k, x"])
def test_logic(op: str, constant: int, changes: int, order: str) -> None:
    proto = text_model(
        f"g (bool[3] x) => (bool[3] y) <bool[1] k = {{{constant}}}> {{ t = {op}({order})\n y = Not(t) }}"
    )
    result = run_pass(proto, EliminateNoop())
    assert result.changes == changes
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(
    ("node", "changes"),
    [
        ("t = Mul(x, one)", 1),
        ("t = Mul(x, ones1)", 1),
        ("t = Mul(x, ones3)", 0),
        ("t = Reshape(x, same)", 1),
        ("t = Reshape(x, fixed)", 0),
        ("t = Slice(x, zero1, most)", 1),
        ("t = Slice(x, zero1, three)", 0),
        ("t = Squeeze(x)", 0),
        ("t = Transpose(x)", 0),
        ("t = Transpose<perm = [0, 1]>(x)", 1),
    ],
)
def test_unknown_sizes_are_different(node: str, changes: int) -> None:
    """N may be 1 when the model runs: a constant of three would enlarge it then."""
    proto = text_model(
        f"""g (float[N, N] x) => (float[?, ?] y) <
            float one = {{1}}, float[1] ones1 = {{1}}, float[3] ones3 = {{1, 1, 1}},
            int64[2] same = {{0, -1}}, int64[2] fixed = {{3, 3}},
            int64[1] zero1 = {{0}}, int64[1] most = {{{BIG}}}, int64[1] three = {{3}}> {{
            {node}
            y = Neg(t)
        }}"""
    )
    result = run_pass(proto, EliminateNoop())
    assert result.changes == changes
    if "Squeeze" not in node:
        assert_equivalent(proto, result.model, random_feeds(proto, sizes={"N": 3}))


def test_a_constant_of_higher_rank_enlarges() -> None:
    proto = text_model(
        "g (float[3] x) => (float[1, 3] y) <float[1, 1] k = {1}> { t = Mul(x, k)\n y = Neg(t) }"
    )
    result = run_pass(proto, EliminateNoop())
    assert result.changes == 0
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize("factor", ["x", "k"])
def test_a_constant_that_can_be_overridden_is_declined(factor: str) -> None:
    proto = text_model(
        f"g (float[3] x, float[1] k) => (float[?] y) <float[1] k = {{1}}>"
        f"{{ t = Mul({factor}, k)\n y = Neg(t) }}"
    )
    result = run_pass(proto, EliminateNoop())
    assert result.changes == 0
    assert result.declined == ("the constant is a graph input (overridable; --freeze-initializers fixes it)",)


def test_the_overridable_value_itself_may_pass_through() -> None:
    proto = text_model(
        """g (float[3] k) => (float[3] y) <float[3] k = {1, 1, 1}, float[1] z = {0}> {
            t = Add(k, z)
            y = Neg(t)
        }"""
    )
    assert run_pass(proto, EliminateNoop()).changes == 1


@pytest.mark.parametrize(("dtype", "changes"), [("float", 1), ("double", 1), ("int64", 0), ("int32", 0)])
def test_powers_of_integers_stay(dtype: str, changes: int) -> None:
    proto = text_model(
        f"g ({dtype}[3] x) => ({dtype}[3] y) <float k = {{1}}> {{ t = Pow(x, k)\n y = Abs(t) }}"
    )
    assert run_pass(proto, EliminateNoop()).changes == changes


OLD = [
    (11, "t = Squeeze<axes = [0]>(x)", 0),
    (11, "t = Unsqueeze<axes = [0]>(x)", 0),
    (9, "t = Slice<starts = [0, 0], ends = [2, 3]>(x)", 1),
    (9, "t = Slice<starts = [0], ends = [9], axes = [1]>(x)", 1),
    (9, "t = Slice<starts = [0], ends = [2], axes = [1]>(x)", 0),
    (10, "t = Pad<pads = [0, 0, 0, 0]>(x)", 1),
    (10, "t = Pad<pads = [0, 0, 0, 1]>(x)", 0),
]


@pytest.mark.parametrize(("opset", "node", "changes"), OLD)
def test_older_opsets_take_attributes(opset: int, node: str, changes: int) -> None:
    proto = onnx.parser.parse_model(
        f"""<ir_version: 5, opset_import: ["" : {opset}]>
        g (float[2, 3] x) => (float[2, 3] y) {{ {node}\n y = Neg(t) }}"""
    )
    result = run_pass(proto, EliminateNoop())
    assert result.changes == changes
    if changes:
        assert_equivalent(proto, result.model)


def test_references_to_function_attributes_are_unknown() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[2, 3] x) => (float[3, 2] y) { y = d.f<order = [1, 0]>(x) }
        <domain: "d", opset_import: ["" : 17]> f <order> (a) => (b) {
            k = Constant<value_float = 1.0>()
            s = Mul(a, k)
            t = Transpose<perm: ints = @order>(s)
            b = Neg(t)
        }"""
    )
    result = run_pass(proto, EliminateNoop())
    assert result.count("Mul") == 0
    assert result.count("Transpose") == 1
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(
    ("nodes", "left"),
    [
        ("t = Resize(x, , ones)", 0),
        ('t = Resize<mode = "linear", coordinate_transformation_mode = "align_corners">(x, roi, ones)', 0),
        ("t = Resize(x, , , same)", 0),
        ("t = Resize(x, , twice)", 1),
        ("t = Resize(x, , , larger)", 1),
        ('t = Resize<mode = "cubic">(x, , ones)', 1),
        ('t = Resize<coordinate_transformation_mode = "tf_crop_and_resize">(x, roi, ones)', 1),
        ("t = Tile(x, once)", 0),
        ("t = Tile(x, repeats)", 1),
        ("t = DepthToSpace<blocksize = 1>(x)", 0),
        ("t = SpaceToDepth<blocksize = 1>(x)", 0),
        ("t = SpaceToDepth<blocksize = 2>(x)", 1),
    ],
)
def test_resize_tile_and_blocks(nodes: str, left: int) -> None:
    proto = text_model(
        f"""g (float[1, 2, 4, 6] x) => (float[a, b, c, d] y)
          <float[4] ones = {{1, 1, 1, 1}}, float[4] twice = {{1, 1, 2, 2}},
           float[8] roi = {{0, 0, 0, 0, 1, 1, 0.5, 1}}, int64[4] same = {{1, 2, 4, 6}},
           int64[4] larger = {{1, 2, 8, 6}}, int64[4] once = {{1, 1, 1, 1}},
           int64[4] repeats = {{1, 2, 1, 1}}> {{ {nodes}
            y = Neg(t) }}"""
    )
    result = run_pass(proto, EliminateNoop())
    assert len(result.op_types) == 1 + left
    assert_equivalent(proto, result.model)


def test_graph_outputs_and_bodies() -> None:
    proto = text_model(
        """g (float[3] x, bool c) => (float[3] y, float[3] z) <float one = {1}> {
            n = Neg(x)
            y = Mul(n, one)
            z = If(c) <then_branch = t () => (float[3] p) { p = Mul(n, one) },
                       else_branch = e () => (float[3] q) { u = Div(n, one)\n q = Exp(u) }>
        }"""
    )
    result = run_pass(proto, EliminateNoop())
    assert result.op_types == ["Neg", "If", "Mul", "Exp"]
    assert result.declined == ("is a graph output whose value comes from outside the graph",)
    x = np.array([1, -2, 3], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


@st.composite
def binary(draw: st.DrawFn) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One operator between an input of known or named sizes and a constant of ones, zeros or a mix."""
    op = draw(st.sampled_from(["Add", "Sub", "Mul", "Div", "Pow"]))
    sizes = draw(st.lists(st.integers(1, 3), max_size=3))
    named = draw(st.lists(st.booleans(), min_size=len(sizes), max_size=len(sizes)))
    shape = draw(st.lists(st.sampled_from([1, *sizes]), max_size=4))
    constant = np.full(shape, draw(st.sampled_from([0.0, 1.0, -0.0, 2.0])), np.float32)
    try:
        np.broadcast_shapes(tuple(sizes), tuple(shape))
    except ValueError:
        shape = []
        constant = np.ones((), np.float32)
    declared = [f"N{i}" if name else size for i, (size, name) in enumerate(zip(sizes, named, strict=True))]
    inputs = ["x", "k"] if draw(st.booleans()) else ["k", "x"]
    graph = oh.make_graph(
        [oh.make_node(op, inputs, ["t"]), oh.make_node("Neg", ["t"], ["y"])],
        "g",
        [oh.make_tensor_value_info("x", onnx.TensorProto.FLOAT, declared)],
        [oh.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        [onnx.numpy_helper.from_array(constant, "k")],
    )
    model = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=10)
    data = np.random.default_rng(0).uniform(0.5, 2, sizes).astype(np.float32)
    return model, {"x": data}


@given(binary())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_constant_of_any_shape(case: tuple[onnx.ModelProto, dict[str, np.ndarray]]) -> None:
    proto, feeds = case
    assert_equivalent(proto, run_pass(proto, EliminateNoop()).model, feeds)


@pytest.mark.parametrize(
    "nodes", ["t = Expand(x, square)", "t = Expand(x, number)", "t = Slice(x, one, one, nine)"]
)
def test_lists_that_are_none_are_left_to_the_runtime(nodes: str) -> None:
    text = f"""g (float[4] x) => (float[?] y) <int64[1,1] square = {{4}}, int64 number = {{4}},
        int64[1] one = {{1}}, int64[1] nine = {{9}}> {{ {nodes} y = Neg(t) }}"""
    model = ir.from_proto(text_model(text))
    ledger = Ledger()
    EliminateNoop().apply(model, ledger)
    assert not ledger.granted
