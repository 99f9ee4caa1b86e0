"""unroll-loop: trips one after the other, with the numbers that the runtime's Loop gives."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.graph import nodes
from onnxopt.passes.unroll_loop import UnrollLoop
from tests.support import Rewritten, assert_equivalent, run_pass, text_model

OVERRIDABLE = (
    "the trip count or condition is an initializer that is also a graph input "
    "(overridable; --freeze-initializers fixes it)"
)
RANDOM = "a trip may draw other random numbers than the one before"
X = np.array([1, -2, 3], np.float32)


def unrolled(text: str, one: UnrollLoop | None = None) -> Rewritten:
    """A model after the pass; the runtime gives the same numbers as before."""
    proto, result = text_model(text), run_pass(text, one or UnrollLoop())
    names = {value.name for value in proto.graph.input}
    for c in (True, False):
        feeds = {"x": X, "c": np.array(c), "n": np.array(2)}
        assert_equivalent(proto, result.model, {n: v for n, v in feeds.items() if n in names})
    return result


BODY = """body = trip (int64 i, bool go, float[3] a, float[3] b)
    => (bool on, float[3] a2, float[3] b2, float[3] row, int64 number) {
        on = Identity(go)
        f = Cast<to = 1>(i)
        [n] s = Add(a, f)
        a2 = Mul(s, w)
        b2 = Identity(a)
        row = Sub(b, x)
        number = Identity(i)
    }"""


@pytest.mark.parametrize("opset", [11, 13, 17])
@pytest.mark.parametrize("condition", ["yes", ""])
@pytest.mark.parametrize("trips", [-1, 0, 1, 2, 4])
def test_trips(trips: int, condition: str, opset: int) -> None:
    """Carried values that swap, the trip's number, and outputs that are stacked."""
    result = unrolled(
        f"""<ir_version: 7, opset_import: ["" : {opset}]>
        g (float[3] x) => (float[3] y, float[3] z, float[T, 3] rows, int64[T] numbers)
        <int64 m = {{{trips}}}, bool yes = {{1}}, float[3] w = {{2, 3, 4}}> {{
            u = Neg(x)
            y, z, rows, numbers = Loop(m, {condition}, x, u) <{BODY}>
        }}"""
    )
    assert (result.changes, result.count("Loop")) == (1, 0)
    assert (result.count("Mul"), result.count("Concat")) == (max(trips, 0), 2 if trips > 1 else 0)
    names = [node.name for node in nodes(result.model) if node.op_type == "Add"]
    copies = ["Loop/n", "Loop/n_1", "Loop/n_2"][: trips - 1]
    assert names == ([*copies, "n"] if trips > 0 else [])


@pytest.mark.parametrize(
    ("count", "start", "on", "changes"),
    [
        ("two", "yes", "on = Identity(go)", 1),
        ("two", "yes", "k = Identity(go)\n on = Identity(k)", 1),
        ("two", "yes", "on = Identity(yes)", 1),
        ("two", "yes", "on = Constant<value = bool {1}>()", 1),
        ("two", "yes", "on = Constant<value = bool {0}>()", 1),
        ("", "yes", "on = Identity(no)", 1),
        ("", "", "on = Identity(no)", 1),
        ("two", "no", "on = Identity(go)", 1),
        ("n", "no", "on = Identity(go)", 1),
        ("one", "yes", "on = Identity(c)", 1),
        ("zero", "c", "on = Identity(c)", 0),
        ("n", "yes", "on = Identity(no)", 0),
        ("n", "yes", "on = Identity(go)", 0),
        ("two", "c", "on = Identity(go)", 0),
        ("two", "yes", "on = Identity(c)", 0),
    ],
)
def test_conditions(count: str, start: str, on: str, changes: int) -> None:
    result = unrolled(
        f"""g (float[3] x, bool c, int64 n) => (float[3] y)
        <int64 zero = {{0}}, int64 one = {{1}}, int64 two = {{2}}, bool yes = {{1}}, bool no = {{0}}> {{
            y = Loop({count}, {start}, x) <body = trip (int64 i, bool go, float[3] a)
                => (bool on, float[3] b) {{ b = Tanh(a)\n {on} }}>
        }}"""
    )
    assert result.changes == changes
    assert result.count("Loop") == 1 - changes


