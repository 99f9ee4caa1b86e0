"""merge-gemm against the runtime: transpositions, scales and sums beside a Gemm, and what must stay."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.merge.merge_gemm import MergeGemm
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

SHARED = "the output of the {} is also read elsewhere"
LARGER = "what is added is not known to fit the product's shape"


def case(body: str, inputs: str = "", constants: str = "", opset: int = 17) -> onnx.ModelProto:
    """`y` of a body with a: [3, 5], b: [5, 4], p: [5, 3], q: [4, 5], c: [3, 4], and what else is given."""
    base = "float[3,5] a, float[5,4] b, float[5,3] p, float[4,5] q, float[3,4] c"
    return text_model(f"""<ir_version: 8, opset_import: ["" : {opset}]>
        agraph ({base}{inputs and ", "}{inputs}) => (float[M,N] y) <{constants}> {{ {body} }}""")


def merged(model: onnx.ModelProto, *ops: str) -> dict[str, float]:
    """The attributes of the Gemm that is left last."""
    after = run_pass(model, MergeGemm())
    assert after.op_types == list(ops)
    assert after.declined == ()
    assert_equivalent(model, after.model, kind="reorder")
    last = after.model.graph[len(ops) - 1]
    return {name: attr.value for name, attr in last.attributes.items()}


def kept(model: onnx.ModelProto, *reasons: str) -> None:
    after = run_pass(model, MergeGemm())
    assert (after.changes, after.declined) == (0, reasons)


@pytest.mark.parametrize("perm", ["<perm=[1,0]>", ""])
@pytest.mark.parametrize("c", ["", ", c"])
@pytest.mark.parametrize(
    ("body", "left"),
    [
        ("t = Transpose{perm}(p) y = Gemm<alpha=0.5>(t, b{c})", {"transA": 1, "alpha": 0.5}),
        ("t = Transpose{perm}(q) y = Gemm(a, t{c})", {"transB": 1}),
        ("s = Transpose{perm}(p) t = Transpose{perm}(q) y = Gemm(s, t{c})", {"transA": 1, "transB": 1}),
        ("t = Transpose{perm}(a) y = Gemm<transA=1>(t, b{c})", {}),
        ("s = Transpose{perm}(a) t = Transpose{perm}(s) y = Gemm(t, b{c})", {}),
    ],
)
def test_transposes(body: str, left: dict[str, float], c: str, perm: str) -> None:
    model = onnx.shape_inference.infer_shapes(case(body.format(c=c, perm=perm)))
    assert merged(model, "Gemm") == left


def test_a_default_transpose_of_unknown_rank_stays() -> None:
    kept(case("t = Transpose(p) y = Gemm(t, b)"))
    kept(case("t = Transpose<perm=[0,1]>(a) y = Gemm(t, b)"))


@pytest.mark.parametrize(
    ("body", "op_type"),
    [
        ("t = Transpose<perm=[1,0]>(p) d = Gemm(t, b) s = Gemm(t, b) y = Add(d, s)", "Transpose"),
        ("h = Mul(a, half) s = Gemm(h, b) t = Gemm(h, b, s) y = Relu(t)", "Mul"),
        ("g = Gemm(a, b) h = Neg(g) y = Add(g, h)", "Gemm"),
    ],
)
def test_what_is_read_elsewhere_stays(body: str, op_type: str) -> None:
    after = run_pass(case(body, constants="float half = {0.5}"), MergeGemm())
    assert SHARED.format(op_type) in after.declined
    assert_equivalent(case(body, constants="float half = {0.5}"), after.model, kind="reorder")


@pytest.mark.parametrize("shape", ["", "[1]", "[1,1]"])
@pytest.mark.parametrize(
    ("body", "alpha", "beta"),
    [
        ("g = Gemm(a, b) y = Mul(g, k)", 0.25, 1),
        ("g = Gemm(a, b, c) y = Mul(k, g)", 0.25, 0.25),
        ("g = Gemm<alpha=3.0, beta=2.0>(a, b, c) y = Div(g, k)", 12, 8),
        ("g = Gemm(a, b, c) y = Neg(g)", -1, -1),
        ("m = Mul(a, k) y = Gemm<alpha=2.0>(m, b, c)", 0.5, 1),
        ("m = Div(b, k) y = Gemm(a, m, c)", 4, 1),
        ("m = Neg(a) n = Mul(b, k) y = Gemm(m, n)", -0.25, 1),
    ],
)
def test_scales(body: str, alpha: float, beta: float, shape: str) -> None:
    left = merged(case(body, constants=f"float{shape} k = {{0.25}}"), "Gemm")
    assert (left["alpha"], left.get("beta", 1)) == (alpha, beta)


@pytest.mark.parametrize(
    ("body", "constants"),
    [
        ("g = Gemm(a, b) y = Mul(g, k)", "float[4] k = {1, 2, 3, 4}"),
        ("g = Gemm(a, b) y = Div(k, g)", "float k = {2}"),
        ("g = Gemm(a, w) y = Mul(g, k)", "float k = {2}, float[5,1] w = {1, 2, 3, 4, 5}"),
        ("m = Mul(a, k) y = Gemm(m, w)", "float k = {2}, float[5,1] w = {1, 2, 3, 4, 5}"),
    ],
)
def test_other_scales_are_not_its_own(body: str, constants: str) -> None:
    kept(case(body, constants=constants))


def test_a_constant_of_more_axes_makes_the_result_larger() -> None:
    model = text_model("""agraph (float[3,5] a, float[5,4] b) => (float[1,3,4] y) <float[1,1,1] k = {2}>
        { g = Gemm(a, b) y = Mul(g, k) }""")
    kept(model)


def test_a_vector_that_the_scale_makes_a_matrix_stays() -> None:
    model = text_model("""agraph (float[5] v, float[5,4] b) => (float[1,4] y) <float[1,1] k = {2}>
        { m = Mul(v, k) y = Gemm(m, b) }""")
    kept(model, "what is scaled is not known to be a matrix")


@pytest.mark.parametrize("number", ["0", "inf", "nan"])
def test_scales_that_are_no_factor(number: str) -> None:
    model = case("k = Constant<value = float {1}>() g = Gemm(a, b) y = Mul(g, k)")
    model.graph.node[0].attribute[0].t.CopyFrom(onnx.numpy_helper.from_array(np.array(number, np.float32)))
    kept(model, "the scale is 0 or not finite")


def test_scales_the_attribute_cannot_hold() -> None:
    reason = "the scale does not fit the attribute, which is of type float"
    kept(case("g = Gemm<alpha=1e30>(a, b) y = Mul(g, k)", constants="float k = {1e30}"), reason)
    kept(case("g = Gemm<alpha=1e-30>(a, b) y = Mul(g, k)", constants="float k = {1e-30}"), reason)
    double = """agraph (double[3,5] a, double[5,4] b) => (double[3,4] y) <double k = {%s}>
        { g = Gemm(a, b) y = Mul(g, k) }"""
    kept(text_model(double % "0.1"), reason)
    merged(text_model(double % "0.125"), "Gemm")


@pytest.mark.parametrize("op", ["Add", "Sum"])
@pytest.mark.parametrize("shape", ["", "[1]", "[4]", "[1,4]", "[3,1]", "[1,1]", "[3,4]"])
def test_sums(shape: str, op: str) -> None:
    for pair in ("g, v", "v, g"):
        assert merged(case(f"g = Gemm<beta=3.0>(a, b) y = {op}({pair})", f"float{shape} v"), "Gemm") == {}


def test_symbols_name_equal_sizes() -> None:
    text = """agraph (float[n,5] a, float[5,k] b, float[{}] v) => (float[M,N] y)
        {{ g = Gemm(a, b) y = Add(g, v) }}"""
    for shape in ("n,k", "k", "1,k", "n,1"):
        model = text_model(text.format(shape))
        after = run_pass(model, MergeGemm())
        assert after.op_types == ["Gemm"]
        feeds = random_feeds(model, sizes={"n": 3, "k": 2})
        assert_equivalent(model, after.model, feeds, kind="reorder")
    for shape in ("n", "k,k", "m,k", "?", "?,k"):
        kept(text_model(text.format(shape)), LARGER)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ("float[2,3,4] v", "what is added to the product has more axes"),
        ("float[1,1,4] v", "what is added to the product has more axes"),
        ("float[3,n] v", LARGER),
        ("float v0", "the shape of what is added to the product is unknown"),
    ],
)
def test_sums_that_may_be_larger(inputs: str, reason: str) -> None:
    body = "v = Reshape(v0, s) " if "v0" in inputs else ""
    model = text_model(f"""agraph (float[3,5] a, float[5,4] b, {inputs}, int64[K] s) => (float y)
        {{ {body} g = Gemm(a, b) z = Add(g, v) y = ReduceSum<keepdims=0>(z) }}""")
    kept(model, reason)


def test_a_bias_goes_into_the_inner_product() -> None:
    model = case("m = MatMul(a, b) g = Gemm<transB=1>(a, q, m) y = Add(g, v)", "float[4] v")
    assert merged(model, "Gemm", "Gemm") == {"transB": 1}
    kept(case("m = MatMul(a, b) g = Gemm<beta=2.0>(a, b, m) y = Add(g, v)", "float[4] v"))
    kept(case("r = Relu(c) g = Gemm(a, b, r) y = Add(g, v)", "float[4] v"))


def test_two_products() -> None:
    model = case("g = Gemm(a, b) h = Gemm<transB=1>(a, q) y = Add(g, h)")
    assert merged(onnx.shape_inference.infer_shapes(model), "Gemm", "Gemm") == {}
    model = case("g = Gemm(a, b) h = Gemm<transB=1>(a, q) r = Relu(g) s = Add(g, h) y = Mul(r, s)")
    merged(onnx.shape_inference.infer_shapes(model), "Gemm", "Relu", "Gemm", "Mul")


def test_empty_products_integers_and_old_opsets_stay() -> None:
    kept(
        text_model("""agraph (float[3,0] a, float[0,4] b, float[4] v) => (float[3,4] y)
            { g = Gemm(a, b) y = Add(g, v) }"""),
        "the product sums up nothing",
    )
    kept(
        text_model("""agraph (int32[3,2] a, int32[2,4] b) => (int32[3,4] y) <int32 k = {2}>
            { g = Gemm(a, b) h = Neg(g) y = Mul(h, k) }""")
    )
    kept(case("t = Transpose<perm=[1,0]>(p) y = Gemm<broadcast=1>(t, b, c)", opset=6))


def test_in_a_body_and_in_a_function() -> None:
    model = text_model("""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[3,5] a, float[4,5] b, float[4] v, bool go) => (float[3,4] y) {
            y = If (go) <
                then_branch = yes () => (float[3,4] t) { u = Transpose(b) g = Gemm(a, u) t = Add(g, v) },
                else_branch = no () => (float[3,4] e) { e = my.f (a, b) }>
        }
        <opset_import: ["" : 17], domain: "my">
        f (a, b) => (y) { t = Transpose<perm=[1,0]>(b) g = Gemm<alpha=2.0>(a, t) y = Relu(g) }""")
    model.graph.node[0].attribute[0].g.node[0].attribute.append(onnx.helper.make_attribute("perm", [1, 0]))
    after = run_pass(model, MergeGemm())
    assert after.count("Gemm") == 2
    assert after.count("Transpose") == 0
    feeds = [random_feeds(model) | {"go": np.array(go)} for go in (True, False)]
    assert_equivalent(model, after.model, feeds, kind="reorder")


def test_parameters_of_a_function() -> None:
    model = text_model("""
        <ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        agraph (float[3,5] a, float[3,4] b) => (float[5,4] y) { y = my.f <flag=1> (a, b) }
        <opset_import: ["" : 17], domain: "my">
        f <flag> (a, b) => (y) { g = Gemm<transA: int = @flag>(a, b) y = Neg(g) }""")
    kept(model)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(st.data())
def test_random_neighbourhoods(data: st.DataObject) -> None:
    """Whatever stands around a Gemm, the numbers stay."""
    draw = data.draw
    lines, operands = [], []
    for name, flat in (("a", "p"), ("b", "q")):
        value = draw(st.sampled_from([name, flat]))
        if value == flat:
            lines.append(f"t{name} = Transpose<perm=[1,0]>({flat})")
            value = f"t{name}"
        for i in range(draw(st.integers(0, 2))):
            op = draw(st.sampled_from(["Mul({0}, k)", "Mul(k, {0})", "Div({0}, k)", "Neg({0})", "Relu({0})"]))
            lines.append(f"{name}{i}s = {op.format(value)}")
            value = f"{name}{i}s"
        operands.append(value)
    operands += draw(st.sampled_from([[], ["c"], ["v"]]))
    attributes = draw(st.sampled_from(["", "<alpha=0.5>", "<beta=-2.0>", "<alpha=2.0, beta=0.5>"]))
    lines.append(f"g = Gemm{attributes}({', '.join(operands)})")
    value = "g"
    for i in range(draw(st.integers(0, 3))):
        op = draw(st.sampled_from(["Mul({0}, k)", "Div({0}, k)", "Neg({0})", "Add({0}, v)", "Sum(c, {0})"]))
        lines.append(f"o{i} = {op.format(value)}")
        value = f"o{i}"
    body = " ".join(lines) + f" y = Relu({value})"
    model = onnx.shape_inference.infer_shapes(case(body, "float[4] v", "float k = {0.75}"))
    assert_equivalent(model, run_pass(model, MergeGemm()).model, kind="reorder")
