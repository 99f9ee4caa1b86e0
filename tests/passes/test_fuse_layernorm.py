"""fuse-layernorm, fuse-rmsnorm and merge-normalization against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.claims import Pass
from onnxopt.passes.fuse.fuse_layernorm import FuseLayernorm
from onnxopt.passes.fuse.fuse_rmsnorm import FuseRmsnorm
from onnxopt.passes.merge.merge_normalization import MergeNormalization
from tests.passes.expressions import Dim, expression_model
from tests.support import assert_equivalent, random_feeds, run_pass, text_model

MEAN = "ReduceMean(x, axes=[-1])"
CENTRED = f"Sub(x, {MEAN})"
VARIANCE = f"ReduceMean(Mul({CENTRED}, {CENTRED}), axes=[-1])"
ROOT = f"Sqrt(Add({VARIANCE}, 1e-5))"
NORMAL = f"Div({CENTRED}, {ROOT})"
RMS = "Div(x, Sqrt(Add(ReduceMean(Pow(x, 2.0), [-1]), 1e-5)))"


def shaped(
    text: str, shape: tuple[Dim, ...] = (2, 3, 8), opset: int = 17, **kwargs: object
) -> onnx.ModelProto:
    """The expression's model with inferred shapes."""
    model = expression_model(text, shape=shape, opset=opset, **kwargs)  # type: ignore[arg-type]
    return onnx.shape_inference.infer_shapes(model)


def spellings() -> list[str]:
    roots = [ROOT, f"Sqrt(Add(1e-5, {VARIANCE}))", f"Pow(Add({VARIANCE}, 1e-5), 0.5)"]
    roots.append(f"Sqrt(Add(ReduceMean(Pow({CENTRED}, 2.0), axes=[-1]), 1e-5))")
    moments = f"Sub(ReduceMean(Mul(x, x), axes=[-1]), Mul({MEAN}, {MEAN}))"
    roots += [f"Sqrt(Add({one}, 1e-5))" for one in (moments, f"Relu({moments})", f"Max({moments}, 0.0)")]
    texts = [f"Div({CENTRED}, {root})" for root in roots]
    texts += [f"Mul({CENTRED}, {one})" for one in (f"Reciprocal({ROOT})", f"Div(1.0, {ROOT})")]
    return [*texts, f"Mul(Pow(Add({VARIANCE}, 1e-5), -0.5), {CENTRED})"]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("text", spellings())
def test_spellings(text: str, share: bool) -> None:
    model = shaped(text, share=share)
    done = run_pass(model, FuseLayernorm())
    assert (done.op_types, done.declined) == (["LayerNormalization"], ())
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(("axes", "shape", "axis"), [([-1], ("N", 8), -1), ([-2, -1], (2, 3, 4, 5), -2)])
@pytest.mark.parametrize("opset", [17, 18, 22])
def test_axes_as_attribute_and_as_input(
    axes: list[int], shape: tuple[Dim, ...], axis: int, opset: int
) -> None:
    given_axes = f"axes={axes}" if opset < 18 else f"{axes}"
    model = shaped(NORMAL.replace("axes=[-1]", given_axes), shape, opset)
    done = run_pass(model, FuseLayernorm())
    assert done.count("LayerNormalization") == 1
    node = next(node for node in done.model.graph if node.op_type == "LayerNormalization")
    assert node.attributes["axis"].as_int() == axis
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize(("axis", "shape"), [(1, ("N", 3, 4, 5)), (-2, ("N", 8, 5)), (0, (8, "N"))])
@pytest.mark.parametrize("one", [FuseLayernorm(), FuseRmsnorm()])
def test_an_axis_that_is_not_the_last(one: Pass, axis: int, shape: tuple[Dim, ...], share: bool) -> None:
    text = NORMAL.replace("axes=[-1]", f"[{axis}]") if one.name == "fuse-layernorm" else RMS
    size = next(dim for dim in shape if isinstance(dim, int))
    place = axis % len(shape)
    weights = {
        name: np.linspace(1, 2, size, dtype=np.float32).reshape(-1, *[1] * (len(shape) - 1 - place))
        for name in ("gamma", "beta")
    }
    after = "Add(Mul({}, gamma), beta)" if one.name == "fuse-layernorm" else "Div({}, gamma)"
    text = after.format(text.replace("[-1]", f"[{axis}]"))
    model = shaped(text, shape, 23, weights=weights, share=share)
    done = run_pass(model, one)
    op_type = {"fuse-layernorm": "LayerNormalization", "fuse-rmsnorm": "RMSNormalization"}[one.name]
    assert done.op_types[:3] == ["Transpose", op_type, "Transpose"]
    both = run_pass(onnx.shape_inference.infer_shapes(_proto(done.model)), MergeNormalization())
    assert both.op_types == ["Transpose", op_type, "Transpose"]
    assert_equivalent(model, both.model, kind="reorder")