@pytest.mark.parametrize(
    ("m", "yes", "inputs"), [("two", "k", "bool k"), ("k", "yes", "int64 k")], ids=["condition", "count"]
)
def test_what_can_be_overridden_is_declined(m: str, yes: str, inputs: str) -> None:
    result = unrolled(
        f"""g (float[3] x, {inputs}) => (float[3] y)
        <{inputs} = {{1}}, int64 two = {{2}}, bool yes = {{1}}> {{
            y = Loop({m}, {yes}, x) <body = trip (int64 i, bool go, float[3] a)
                => (bool on, float[3] b) {{ b = Tanh(a)\n on = Identity(go) }}>
        }}"""
    )
    assert (result.changes, result.declined) == (0, (OVERRIDABLE,))


@pytest.mark.parametrize(
    ("one", "inner", "reason"),
    [
        (UnrollLoop(max_trips=2), "b = Tanh(a)", "it has more trips than max_trips=2"),
        (UnrollLoop(max_nodes=5), "b = Tanh(a)", "it would become more nodes than max_nodes=5"),
        (UnrollLoop(), "r = RandomNormalLike<seed = 1.0>(a)\n b = Add(a, r)", RANDOM),
        (UnrollLoop(), "r = com.microsoft.Gelu(a)\n b = Add(a, r)", RANDOM),
        (
            UnrollLoop(),
            "b = Tanh(a)\n s = ReduceSum<keepdims = 0>(a)\n on = Less(s, limit)",
            "whether there is another trip is worked out in the body",
        ),
    ],
)
def test_declines(one: UnrollLoop, inner: str, reason: str) -> None:
    on = "" if " on = " in inner else "on = Identity(go)\n"
    result = run_pass(
        f"""<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[3] x) => (float[3] y) <int64 m = {{3}}, bool yes = {{1}}, float limit = {{5}}> {{
            y = Loop(m, yes, x) <body = trip (int64 i, bool go, float[3] a) => (bool on, float[3] b) {{
                {on} {inner} }}>
        }}""",
        one,
    )
    assert (result.changes, result.declined) == (0, (reason,))


def test_a_trip_count_without_an_element_is_none() -> None:
    text = """g (float[3] x) => (float[3] y) <int64[0] m = {}> {
        y = Loop(m, , x) <body = b (int64 i, bool go, float[3] a) => (bool on, float[3] c) {
            on = Identity(go) c = Neg(a) }>
    }"""
    assert run_pass(text, UnrollLoop()).changes == 0


def test_no_trip_and_a_stacked_output_of_unknown_shape() -> None:
    result = unrolled(
        """g (float[3] x) => (float[T, 3] y) <int64 m = {0}, bool yes = {1}> {
            z, y = Loop(m, yes, x) <body = trip (int64 i, bool go, float[3] a)
                => (bool on, float[3] b, float[N] row) {
                    b = Tanh(a)\n row = Compress(a, k)\n on = Identity(go) }>
        }""".replace("bool yes = {1}", "bool yes = {1}, bool[3] k = {1, 1, 0}")
    )
    assert result.declined == ("no trip, and the shape of a stacked output is not known",)


