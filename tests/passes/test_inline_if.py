"""inline-if: the branch that is taken, in the place of the If, with names that clash with nothing."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.claims import Pass
from onnxopt.graph import nodes
from onnxopt.model import load, opener
from onnxopt.passes.eliminate.eliminate_identity import EliminateIdentity
from onnxopt.passes.fold.fold_constants import FoldConstants
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.inline_if import InlineIf
from onnxopt.pipeline import Outcome, Pipeline
from tests.support import Rewritten, assert_equivalent, execute, run_pass, text_model

OVERRIDABLE = (
    "the condition is an initializer that is also a graph input (overridable; --freeze-initializers fixes it)"
)
SETTLE: tuple[Pass, ...] = (InferShapes(), FoldConstants(), InlineIf(), EliminateIdentity())


def inlined(text: str) -> tuple[onnx.ModelProto, Rewritten]:
    """A model before and after the pass; the runtime gives the same numbers for both."""
    proto, result = text_model(text), run_pass(text, InlineIf())
    x, names = np.array([1, -2, 3], np.float32), {value.name for value in proto.graph.input}
    for c in (True, False):
        feeds = {"x": x, "c": np.array(c)}
        assert_equivalent(proto, result.model, {n: v for n, v in feeds.items() if n in names})
    return proto, result


def settled(proto: onnx.ModelProto) -> Outcome:
    return Pipeline(SETTLE).run(opener(proto))


def op_types(result: Outcome) -> list[str]:
    return [node.op_type for node in nodes(result.model)]


@pytest.mark.parametrize("yes", [0, 1])
@pytest.mark.parametrize("shape", ["bool", "bool[1]"])
def test_a_constant_condition(yes: int, shape: str) -> None:
    _, result = inlined(
        f"""g (float[3] x) => (float[3] y) <{shape} c = {{{yes}}}> {{
            a = Neg(x)
            b = If(c) <then_branch = p () => (float[3] t) {{ s = Exp(a)\n t = Sin(s) }},
                       else_branch = q () => (float[3] e) {{ e = Abs(x) }}>
            y = Cos(b)
        }}"""
    )
    assert result.op_types == (["Neg", "Exp", "Sin", "Cos"] if yes else ["Neg", "Abs", "Cos"])
    assert result.model.graph[-2].outputs[0].name == "b"


def test_initializers_of_the_branch() -> None:
    """One of them is its output, and then a graph output."""
    _, result = inlined(
        """g (float[3] x) => (float[3] y, float[3] z, float[3] v) {
            c = Constant<value = bool {1}>()
            y, z, u = If(c) <
                then_branch = p () => (float[3] w, float[3] t, float[3] s)
                    <float[3] w = {4, 5, 6}, float[3] s = {1, 2, 3}, float[3] k = {7, 8, 9}> {
                        t = Add(x, k) },
                else_branch = q () => (float[3] e, float[3] f, float[3] h) {
                    e = Neg(x)\n f = Abs(x)\n h = Exp(x) }>
            v = Mul(u, x)
        }"""
    )
    assert result.count("If") == 0
    assert [value.name for value in result.model.graph.outputs] == ["y", "z", "v"]
    assert list(result.model.graph.initializers) == ["k"]


def test_constants_of_the_branch_below_ir_version_4() -> None:
    _, result = inlined(
        """<ir_version: 3, opset_import: ["" : 9]>
        g (float[3] x) => (float[3] y) {
            c = Constant<value = bool {1}>()
            y = If(c) <
                then_branch = p () => (float[3] t) {
                    w = Constant<value = float[3] {1, 2, 3}>()\n t = Mul(x, w) },
                else_branch = q () => (float[3] e) { e = Neg(x) }>
        }"""
    )
    assert result.op_types == ["Constant", "Mul"]


@pytest.mark.parametrize("outputs", ["p1 p2", "p2 p1", "p1 p1", "w w"])
def test_outputs_that_are_outer_values_or_the_same_twice(outputs: str) -> None:
    """The runtime gives nothing for the second of two equal outputs of a branch."""
    first, second = outputs.split()
    result = run_pass(
        f"""g (float[3] x) => (float[3] y, float[3] z, float[3] r) <bool c = {{1}}> {{
            r = Neg(x)
            y, z = If(c) <
                then_branch = p () => (float[3] {first}, float[3] {second}) <float[3] w = {{4, 5, 6}}> {{
                    p1 = Identity(r)\n p2 = Identity(x) }},
                else_branch = q () => (float[3] e, float[3] e) {{ e = Neg(x) }}>
        }}""",
        InlineIf(),
    )
    x = np.array([1, -2, 3], np.float32)
    values = {"p1": -x, "p2": x, "w": np.array([4, 5, 6], np.float32)}
    assert result.count("If") == 0
    assert [value.name for value in result.model.graph.outputs] == ["y", "z", "r"]
    np.testing.assert_array_equal(execute(result.model, {"x": x}), [values[first], values[second], -x])


def test_names_that_clash_with_those_around_beside_and_after() -> None:
    _, result = inlined(
        """g (float[3] x, bool c) => (float[3] y, float[3] v) <bool yes = {1}> {
            [first] a = If(yes) <
                then_branch = p () => (float[3] o) <float[3] w = {1, 2, 3}> {
                    [n] s = Add(x, w)\n [m] o = Exp(s) },
                else_branch = q () => (float[3] o) <float[3] w = {4, 5, 6}> {
                    [n] s = Mul(x, w)\n o = Neg(s) }>
            [second] b = If(c) <
                then_branch = p () => (float[3] o) <float[3] w = {7, 8, 9}> {
                    [n] s = Sub(x, w)\n o = Sin(s) },
                else_branch = q () => (float[3] o) { [k] s = Abs(x)\n [m] o = Cos(s) }>
            y = Add(a, b)
            [n] u = Neg(y)
            v = Abs(u)
        }"""
    )
    assert [node.name for node in result.model.graph][:2] == ["first/n", "first/m"]
    names = [node.name for node in nodes(result.model)]
    assert names.count("n") == 2  # the branch of the second If and the node after it, as they were
    assert len(result.model.graph.initializers) == 2


def test_nested_ifs_with_captures() -> None:
    _, result = inlined(
        """g (float[3] x, bool c) => (float[3] y) <bool yes = {1}, bool no = {0}> {
            a = Neg(x)
            y = If(yes) <
                then_branch = p () => (float[3] t) {
                    b = Exp(a)
                    d = If(c) <then_branch = p2 () => (float[3] u) {
                                   u = If(no) <then_branch = p3 () => (float[3] i) { i = Sin(b) },
                                               else_branch = q3 () => (float[3] j) {
                                                   k = Add(b, a)\n j = Cos(k) }> },
                               else_branch = q2 () => (float[3] v) { v = Identity(b) }>
                    t = Sub(d, b) },
                else_branch = q () => (float[3] e) { e = Abs(x) }>
        }"""
    )
    assert result.op_types == ["Neg", "Exp", "If", "Add", "Cos", "Identity", "Sub"]
    assert result.changes == 2


def test_the_condition_of_an_if_around_it() -> None:
    """Within a branch the condition is known, also further in, and not beside it."""
    _, result = inlined(
        """g (float[3] x, bool c) => (float[3] y, float[3] z) {
            y = If(c) <
                then_branch = p () => (float[3] t) {
                    t = If(c) <then_branch = p2 () => (float[3] u) { u = Sin(x) },
                               else_branch = q2 () => (float[3] v) { v = Cos(x) }> },
                else_branch = q () => (float[3] e) {
                    e = If(c) <then_branch = p3 () => (float[3] i) { i = Tan(x) },
                               else_branch = q3 () => (float[3] j) { j = Exp(x) }> }>
            z = If(c) <then_branch = p4 () => (float[3] k) { k = Abs(x) },
                       else_branch = q4 () => (float[3] l) { l = Neg(x) }>
        }"""
    )
    assert result.op_types == ["If", "Sin", "Exp", "If", "Abs", "Neg"]


@pytest.mark.parametrize(
    ("first", "second", "equal"),
    [
        ("s = Neg(x)\n t = Exp(s)", "r = Neg(x)\n t = Exp(r)", True),
        ("t = LeakyRelu<alpha = 0.5>(x)", "t = LeakyRelu<alpha = 0.5>(x)", True),
        ("t = LeakyRelu<alpha = 0.5>(x)", "t = LeakyRelu<alpha = 0.25>(x)", False),
        ("t = LeakyRelu<alpha = 0.01>(x)", "t = LeakyRelu(x)", False),
        ("s = Neg(x)\n t = Sub(s, x)", "s = Neg(x)\n t = Sub(x, s)", False),
        ("s = Neg(x)\n t = Exp(x)", "s = Neg(x)\n t = Exp(s)", False),
        ("t = Neg(x)", "s = Neg(x)\n t = Exp(s)", False),
    ],
)
def test_equal_branches(first: str, second: str, equal: bool) -> None:
    _, result = inlined(
        f"""g (float[3] x, bool c) => (float[3] y) {{
            y = If(c) <then_branch = p () => (float[3] t) {{ {first} }},
                       else_branch = q () => (float[3] t) {{ {second} }}>
        }}"""
    )
    assert (result.count("If") == 0) == equal


def test_branches_with_weights_of_the_same_name_are_not_equal() -> None:
    _, result = inlined(
        """g (float[3] x, bool c) => (float[3] y) {
            y = If(c) <
                then_branch = p () => (float[3] o) <float[3] w = {1, 2, 3}> { o = Add(x, w) },
                else_branch = q () => (float[3] o) <float[3] w = {4, 5, 6}> { o = Add(x, w) }>
        }"""
    )
    assert result.changes == 0


def test_an_overridable_condition_is_declined() -> None:
    _, result = inlined(
        """g (float[3] x, bool k) => (float[3] y) <bool k = {1}> {
            y = If(k) <then_branch = p () => (float[3] t) { t = Exp(x) },
                       else_branch = q () => (float[3] e) { e = Abs(x) }>
        }"""
    )
    assert (result.changes, result.declined) == (0, (OVERRIDABLE,))


def test_in_functions_and_loops() -> None:
    _, result = inlined(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x) => (float[3] y) <int64 three = {3}, bool yes = {1}> {
            a = d.f<slope = 0.5>(x)
            y = Loop(three, yes, a) <body = trip (int64 i, bool go, float[3] s) => (bool on, float[3] n) {
                on = Identity(go)
                n = If(yes) <then_branch = p () => (float[3] t) { o = Neg(s)\n t = Add(o, a) },
                             else_branch = q () => (float[3] e) { o = Exp(s)\n e = Abs(o) }> }>
        }
        <domain: "d", opset_import: ["" : 17]> f <slope> (a) => (b) {
            c = Constant<value = bool {0}>()
            b = If(c) <
                then_branch = p () => (float[3] t) { t = Exp(a) },
                else_branch = q () => (float[3] e) <float[3] w = {1, 2, 3}> {
                    o = LeakyRelu<alpha: float = @slope>(a)\n e = Mul(o, w) }>
        }"""
    )
    assert result.count("If") == 0
    assert [value.name for value in result.model.graph.outputs] == ["y"]