@pytest.mark.parametrize("scale", ["gamma", "ones"])
def test_the_form_of_batch_normalization(scale: str) -> None:
    factor = f"Mul(Reciprocal({ROOT}), {scale})"
    text = f"Add(Mul(x, {factor}), Sub(beta, Mul({MEAN}, {factor})))"
    weights = {"beta": np.arange(8, dtype=np.float32), scale: np.linspace(1, 2, 8, dtype=np.float32)}
    model = shaped(text, weights=weights)
    done = run_pass(model, FuseLayernorm())
    assert done.op_types == ["LayerNormalization", "Mul", "Add"]
    both = run_pass(onnx.shape_inference.infer_shapes(_proto(done.model)), MergeNormalization())
    assert both.op_types == ["LayerNormalization"]
    assert_equivalent(model, both.model, kind="reorder")


def _proto(model: object) -> onnx.ModelProto:
    import onnx_ir as ir

    assert isinstance(model, ir.Model)
    return ir.to_proto(model)


def test_a_factor_in_the_denominator() -> None:
    model = shaped(
        f"Mul({CENTRED}, Mul(Reciprocal({ROOT}), gamma))", weights={"gamma": np.array([2.0], np.float32)}
    )
    done = run_pass(model, FuseLayernorm())
    assert done.op_types == ["LayerNormalization", "Mul"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("text", "shape", "opset", "reason"),
    [
        (NORMAL, (2, 8), 16, "LayerNormalization came with opset 17"),
        (NORMAL, (2, "C"), 17, "the size of a normalized axis is not known"),
        (NORMAL.replace("axes=[-1]", "axes=[0, 1]"), (2, 3, 8), 17, "several axes that are not the last"),
        (NORMAL.replace("axes=[-1]", "axes=[-1], keepdims=0"), (8, 8), 17, "drops its axes"),
        (NORMAL.replace(VARIANCE, VARIANCE[:-5] + "[0])"), (2, 8), 17, "along different axes"),
    ],
)
def test_refusals(text: str, shape: tuple[Dim, ...], opset: int, reason: str) -> None:
    done = run_pass(shaped(text, shape, opset), FuseLayernorm())
    assert done.changes == 0
    assert len(done.declined) == 1
    assert reason in done.declined[0]


def test_a_type_that_is_more_precise() -> None:
    done = run_pass(shaped(NORMAL, dtype=np.float64), FuseLayernorm())
    assert done.declined == ("its type is DOUBLE",)


def test_float16() -> None:
    model = shaped(NORMAL.replace("1e-5", "1e-3"), dtype=np.float16)
    done = run_pass(model, FuseLayernorm())
    assert done.op_types == ["LayerNormalization"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    "text",
    [
        f"Div({CENTRED}, Add(Sqrt({VARIANCE}), 1e-5))",
        f"Div({CENTRED}, Sqrt(Add(ReduceMean(Abs({CENTRED}), axes=[-1]), 1e-5)))",
        f"Div(Sub(x, ReduceMax(x, axes=[-1])), {ROOT})",
        f"Div({CENTRED}, Sqrt({VARIANCE}))",
        f"Div(x, {ROOT})",
    ],
)
def test_what_is_something_else_stays(text: str) -> None:
    done = run_pass(shaped(text), FuseLayernorm())
    assert (done.changes, done.declined) == (0, ())


