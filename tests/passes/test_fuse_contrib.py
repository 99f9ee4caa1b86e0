"""fuse-skip-layernorm, fuse-bias-gelu and fuse-embed-layernorm against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.benchmarking.profits import pattern_of
from onnxopt.claims import Pass
from onnxopt.examples import rewritten
from onnxopt.passes.fuse.fuse_bias_gelu import FuseBiasGelu
from onnxopt.passes.fuse.fuse_embed_layernorm import FuseEmbedLayernorm
from onnxopt.passes.fuse.fuse_skip_layernorm import FuseSkipLayernorm
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

WEIGHTS = """<float[4] gamma = {1.0, 2.0, -0.5, 3.0}, float[4] beta = {0.5, 0.0, 1.0, -1.0},
    float[4] bias = {2.0, 3.0, 0.5, 0.25}, float[1] short = {2.0},
    float[1,4] row = {0.5, 0.0, 1.0, -1.0}>"""


def inferred(text: str) -> onnx.ModelProto:
    return onnx.shape_inference.infer_shapes(text_model(text))


def residual(body: str, shape: str = "N,S,4", outputs: str = "", other: str | None = None) -> onnx.ModelProto:
    opset = '<ir_version: 11, opset_import: ["" : 23]>'
    given_shapes = f"float[{shape}] x, float[{other or shape}] r"
    return inferred(f"{opset} agraph ({given_shapes}) => (float[{shape}] y{outputs}) {WEIGHTS} {{ {body} }}")


NORMS = {
    "LayerNormalization(s, gamma, beta)": "SkipLayerNormalization",
    "LayerNormalization<epsilon = 0.01>(s, gamma)": "SkipLayerNormalization",
    "RMSNormalization<axis = -1>(s, gamma)": "SkipSimplifiedLayerNormalization",
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", ["N,S,4", "N,4"])
@pytest.mark.parametrize(
    "sum_of",
    [
        "s = Add(x, r)",
        "b = Add(x, bias) s = Add(b, r)",
        "b = Add(bias, x) s = Add(r, b)",
        "a = Add(r, bias) s = Add(x, a)",
    ],
)
def test_skip(norm: str, shape: str, sum_of: str) -> None:
    model = residual(f"{sum_of} y = {norm}", shape)
    done = run_pass(model, FuseSkipLayernorm())
    assert (done.op_types, done.declined) == ([NORMS[norm]], ())
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("where", ["before", "after", "output"])
def test_the_sum_stays_where_it_is_read(norm: str, where: str) -> None:
    bodies = {
        "before": f"s = Add(x, r) z = Neg(s) y = {norm}",
        "after": f"s = Add(x, r) y = {norm} z = Mul(y, s)",
        "output": f"z = Add(x, r) y = {norm.replace('(s', '(z')}",
    }
    model = residual(bodies[where], outputs=", float[N,S,4] z")
    done = run_pass(model, FuseSkipLayernorm())
    assert done.op_types[0] == NORMS[norm]
    assert len(done.op_types) == 1 + (where != "output")
    assert_equivalent(model, done.model, kind="reorder")


def test_a_biased_value_that_is_read_elsewhere_is_an_operand() -> None:
    body = "b = Add(x, bias) s = Add(b, r) y = LayerNormalization(s, gamma) z = Neg(b)"
    model = residual(body, outputs=", float[N,S,4] z")
    done = run_pass(model, FuseSkipLayernorm())
    assert sorted(done.op_types) == ["Add", "Neg", "SkipLayerNormalization"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("body", "shape", "other", "reason"),
    [
        ("s = Add(x, r) y = LayerNormalization(s, gamma)", "N,S,4", "S,4", "known to have one shape"),
        ("s = Add(x, r) y = LayerNormalization(s, gamma)", "N,S,4", "N,1,4", "known to have one shape"),
        ("s = Add(x, r) y = LayerNormalization(s, gamma)", "2,N,S,4", None, "last of two or three axes"),
        ("s = Add(x, r) y = LayerNormalization<axis = 1>(s, gamma)", "N,1,4", None, "last of two or three"),
        ("s = Add(x, r) y = LayerNormalization(s, short)", "N,S,4", None, "each element of the last axis"),
        (
            "s = Add(x, r) g = Abs(gamma) y = LayerNormalization(s, g) z = Neg(s)",
            "N,S,4",
            None,
            "made after it",
        ),
        ("s = Add(x, r) y = LayerNormalization(s, gamma, row)", "N,S,4", None, "the shape of the scale"),
        ("s = Add(x, r) y = LayerNormalization<epsilon=-0.1>(s, gamma)", "N,S,4", None, "is negative"),
        ("s = Add(x, r) y, m = LayerNormalization(s, gamma) z = Add(x, m)", "N,S,4", None, "is read too"),
    ],
)
def test_skip_refusals(body: str, shape: str, other: str | None, reason: str) -> None:
    outputs = f", float[{shape}] z" if "z =" in body else ""
    done = run_pass(residual(body, shape, outputs, other), FuseSkipLayernorm())
    assert done.changes == 0
    assert any(reason in one for one in done.declined), done.declined


@pytest.mark.parametrize(
    "body", ["y = LayerNormalization(x, gamma)", "s = Add(x, bias) y = LayerNormalization(s, gamma)"]
)
def test_no_residual(body: str) -> None:
    done = run_pass(residual(body), FuseSkipLayernorm())
    assert (done.changes, done.declined) == (0, ())


def test_types_that_the_operator_normalizes_in_float32() -> None:
    body = "s = Add(x, r) y = LayerNormalization(s, g)"
    text = f"""agraph (double[2,4] x, double[2,4] r, double[4] g) => (double[2,4] y) {{ {body} }}"""
    assert run_pass(inferred(text), FuseSkipLayernorm()).declined == (
        "its type is none that the operator takes",
    )


@pytest.mark.parametrize(
    ("gelu", "fused"),
    [
        ("Gelu", "BiasGelu"),
        ("com.microsoft.Gelu", "BiasGelu"),
        ('Gelu<approximate = "tanh">', "FastGelu"),
        ("com.microsoft.FastGelu", "FastGelu"),
    ],
)
@pytest.mark.parametrize("order", ["x, bias", "bias, x"])
@pytest.mark.parametrize("shape", ["4", "N,4", "2,3,4", "1,2,3,4"])
def test_bias_gelu(gelu: str, fused: str, order: str, shape: str) -> None:
    model = inferred(f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        agraph (float[{shape}] x) => (float[{shape}] y) {WEIGHTS} {{ s = Add({order}) y = {gelu}(s) }}""")
    done = run_pass(model, FuseBiasGelu())
    assert done.op_types == [fused]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("body", "kind", "reason"),
    [
        ("s = Add(x, short) y = Gelu(s)", "float[2,4]", "each element of the last axis"),
        ("s = Add(x, bias) y = Gelu(s)", "float[2,1]", "each element of the last axis"),
        ("s = Add(x, bias) y = Gelu(s) z = Neg(s)", "float[2,4]", "is also read elsewhere"),
        ("b = Cast<to = 11>(bias) s = Add(x, b) y = Gelu(s)", "double[2,4]", None),
        ("y = Gelu(x)", "float[2,4]", None),
        ("s = Add(x, x) y = Gelu(s)", "float[2,4]", None),
        ("s = Add(x, bias) y = com.microsoft.FastGelu(s, bias)", "float[2,4]", None),
    ],
)
def test_bias_gelu_stays(body: str, kind: str, reason: str | None) -> None:
    out = kind.split("[")[0] + "[N,M]"
    outputs = f", {out} z" if "z =" in body else ""
    done = run_pass(
        inferred(f"""<ir_version: 10, opset_import: ["" : 20, "com.microsoft" : 1]>
        agraph ({kind} x) => ({out} y{outputs}) {WEIGHTS} {{ {body} }}"""),
        FuseBiasGelu(),
    )
    assert done.changes == 0
    assert len(done.declined) == (reason is not None)
    assert all(reason is not None and reason in one for one in done.declined)


