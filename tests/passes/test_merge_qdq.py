"""merge-qdq, bit-equal in the runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.passes.merge.merge_qdq import MergeQdq
from tests.support import Rewritten, assert_equivalent, execute, run_pass, text_model

X = {"x": np.linspace(-40, 40, 24, dtype=np.float32).reshape(2, 3, 4)}
CONSTANTS = """<float s = {0.1}, float t = {0.2}, int8 z = {-128}, uint8 u = {0}, int8 m = {3},
    float low = {-100}, float high = {100}, float six = {6}, int64[1] zero = {0}, int64[2] flat = {0, -1},
    int64[1] one = {1}, int64[3] twice = {1, 2, 1}, float[3] sc = {0.1, 0.2, 0.3}, int8[3] zc = {0, 0, 0},
    float sl = {0.01}>"""


def rewritten(body: str, one: MergeQdq | None = None) -> Rewritten:
    """After the pass, whose numbers are those of before."""
    before = text_model(
        f"agraph (float[2,3,4] x) => (float y) {CONSTANTS} {{ {body} y = DequantizeLinear(q, s, z) }}"
    )
    before.graph.output[0].type.tensor_type.ClearField("shape")
    done = run_pass(before, one or MergeQdq())
    assert_equivalent(before, done.model, X)
    return done


def test_a_value_quantized_again_as_it_was_is_the_value() -> None:
    done = rewritten("p = QuantizeLinear(x, s, z) d = DequantizeLinear(p, s, z) q = QuantizeLinear(d, s, z)")
    assert done.op_types == ["QuantizeLinear", "DequantizeLinear"]


@pytest.mark.parametrize(("scale", "zero"), [("t", "z"), ("s", "m")])
def test_another_scale_or_zero_point_stays(scale: str, zero: str) -> None:
    done = rewritten(
        f"p = QuantizeLinear(x, {scale}, {zero}) d = DequantizeLinear(p, {scale}, {zero})"
        "q = QuantizeLinear(d, s, z)"
    )
    assert (done.changes, done.declined) == (0, ("scale or zero point differ",))


def test_another_type_stays() -> None:
    done = rewritten("p = QuantizeLinear(x, s, u) d = DequantizeLinear(p, s, u) q = QuantizeLinear(d, s, z)")
    assert (done.changes, done.declined) == (0, ("the quantized types differ or are unknown",))


def test_a_scale_that_is_computed_stays() -> None:
    done = rewritten("""r = ReduceMax<keepdims=0>(x) p = QuantizeLinear(x, r, z) d = DequantizeLinear(p, r, z)
        e = Abs(r) q = QuantizeLinear(d, e, z)""")
    assert done.declined == ("scale or zero point are computed at run time",)


MOVES = [
    "Transpose<perm=[2,0,1]>(d)",
    "Reshape(d, flat)",
    "Flatten(d)",
    "Unsqueeze(d, zero)",
    "Slice(d, zero, one, one)",
    "Gather<axis=1>(d, one)",
    "Tile(d, twice)",
    "Expand(d, one)",
]


@pytest.mark.parametrize("move", MOVES)
def test_data_moves_while_quantized(move: str) -> None:
    body = f"p = QuantizeLinear(x, s, z) d = DequantizeLinear(p, s, z) v = {move} q = QuantizeLinear(v, s, z)"
    done = rewritten(body)
    assert done.op_types == [
        "QuantizeLinear",
        move[: move.index("<" if "<" in move else "(")],
        "DequantizeLinear",
    ]
    assert rewritten(body, MergeQdq(movement=False)).changes == 0


def test_data_that_moves_across_channels_stays() -> None:
    before = text_model(f"""agraph (int8[2,3,4] p) => (int8 q) {CONSTANTS} {{
        d = DequantizeLinear<axis=1>(p, sc, zc) v = Transpose<perm=[1,0,2]>(d)
        q = QuantizeLinear<axis=1>(v, sc, zc)
    }}""")
    done = run_pass(before, MergeQdq())
    assert done.declined == ("the scale differs by channel, which the data in between moves",)


@pytest.mark.parametrize(
    ("bound", "scale", "zero", "goes"),
    [
        ("Relu(x)", "s", "z", True),
        ("Relu(x)", "s", "m", False),
        ("Relu(x)", "sc", "zc", False),
        ("Clip(x, low, high)", "s", "m", True),
        ("Clip(x, low, six)", "s", "m", False),
        ("Clip(x, , high)", "s", "m", True),
        ("Clip(x)", "s", "m", True),
        ("Clip(x, , six)", "sl", "m", True),
    ],
)
def test_bounds_that_quantizing_has_anyway_go(bound: str, scale: str, zero: str, goes: bool) -> None:
    axis = "<axis=1>" if scale == "sc" else ""
    done = rewritten(f"b = {bound} q = QuantizeLinear{axis}(b, {scale}, {zero})")
    assert (done.changes == 1) is goes


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
@pytest.mark.parametrize("perm", ["", "<perm=[1,2,0]>", "<perm=[0,2,1]>"])
def test_a_weight_is_turned_before_it_is_dequantized(axis: int, perm: str) -> None:
    size = (2, 3, 4)[axis]
    numbers = ", ".join(str(i - 12) for i in range(24))
    scales = ", ".join(str(0.1 * (i + 1)) for i in range(size))
    before = text_model(f"""agraph () => (float y)
        <int8[2,3,4] w = {{{numbers}}}, float[{size}] s = {{{scales}}}> {{
        d = DequantizeLinear<axis={axis}>(w, s) y = Transpose{perm}(d) }}""")
    done = run_pass(before, MergeQdq())
    assert done.op_types == ["Transpose", "DequantizeLinear"]
    assert_equivalent(before, done.model, {})


@pytest.mark.parametrize(
    "body",
    [
        "b = Relu(x) q = QuantizeLinear(b, s, z) o = Neg(b)",
        """p = QuantizeLinear(x, s, z) d = DequantizeLinear(p, s, z) v = Flatten(d) o = Neg(v)
        q = QuantizeLinear(v, s, z)""",
    ],
)
def test_a_value_that_others_read_stays(body: str) -> None:
    text = f"agraph (float[2,3,4] x) => (int8 q, float o) {CONSTANTS} {{ {body} }}"
    done = run_pass(text, MergeQdq())
    assert done.declined == ("the value in between is read elsewhere too",)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.sampled_from(["Relu", "Flatten", "Transpose", "QDQ", "QDQ2"]), min_size=1, max_size=7))
def test_any_chain(ops: list[str]) -> None:
    lines, value = [], "x"
    for i, op in enumerate([*ops, "QDQ"]):
        scale, zero = ("s", "z") if op == "QDQ" else ("t", "m")
        if op.startswith("QDQ"):
            lines.append(f"q{i} = QuantizeLinear({value}, {scale}, {zero})")
            lines.append(f"v{i} = DequantizeLinear(q{i}, {scale}, {zero})")
        else:
            lines.append(f"v{i} = {op}({value})")
        value = f"v{i}"
    before = text_model(
        f"agraph (float[2,3,4] x) => (float y) {CONSTANTS} {{ {' '.join(lines)} y = Neg({value}) }}"
    )
    before.graph.output[0].type.tensor_type.ClearField("shape")
    done = run_pass(before, MergeQdq())
    np.testing.assert_array_equal(execute(before, X)[0], execute(done.model, X)[0])


@pytest.mark.parametrize(
    ("scale", "bound", "declined"),
    [
        (0.1, "Clip(x, edge, high)", ()),
        (-0.1, "Relu(x)", ("a scale is not positive",)),
    ],
)
def test_bounds_that_round_to_the_last_numbers_go(scale: float, bound: str, declined: tuple[str]) -> None:
    before = text_model(f"""agraph (float[2,3,4] x) => (int8[2,3,4] q) <float n = {{{scale}}},
        int8 z = {{-128}}, float edge = {{0.02}}, float high = {{25.48}}> {{
            r = {bound}
            q = QuantizeLinear(r, n, z)
        }}""")
    done = run_pass(before, MergeQdq())
    assert (len(done.op_types), done.declined) == (1 + len(declined), declined)
    assert_equivalent(before, done.model, X)


@pytest.mark.parametrize(
    ("kind", "between", "scale", "reason"),
    [
        ("int8", "float16", 0.0371, None),
        ("int16", "float32", 0.0371, None),
        ("int16", "float16", 0.0371, "the type in between is not known to hold what is quantized"),
        ("int8", "float16", 1000.0, "a scale is not positive, or takes the numbers out of range"),
        ("int8", "float32", 0.0, "a scale is not positive, or takes the numbers out of range"),
    ],
)
def test_each_number_survives_the_type_in_between(
    kind: str, between: str, scale: float, reason: str | None
) -> None:
    info = np.iinfo(kind)
    every = np.arange(info.min, info.max + 1).astype(kind)
    nodes = [
        helper.make_node("Transpose", ["x"], ["p"]),
        helper.make_node("DequantizeLinear", ["p", "s", "z"], ["d"]),
        helper.make_node("QuantizeLinear", ["d", "s", "z"], ["q"]),
    ]
    value = helper.make_tensor_value_info("x", helper.np_dtype_to_tensor_dtype(every.dtype), every.shape)
    result = helper.make_tensor_value_info("q", helper.np_dtype_to_tensor_dtype(every.dtype), every.shape)
    constants = [
        numpy_helper.from_array(np.array(scale, between), "s"),
        numpy_helper.from_array(every[:1] * 0, "z"),
    ]
    constants[1].dims[:] = []
    graph = helper.make_graph(nodes, "g", [value], [result], constants)
    before = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    done = run_pass(before, MergeQdq())
    assert (done.changes, done.declined) == ((1, ()) if reason is None else (0, (reason,)))
    assert_equivalent(before, done.model, {"x": every})


def test_four_bits_are_not_moved() -> None:
    done = run_pass(
        """<ir_version: 10, opset_import: ["" : 21]>
        agraph (float[2,3] x) => (float[3,2] y) <float s = {0.1}, int4 z = {0}, int4[2,3] p, int4[3,2] q> {
            p = QuantizeLinear(x, s, z)
            d = DequantizeLinear(p, s, z)
            m = Transpose(d)
            q = QuantizeLinear(m, s, z)
            y = DequantizeLinear(q, s, z)
        }""",
        MergeQdq(),
    )
    assert done.declined == ("runtimes do not move data of this quantized type",)


def test_a_type_that_is_not_known_is_not_guessed() -> None:
    body = "d = DequantizeLinear(p, s) q = QuantizeLinear(d, s)"
    before = text_model(f"""<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (int8[3] p, float s) => (uint8[3] q) {{ q = my.Twice(p, s) }}
        <domain: "my", opset_import: ["" : 17]> Twice (p, s) => (q) {{ {body} }}""")
    done = run_pass(before, MergeQdq())
    assert done.declined == ("the quantized types differ or are unknown",)


@pytest.mark.parametrize(("opset", "shape", "changes"), [(12, "[2,3]", 1), (17, "[2,3]", 1), (17, "", 0)])
def test_a_scale_of_one_element_has_no_axis_before_opset_13(opset: int, shape: str, changes: int) -> None:
    numbers = "{1, 2, 3, 4, 5, 6}" if shape else "{7}"
    before = text_model(f"""<ir_version: 7, opset_import: ["" : {opset}]>
        agraph () => (float{"[3,2]" if shape else ""} y)
        <uint8{shape} w = {numbers}, float[1] s = {{0.5}}, uint8[1] z = {{0}}> {{
            d = DequantizeLinear(w, s, z)
            y = Transpose(d)
        }}""")
    done = run_pass(before, MergeQdq())
    assert done.changes == changes
    assert_equivalent(before, done.model, {})
