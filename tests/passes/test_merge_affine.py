"""merge-affine against the runtime: the product of layer, operator, order of operands, constant and place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.ledger import Ledger
from onnxopt.model import load
from onnxopt.passes.merge.merge_affine import MergeAffine
from onnxopt.protobuf import dump
from tests.passes.layers import KINDS, Kind, Sketch
from tests.support import assert_equivalent, execute, random_feeds, run_pass, sqnr, text_model

OVERRIDABLE = "is a graph input (overridable; --freeze-initializers folds it)"
ACROSS = "the constant does not run along the channels alone"
UNKNOWN = "the layer's input is not known to have as many channels as the constant"
LARGER = "the constant makes the layer's input larger"
BLOCK = "it ends a normalization or activation, which runtimes know as a whole"
OPS = ("Add", "Sub", "Mul", "Div")


def merged(model: onnx.ModelProto, left: list[str]) -> ir.Model:
    after = run_pass(model, MergeAffine())
    assert after.op_types == left
    assert after.declined == ()
    assert_equivalent(model, after.model, kind="reorder")
    return after.model


def kept(model: onnx.ModelProto, *reasons: str) -> None:
    after = run_pass(model, MergeAffine())
    assert after.changes == 0
    assert sorted(after.declined) == sorted(reasons)


def affine(
    sketch: Sketch, op: str, source: str, output: str, shape: tuple[int, ...], first: bool = False
) -> str:
    """A node of a constant `<output>_k` away from zero, as first or second operand."""
    k = sketch.constant(f"{output}_k", shape, 0.5, 2)
    return sketch.op(op, [k, source] if first else [source, k], output)


def channel_shapes(kind: Kind, channels: int) -> list[tuple[int, ...]]:
    trailing = (1,) * (len(kind.w) - 2)
    return [(), (1,), (channels, *trailing), (1, channels, *trailing), (1, 1, *trailing)]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_after_each_layer(kind: Kind, bias: bool, op: str) -> None:
    for shape in channel_shapes(kind, kind.outputs):
        for first in (False, True):
            sketch = Sketch(kind.x)
            affine(sketch, op, sketch.layer(kind, "x", "c", bias), "y", shape, first)
            model = sketch.model()
            if op == "Div" and first:
                kept(model, "the constant is divided by the run-time value")
            elif kind.op_type == "MatMul" and not bias and op in ("Add", "Sub"):
                kept(model)
            else:
                merged(model, ["MatMul", "Add"] if kind.op_type == "MatMul" and bias else [kind.op_type])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_before_each_layer(kind: Kind, bias: bool, op: str) -> None:
    shapes = channel_shapes(kind, kind.inputs)
    if "transA" in kind.attributes:
        shapes = [(), (1,), (5, 1), (1, 1)]
    shift = op in ("Add", "Sub")
    for shape in shapes:
        for first in (False, True):
            sketch = Sketch(kind.x)
            sketch.layer(kind, affine(sketch, op, "x", "n", shape, first), "y", bias)
            model = sketch.model()
            if op == "Div" and first:
                kept(model, "the constant is divided by the run-time value")
            elif shift and kind.op_type == "ConvTranspose":
                kept(model, "the shift does not reach all outputs of a ConvTranspose alike")
            elif shift and "pads" in kind.attributes:
                kept(model, "the padding of the Conv would need the shift")
            elif shift and kind.op_type == "MatMul" and not bias:
                kept(model)
            else:
                merged(model, ["MatMul", "Add"] if kind.op_type == "MatMul" and bias else [kind.op_type])


@pytest.mark.parametrize("op", ["Add", "Mul"])
@pytest.mark.parametrize(
    ("kind", "shape"),
    [
        (Kind("Conv", (1, 3, 8, 8), (6, 3, 3, 3), 6, 3), (6,)),
        (Kind("Conv", (1, 3, 8, 8), (6, 3, 3, 3), 6, 3), (6, 1)),
        (Kind("Conv", (1, 3, 8, 8), (6, 3, 3, 3), 6, 3), (1, 6, 6, 6)),
        (Kind("Conv", (1, 3, 8, 8), (6, 3, 3, 3), 6, 3), (2, 6, 1, 1)),
        (Kind("Conv", (1, 3, 8, 8), (6, 3, 3, 3), 6, 3), (1, 1, 1, 1, 1)),
        (Kind("Conv", (1, 3, 8, 8), (1, 3, 3, 3), 1, 3), (4, 1, 1)),
        (Kind("Conv", (1, 3, 8), (4, 3, 8), 4, 3), (4, 5)),
        (KINDS["gemm"], (3, 1)),
        (KINDS["gemm"], (3, 4)),
        (KINDS["gemm"], (1, 3, 4)),
        (Kind("Gemm", (3, 5), (5, 1), 1, 5), (4,)),
        (KINDS["matmul"], (3, 4)),
        (KINDS["matmul"], (2, 1, 4)),
        (Kind("MatMul", (3, 5), (5, 1), 1, 5), (4,)),
    ],
)
def test_other_constants_after_a_layer(kind: Kind, shape: tuple[int, ...], op: str) -> None:
    sketch = Sketch(kind.x)
    affine(sketch, op, sketch.layer(kind, "x", "c", bias=True), "y", shape)
    kept(sketch.model(), ACROSS)


@pytest.mark.parametrize(
    ("x", "kind", "shape", "reason"),
    [
        ((1, 1, 6), KINDS["conv1d"], (1, 3, 1), UNKNOWN),
        (
            ("n", "c", 6),
            KINDS["conv1d"],
            (1, 3, 1),
            UNKNOWN,
        ),
        ((3, 6), KINDS["conv1d"], (1, 3, 1), LARGER),
        ((3, 6), KINDS["conv1d"], (2, 3, 1), LARGER),
        ((1, 3, 3), KINDS["conv1d"], (3,), ACROSS),
        ((1, 3, 6), KINDS["conv1d"], (1, 3, 6), ACROSS),
        ((1, 3, 6), KINDS["conv1d"], (2, 1, 1), ACROSS),
        ((3, 1), KINDS["matmul"], (5,), UNKNOWN),
        ((5,), KINDS["matmul"], (1, 5), LARGER),
        ((5,), KINDS["gemm"], (1, 5), LARGER),
        ((5,), KINDS["gemm"], (3, 5), LARGER),
        ((5, 3), KINDS["gemm_transposed"], (3,), ACROSS),
    ],
)
def test_other_constants_before_a_layer(
    x: tuple[int | str, ...], kind: Kind, shape: tuple[int, ...], reason: str
) -> None:
    sketch = Sketch(x)
    sketch.layer(kind, affine(sketch, "Mul", "x", "n", shape), "y")
    kept(sketch.model(), reason)


def test_matrices_of_higher_rank() -> None:
    for x, shape in (((2, 3, 5), (1, 1, 4)), ((2, 3, 5), (4,)), ((5,), (4,)), ((2, 2, 3, 5), ())):
        sketch = Sketch(x)
        affine(sketch, "Mul", sketch.layer(KINDS["matmul"], "x", "c", bias=True), "y", shape)
        merged(sketch.model(), ["MatMul", "Add"])


def test_unknown_shapes() -> None:
    sketch = Sketch((1, 3, 5, 5))
    r = sketch.op("Relu", ["x"], "r")
    n = affine(sketch, "Mul", r, "n", (1, 3, 1, 1))
    c = sketch.layer(Kind("Conv", (), (4, 3, 3, 3), 4, 3), n, "c")
    affine(sketch, "Add", c, "y", (1, 4, 1, 1))
    model = sketch.model(unknown_shapes=True)
    after = run_pass(model, MergeAffine())
    assert after.op_types == ["Relu", "Mul", "Conv"]
    assert after.declined == (ACROSS,)
    matrix = Sketch((3, 5))
    c = matrix.layer(KINDS["matmul"], matrix.op("Relu", ["x"], "r"), "c")
    affine(matrix, "Mul", c, "y", (1, 4))
    kept(matrix.model(unknown_shapes=True), ACROSS)


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("opset", [7, 9, 13, 14, 15, 17])
def test_types_and_opsets(opset: int, dtype: str) -> None:
    for kind in (KINDS["gemm_scaled"], *([KINDS["conv2d_group"]] if dtype != "float64" else [])):
        sketch = Sketch(kind.x, dtype)
        c = sketch.layer(kind, affine(sketch, "Div", "x", "n", ()), "c", bias=True)
        shape = (kind.outputs, *(1,) * (len(kind.w) - 2))
        affine(sketch, "Sub", affine(sketch, "Mul", c, "d", shape), "y", shape, first=True)
        merged(sketch.model(opset=opset), [kind.op_type])


def test_before_opset_7_nothing_is_merged() -> None:
    sketch = Sketch((3, 5))
    sketch.op("Mul", [sketch.op("MatMul", ["x", sketch.constant("w", (5, 4))], "c"), "k"], "y", broadcast=1)
    sketch.constant("k", (4,))
    kept(sketch.model(opset=6, ir_version=4))


def test_chains_collapse_into_one_layer() -> None:
    kind = KINDS["conv2d"]
    sketch = Sketch(kind.x)
    value = affine(sketch, "Div", affine(sketch, "Mul", "x", "a", (1, 3, 1, 1)), "b", ())
    value = sketch.layer(kind, value, "c")
    for number, op in enumerate(("Add", "Mul", "Sub", "Div", "Mul")):
        value = affine(sketch, op, value, f"d{number}", (1, 4, 1, 1), first=op == "Sub")
    merged(sketch.model(), ["Conv"])


def test_the_affine_between_two_layers_goes_into_the_first() -> None:
    kind = KINDS["conv1d"]
    sketch = Sketch(kind.x)
    n = affine(sketch, "Add", sketch.layer(kind, "x", "c"), "n", (4, 1))
    sketch.layer(Kind("Conv", (), (2, 4, 3), 2, 4, {"pads": [1, 1]}), n, "y")
    model = merged(sketch.model(), ["Conv", "Conv"])
    assert [len(node.inputs) for node in model.graph] == [3, 2]


@pytest.mark.parametrize(("name", "what"), [("c_w", "weight"), ("c_b", "bias"), ("y_k", "constant")])
@pytest.mark.parametrize("kind", ["conv2d", "transposed2d", "gemm_scaled", "matmul"])
def test_an_overridable_initializer(name: str, what: str, kind: str) -> None:
    sketch = Sketch(KINDS[kind].x)
    c = sketch.layer(KINDS[kind], "x", "c", bias=True)
    affine(sketch, "Mul", c, "y", (4, *(1,) * (len(KINDS[kind].w) - 2)))
    kept(sketch.model(overridable=[name]), f"the {what} {OVERRIDABLE}")
    kept(sketch.model(opset=8, ir_version=3, overridable=list(sketch.constants)), f"the weight {OVERRIDABLE}")


def test_what_lies_between_is_read_elsewhere() -> None:
    kind = KINDS["conv1d"]
    sketch = Sketch(kind.x)
    c = sketch.layer(kind, affine(sketch, "Mul", "x", "n", ()), "c")
    affine(sketch, "Mul", c, "y", ())
    kept(
        sketch.model(outputs=["n", "c", "y"]),
        "the output of the Mul is also a graph output",
        "the output of the Conv is also a graph output",
    )
    sketch.op("Relu", ["n"], "p")
    sketch.op("Relu", ["c"], "q")
    kept(
        sketch.model(outputs=["p", "q", "y"]),
        "the output of the Mul is also read elsewhere",
        "the output of the Conv is also read elsewhere",
    )


def test_two_layers_share_a_weight() -> None:
    kind = KINDS["gemm_scaled"]
    sketch = Sketch(kind.x)
    affine(sketch, "Mul", sketch.layer(kind, "x", "c"), "y", (4,))
    sketch.op("Gemm", ["x", "c_w"], "z", **kind.attributes)
    merged(sketch.model(outputs=["y", "z"]), ["Gemm", "Gemm"])


def test_a_shift_takes_no_new_weight() -> None:
    sketch = Sketch((1, 600))
    c = sketch.op("Gemm", ["x", sketch.constant("w", (600, 600))], "c")
    affine(sketch, "Add", c, "y", (600,))
    sketch.op("Gemm", ["x", "w"], "z")
    model = merged(sketch.model(outputs=["y", "z"]), ["Gemm", "Gemm"])
    assert [node.inputs[1].name for node in model.graph if node.inputs[1] is not None] == ["w", "w"]
    sketch.nodes[1].op_type = "Mul"
    kept(sketch.model(outputs=["y", "z"]), "the weight is shared and too large to duplicate")


def test_a_product_of_run_time_values_is_no_layer() -> None:
    kept(
        text_model(
            """agraph (float[2, 3] x, float[3, 2] w, float[1, 1, 2] p, float[1, 1, 1] q)
            => (float[2, 2] y, float[1, 1, 2] z) <float k = {2}, float[2, 3] j = {1, 2, 3, 4, 5, 6}>
            { a = Mul (x, k)  b = MatMul (a, w)  y = Mul (b, k)
              c = Conv (p, q)  z = Mul (c, k) }"""
        )
    )
    kept(text_model("agraph (float[2] x) => (float[2] y) { a = Gemm (x, x) y = Add (a, a) }"))


def test_integers_stay() -> None:
    kept(
        text_model(
            """agraph (int32[2, 2] x) => (int32[2, 2] y)
            <int32[2, 2] w = {1, 2, 3, 4}, int32 k = {2}> { a = MatMul (x, w)  y = Div (a, k) }"""
        ),
        "the weight is of type INT32",
    )


def test_division_by_zero_stays() -> None:
    sketch = Sketch((3, 5))
    affine(sketch, "Div", sketch.layer(KINDS["gemm"], "x", "c"), "y", (4,))
    sketch.constants["y_k"][1] = 0
    kept(sketch.model(), "scale or shift are not finite")


BLOCKS = {
    "gelu": "a = Mul (x, r) b = Erf (a) c = Add (b, o) d = Mul (x, c) e = Mul (d, h)",
    "layer norm": """a = ReduceMean <axes = [-1]> (x) b = Sub (x, a) c = Mul (b, b)
        d0 = ReduceMean <axes = [-1]> (c) d1 = Sqrt (d0) d = Div (b, d1) e0 = Mul (d, g) e = Add (e0, g)""",
    "hard swish": "a = Add (x, o) b = Clip (a, h, o) c = Mul (x, b) d = Div (c, h) e = Mul (d, g)",
}


@pytest.mark.parametrize("block", BLOCKS)
def test_the_end_of_a_block_that_runtimes_fuse(block: str) -> None:
    model = text_model(
        f"""agraph (float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {{1, 2, 3, 4, 5, 6}}, float r = {{0.7071067}}, float o = {{1}}, float h = {{0.5}},
         float[3] g = {{1, 2, 3}}, float[2] k = {{1, 2}}>
        {{ {BLOCKS[block]} p = MatMul (e, w) y = Add (p, k) }}"""
    )
    if block == "hard swish":
        merged(onnx.shape_inference.infer_shapes(model), ["Add", "Clip", "Mul", "MatMul", "Add"])
    else:
        kept(model, BLOCK)


def test_in_a_function() -> None:
    model = text_model(
        """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        agraph (float[1, 2, 3] x) => (float[1, 1, 3] y) { y = local.layer (x) }
        <opset_import: ["" : 17], domain: "local">
        layer (x) => (y) {
            w = Constant <value = float[1, 2, 1] {1, 2}> ()
            two = Constant <value_float = 2.0> ()
            c = Conv (x, w)
            d = Mul (c, two)
            y = Add (two, d)
        }"""
    )
    merged(model, ["layer", "Constant", "Constant", "Conv"])


@pytest.mark.parametrize("holds", [False, True])
def test_in_a_branch(holds: bool) -> None:
    model = text_model(
        """agraph (bool p, float[2, 3] x) => (float[2, 2] y)
        <float[3, 2] w = {1, 2, 3, 4, 5, 6}, float[2] s = {1, 2}> { o = MatMul (x, w) y = If (p) <
            then_branch = one () => (float[2, 2] a) { b = MatMul (x, w) a = Mul (s, b) },
            else_branch = two () => (float[2, 2] c) { c = Mul (o, s) }> }"""
    )
    after = run_pass(model, MergeAffine())
    assert after.op_types == ["MatMul", "If", "MatMul", "Mul"]
    assert after.declined == ("the output of the MatMul is also read in another graph",)
    feeds = {"p": np.array(holds), "x": np.ones((2, 3), np.float32)}
    assert_equivalent(model, after.model, feeds, kind="reorder")


def test_large_external_weights_are_not_read(tmp_path: Path) -> None:
    sketch = Sketch((2, 600))
    c = sketch.op("Gemm", ["x", sketch.constant("w", (600, 600))], "c")
    affine(sketch, "Mul", affine(sketch, "Mul", c, "d", ()), "y", (600,))
    proto, copy = sketch.model(), sketch.model()
    path = tmp_path / "model.onnx"
    onnx.save(copy, path, save_as_external_data=True, size_threshold=100_000, location="data")
    model = load(path)
    MergeAffine().apply(model, Ledger(pass_name="merge-affine"))
    assert [node.op_type for node in model.graph] == ["Gemm"]
    weight = model.graph[0].inputs[1]
    assert weight is not None
    assert isinstance(weight.const_value, ir.LazyTensor)
    assert dump(model).SerializeToString() == dump(model).SerializeToString()
    feeds = random_feeds(proto)
    assert sqnr(execute(proto, feeds)[0], execute(model, feeds)[0]) > 120


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_chains(data: st.DataObject) -> None:
    draw = data.draw
    kind = KINDS[draw(st.sampled_from(list(KINDS)))]
    sketch = Sketch(kind.x, seed=draw(st.integers(0, 99)))
    ends = (1,) * (len(kind.w) - 2)
    operators = st.sampled_from([(op, first) for op in OPS for first in (False, True)][:-1])
    value = "x"
    for number in range(draw(st.integers(0, 2))):
        column = (kind.inputs, 1) if "transA" in kind.attributes else (kind.inputs, *ends)
        shape = draw(st.sampled_from([(), column]))
        op, first = draw(operators)
        value = affine(sketch, op, value, f"a{number}", shape, first)
    value = sketch.layer(kind, value, "c", draw(st.booleans()))
    for number in range(draw(st.integers(0, 3))):
        shape = draw(st.sampled_from([(), (kind.outputs, *ends), (1, kind.outputs, *ends)]))
        op, first = draw(operators)
        value = affine(sketch, op, value, f"d{number}", shape, first)
    sketch.op("Identity", [value], "y")
    model = sketch.model()
    after = run_pass(model, MergeAffine())
    assert_equivalent(model, after.model, kind="reorder")