def test_weights_captures_and_bodies_in_the_body() -> None:
    """Each trip captures values from around the Loop; the body's own weight is stored once."""
    result = unrolled(
        """g (float[3] x, bool c) => (float[3] y, float[3] z) <int64 m = {3}, bool yes = {1}> {
            k = Exp(x)
            [loop] y = Loop(m, yes, x) <body = trip (int64 i, bool go, float[3] a) => (bool on, float[3] b)
                <float[3] w = {1, 2, 3}> {
                    [n] s = Mul(a, w)
                    [m] b = If(c) <
                        then_branch = p () => (float[3] t) <float[3] w2 = {3, 4, 5}> {
                            [q] u = Add(s, k)\n [r] t = Mul(u, w2) },
                        else_branch = q () => (float[3] e) { [q] e = Sub(s, a) }>
                    on = Identity(go) }>
            z = If(c) <then_branch = p2 () => (float[3] t) { [q] u = Neg(k)\n t = Abs(u) },
                       else_branch = q2 () => (float[3] s) { [q] s = Neg(y) }>
        }"""
    )
    assert result.count("If") == 4
    assert [name for name in result.model.graph.initializers if name.startswith("w")] == ["w"]


@pytest.mark.parametrize("order", ["i, j", "j, i"])
def test_loops_in_loops_and_functions(order: str) -> None:
    result = unrolled(
        f"""<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[3] x) => (float[R, S, 3] y) {{ z, y = d.f<slope = 0.5>(x) }}
        <domain: "d", opset_import: ["" : 17]> f <slope> (x) => (last, all) {{
            two = Constant<value = int64 {{2}}>()
            three = Constant<value = int64 {{3}}>()
            yes = Constant<value = bool {{1}}>()
            last, all = Loop(two, yes, x) <body = outer (int64 i, bool go, float[3] a)
                => (bool on, float[3] b, float[S, 3] rows) {{
                    on = Identity(go)
                    b, rows = Loop(three, yes, a) <body = inner (int64 j, bool go2, float[3] v)
                        => (bool on2, float[3] n, float[3] row) <float[3] w = {{1, 2, 3}}> {{
                            on2 = Identity(go2)
                            p = Sub({order})
                            q = Cast<to = 1>(p)
                            s = LeakyRelu<alpha: float = @slope>(v)
                            n = Sub(s, q)
                            row = Mul(s, w) }}> }}>
        }}"""
    )
    assert result.declined == ()
    assert (result.changes, result.count("Loop"), result.count("LeakyRelu")) == (2, 0, 6)


def test_a_carried_value_that_grows() -> None:
    """The shape on record in the body is that of the first trip."""
    result = unrolled(
        """g (float[3] x) => (float[N] y, int64[2, 1] sizes) <int64 m = {2}, bool yes = {1}> {
            y, sizes = Loop(m, yes, x) <body = trip (int64 i, bool go, float[3] a)
                => (bool on, float[6] b, int64[1] size) {
                    on = Identity(go)\n b = Concat<axis = 0>(a, x)\n size = Shape(a) }>
        }"""
    )
    assert result.count("Loop") == 0


def test_sequences_are_carried() -> None:
    result = unrolled(
        """g (float[3] x) => (float[N] y) <int64 m = {3}, bool yes = {1}> {
            none = SequenceEmpty<dtype = 1>()
            all = Loop(m, yes, none) <body = trip (int64 i, bool go, seq(float[3]) a)
                => (bool on, seq(float[3]) b) { on = Identity(go)\n b = SequenceInsert(a, x) }>
            y = ConcatFromSequence<axis = 0>(all)
        }"""
    )
    assert result.count("SequenceInsert") == 3


def test_a_loop_that_nobody_reads_is_left_to_others() -> None:
    result = unrolled(
        """g (float[3] x) => (float[3] y) <int64 m = {2}, bool yes = {1}> {
            z = Loop(m, yes, x) <body = trip (int64 i, bool go, float[3] a) => (bool on, float[3] b) {
                on = Identity(go)\n b = Neg(a) }>
            y = Neg(x)
        }"""
    )
    assert (result.changes, result.declined) == (0, ())