def test_a_mean_that_is_read_elsewhere() -> None:
    done = run_pass(shaped(NORMAL, outputs=[MEAN]), FuseLayernorm())
    assert done.declined == ("the output of its ReduceMean is also a graph output",)


def test_rows_without_variance_and_a_tiny_epsilon() -> None:
    model = shaped(NORMAL.replace("1e-5", "1e-12"), (3, 8))
    done = run_pass(model, FuseLayernorm())
    x = random_feeds(model)["x"]
    x[1] = 2.0
    assert_equivalent(model, done.model, {"x": x}, kind="reorder")


@pytest.mark.parametrize(("opset", "scale"), [(11, (4, 1)), (17, (4, 1)), (17, (1, 4, 1))])
def test_a_factor_for_each_channel_makes_it_an_instance_normalization(
    opset: int, scale: tuple[int, ...]
) -> None:
    weights = {
        "gamma": np.linspace(1, 2, 4, dtype=np.float32).reshape(scale),
        "beta": np.linspace(-1, 1, 4, dtype=np.float32).reshape(scale),
    }
    model = shaped(f"Add(Mul({NORMAL}, gamma), beta)", (2, 4, 8), opset, weights=weights)
    done = run_pass(model, FuseLayernorm())
    assert done.op_types == ["InstanceNormalization", "Mul", "Add"]
    done = run_pass(onnx.shape_inference.infer_shapes(_proto(done.model)), MergeNormalization())
    assert done.op_types == ["InstanceNormalization"]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize("narrow", [10, 16])
@pytest.mark.parametrize("exact", [True, False])
def test_casts_around(narrow: int, exact: bool) -> None:
    kind = {10: "float16", 16: "bfloat16"}[narrow]
    number = 1.5 if exact else 1.0001
    model = text_model(f"""agraph ({kind}[2,4] x) => ({kind}[2,4] y) {{
        scale = Constant<value_floats = [1.0, {number}, 2.0, 3.0]>()
        wide = Cast<to=1>(x)
        normal = LayerNormalization<epsilon=0.001>(wide, scale)
        y = Cast<to={narrow}>(normal)
    }}""")
    model = onnx.shape_inference.infer_shapes(model)
    done = run_pass(model, FuseLayernorm())
    if exact:
        assert done.op_types[-1] == "LayerNormalization"
        assert done.count("Cast") == 0
    else:
        assert done.declined == (f"scale or bias are no numbers of {kind.upper()}",)
    if narrow == 10:
        assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    "text",
    [
        RMS,
        "Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Mul(x, x), [-1]), 1e-5))))",
        "Mul(Div(1.0, Sqrt(Add(ReduceMean(Mul(x, x), [-1]), 1e-5))), x)",
        "Mul(x, Pow(Add(ReduceMean(Pow(x, 2.0), [-1]), 1e-5), -0.5))",
    ],
)
def test_rms(text: str) -> None:
    model = shaped(text, opset=23)
    done = run_pass(model, FuseRmsnorm())
    assert done.op_types == ["Constant", "RMSNormalization"][1 - done.count("Constant") :]
    assert_equivalent(model, done.model, kind="reorder")
    assert run_pass(shaped(text, opset=22), FuseRmsnorm()).declined == (
        "RMSNormalization came with opset 23",
    )


def test_rms_leaves_a_layer_normalization_alone() -> None:
    text = NORMAL.replace("axes=[-1]", "[-1]")
    done = run_pass(shaped(text, opset=23), FuseRmsnorm())
    assert (done.changes, done.declined) == (0, ())