def test_a_branch_that_the_caller_gives_stays() -> None:
    """Neither the runtime nor the checker take such a function, but it can be written."""
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x) => (float[3] y) { y = d.f(x) }
        <domain: "d", opset_import: ["" : 17]> f <body> (a) => (b) {
            c = Constant<value = bool {0}>()
            b = If<then_branch: graph = @body, else_branch: graph = @body>(c)
        }"""
    )
    model = load(proto)
    assert not InlineIf()(model).modified


@pytest.mark.parametrize(("rank", "op_type"), [("[N, 3]", "Exp"), ("[N, 3, 1]", "Neg")])
def test_a_condition_on_the_rank(rank: str, op_type: str) -> None:
    proto = text_model(
        f"""g (float{rank} x) => (float{rank} y) <int64 two = {{2}}> {{
            s = Shape(x)\n n = Size(s)\n c = Equal(n, two)
            y = If(c) <then_branch = p () => (float{rank} t) {{ t = Exp(x) }},
                       else_branch = q () => (float{rank} e) {{ e = Neg(x) }}>
        }}"""
    )
    assert op_types(settled(proto)) == [op_type]


def squeezed(then: str) -> onnx.ModelProto:
    """What exporters make of a squeeze of an axis whose size is not known: the rank of `a` is 2 or 3."""

    def weight(*shape: int) -> str:
        numbers = np.random.default_rng(0).standard_normal(int(np.prod(shape)))
        return f"{{{', '.join(f'{number:.3f}' for number in numbers)}}}"

    return text_model(
        f"""g (float[N, 3, M] x, bool c) => (float y)
        <int64[1] one = {{1}}, int64[1] first = {{0}}, int64[1] last = {{-1}}, int64 two = {{2}},
         float[1, 8, 3] w = {weight(1, 8, 3)}, float[1, 8, 2] r = {weight(1, 8, 2)},
         float[3, 2] k = {weight(3, 2)}, bool yes = {{1}}, float[4, 3, 1] f = {weight(4, 3, 1)}> {{
            size_of = Shape(x)
            size = Gather(size_of, last)
            is_one = Equal(size, one)
            {SQUEEZE}
            {then}
            y = ReduceSum<keepdims = 0>(z)
        }}"""
    )


SQUEEZE = """a = If(is_one) <then_branch = p () => (float[N, 3] t) { t = Squeeze(x, last) },
                             else_branch = q () => (float[N, 3, M] e) { e = Identity(x) }>"""
BY_RANK = """rank_of = Shape(a)
    rank = Size(rank_of)
    is_2 = Equal(rank, two)
    b = If(is_2) <then_branch = p2 () => (float[...] i) { i = Unsqueeze(a, first) },
                  else_branch = q2 () => (float[...] j) { j = OTHER }>
    z = LSTM<hidden_size = 2>(b, w, r)""".replace("[...]", "[A, B, C]")


@pytest.mark.parametrize(
    ("then", "taken"),
    [
        ("z = Gemm(a, k)", "Squeeze"),
        ("b = Unsqueeze(a, first)\n z = LSTM<hidden_size = 2>(b, w, r)", "Squeeze"),
        ("b = Neg(a)\n u = Transpose<perm = [1, 0]>(b)\n z = Exp(u)", "Squeeze"),
        (BY_RANK.replace("OTHER", "Unsqueeze(a, one)"), "Squeeze"),
        ("z = Conv(a, f)", "Identity"),
        (BY_RANK.replace("OTHER", "Identity(a)"), None),
        ("z = Exp(a)", None),
        ("z = Concat<axis = 0>(a, x)", None),
        ("b = ReduceMax<keepdims = 0, axes = [0]>(a)\n z = Gemm(b, k)", None),
        ("b = Exp(x)\n z = Conv(b, f)\n v = Neg(a)", None),
    ],
)
def test_a_branch_that_gives_a_rank_which_is_refused(then: str, taken: str | None) -> None:
    proto = squeezed(then)
    result = settled(proto)
    if taken is None:
        assert "If" in op_types(result)
    else:
        assert "If" not in op_types(result)
        assert ("Squeeze" in op_types(result)) == (taken == "Squeeze")
    x = (
        np.random.default_rng(1)
        .standard_normal((2, 3, 2 if taken == "Identity" or "Concat" in then else 1))
        .astype(np.float32)
    )
    assert_equivalent(proto, result.model, {"x": x, "c": np.array(True)})
    assert not run_pass(proto, InlineIf(dead_branches=False)).changes


def test_a_rank_that_is_refused_only_where_another_condition_holds() -> None:
    proto = squeezed(
        """b = If(c) <then_branch = p2 () => (float[N, 2] i) { i = Gemm(a, k) },
                      else_branch = q2 () => (float[N, 3] j) { j = Identity(a) }>
           z = Exp(b)"""
    )
    assert op_types(settled(proto)).count("If") == 2


def test_a_rank_that_is_refused_in_a_loop() -> None:
    """What a Loop carries may change its rank, whatever is on record."""
    proto = squeezed("z = Gemm(a, k)")
    body = """z = Loop(two, yes, x) <body = trip (int64 i, bool go, float[N, 3, M] v)
                => (bool on, float[N, 3, M] n) {
            on = Identity(go)\n n = Identity(v)\n SQUEEZE\n g = Gemm(a, k) }>"""
    looped = squeezed(body.replace("SQUEEZE", SQUEEZE))
    del looped.graph.node[3]
    assert not run_pass(looped, InlineIf()).changes
    assert run_pass(proto, InlineIf()).changes


STEPS = ("Neg({a})", "Abs({a})", "Identity({a})", "Tanh({a})", "Add({a}, {b})", "Sub({a}, {b})", "If", "If")


@st.composite
def block(draw: st.DrawFn, seen: tuple[str, ...], depth: int) -> list[tuple[str, str]]:
    """Assignments (name, expression) that read what was seen before; names are those of other branches too.

    They are not those of the graphs around a branch: the runtime takes no such model.
    """
    made: list[tuple[str, str]] = []
    for number in range(draw(st.integers(1, 4))):
        name, known = f"{'abcd'[depth]}{number}", (*seen, *(name for name, _ in made))
        step = draw(st.sampled_from(STEPS if depth < 3 else STEPS[:-2]))
        if step == "If":
            condition = draw(st.sampled_from(["yes", "no", "c", "d"]))
            branches = [draw(branch(known, depth + 1)) for _ in "te"]
            expression = f"If({condition}) <then_branch = {branches[0]}, else_branch = {branches[1]}>"
        else:
            a, b = draw(st.sampled_from(known)), draw(st.sampled_from(known))
            expression = step.format(a=a, b=b)
        made.append((name, expression))
    return made


def assignments(made: list[tuple[str, str]]) -> str:
    return "\n".join(f"[n{index}] {name} = {right}" for index, (name, right) in enumerate(made))


@st.composite
def branch(draw: st.DrawFn, seen: tuple[str, ...], depth: int) -> str:
    weight = "w" not in seen and draw(st.booleans())
    inner = draw(block((*seen, "w") if weight else seen, depth))
    own = f"<float[3] w = {{{draw(st.integers(1, 9))}, 2, 3}}>" if weight else ""
    return f"b () => (float[3] {inner[-1][0]}) {own} {{ {assignments(inner)} }}"


@st.composite
def programs(draw: st.DrawFn) -> str:
    body = draw(block(("x",), 0))
    names = [name for name, _ in body]
    ports = ", ".join(f"float[3] {n}" for n in dict.fromkeys([names[-1], draw(st.sampled_from(names))]))
    constants = "bool yes = {1}, bool no = {0}"
    return f"g (float[3] x, bool c, bool d) => ({ports}) <{constants}> {{ {assignments(body)} }}"


@given(programs())
@settings(derandomize=True, max_examples=60, deadline=None)
def test_random_ifs(text: str) -> None:
    proto = text_model(text)
    onnx.checker.check_model(proto)
    result = run_pass(text, InlineIf())
    for node in nodes(result.model):
        assert node.op_type != "If" or node.inputs[0] is None or node.inputs[0].name in ("c", "d")
    x = np.array([1, -2, 3], np.float32)
    feeds = [{"x": x, "c": np.array(c), "d": np.array(d)} for c in (True, False) for d in (True, False)]
    assert_equivalent(proto, result.model, feeds)
