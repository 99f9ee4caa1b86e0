"""Random graphs with branches, functions, duplicates and dead ends: each clean-up pass keeps every bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.claims import Pass
from onnxopt.model import opener
from onnxopt.passes.dedupe_initializers import DedupeInitializers
from onnxopt.passes.eliminate.eliminate_common_subexpressions import EliminateCommonSubexpressions
from onnxopt.passes.eliminate.eliminate_dead import EliminateDead
from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from onnxopt.passes.eliminate.eliminate_noop import EliminateNoop
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.inline_functions import InlineFunctions
from onnxopt.passes.lift_constants import LiftConstants
from onnxopt.pipeline import Pipeline
from onnxopt.structure import signature_of
from tests.support import assert_equivalent, run_pass, text_model

PASSES: tuple[Pass, ...] = (
    InlineFunctions(),
    LiftConstants(),
    InferShapes(),
    EliminateIdentity(),
    EliminateNoop(),
    EliminateCommonSubexpressions(),
    DedupeInitializers(),
    EliminateDead(),
)
STEPS = [
    *("Tanh({a})", "Neg({a})", "Identity({a})", "Dropout({a})", "Cast<to = 1>({a})", "Slice({a}, i0, i3)"),
    *("Add({a}, {b})", "Sub({a}, {b})", "Max({a}, {b})", "Mul({a}, one)", "Add(zero, {a})", "Mul({a}, ones)"),
    *("d.f<alpha = 0.5>({a}, {b})", "LeakyRelu({a})", "LeakyRelu<alpha = 0.01>({a})", "constant", "if"),
]
FEEDS = [
    {"x": np.array([1, -2, 3], np.float32), "w": np.array([0.5, 0.5, -1], np.float32), "c": np.array(c)}
    for c in (True, False)
]


@st.composite
def block(draw: st.DrawFn, seen: list[str], prefix: str, depth: int) -> list[tuple[str, str]]:
    """Assignments (name, expression) that read what was seen before."""
    lines: list[tuple[str, str]] = []
    for number in range(draw(st.integers(1, 7 - 2 * depth))):
        name, known = f"{prefix}{number}", [*seen, *(line[0] for line in lines)]
        step = draw(st.sampled_from(STEPS if depth < 2 else STEPS[:-1]))
        a, b = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if step == "constant":
            value = draw(st.sampled_from([0.0, 1.0, 2.0]))
            lines.append((f"{name}k", f"Constant<value = float[3] {{{value}, {value}, 1.0}}>()"))
            expression = f"Add({a}, {name}k)"
        elif step == "if":
            branches = []
            for branch in "te":
                inner = draw(block(known, f"{name}{branch}", depth + 1))
                body = "\n".join(f"{left} = {right}" for left, right in inner)
                branches.append(f"b{branch} () => (float[3] {inner[-1][0]}) {{ {body} }}")
            expression = f"If(c) <then_branch = {branches[0]}, else_branch = {branches[1]}>"
        else:
            expression = step.format(a=a, b=b)
        lines.append((name, expression))
    return lines


@st.composite
def program(draw: st.DrawFn) -> str:
    """A model as text: some of the values become graph outputs, the others may be dead."""
    lines = draw(block(["x", "w", "u", "v"], "n", 0))
    names = [name for name, _ in lines]
    outputs = draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
    ports = ", ".join(f"float[3] {name}" for name in outputs)
    body = "\n".join(f"{name} = {expression}" for name, expression in lines)
    return f"""<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x, float[3] w, bool c) => ({ports})
        <float[3] u = {{1, 2, 3}}, float[3] v = {{1, 2, 3}}, float one = {{1}}, float[1] zero = {{0}},
         float[3] ones = {{1, 1, 1}}, int64[1] i0 = {{0}}, int64[1] i3 = {{3}}> {{ {body} }}
        <domain: "d", opset_import: ["" : 17]> f <alpha> (a, b) => (p) {{
            s = LeakyRelu<alpha: float = @alpha>(a)
            t = Identity(s)
            p = Add(t, b)
        }}"""


@pytest.mark.parametrize("one", PASSES, ids=lambda one: one.name)
@given(text=program())
@settings(max_examples=25, deadline=None, derandomize=True)
def test_each_pass(one: Pass, text: str) -> None:
    assert_equivalent(text_model(text), run_pass(text, one).model, FEEDS)


@given(text=program(), limit=st.integers(0, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_all_together_and_after_each_rewrite(text: str, limit: int) -> None:
    proto = text_model(text)
    source = proto.SerializeToString()
    before = signature_of(opener(source)())
    for stop_after in (None, limit):
        outcome = Pipeline(PASSES).run(opener(source), stop_after=stop_after)
        assert outcome.settled
        assert outcome.left_out == ()
        assert signature_of(outcome.model) == before
        assert_equivalent(proto, outcome.model, FEEDS)