@pytest.mark.parametrize("opset", [9, 17])
@pytest.mark.parametrize(("size", "into"), [(1, 0), (1, 1), (1, -1), (2, 0)])
def test_scans(size: int, into: int, opset: int) -> None:
    """A Scan of one step, with axes from either end, a state, a direction and a captured weight."""
    proto = text_model(
        f"""<ir_version: 7, opset_import: ["" : {opset}]>
        g (float[3] x, float[{size}, 3] a, float[3, {size}] b) => (float[3] y, float[A, B] z) {{
            n = Neg(x)
            y, z = Scan<num_scan_inputs = 2, scan_input_axes = [0, -1], scan_input_directions = [0, 1],
                        scan_output_axes = [{into}], body = step (float[3] s, float[3] p, float[3] q)
                => (float[3] t, float[3] r) <float[3] w = {{1, 2, 3}}> {{
                    k = Mul(p, w)\n t = Add(s, k)\n r = Sub(t, q) }}>(n, a, b)
        }}"""
    )
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((size, 3)), rng.standard_normal((3, size))
    result = run_pass(onnx.parser.parse_model(onnx.printer.to_text(proto)), UnrollLoop())
    assert result.count("Scan") == (size > 1)
    assert_equivalent(proto, result.model, {"x": X, "a": a.astype("f"), "b": b.astype("f")})


STEPS = (
    *("Neg({a})", "Tanh({a})", "Identity({a})", "Add({a}, {b})", "Sub({a}, {b})", "Mul({a}, {factor})"),
    *("loop", "if"),
)


@st.composite
def block(draw: st.DrawFn, seen: tuple[str, ...], factor: str, depth: int, least: int) -> str:
    """Assignments, at least so many; a name is that of the graph's depth and a number."""
    lines = []
    for number in range(draw(st.integers(least, least + 2))):
        name = f"{'abc'[depth]}{number}"
        step = draw(st.sampled_from(STEPS if depth < 2 else STEPS[:-2]))
        a, b = draw(st.sampled_from(seen)), draw(st.sampled_from(seen))
        if step == "loop":
            trips = draw(st.sampled_from(["m0", "m1", "m2", "m3", "mt"]))
            start = draw(st.sampled_from(["yes", "c", ""]))
            body = draw(trip(seen, depth + 1))
            lines.append(f"{name}, {name}_2, {name}_rows = Loop({trips}, {start}, {a}, {b}) <body = {body}>")
        elif step == "if":
            bodies = [draw(block(seen, factor, depth + 1, 1)) for _ in "te"]
            graphs = [f"b () => (float[3] {'abc'[depth + 1]}0) {{ {body} }}" for body in bodies]
            lines.append(f"{name} = If(c) <then_branch = {graphs[0]}, else_branch = {graphs[1]}>")
        else:
            lines.append(f"{name} = {step.format(a=a, b=b, factor=factor)}")
        seen = (*seen, name)
    return "\n".join(lines)


@st.composite
def trip(draw: st.DrawFn, seen: tuple[str, ...], depth: int) -> str:
    """A body that carries two values and stacks one."""
    p, n = "xyz"[depth], "abc"[depth]
    inner = draw(block((*seen, f"{p}1", f"{p}2"), f"{p}f", depth, 3))
    go = draw(st.sampled_from([f"{p}go", f"{p}go", "yes", "no", "c"]))
    ports = ", ".join(f"float[3] {n}{number}" for number in draw(st.permutations(range(3))))
    return f"""t (int64 {p}i, bool {p}go, float[3] {p}1, float[3] {p}2) => (bool {p}on, {ports}) {{
        {p}on = Identity({go})\n {p}f = Cast<to = 1>({p}i)\n {inner} }}"""


@given(block(("x",), "factor", 0, 2))
@settings(derandomize=True, max_examples=50, deadline=None)
def test_random_loops(body: str) -> None:
    text = f"""g (float[3] x, bool c, int64 mt) => (float[3] a0, float[3] a1)
        <int64 m0 = {{0}}, int64 m1 = {{1}}, int64 m2 = {{2}}, int64 m3 = {{3}},
         bool yes = {{1}}, bool no = {{0}}, float factor = {{3}}> {{ {body} }}"""
    proto, result = text_model(text), run_pass(text, UnrollLoop())
    feeds = [{"x": X, "c": np.array(c), "mt": np.array(t)} for c in (True, False) for t in (0, 2)]
    assert_equivalent(proto, result.model, feeds)
