"""fuse-activation against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.fuse.fuse_activation import FuseActivation
from tests.passes.expressions import expression_model
from tests.support import Feeds, assert_equivalent, run_pass, text_model

CLIP = "Clip(Add(x, 3.0), 0.0, 6.0)"
SIXTH = "0.16666667"
GATE = "HardSigmoid(x, alpha=0.16666667, beta=0.5)"
ERF = "Erf(Div(x, 1.4142135))"
TANH = "Tanh(Mul(0.7978846, Add(x, Mul(0.044715, Mul(x, Mul(x, x))))))"


def numbers(dtype: type = np.float32, largest: float = 60) -> Feeds:
    """Small, large and special numbers, 3 x 17."""
    usual = [*np.linspace(-8, 8, 39), -0.0, 0.0, 1e-6, -1e-6, largest, -largest, 20, -20]
    return {"x": np.array([*usual, np.nan, np.inf, -np.inf, 3.0]).astype(dtype).reshape(3, 17)}


@pytest.mark.parametrize(
    ("result", "opset", "spelling"),
    [
        ("HardSwish", 14, f"Mul(x, Div({CLIP}, 6.0))"),
        ("HardSwish", 14, f"Mul(Mul({CLIP}, {SIXTH}), x)"),
        ("HardSwish", 14, f"Div(Mul(x, {CLIP}), 6.0)"),
        ("HardSwish", 14, f"Mul({SIXTH}, Mul({CLIP}, x))"),
        ("HardSwish", 14, f"Mul(Div(x, 6.0), {CLIP})"),
        ("HardSwish", 14, f"Mul({GATE}, x)"),
        ("HardSigmoid", 13, f"Div({CLIP}, 6.0)"),
        ("HardSigmoid", 13, "Clip(Add(Mul(x, 0.2), 0.5), 0.0, 1.0)"),
        ("Gelu", 20, f"Mul(Mul(x, Add({ERF}, 1.0)), 0.5)"),
        ("Gelu", 20, f"Mul(Mul(x, 0.5), Add(1.0, {ERF}))"),
        ("Gelu", 20, f"Mul(x, Mul(0.5, Add({ERF}, 1.0)))"),
        ("Gelu", 20, f"Div(Mul(x, Add({ERF}, 1.0)), 2.0)"),
        ("Gelu", 20, "Mul(Mul(x, 0.5), Add(Erf(Mul(x, 0.70710677)), 1.0))"),
        ("Gelu", 20, f"Mul(x, Add(Mul(0.5, {ERF}), 0.5))"),
        ("Gelu", 20, f"Mul(Mul(x, 0.5), Add({TANH}, 1.0))"),
        ("Gelu", 20, f"Mul(x, Mul(0.5, Add(1.0, {TANH})))"),
        ("Gelu", 20, f"Mul(x, Add(0.5, Mul(0.5, {TANH})))"),
        ("Gelu", 20, f"Mul(Mul(x, 0.5), Add({TANH.replace('Mul(x, Mul(x, x))', 'Pow(x, 3.0)')}, 1.0))"),
        ("Gelu", 20, f"Mul(x, Mul(0.5, Add(1.0, {TANH.replace('Mul(x, x)', 'Pow(x, 2.0)')})))"),
        (
            "Gelu",
            20,
            "Mul(Mul(x, 0.5), Add(Tanh(Mul(Mul(x, 0.7978846), Add(Mul(Mul(x, x), 0.044715), 1.0))), 1.0))",
        ),
        (
            "Gelu",
            20,
            "Mul(Mul(x, 0.5), Add(Tanh(Add(Mul(x, 0.7978846), Mul(Pow(x, 3.0), 0.035677407))), 1.0))",
        ),
        ("Gelu", 20, "Mul(x, Sigmoid(Mul(1.5957691, Add(x, Mul(0.044715, Pow(x, 3.0))))))"),
        ("Swish", 24, "Mul(x, Sigmoid(x))"),
        ("Swish", 24, "Mul(Sigmoid(x), x)"),
        ("Swish", 24, "Div(x, Add(Exp(Neg(x)), 1.0))"),
        ("Swish", 24, "Mul(x, Sigmoid(Mul(x, 1.702)))"),
        ("Mish", 18, "Mul(x, Tanh(Softplus(x)))"),
        ("Mish", 18, "Mul(x, Tanh(Log(Add(Exp(x), 1.0))))"),
        ("Sigmoid", 13, "Div(1.0, Add(Exp(Neg(x)), 1.0))"),
        ("Sigmoid", 13, "Reciprocal(Add(1.0, Exp(Neg(x))))"),
        ("Softplus", 13, "Add(Relu(x), Log(Add(Exp(Neg(Abs(x))), 1.0)))"),
        ("Softsign", 13, "Div(x, Add(1.0, Abs(x)))"),
        ("LeakyRelu", 16, "Where(Greater(x, 0.0), x, Mul(x, 0.3))"),
        ("LeakyRelu", 16, "Where(GreaterOrEqual(x, 0.0), x, Mul(x, -3.0))"),
        ("LeakyRelu", 16, "Where(Less(x, 0.0), Mul(0.01, x), x)"),
        ("LeakyRelu", 16, "Max(Mul(x, 0.01), x)"),
        ("LeakyRelu", 16, "PRelu(x, [0.25])"),
        ("Elu", 13, "Where(Greater(x, 0.0), x, Sub(Exp(x), 1.0))"),
        ("Elu", 13, "Where(Greater(x, 0.0), x, Mul(0.5, Sub(Exp(x), 1.0)))"),
        ("Selu", 13, "Mul(1.0507010, Elu(x, alpha=1.6732632))"),
        ("Relu", 13, "Max(0.0, x)"),
    ],
)
def test_parts_become_one_operator(result: str, opset: int, spelling: str) -> None:
    spelling = spelling.replace("[0.25]", "0.25")
    model = expression_model(spelling, opset=opset)
    done = run_pass(model, FuseActivation(swish=True))
    assert (done.op_types, done.declined) == ([result], ())
    assert_equivalent(model, done.model, numbers(), kind="reorder")


@pytest.mark.parametrize("opset", [8, 11, 13])
@pytest.mark.parametrize(
    "form", ["Div(Mul(x, {}), 6.0)", "Mul(x, Div({}, 6.0))", "Mul(Mul({}, 0.16666667), x)"]
)
def test_hardswish_before_its_opset_is_a_product_with_hardsigmoid(form: str, opset: int) -> None:
    clip = CLIP if opset >= 11 else "Clip(Add(x, 3.0), min=0.0, max=6.0)"
    model = expression_model(form.format(clip), opset=opset)
    done = run_pass(model, FuseActivation())
    assert sorted(done.op_types) == ["HardSigmoid", "Mul"]
    assert done.declined == ("HardSwish came with opset 14",)
    assert_equivalent(model, done.model, numbers(), kind="reorder")


@pytest.mark.parametrize(
    ("spelling", "opset", "contrib"),
    [
        (f"Mul(Mul(x, 0.5), Add({ERF}, 1.0))", 17, "Gelu"),
        (f"Mul(Mul(x, 0.5), Add({TANH}, 1.0))", 17, "FastGelu"),
        ("Mul(x, Sigmoid(x))", 17, "QuickGelu"),
        ("Mul(x, Sigmoid(Mul(x, 1.702)))", 17, "QuickGelu"),
    ],
)
def test_contrib_operators_are_used_only_when_asked_for(spelling: str, opset: int, contrib: str) -> None:
    model = expression_model(spelling, opset=opset)
    kept = run_pass(model, FuseActivation())
    assert kept.changes == 0
    assert all("came with opset" in reason for reason in kept.declined)
    done = run_pass(model, FuseActivation(contrib=True))
    assert done.op_types == [contrib]
    assert done.model.graph[0].domain == "com.microsoft"
    assert_equivalent(model, done.model, numbers(), kind="reorder")


def test_a_tensor_without_axes_is_none_for_the_contrib_operator() -> None:
    model = expression_model(f"Mul(Mul(x, 0.5), Add({TANH}, 1.0))", opset=17)
    for port in (*model.graph.input, *model.graph.output):
        del port.type.tensor_type.shape.dim[:]
    done = run_pass(model, FuseActivation(contrib=True))
    assert done.changes == 0
    assert "without axes" in done.declined[0]


@pytest.mark.parametrize("alpha", [None, 1.702])
def test_swish_of_the_standard_only_when_asked_for(alpha: float | None) -> None:
    gate = "Sigmoid(x)" if alpha is None else f"Sigmoid(Mul(x, {alpha}))"
    model = expression_model(f"Mul(x, {gate})", opset=24)
    kept = run_pass(model, FuseActivation())
    assert kept.changes == 0
    assert "runs slower than its parts" in kept.declined[0]
    assert run_pass(model, FuseActivation(contrib=True)).op_types == ["QuickGelu"]
    assert run_pass(model, FuseActivation(swish=True)).op_types == ["Swish"]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_types(dtype: type) -> None:
    model = expression_model("Mul(x, Div(Clip(Add(x, 3.0), 0.0, 6.0), 6.0))", opset=14, dtype=dtype)
    done = run_pass(model, FuseActivation())
    if dtype is np.float64:
        assert set(done.declined) == {"its type is DOUBLE"}
    else:
        assert done.op_types == ["HardSwish"]
        assert_equivalent(model, done.model, numbers(dtype, largest=60), kind="reorder")


@pytest.mark.parametrize("spelling", ["Max(x, 0.0)", "Div(1.0, Add(Exp(Neg(x)), 1.0))"])
def test_double_where_the_runtime_has_it(spelling: str) -> None:
    model = expression_model(spelling, dtype=np.float64)
    done = run_pass(model, FuseActivation())
    assert len(done.op_types) == 1
    assert_equivalent(model, done.model, numbers(np.float64), kind="reorder")


def test_an_unknown_type_is_declined() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 17, "custom" : 1]>
        agraph (float[2] x) => (float[2] y) {
            h = custom.Mystery(x) a = Abs(h) one = Constant<value_float=1.0>() b = Add(a, one)
            z = Div(h, b) y = custom.Mystery(z)
        }""")
    assert run_pass(model, FuseActivation()).declined == ("its type is unknown",)


