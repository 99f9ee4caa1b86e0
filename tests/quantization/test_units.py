"""What can be quantized, and for each node that cannot, why: said in words that tell what to do."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.quantization.fusion import kernels_of
from onnxopt.targets import PLACEMENTS
from tests.quantization.quantizing import (
    X86,
    bytes_of,
    model_of,
    quantized,
    random,
    reasons,
    samples_for,
    surveyed,
)
from tests.support import text_model

FREEZE = "is a graph input (overridable; --freeze-initializers makes it constant)"
IMAGE = "agraph (float[1,8,9,9] x) => (float[] y)"
ROWS = "agraph (float[3,16] x) => (float[] y)"
WEIGHTS = {"w": random(16, 8, 3, 3), "b": random(16)}
MATRIX = {"w": random(16, 8), "b": random(8)}


def overridable(text: str, name: str, **constants: np.ndarray) -> ir.Model:
    """A model of which one initializer is a graph input."""
    model = model_of(text, **constants)
    value = model.graph.initializers[name]
    model.graph.inputs.append(value)
    return model


def test_reasons_of_convolutions() -> None:
    conv = f"{IMAGE} {{ y = Conv(x, w, b) }}"
    assert reasons(model_of(conv, **WEIGHTS)) == []
    assert reasons(overridable(conv, "w", **WEIGHTS)) == [f"Conv: its weight {FREEZE}"]
    assert reasons(overridable(conv, "b", **WEIGHTS)) == [f"Conv: its bias {FREEZE}"]
    computed = "agraph (float[1,8,9,9] x, float[4,8,3,3] w) => (float[] y) { y = Conv(x, w) }"
    assert reasons(model_of(computed)) == ["Conv: its weight is computed at run time"]
    biased = "agraph (float[1,8,9,9] x, float[16] b) => (float[] y) { y = Conv(x, w, b) }"
    assert reasons(model_of(biased, w=WEIGHTS["w"])) == ["Conv: its bias is no constant"]
    constant = f"{IMAGE} {{ y = Conv(c, w) }}"
    assert reasons(model_of(constant, w=WEIGHTS["w"], c=random(1, 8, 9, 9))) == [
        "Conv: its operands are constants"
    ]
    turned = f"{IMAGE} {{ y = ConvTranspose(x, w) }}"
    assert reasons(model_of(turned, w=random(8, 4, 2, 2))) == [
        "ConvTranspose: the target has no integer kernel for it"
    ]
    assert reasons(model_of(turned, w=random(16, 16, 2, 2)), PLACEMENTS["tensorrt"]) == []


@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_reasons_of_other_types(dtype: str) -> None:
    kind = np.dtype("float16" if dtype == "float16" else "float64")
    name = {"float16": "FLOAT16", "double": "DOUBLE"}[dtype]
    text = f"agraph ({dtype}[3,16] x) => ({dtype}[] y) {{ a = MatMul(x, w) c = Transpose(a) y = Add(c, c) }}"
    model = model_of(text, w=random(16, 8).astype(kind))
    assert reasons(model) == ["MatMul: its weight is no matrix of float32"]
    assert surveyed(model).units == ()
    computed = f"agraph ({dtype}[3,3] x) => ({dtype}[] y) {{ y = MatMul(x, x) }}"
    assert reasons(model_of(computed)) == [f"MatMul: its operands are of type {name}"]
    conv = f"agraph ({dtype}[1,8,9,9] x) => ({dtype}[] y) {{ y = Conv(x, w) }}"
    assert reasons(model_of(conv, w=WEIGHTS["w"].astype(kind))) == [f"Conv: its weight is of type {name}"]


def test_reasons_of_gemm() -> None:
    def of(node: str, **constants: np.ndarray) -> list[str]:
        return reasons(model_of(f"{ROWS} {{ y = {node} }}", **{**MATRIX, **constants}))

    assert of("Gemm(x, w, b)") == []
    for node in ("Gemm<alpha = 0.5>(x, w, b)", "Gemm<transA = 1>(x, v)"):
        assert of(node, v=random(3, 5)) == ["Gemm: its factors are scaled or transposed"]
    assert of("Gemm<beta = 0.5>(x, w, b)") == ["Gemm: its bias is scaled"]
    for shape in ((1,), (3, 8), (3, 1), ()):
        assert of("Gemm(x, w, b)", b=random(*shape)) == ["Gemm: its bias has not one number a column"]
    assert of("Gemm<transB = 1>(v, x)", v=random(5, 16)) == ["Gemm: its first factor is a constant"]
    computed = "agraph (float[3,16] x, float[16,8] z) => (float[] y) { y = Gemm(x, z, b) }"
    assert reasons(model_of(computed, b=MATRIX["b"])) == [
        "Gemm: it has a bias, and its weight is computed at run time"
    ]
    for name, word in (("w", "weight"), ("b", "bias")):
        model = overridable(f"{ROWS} {{ y = Gemm(x, w, b) }}", name, **MATRIX)
        assert reasons(model) == [f"Gemm: its {word} {FREEZE}"]


def test_reasons_of_matmul() -> None:
    assert reasons(overridable(f"{ROWS} {{ y = MatMul(x, w) }}", "w", w=MATRIX["w"])) == [
        f"MatMul: its weight {FREEZE}"
    ]
    assert reasons(model_of(f"{ROWS} {{ y = MatMul(x, w) }}", w=random(16))) == [
        "MatMul: its weight is no matrix of float32"
    ]
    both = model_of(f"{ROWS} {{ c = MatMul(w, w) y = Add(c, c) }}", w=random(4, 4))
    assert reasons(both) == ["MatMul: its operands are constants"]


def test_what_has_no_range_stays() -> None:
    model = model_of(
        f"{ROWS} {{ a = Log(n) c = MatMul(a, w) y = Add(c, c) }}", n=-np.ones((3, 16), np.float32), **MATRIX
    )
    done = quantized(model)
    assert done.surveyed.left == {"MatMul: an operand has no known range (it was never finite)": ("c",)}
    assert done.sites == {}
    assert bytes_of(done.model) == bytes_of(model)
    empty = model_of("agraph (float[0,16] x) => (float[] y) { c = MatMul(x, w) y = Relu(c) }", w=MATRIX["w"])
    assert list(quantized(empty).surveyed.left) == [
        "MatMul: an operand has no known range (it was never finite)"
    ]


BODY = """
agraph (float[3,16] x, bool c) => (float[] y) {
    a = MatMul(x, w)
    y = If(c) <
        then_branch = then () => (float[] t) { p = MatMul(a, v) t = Relu(p) },
        else_branch = other () => (float[] e) { q = MatMul(a, u) e = Neg(q) }
    >
}
"""


def test_nodes_in_bodies_and_functions_are_named() -> None:
    model = model_of(BODY, w=MATRIX["w"], v=random(8, 8), u=random(8, 8))
    left = "it is in a body or function, whose values are not calibrated"
    assert surveyed(model).left == {f"MatMul: {left}": ("p", "q")}
    proto = text_model(
        '<ir_version: 10, opset_import: ["" : 17, "my" : 1]> '
        "agraph (float[3,16] x, float[16,8] w) => (float[] y) { y = my.Twice(x, w) } "
        '<domain: "my", opset_import: ["" : 17]> Twice (x, w) => (y) { a = MatMul(x, w) y = Add(a, a) }'
    )
    held = ir.from_proto(proto)
    assert isinstance(held, ir.Model)
    assert surveyed(held).left == {f"MatMul: {left}": ("a",)}


def test_what_a_body_reads_is_as_an_integer_kernel_wrote_it() -> None:
    model = model_of(BODY, w=MATRIX["w"], v=random(8, 8), u=random(8, 8))
    feeds = [{"x": random(3, 16), "c": np.array(flag)} for flag in (True, False)]
    done = quantized(model, feeds)
    done.check()
    assert done.fusion.fused == ("a",)
    assert done.least_sqnr() >= 30
    read = {value.name for body in bodies(done.model) for node in body for value in node.inputs if value}
    assert "a_dequantized" in read
    assert "a" not in read


def bodies(model: ir.Model) -> list[ir.Graph]:
    return [
        attr.as_graph() for node in model.graph if node.op_type == "If" for attr in node.attributes.values()
    ]


@pytest.mark.parametrize(
    ("node", "opset"),
    [
        ("AveragePool<kernel_shape = [2, 2], dilations = [1, 1]>(x)", 19),
        ('Resize<mode = "linear">(x, , s)', 17),
        ('Resize<coordinate_transformation_mode = "tf_crop_and_resize">(x, r, s)', 17),
        ("Tanh(x)", 17),
        ("Softmax<axis = 0>(x)", 17),
        ("LeakyRelu(c)", 17),
        ("Sub(x, x)", 17),
    ],
)
def test_light_nodes_without_an_integer_kernel_stay_silently(node: str, opset: int) -> None:
    crop = {
        "r": np.array([0, 0, 0.1, 0.1, 1, 1, 0.9, 0.9], np.float32),
        "s": np.array([1, 1, 2, 2], np.float32),
    }
    model = model_of(f"{IMAGE} {{ y = {node} }}", opset=opset, **crop, c=random(1, 8, 9, 9))
    found = surveyed(model)
    assert found.units == ()
    assert found.left == {}


def test_indices_of_a_pool_and_references_are_no_units() -> None:
    pool = "agraph (float[1,8,9,9] x) => (float[] y, int64[] i) { y, i = MaxPool<kernel_shape = [2, 2]>(x) }"
    assert surveyed(model_of(pool)).units == ()
    missing = model_of(f"{IMAGE} {{ y = Concat<axis = 1>(x, x) }}")
    node = missing.graph[0]
    node.replace_input_with(1, None)
    assert surveyed(missing).units == ()


def test_numbers_that_decide_over_shapes_stay_exact() -> None:
    """An old export of upsampling: sizes as floats, times a factor."""
    text = """agraph (float[1,8,H,W] x) => (float[] y) {
        s = Shape(x) n = Slice(s, two, four) f = Cast<to = 1>(n) m = Mul(f, factor) u = Slice(m, zero, two)
        r = Floor(u) i = Cast<to = 7>(r) h = Slice(s, zero, two) k = Concat<axis = 0>(h, i) a = LeakyRelu(x)
        y = Resize(a, , , k)
    }"""
    ints = {name: np.array([n]) for name, n in (("zero", 0), ("two", 2), ("four", 4))}
    model = model_of(text, factor=2.5, **ints)
    done = quantized(model, samples_for(model, H=37, W=211))
    assert set(done.sites) == {"a", "y"}
    assert done.runs()[0]["y"].shape == (1, 8, 92, 527)


def test_a_unit_knows_its_parts() -> None:
    text = f"{IMAGE} {{ a = Conv(x, w, b) r = Relu(a) m = MaxPool<kernel_shape = [2, 2]>(r) y = Add(m, c) }}"
    conv, pool, add = surveyed(model_of(text, **WEIGHTS, c=random(16, 1, 1))).units
    assert (conv.site, conv.reads, conv.weight, conv.output.name) == ("a", (0,), 1, "r")
    assert (conv.is_layer, conv.is_move, conv.bias.name if conv.bias else "") == (True, False, "b")
    assert (pool.is_move, pool.output.name, [v.name for v in pool.sources]) == (True, "m", ["r"])
    assert (add.reads, add.weight, add.bias) == ((0,), 1, None)
    assert conv.others == ()
    (concat,) = surveyed(
        model_of(f"{IMAGE} {{ y = Concat<axis = 0>(c, x, d) }}", c=random(1, 8, 9, 9), d=random(2, 8, 9, 9))
    ).units
    assert (concat.reads, concat.weight, concat.others) == ((1,), 0, (2,))


@pytest.mark.parametrize(
    ("tail", "output"),
    [
        ("Relu(a)", "y"),
        ("Clip(a, zero, six)", "y"),
        ("Clip(a, one, six)", "a"),
        ("Clip(a, , six)", "a"),
        ("Clip(six, a)", "a"),
        ("Tanh(a)", "a"),
    ],
)
def test_only_an_activation_that_starts_at_zero_belongs_to_a_unit(tail: str, output: str) -> None:
    model = model_of(f"{ROWS} {{ a = MatMul(x, w) y = {tail} }}", w=random(16, 8), zero=0.0, one=1.0, six=6.0)
    (unit,) = [unit for unit in surveyed(model).units if unit.site == "a"]
    assert unit.output.name == output


def test_a_value_that_others_read_keeps_its_activation_apart() -> None:
    shared = f"{ROWS} {{ a = MatMul(x, w) r = Relu(a) y = Sub(r, a) }}"
    (unit,) = surveyed(model_of(shared, w=random(16, 8))).units
    assert unit.output.name == "a"
    (output,) = surveyed(
        model_of(
            "agraph (float[3,16] x) => (float[] a, float[] y) { a = MatMul(x, w) y = Relu(a) }",
            w=random(16, 8),
        )
    ).units
    assert output.output.name == "a"


CONSTANT = f"""{ROWS} {{
    w = Constant<value = float[2,2] {{1, 2, 3, 4}}>()
    y = MatMul(x, w)
}}"""


def test_weights_in_constant_nodes_are_weights() -> None:
    proto = text_model(CONSTANT.replace("[3,16]", "[3,2]"))
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    assert isinstance(model, ir.Model)
    done = quantized(model)
    assert done.fusion.fused == ("y",)
    assert kernels_of(done.model)["QLinearMatMul"] == 1
    np.testing.assert_array_equal(done.array("w_quantized"), [[42, 64], [127, 127]])


def test_a_survey_does_not_change_the_model() -> None:
    model = model_of(BODY, w=MATRIX["w"], v=random(8, 8), u=random(8, 8))
    before = bytes_of(model)
    surveyed(model, X86)
    assert bytes_of(model) == before