@pytest.mark.parametrize("place", ["branch", "function"])
@pytest.mark.parametrize("one", [FuseLayernorm(), FuseRmsnorm()])
def test_subgraphs_and_functions(place: str, one: Pass) -> None:
    parts = """two = Constant<value_float=2.0>() e = Constant<value_float=0.01>()
        a = Constant<value_ints=[-1]>() m = ReduceMean(x, a) d = Sub(x, m) s = Pow(d, two)
        v = ReduceMean(s, a) t = Add(v, e) r = Sqrt(t)
        p = Div(d, r)"""
    if isinstance(one, FuseRmsnorm):
        parts = parts.replace("m = ReduceMean(x, a) d = Sub(x, m) ", "").replace("(d,", "(x,")
    if place == "branch":
        text = f"""<ir_version: 11, opset_import: ["" : 23]>
            agraph (float[2,4] x, bool c) => (float[2,4] y) {{
            y = If (c) < then_branch = a () => (float[2,4] p) {{ {parts} }},
                         else_branch = b () => (float[2,4] q) {{ q = Neg(x) }} > }}"""
    else:
        text = f"""<ir_version: 11, opset_import: ["" : 23, "local" : 1]>
            agraph (float[2,4] x) => (float[2,4] y) {{ y = local.Norm(x) }}
            <domain: "local", opset_import: ["" : 23]> Norm (x) => (p) {{ {parts} }}"""
    model = text_model(text)
    done = run_pass(model, one)
    if place == "branch":
        assert done.count("Div") == 0
        feeds = {**random_feeds(model), "c": np.array(True)}
        assert_equivalent(model, done.model, feeds, kind="reorder")
    else:
        assert done.declined == ("its type is unknown",)


def normalized(op_type: str, after: str, scale: tuple[int, ...] = (4,), bias: bool = True) -> str:
    """A normalization of x[2,4,4] with `after` behind it, where `n` is its output."""
    attributes = {"GroupNormalization": "<num_groups=2>", "InstanceNormalization": "<epsilon=0.01>"}
    second = ", b" if bias else ""
    return f"""<ir_version: 11, opset_import: ["" : 23]>
        agraph (float[2,4,4] x) => (float[2,4,4] y)
        <float{list(scale)} s = {{1.0, 2.0, -0.5, 3.0}}, float{list(scale)} b = {{0.5, 0.0, 1.0, -1.0}},
         float[4] row = {{2.0, 3.0, 0.5, 0.25}}, float[4,1] column = {{2.0, 3.0, 0.5, 0.25}},
         float one = {{2.0}}, float[1,1,4] padded = {{2.0, 3.0, 0.5, 0.25}}, float[2,4,4] whole>
        {{ n = {op_type}{attributes.get(op_type, "")}(x, s{second}) {after} }}"""


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operand", ["row", "one", "padded"])
@pytest.mark.parametrize("op_type", ["LayerNormalization", "RMSNormalization"])
@pytest.mark.parametrize("arithmetic", ["Mul(n, {})", "Mul({}, n)", "Div(n, {})", "Add(n, {})", "Sub(n, {})"])
def test_arithmetic_after_a_normalization_of_rows(
    op_type: str, operand: str, arithmetic: str, bias: bool
) -> None:
    if op_type == "RMSNormalization" and bias:
        return
    model = text_model(normalized(op_type, f"y = {arithmetic.format(operand)}", bias=bias))
    done = run_pass(model, MergeNormalization())
    shifts = arithmetic[0] in "AS"
    assert len(done.op_types) == 1 + (shifts and op_type == "RMSNormalization")
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize("operand", ["column", "one"])
@pytest.mark.parametrize("op_type", ["InstanceNormalization", "GroupNormalization"])
@pytest.mark.parametrize("arithmetic", ["Mul(n, {})", "Div(n, {})", "Add({}, n)", "Sub(n, {})"])
def test_arithmetic_after_a_normalization_of_channels(op_type: str, operand: str, arithmetic: str) -> None:
    model = text_model(normalized(op_type, f"y = {arithmetic.format(operand)}"))
    done = run_pass(model, MergeNormalization())
    assert done.op_types == [op_type]
    assert_equivalent(model, done.model, kind="reorder")