def test_softplus_that_overflows_only_when_asked_for() -> None:
    model = expression_model("Log(Add(Exp(x), 1.0))")
    kept = run_pass(model, FuseActivation())
    assert kept.changes == 0
    assert "infinite where they overflow" in kept.declined[0]
    done = run_pass(model, FuseActivation(stable=True))
    assert done.op_types == ["Softplus"]
    assert_equivalent(model, done.model, numbers(largest=60), kind="reorder")


@pytest.mark.parametrize(
    "spelling",
    [
        "Mul(x, Div(Clip(Add(x, 3.0), 0.0, 6.0), 6.001))",
        "Mul(x, Div(Clip(Add(x, 3.0), 0.5, 6.0), 6.0))",
        "Mul(x, Div(Clip(Add(x, 2.999), 0.0, 6.0), 6.0))",
        "Mul(x, HardSigmoid(x))",
        "Mul(Neg(x), HardSigmoid(x, alpha=0.16666667, beta=0.5))",
        "Mul(Mul(x, 0.5), Add(Erf(Div(x, 1.4142)), 1.0))",
        "Mul(Mul(x, 0.5), Add(Erf(Div(Neg(x), 1.4142135)), 1.0))",
        "Mul(Mul(x, 0.25), Add(Erf(Div(x, 1.4142135)), 1.0))",
        "Mul(Mul(x, 0.5), Add(Tanh(Mul(0.7978846, Add(x, Mul(0.0447, Pow(x, 3.0))))), 1.0))",
        "Max(x, Mul(x, 1.5))",
        "Max(x, Mul(x, -0.5))",
        "Max(x, -1.0)",
        "Where(Greater(x, 0.5), x, Mul(x, 0.3))",
        "Mul(1.05, Elu(x, alpha=1.6732632))",
        "Mul(Neg(x), Sigmoid(x))",
        "Mul(x, Sigmoid(Mul(x, x)))",
        "Div(x, Add(Exp(x), 1.0))",
        "PRelu(x, Exp(x))",
    ],
)
def test_what_is_something_else_stays(spelling: str) -> None:
    done = run_pass(
        expression_model(spelling, opset=24), FuseActivation(contrib=True, stable=True, swish=True)
    )
    assert (done.changes, done.declined) == (0, ())


