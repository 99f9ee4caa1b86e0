"""eliminate-pairs against the runtime, on numbers where signs, NaN and infinities show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.eliminate.eliminate_pairs import EliminatePairs
from tests.support import assert_equivalent, execute, run_pass, text_model

ODD = np.array([0.0, -0.0, 0.5, -0.5, 2.5, -3.5, np.inf, -np.inf, np.nan, 1e30, 1e-40, -7], np.float32)
FEEDS = {"x": ODD, "u": ODD[::-1].copy()}
PAIRS = {
    "a = Neg(x) y = Neg(a)": 0,
    "a = Neg(x) y = Abs(a)": 1,
    "a = Abs(x) y = Abs(a)": 1,
    "a = Relu(x) y = Relu(a)": 1,
    "a = Ceil(x) y = Floor(a)": 1,
    "a = Floor(x) y = Round(a)": 1,
    "a = Round(x) y = Ceil(a)": 1,
    "a = Sign(x) y = Sign(a)": 1,
    "a = Neg(u) y = Add(x, a)": 1,
    "a = Neg(u) y = Add(a, x)": 1,
    "a = Neg(u) y = Sub(x, a)": 1,
    "a = Neg(u) b = Neg(x) y = Mul(b, a)": 1,
    "a = Neg(u) b = Neg(x) y = Div(b, a)": 1,
    "y = Sum(x, u)": 1,
    "y = Max(x, x)": 0,
    "y = Min(x, x)": 0,
    "a = Less(x, u) b = Not(a) y = Where(b, x, u)": 2,
    "a = Less(x, u) b = Not(a) c = Not(b) y = Where(c, x, u)": 2,
}


def model(body: str, outputs: str = "float[12] w") -> str:
    """The reciprocal of `y` tells the zeros apart."""
    return f"agraph (float[12] x, float[12] u) => ({outputs}) {{ {body} w = Reciprocal(y) }}"


@pytest.mark.parametrize(("body", "left"), PAIRS.items())
def test_a_pair_becomes_what_one_op_does(body: str, left: int) -> None:
    before = text_model(model(body))
    done = run_pass(before, EliminatePairs())
    assert done.changes
    assert len(done.op_types) == left + 1
    assert_equivalent(before, done.model, FEEDS)


@pytest.mark.parametrize(
    "body",
    [
        "a = Relu(x) y = Abs(a)",
        "a = Neg(x) y = Relu(a)",
        "a = Floor(x) y = Sign(a)",
        "a = Neg(x) b = Neg(u) y = Add(a, b) z = Mul(a, b)",
        "a = Reciprocal(x) y = Reciprocal(a)",
        "y = Sum(x, u, x)",
    ],
)
def test_what_is_no_pair_stays(body: str) -> None:
    done = run_pass(text_model(model(body)), EliminatePairs())
    assert done.changes == 0


def test_a_value_that_others_read_is_kept_and_said() -> None:
    done = run_pass(
        text_model(model("a = Neg(u) y = Add(x, a)", "float[12] w, float[12] a")), EliminatePairs()
    )
    assert done.declined == ("the output of its Neg is also a graph output",)


def test_a_repeat_keeps_the_first_for_its_other_readers() -> None:
    before = text_model(model("a = Abs(x) y = Abs(a) z = Neg(a)", "float[12] w, float[12] z"))
    done = run_pass(before, EliminatePairs())
    assert (done.changes, done.count("Abs")) == (1, 1)
    assert_equivalent(before, done.model, FEEDS)


@pytest.mark.parametrize("dtype", ["int32", "int64", "float16", "double"])
def test_other_types_wrap_and_round_alike(dtype: str) -> None:
    text = f"agraph ({dtype}[3] x, {dtype}[3] u) => ({dtype}[3] y) {{ a = Neg(u) y = Sub(x, a) }}"
    before = text_model(text)
    done = run_pass(before, EliminatePairs())
    assert done.op_types == ["Add"]
    kind = np.dtype(dtype)
    low = np.iinfo(kind).min if kind.kind == "i" else -2
    assert_equivalent(
        before, done.model, {"x": np.array([low, 1, -5], kind), "u": np.array([low, 3, 5], kind)}
    )


def test_integers_that_cannot_be_divided_stay() -> None:
    before = text_model(
        "agraph (int32[2] x, int32[2] y) => (int32[2] z) { a = Neg(x) b = Neg(y) z = Div(a, b) }"
    )
    done = run_pass(before, EliminatePairs())
    assert done.changes == 0
    least = np.iinfo(np.int32).min
    feeds = {"x": np.array([least, 7], np.int32), "y": np.array([-1, -2], np.int32)}
    np.testing.assert_array_equal(execute(done.model, feeds)[0], [least, -3])


def test_bodies_of_control_flow_are_graphs_too() -> None:
    before = text_model("""agraph (float[12] x, bool c) => (float[12] y) {
        y = If (c) <
          then_branch = t () => (float[12] p) { a = Neg(x) p = Neg(a) },
          else_branch = e () => (float[12] q) { b = Abs(x) q = Abs(b) }
        >
    }""")
    done = run_pass(before, EliminatePairs())
    assert (done.count("Neg"), done.count("Abs")) == (2, 1)
    assert "is a graph output whose value comes from outside the graph" in done.declined
    for c in (True, False):
        assert_equivalent(before, done.model, {"x": ODD, "c": np.array(c)})


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(
        st.sampled_from(["Neg", "Abs", "Ceil", "Floor", "Round", "Relu", "Sign"]), min_size=2, max_size=8
    )
)
def test_any_chain_of_them(ops: list[str]) -> None:
    names = ["x", *(f"v{i}" for i in range(len(ops) - 1)), "y"]
    before = text_model(
        model(" ".join(f"{b} = {op}({a})" for op, a, b in zip(ops, names, names[1:], strict=False)))
    )
    assert_equivalent(before, run_pass(before, EliminatePairs()).model, FEEDS)