TABLES = """<float[6,4] words, float[2,4] types, float[5,4] places, float[4] gamma = {1.0, 2.0, -0.5, 3.0},
    float[4] beta = {0.5, 0.0, 1.0, -1.0}, int64[5] numbers = {0, 1, 2, 3, 4},
    int64[1,5] row = {0, 1, 2, 3, 4}, int64[1,1,5] cube = {0, 1, 2, 3, 4},
    int64[5] others = {0, 1, 3, 2, 4}, int64[1] zero = {0}, int64[1] one = {1}, int64[1] two = {2},
    int64 first = {1}, int64[1] last = {-1}>"""

LENGTHS = {
    "Shape with a start": "n = Shape<start = 1, end = 2>(ids)",
    "Gather": "h = Shape(ids) n = Gather(h, one)",
    "Gather of a scalar": "h = Shape(ids) g = Gather(h, first) n = Unsqueeze(g, zero)",
    "Slice": "h = Shape(ids) n = Slice(h, one, two, zero)",
}
COUNTED = "p = Slice(numbers, zero, n) place = Gather(places, p)"


def embedding(
    body: str, total: str = "a = Add(word, type) s = Add(a, place)", ids: str = "int64[N,S]"
) -> onnx.ModelProto:
    text = f"""<ir_version: 10, opset_import: ["" : 17]>
        agraph ({ids} ids, {ids} kinds, {ids} spots, int64[M,S] single) => (float[N,S,4] y) {TABLES} {{
        word = Gather(words, ids) type = Gather(types, kinds) {body} {total}
        y = LayerNormalization<epsilon = 0.001>(s, gamma, beta) }}"""
    model = text_model(text)
    rng = np.random.default_rng(0)
    for name, rows in (("words", 6), ("types", 2), ("places", 5)):
        array = rng.standard_normal((rows, 4)).astype(np.float32)
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return onnx.shape_inference.infer_shapes(model)


