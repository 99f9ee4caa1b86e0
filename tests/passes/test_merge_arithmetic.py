"""merge-arithmetic against the runtime."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.merge.merge_arithmetic import MergeArithmetic
from tests.support import assert_equivalent, run_pass, text_model


def chain(first: str, second: str, a: str = "a", outputs: str = "float[2,3] y", dtype: str = "float") -> str:
    one, two = ("1, 2, 3", "5, 3, 2") if "int" in dtype else ("1.5, 2.5, 3.5", "0.25, 3, -2")
    return f"""agraph ({dtype}[2,3] x) => ({outputs})
        <{dtype}[3] a = {{{one}}}, {dtype}[3] b = {{{two}}}, {dtype} s = {{2}}, {dtype}[2,1] c = {{7, 5}}> {{
        v = {first} y = {second}
    }}"""


FORMS = ["Add(v, b)", "Add(b, v)", "Sub(v, b)", "Sub(b, v)"]


@pytest.mark.parametrize("first", ["Add(x, a)", "Sub(x, a)", "Sub(a, x)", "Add(s, x)"])
@pytest.mark.parametrize("second", FORMS)
@pytest.mark.parametrize("dtype", ["float", "double", "int64", "int32"])
def test_sums_and_differences_become_one(first: str, second: str, dtype: str) -> None:
    before = text_model(chain(first, second, outputs=f"{dtype}[2,3] y", dtype=dtype))
    done = run_pass(before, MergeArithmetic())
    assert len(done.op_types) == 1
    assert_equivalent(before, done.model, kind="reorder")


@pytest.mark.parametrize("first", ["Mul(x, a)", "Mul(a, x)", "Div(x, a)", "Div(x, s)"])
@pytest.mark.parametrize("second", ["Mul(v, b)", "Mul(b, v)", "Div(v, b)", "Mul(v, s)"])
def test_products_and_quotients_become_one(first: str, second: str) -> None:
    before = text_model(chain(first, second))
    done = run_pass(before, MergeArithmetic())
    assert done.op_types == ["Mul"]
    assert_equivalent(before, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        ("Add(x, a)", "Add(v, c)", "the merged constant would be larger than both"),
        ("Mul(x, tiny)", "Mul(v, tiny)", "the merged constant is no normal number of its type"),
        ("Mul(x, huge)", "Mul(v, huge)", "the merged constant is not finite"),
        ("Div(x, zero)", "Mul(v, a)", "the merged constant is not finite"),
        ("Add(x, magic)", "Sub(v, magic)", "the constants cancel out, which may be there to round"),
    ],
)
def test_what_would_lose_numbers_is_declined(first: str, second: str, reason: str) -> None:
    text = f"""agraph (float[2,3] x) => (float[2,3] y) <float[3] a = {{1, 2, 3}}, float[2,1] c = {{7, 5}},
        float tiny = {{1e-30}}, float huge = {{1e30}}, float zero = {{0}},
        float magic = {{12582912}}> {{ v = {first} y = {second} }}"""
    done = run_pass(text, MergeArithmetic())
    assert (done.changes, done.declined) == (0, (reason,))


def test_a_value_that_others_read_is_kept() -> None:
    done = run_pass(chain("Add(x, a)", "Add(v, b)", outputs="float[2,3] y, float[2,3] v"), MergeArithmetic())
    assert done.declined == ("the value in between is read elsewhere too",)


@pytest.mark.parametrize(
    ("first", "second"), [("Add(x, a)", "Mul(v, b)"), ("Div(a, x)", "Mul(v, b)"), ("Mul(x, a)", "Div(b, v)")]
)
def test_other_chains_stay(first: str, second: str) -> None:
    assert run_pass(chain(first, second), MergeArithmetic()).changes == 0


def test_integers_are_not_scaled_and_an_overridable_constant_stays() -> None:
    assert (
        run_pass(
            chain("Div(x, a)", "Mul(v, b)", outputs="int64[2,3] y", dtype="int64"), MergeArithmetic()
        ).changes
        == 0
    )
    text = "agraph (float[3] x, float[3] a = {1, 2, 3}) => (float[3] y) { v = Add(x, a) y = Add(v, a) }"
    assert run_pass(text, MergeArithmetic()).changes == 0


@pytest.mark.parametrize("body", ["r = Reciprocal(z) y = Mul(x, r)", "r = Div(one, z) y = Mul(r, x)"])
def test_a_product_with_a_reciprocal_is_a_quotient(body: str) -> None:
    before = text_model(
        f"agraph (float[2,3] x, float[2,3] z) => (float[2,3] y) <float one = {{1}}> {{ {body} }}"
    )
    done = run_pass(before, MergeArithmetic())
    assert done.op_types == ["Div"]
    assert_equivalent(before, done.model, kind="reorder")


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(st.sampled_from(["Add", "Sub", "Mul", "Div"]), st.sampled_from("abcs"), st.booleans()),
        min_size=2,
        max_size=6,
    )
)
def test_any_chain_of_arithmetic_with_constants(ops: list[tuple[str, str, bool]]) -> None:
    lines, value = [], "x"
    for i, (op, constant, first) in enumerate(ops):
        operands = (constant, value) if first else (value, constant)
        value = "y" if i == len(ops) - 1 else f"v{i}"
        lines.append(f"{value} = {op}({', '.join(operands)})")
    before = text_model(f"""agraph (float[2,3] x) => (float[2,3] y)
        <float[3] a = {{1.5, 2.5, 3.5}}, float[1,3] b = {{0.25, 3, -2}}, float s = {{2}},
        float[2,1] c = {{7, 5}}> {{
        {" ".join(lines)}
    }}""")
    feeds = {"x": np.array([[1.25, -2.5, 3.75], [0.5, 10.0, -7.0]], np.float32)}
    assert_equivalent(before, run_pass(before, MergeArithmetic()).model, feeds, kind="reorder")