@pytest.mark.parametrize("kept", ["Erf(Div(x, 1.4142135))", "Mul(x, 0.5)"])
def test_a_value_inside_that_is_a_graph_output(kept: str) -> None:
    model = expression_model(f"Mul(Mul(x, 0.5), Add({ERF}, 1.0))", outputs=[kept])
    done = run_pass(model, FuseActivation())
    assert done.changes == 0
    assert "is also a graph output" in done.declined[0]


def test_a_value_inside_that_is_read_elsewhere() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 24]>
        agraph (float[2] x) => (float[2] y, float[2] z) { s = Sigmoid(x) y = Mul(x, s) z = Neg(s) }""")
    assert run_pass(model, FuseActivation(swish=True)).declined == (
        "the output of its Sigmoid is also read elsewhere",
    )


def test_two_on_one_input_and_a_constant_that_they_share() -> None:
    model = text_model("""agraph (float[2] x) => (float[2] y, float[2] z) {
        three = Constant<value_float=3.0>() zero = Constant<value_float=0.0>()
        six = Constant<value_float=6.0>()
        a = Add(x, three) b = Clip(a, zero, six) c = Mul(x, b) y = Div(c, six)
        d = Add(three, x) e = Clip(d, zero, six) f = Div(e, six) z = Mul(x, f)
    }""")
    done = run_pass(model, FuseActivation())
    assert done.op_types == ["HardSwish", "HardSwish"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_constants_that_would_raise_the_rank(rank: int) -> None:
    shape = "[1,1,1]"[: 2 * rank] + "]" if rank else ""
    text = f"""agraph (float[4,2] x) => (float[N,M] y) {{
        three = Constant<value = float{shape} {{3.0}}>() zero = Constant<value_float=0.0>()
        six = Constant<value = float{shape} {{6.0}}>() top = Constant<value_float=6.0>()
        a = Add(x, three) b = Clip(a, zero, top) c = Mul(x, b) y = Div(c, six)
    }}"""
    model = onnx.shape_inference.infer_shapes(text_model(text))
    done = run_pass(model, FuseActivation())
    assert done.count("HardSwish") == (rank < 3)
    assert_equivalent(model, done.model, kind="reorder")


def test_an_overridable_constant_is_none() -> None:
    model = text_model("""<ir_version: 10, opset_import: ["" : 17]>
        agraph (float[2] x, float[1] slope = {0.1}) => (float[2] y) { m = Mul(x, slope) y = Max(x, m) }""")
    assert run_pass(model, FuseActivation()).op_types == ["Mul", "Max"]


@pytest.mark.parametrize("place", ["branch", "function"])
def test_subgraphs_and_functions(place: str) -> None:
    if place == "branch":
        model = text_model("""<ir_version: 10, opset_import: ["" : 24]>
            agraph (float[2] x, bool c) => (float[2] y) {
                y = If (c) <
                  then_branch = a () => (float[2] p) { s = Sigmoid(x) p = Mul(x, s) },
                  else_branch = b () => (float[2] q) { q = Neg(x) }
                >
            }""")
        feeds = [{"x": np.array([1, -2], np.float32), "c": np.array(c)} for c in (True, False)]
    else:
        model = text_model("""<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
            agraph (float[2] x) => (float[2] y) { y = local.Half(x) }
            <domain: "local", opset_import: ["" : 17]>
            Half (x) => (y) { z = Constant<value_float=0.0>() y = Max(x, z) }""")
        feeds = [{"x": np.array([1, -2], np.float32)}]
    done = run_pass(model, FuseActivation(swish=True))
    if place == "branch":
        assert done.count("Swish") == 1
        assert_equivalent(model, done.model, feeds, kind="reorder")
    else:
        assert done.declined == ("its type is unknown",)


@st.composite
def gelus(draw: st.DrawFn) -> str:
    """x * 0.5 * (1 + erf(x / sqrt 2)) in a random order and nesting."""
    erf = draw(
        st.sampled_from(["Erf(Div(x, 1.4142135))", "Erf(Mul(x, 0.70710677))", "Erf(Mul(0.70710677, x))"])
    )
    factors = ["x", "0.5", draw(st.sampled_from([f"Add({erf}, 1.0)", f"Add(1.0, {erf})"]))]
    while len(factors) > 1:
        a, b = draw(st.permutations(factors))[:2]
        factors.remove(a)
        factors.remove(b)
        halves = draw(st.booleans()) and "0.5" in (a, b)
        other = b if a == "0.5" else a
        factors.append(f"Div({other}, 2.0)" if halves else f"Mul({a}, {b})")
    return factors[0]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(spelling=gelus(), opset=st.sampled_from([13, 17, 20, 22]), share=st.booleans())
def test_any_nesting_of_gelu(spelling: str, opset: int, share: bool) -> None:
    model: onnx.ModelProto = expression_model(spelling, opset=opset, share=share)
    done = run_pass(model, FuseActivation(contrib=True))
    assert done.op_types == ["Gelu"]
    assert (done.model.graph[0].domain == "") == (opset >= 20)
    assert_equivalent(model, done.model, numbers(), kind="reorder")