def embed_feeds(dtype: type = np.int64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    sizes = {"ids": 6, "kinds": 2, "spots": 5}
    feeds: dict[str, np.ndarray] = {
        name: rng.integers(0, rows, (2, 3)).astype(dtype) for name, rows in sizes.items()
    }
    return {**feeds, "single": np.zeros((1, 3), np.int64)}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(
    "total",
    [
        "a = Add(word, type) s = Add(a, place)",
        "a = Add(place, type) s = Add(word, a)",
        "a = Add(place, word) s = Add(type, a)",
    ],
)
def test_embeddings_with_counted_places(length: str, total: str) -> None:
    model = embedding(f"{LENGTHS[length]} {COUNTED}", total)
    done = run_pass(model, FuseEmbedLayernorm())
    assert done.op_types == ["Cast", "Cast", "EmbedLayerNormalization"]
    assert_equivalent(model, done.model, embed_feeds(), kind="reorder")


@pytest.mark.parametrize("ids", ["int64[N,S]", "int32[N,S]"])
def test_embeddings_with_place_ids(ids: str) -> None:
    model = embedding("place = Gather(places, spots)", ids=ids)
    done = run_pass(model, FuseEmbedLayernorm())
    assert done.count("Cast") == (3 if "64" in ids else 0)
    assert done.count("EmbedLayerNormalization") == 1
    dtype = np.int64 if "64" in ids else np.int32
    assert_equivalent(model, done.model, embed_feeds(dtype), kind="reorder")


def test_embeddings_without_types() -> None:
    model = embedding(f"{LENGTHS['Slice']} {COUNTED}", "s = Add(word, place)")
    done = run_pass(model, FuseEmbedLayernorm())
    assert done.count("EmbedLayerNormalization") == 1
    assert_equivalent(model, done.model, embed_feeds(), kind="reorder")


def test_a_row_of_numbers_and_a_length_that_is_read_elsewhere() -> None:
    body = "h = Shape(ids) n = Gather(h, one) p = Slice(row, zero, n, last, one) place = Gather(places, p)"
    total = "a = Add(word, type) s = Add(a, place) d = Cast<to = 1>(n)"
    model = embedding(body, total)
    model.graph.output.append(onnx.helper.make_tensor_value_info("d", 1, [1]))
    done = run_pass(model, FuseEmbedLayernorm())
    assert sorted(done.op_types) == ["Cast"] * 3 + ["EmbedLayerNormalization", "Gather", "Shape"]
    assert_equivalent(model, done.model, embed_feeds(), kind="reorder")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("p = Slice(others, zero, two) place = Gather(places, p)", "to be 0, 1, 2"),
        (f"{LENGTHS['Gather']} {COUNTED.replace('numbers', 'others')}", "to be 0, 1, 2"),
        (f"{LENGTHS['Gather'].replace('one', 'zero')} {COUNTED}", "to be 0, 1, 2"),
        (f"{LENGTHS['Gather'].replace('(ids)', '(single)')} {COUNTED}", "to be 0, 1, 2"),
        (f"{LENGTHS['Gather']} {COUNTED.replace('zero', 'one')}", "to be 0, 1, 2"),
        ("place = Gather(places, single)", "to be 0, 1, 2"),
        (f"{LENGTHS['Gather']} p = Slice(cube, zero, n, last) place = Gather(places, p)", "to be 0, 1, 2"),
        (f"{LENGTHS['Gather']} {COUNTED} z = Neg(place) word3 = Add(z, word)", None),
    ],
)
def test_embedding_refusals(body: str, reason: str | None) -> None:
    model = embedding(body)
    done = run_pass(model, FuseEmbedLayernorm())
    assert done.changes == 0
    assert len(done.declined) == 1
    assert (reason or "is also read elsewhere") in done.declined[0]


