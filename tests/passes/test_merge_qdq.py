"""merge-qdq, bit-equal in the runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.merge_qdq import MergeQdq
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
