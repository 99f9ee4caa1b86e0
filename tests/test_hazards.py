"""Whole recipes on models that hold what rewriting tools get wrong, with nothing left to the proof."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from onnxopt.graph import nodes
from onnxopt.model import opener
from onnxopt.pipeline import Outcome
from onnxopt.protobuf import dump
from onnxopt.recipe import load_recipe
from onnxopt.structure import checker_complaint, signature_of
from tests.support import assert_equivalent, random_feeds, text_model

RECIPES = ("default", "cpu")
HAZARDS = dict(
    part.split("\n", 1)
    for part in (Path(__file__).parent / "hazards.txt").read_text(encoding="utf-8").split("# ")[1:]
)
"""Name -> `(inputs) => (outputs) <tensors> { nodes }`."""


def hazard(text: str, opset: int = 17) -> onnx.ModelProto:
    """The model of a text; a tensor without a value that no node makes holds random numbers."""
    model = text_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\nagraph {text}')
    made = {name for node in model.graph.node for name in node.output}
    rng = np.random.default_rng(0)
    for info in [info for info in model.graph.value_info if info.name not in made]:
        kind = info.type.tensor_type
        dtype = onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)
        array = rng.standard_normal([d.dim_value for d in kind.shape.dim]).astype(dtype)
        model.graph.initializer.append(numpy_helper.from_array(array, info.name))
        model.graph.value_info.remove(info)
    return model


def rewritten(model: onnx.ModelProto, recipe: str) -> Outcome:
    """After a recipe, without a proof: nothing may be left out, and a second run finds nothing to do."""
    outcome = load_recipe(recipe).run(opener(model))
    assert outcome.left_out == ()
    assert outcome.settled
    assert checker_complaint(outcome.model) is None
    assert signature_of(outcome.model) == signature_of(ir.from_proto(model))
    first = dump(outcome.model)
    again = load_recipe(recipe).run(opener(first))
    assert again.changes == 0
    assert dump(again.model).SerializeToString() == first.SerializeToString()
    return outcome


def feeds_of(model: onnx.ModelProto) -> list[dict[str, np.ndarray]]:
    return [random_feeds(model, seed, dict.fromkeys("NM", size)) for seed, size in ((0, 3), (1, 5))]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", HAZARDS)
def test_numbers_stay(name: str, recipe: str) -> None:
    opset = re.search(r"\(opset (\d+)\)", name)
    before = hazard(HAZARDS[name], int(opset[1]) if opset else 17)
    outcome = rewritten(before, recipe)
    assert_equivalent(before, outcome.model, feeds_of(before), kind="reorder")


@pytest.mark.parametrize(
    "body",
    [
        "b = Bernoulli(half) y = Add(b, x)",
        "b = RandomNormalLike(half) y = Add(b, x)",
        "b = RandomUniform<shape=[100], seed=1.0>() y = Add(b, x)",
        "d = Dropout(half, ratio, yes) y = Add(d, x)",
        "a = RandomNormalLike(half) b = RandomNormalLike(half) y = Sub(a, b)",
    ],
)
def test_what_is_random_stays_random(body: str) -> None:
    values = ", ".join(["0.5"] * 100)
    before = hazard(
        f"(float[100] x) => (float[100] y) <float[100] half = {{{values}}}, float ratio = {{0.5}},"
        f"bool yes = {{1}}> {{ {body} }}"
    )
    outcome = rewritten(before, "default")
    x = {"x": np.zeros(100, np.float32)}
    session = ort.InferenceSession(dump(outcome.model).SerializeToString())
    draws = [session.run(None, x)[0] for _ in range(2)]
    assert not np.array_equal(*draws)


def test_batchnorm_in_training_normalises_by_the_batch() -> None:
    before = hazard(
        "(float[4,3] x) => (float[4,3] y, float[3] rm, float[3] rv) <float[3,3] w, float[3] g, float[3] b,"
        " float[3] m, float[3] v = {1, 2, 3}>"
        " { c = Gemm(x, w) y, rm, rv = BatchNormalization<training_mode=1>(c, g, b, m, v) }"
    )
    assert_equivalent(before, rewritten(before, "default").model, kind="reorder")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        (
            "(float[2,6] x, int64[2] s = {3, 4}) => (float[A,B] y) { y = Reshape(x, s) }",
            "s",
            np.array([4, 3], np.int64),
        ),
        (
            (
                "(float[2,3] x, float[3] k = {0, 0, 0}) => (float[2,4] y) <float[3,4] w>"
                " { a = Add(x, k) y = MatMul(a, w) }"
            ),
            "k",
            np.array([1, 2, 3], np.float32),
        ),
        (
            (
                "(float[1,3,4,4] x, float[5] k = {0, 0, 0, 0, 0}) => (float[1,5,4,4] y) <float[5,3,1,1] w>"
                " { y = Conv(x, w, k) }"
            ),
            "k",
            np.arange(5, dtype=np.float32),
        ),
    ],
)
def test_an_initializer_that_callers_override_stays_theirs(text: str, name: str, value: np.ndarray) -> None:
    before = hazard(text)
    after = rewritten(before, "default").model
    feeds = random_feeds(before)
    assert_equivalent(before, after, [feeds, {**feeds, name: value}], kind="reorder")


def test_an_integer_weight_stays_quantized() -> None:
    weight = numpy_helper.from_array(np.arange(-6, 6, dtype=np.int8).reshape(3, 4), "w")
    before = hazard(
        "(float[2,3] x) => (float[2,4] y) <float s = {0.1}, int8 z = {0}>"
        "{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s)"
        " y = MatMul(d, v) }"
    )
    before.graph.initializer.append(weight)
    outcome = rewritten(before, "default")
    assert sum(node.op_type == "DequantizeLinear" for node in nodes(outcome.model)) == 2
    assert_equivalent(before, outcome.model)


def test_a_float8_constant_is_kept_as_it_is() -> None:
    weight = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT8E4M3FN, [2], [1.0, 2.0])
    before = hazard("(float[2] x) => (float[2] y) { c = Cast<to=1>(w) y = Mul(x, c) }", opset=19)
    before.graph.initializer.append(weight)
    assert_equivalent(before, rewritten(before, "default").model)


def test_strings_and_sequences_are_left_alone() -> None:
    texts = numpy_helper.from_array(np.array(["a", "b"], object), "t")
    before = hazard(
        "(float[2,3] x) => (float[2,3] y, string[2] s) <int64 i = {1}>"
        "{ q = SequenceConstruct(x, x) y = SequenceAt(q, i) s = Identity(t) }"
    )
    before.graph.initializer.append(texts)
    assert_equivalent(before, rewritten(before, "default").model)


def test_an_empty_batch_keeps_its_shape() -> None:
    before = hazard(
        "(float[N,3,4] x) => (float[N,12] y) <int64 i = {0}, int64[1] z = {0}, int64[1] t = {12}>"
        "{ s = Shape(x) n = Gather(s, i) n1 = Unsqueeze(n, z) k = Concat<axis=0>(n1, t) y = Reshape(x, k) }"
    )
    after = rewritten(before, "default").model
    assert_equivalent(before, after, [{"x": np.zeros((n, 3, 4), np.float32)} for n in (0, 1, 3)])


def test_nodes_without_names_and_functions_of_the_model() -> None:
    text = """<ir_version: 10, opset_import: ["" : 17, "my" : 1]> agraph (float[N] x) => (float[N] y) {
        a = my.twice(x) y = my.twice(a) }
        <domain: "my", opset_import: ["" : 17]> twice (p) => (q) {
            two = Constant<value_float=2.0>() q = Mul(p, two)
        }"""
    before = onnx.parser.parse_model(text)
    after = rewritten(before, "default").model
    assert [node.op_type for node in nodes(after)] == ["Mul"]
    assert_equivalent(before, after, feeds_of(before), kind="reorder")


def test_a_shape_that_holds_in_a_branch_is_not_the_value_s_own() -> None:
    before = hazard("""(float[2,3] x, bool c) => (float y) <int64[1] z = {0}, int64 two = {2}> {
        u = If (c) < then_branch = a () => (float[2,3] p) { p = Neg(x) },
                     else_branch = b () => (float[1,2,3] q) { q = Unsqueeze(x, z) } >
        s = Shape(u) n = Size(s) flat = Equal(n, two)
        v = If (flat) < then_branch = d () => (float[2,3] r) { i = Identity(u) r = Exp(i) },
                        else_branch = e () => (float[1,2,3] w) { w = Abs(u) } >
        y = ReduceSum<keepdims = 0>(v)
    }""")
    body = before.graph.node[4].attribute[0].g
    body.value_info.append(onnx.helper.make_tensor_value_info("i", onnx.TensorProto.FLOAT, [2, 3]))
    after = rewritten(before, "default").model
    x = np.full((2, 3), 2, np.float32)
    assert_equivalent(before, after, [{"x": x, "c": np.array(c)} for c in (True, False)], kind="reorder")