@pytest.mark.parametrize("one", [FuseSkipLayernorm(), FuseBiasGelu(), FuseEmbedLayernorm()])
def test_the_pattern_that_is_measured_is_rewritten(one: Pass) -> None:
    after = rewritten(one, pattern_of(one))
    assert any(node.domain == "com.microsoft" for node in after.graph)


@pytest.mark.parametrize("place", ["branch", "function"])
def test_subgraphs_and_functions(place: str) -> None:
    parts = "s = Add(x, r) p = LayerNormalization(s, g)"
    if place == "branch":
        model = inferred(f"""agraph (float[2,4] x, float[2,4] r, float[4] g, bool c) => (float[2,4] y) {{
            y = If (c) < then_branch = a () => (float[2,4] p) {{ {parts} }},
                         else_branch = b () => (float[2,4] q) {{ q = Neg(x) }} > }}""")
        done = run_pass(model, FuseSkipLayernorm())
        assert done.count("SkipLayerNormalization") == 1
        feeds = {**random_feeds(model), "c": np.array(True)}
        assert_equivalent(model, done.model, feeds, kind="reorder")
    else:
        model = text_model(f"""<ir_version: 10, opset_import: ["" : 17, "local" : 1]>
            agraph (float[2,4] x, float[2,4] r, float[4] g) => (float[2,4] y) {{ y = local.Norm(x, r, g) }}
            <domain: "local", opset_import: ["" : 17]> Norm (x, r, g) => (p) {{ {parts} }}""")
        done = run_pass(model, FuseSkipLayernorm())
        assert done.declined == ("its type is none that the operator takes",)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 4),
    broadcast=st.booleans(),
    with_bias=st.booleans(),
    keeps=st.booleans(),
    norm=st.sampled_from(sorted(NORMS)),
    swap=st.booleans(),
)
def test_any_residual(
    rank: int, broadcast: bool, with_bias: bool, keeps: bool, norm: str, swap: bool
) -> None:
    shape = ",".join(map(str, [*[2, 3, 5][: rank - 1], 4]))
    other = ",".join(["1"] * (rank - 1) + ["4"]) if broadcast else shape
    bias = "b = Add(x, bias)" if with_bias else "b = Identity(x)"
    order = "r, b" if swap else "b, r"
    body = f"{bias} s = Add({order}) y = {norm} " + ("z = Exp(s)" if keeps else "")
    model = residual(body, shape, f", float[{shape}] z" if keeps else "", other)
    done = run_pass(model, FuseSkipLayernorm())
    fused = rank in (2, 3) and not broadcast
    assert done.count(NORMS[norm]) == fused
    assert_equivalent(model, done.model, kind="reorder")