@pytest.mark.parametrize(
    ("op_type", "after", "reason"),
    [
        ("LayerNormalization", "y = Mul(n, column)", "does not run along the scale alone"),
        ("InstanceNormalization", "y = Mul(n, row)", "does not run along the scale alone"),
        ("LayerNormalization", "z = Abs(n) m = Mul(n, row) y = Add(m, z)", "is also read elsewhere"),
        ("LayerNormalization", "z = Abs(row) y = Mul(n, z)", "is computed at run time"),
        ("LayerNormalization", "t = Transpose<perm = [2, 0, 1]>(n) y = Mul(t, row)", "does not run along"),
        ("LayerNormalization", "t = Transpose(n) z = Abs(t) m = Mul(t, one) y = Add(m, z)", "read elsewhere"),
    ],
)
def test_arithmetic_that_stays(op_type: str, after: str, reason: str) -> None:
    model = onnx.shape_inference.infer_shapes(text_model(normalized(op_type, after)))
    done = run_pass(model, MergeNormalization())
    assert done.changes == 0
    assert any(reason in one for one in done.declined)


@pytest.mark.parametrize("after", ["y = Add(n, x)", "y = Mul(n, n)", "y = Sub(row, n)", "y = Div(row, n)"])
def test_arithmetic_with_something_else(after: str) -> None:
    done = run_pass(normalized("LayerNormalization", after), MergeNormalization())
    assert (done.changes, done.declined) == (0, ())


@pytest.mark.parametrize(
    ("operator", "scale", "merged"), [("Mul", 1.0, True), ("Mul", 2.0, False), ("Add", 2.0, True)]
)
def test_an_operand_of_the_caller_where_there_is_room(operator: str, scale: float, merged: bool) -> None:
    model = text_model(f"""agraph (float[2,4] x, float[4] w) => (float[2,4] y)
        <float[4] s = {{{scale}, {scale}, {scale}, {scale}}}>
        {{ n = LayerNormalization(x, s) y = {operator}(n, w) }}""")
    done = run_pass(model, MergeNormalization())
    assert (len(done.op_types) == 1) == merged
    assert_equivalent(model, done.model, kind="reorder")


def test_its_other_outputs_stay() -> None:
    model = text_model("""agraph (float[2,4] x) => (float[2,4] y, float[2,1] m)
        <float[4] s = {1.0, 2.0, 3.0, 4.0}> { n, m = LayerNormalization(x, s) y = Mul(n, s) }""")
    assert run_pass(model, MergeNormalization()).declined == ("its mean or deviation is read too",)


def test_a_shared_scale_stays_as_it_is() -> None:
    model = text_model("""agraph (float[2,4] x) => (float[2,4] y, float[2,4] z)
        <float[4] s = {1.0, 2.0, 3.0, 4.0}> { n = LayerNormalization(x, s) y = Mul(n, s) z = Add(x, s) }""")
    done = run_pass(model, MergeNormalization())
    assert done.op_types == ["LayerNormalization", "Add"]
    assert_equivalent(model, done.model, kind="reorder")


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    rank=st.integers(1, 4),
    axes=st.integers(1, 3),
    chain=st.lists(st.sampled_from(["Mul({}, w)", "Add(w, {})", "Sub({}, w)", "Div({}, w)"]), max_size=4),
    width=st.integers(0, 4),
    seed=st.integers(0, 99),
    spelling=st.sampled_from(spellings()),
)
def test_any_rank_and_any_arithmetic(
    rank: int, axes: int, chain: list[str], width: int, seed: int, spelling: str
) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(int(size) for size in rng.integers(2, 5, rank))
    taken = [-1 - i for i in range(min(axes, rank))]
    weight_shape = tuple(int(size) if rng.random() < 0.7 else 1 for size in shape[rank - min(width, rank) :])
    text = spelling.replace("[-1]", str(taken))
    for step in chain:
        text = step.format(text)
    weights = {"w": rng.uniform(0.5, 2, weight_shape).astype(np.float32)}
    model = shaped(text, shape, weights=weights)
    done = run_pass(model, FuseLayernorm())
    assert done.count("LayerNormalization") + done.count("InstanceNormalization") == 1
    both = run_pass(onnx.shape_inference.infer_shapes(_proto(done.model)), MergeNormalization())
    assert_equivalent(model, both.model, kind="reorder")
