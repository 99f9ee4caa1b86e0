"""infer-shapes: the record grows, it never contradicts, and the signature stays."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import onnxopt.inference
from models.scale import chain
from onnxopt.graph import nodes
from onnxopt.ledger import Ledger
from onnxopt.model import load
from onnxopt.passes import infer_shapes
from onnxopt.passes.infer_shapes import InferShapes
from onnxopt.passes.lift_constants import LiftConstants
from tests.random_graphs import random_model
from tests.support import assert_equivalent, execute, random_feeds, run_pass, text_model


def record(model: ir.Model) -> dict[str | None, str]:
    """Type and shape of what nodes give, as text."""
    return {v.name: f"{v.type} {v.shape}" for node in nodes(model) for v in node.outputs}


def test_missing_types_and_shapes_are_filled_in() -> None:
    proto = text_model(
        """g (float[N, 3] x) => (float[A, B] y) <float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
            a = MatMul(x, w)\n b = Cast<to = 7>(a)\n s = Shape(a)\n c = Cast<to = 1>(b)\n y = Neg(c) }"""
    )
    result = run_pass(proto, InferShapes())
    assert result.changes == 1
    found = record(result.model)
    assert (found["a"], found["b"], found["s"]) == (
        "FLOAT [N,4]",
        "INT64 [N,4]",
        "INT64 [2]",
    )
    assert found["y"] == "FLOAT [A,B]"
    assert_equivalent(proto, result.model, random_feeds(proto, sizes={"N": 5}))


def test_names_that_inference_makes_up_are_not_kept() -> None:
    result = run_pass(
        "g (float[N] x, bool[N] m) => (float[M] y) { i = NonZero(m)\n a = Compress(x, m)\n y = Neg(a) }",
        InferShapes(),
    )
    assert record(result.model)["i"] == "INT64 [1,None]"
    assert record(result.model)["a"] == "FLOAT [None]"


@pytest.mark.parametrize(
    ("on_record", "after"),
    [
        ([None, 4], "[N,4]"),
        (["N", "K"], "[N,4]"),
        (["Other", 4], "[Other,4]"),
        ([7, None], "[7,4]"),
        ([None, 5], "[None,5]"),
        ([None], "[None]"),
        (None, "[N,4]"),
    ],
)
def test_the_record_is_refined_and_never_contradicted(
    on_record: list[int | str | None] | None, after: str
) -> None:
    model = load(
        text_model(
            """g (float[N, 3] x) => (float[A, B] y)
            <float[3, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> {
                a = MatMul(x, w)\n y = Neg(a) }"""
        )
    )
    value = next(iter(model.graph)).outputs[0]
    value.type = ir.TensorType(ir.DataType.FLOAT)
    value.shape = None if on_record is None else ir.Shape(on_record)
    InferShapes().apply(model, Ledger(pass_name="infer-shapes"))
    assert str(value.shape) == after


def test_a_type_on_record_is_not_contradicted() -> None:
    model = load(text_model("g (float[3] x) => (float[3] y) { a = Neg(x)\n y = Neg(a) }"))
    value = next(iter(model.graph)).outputs[0]
    value.type = ir.TensorType(ir.DataType.INT8)
    InferShapes().apply(model, Ledger(pass_name="infer-shapes"))
    assert (str(value.type), value.shape) == ("INT8", None)


def test_one_node_that_cannot_be_inferred_does_not_stop_the_rest() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "unknown" : 1]>
        g (float[2, 3] x, int64[2] k) => (float[?] y, int64[?] z) {
            a = unknown.Op(x)\n b = Transpose(x)\n c = MatMul(x, x)\n y = Sum(a, b, c)
            d = HardSwish(k)\n z = Neg(d) }"""
    )
    found = record(run_pass(proto, InferShapes()).model)
    assert found["a"] == "None None"
    assert found["b"] == "FLOAT [3,2]"


def test_a_shape_that_can_be_overridden_is_unknown() -> None:
    proto = text_model(
        "g (float[4] x, int64[1] k) => (float[?] y) <int64[1] k = {4}> { a = Reshape(x, k)\n y = Neg(a) }"
    )
    assert record(run_pass(proto, InferShapes()).model)["a"] == "FLOAT [None]"


@pytest.mark.parametrize("cut", ["k, four, zero", "zero, k, zero", "one, four, k", "zero, four, zero, k"])
@pytest.mark.parametrize("inside", [False, True])
def test_a_shape_that_is_cut_where_the_user_says_is_unknown(cut: str, inside: bool) -> None:
    constants = "<int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}>"
    nodes, output = f"s = Shape(x) c = Slice(s, {cut}) a = Reshape(x, c) y = Neg(a)", "y"
    if inside:
        other = "e () => (float[A] v) { v = Neg(x) }"
        nodes = f"z = If (b) <then_branch = t () => (float[A] y) {{ {nodes} }}, else_branch = {other}>"
        output = "z"
    text = f"g (float[2,3,4] x, int64[1] k, bool b) => (float[A] {output}) {constants} {{ {nodes} }}"
    assert record(run_pass(text, InferShapes()).model)["a"] in ("None None", "FLOAT None")


@pytest.mark.parametrize("opset", [9, 10, 11])
def test_a_size_that_is_cut_loses_its_name(opset: int) -> None:
    """In onnx, a Slice of opset 10 keeps it."""
    constants = "" if opset < 10 else "<int64[1] s = {1}, int64[1] e = {3}>"
    cut = "Slice<starts = [1], ends = [3]>(x)" if opset < 10 else "Slice(x, s, e)"
    proto = text_model(
        f"""<ir_version: 5, opset_import: ["" : {opset}]>
        g (float[N, 3] x) => (float[A, 3] y) {constants} {{ t = {cut}\n u = Neg(t)\n y = Neg(u) }}"""
    )
    proto.graph.value_info.extend(onnx.shape_inference.infer_shapes(proto).graph.value_info[1:])
    assert record(run_pass(proto, InferShapes()).model)["t"] == "FLOAT [None,3]"


@pytest.mark.parametrize("lift", [False, True])
def test_bodies_also_after_their_constants_were_lifted(lift: bool) -> None:
    proto = text_model(
        """g (float[2, 3] x, bool c) => (float[?, ?] y) {
            y = If(c) <
                then_branch = t () => (float[?, ?] p) {
                    k = Constant<value_ints = [3, 2]>()\n a = Reshape(x, k)\n p = Neg(a) },
                else_branch = e () => (float[?, ?] q) { b = Transpose(x)\n q = Exp(b) }>
        }"""
    )
    before = run_pass(proto, LiftConstants()).model if lift else load(proto)
    InferShapes().apply(before, Ledger(pass_name="infer-shapes"))
    found = record(before)
    assert (found["a"], found["p"], found["b"]) == ("FLOAT [3,2]",) * 3
    assert len(before.graph.initializers) == lift
    x = np.ones((2, 3), np.float32)
    assert_equivalent(proto, before, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_a_loop_may_change_the_shape_it_carries() -> None:
    proto = text_model(
        """g (float[?] x) => (float[?] y) <int64 n = {3}, bool t = {1}> {
            u = Exp(x)
            v = Loop(n, t, u) <body = b (int64 i, bool c, float[?] s) => (bool d, float[?] r) {
                d = Identity(c)\n r = Concat<axis = 0>(s, s) }>
            y = Neg(v)
        }"""
    )
    result = run_pass(proto, InferShapes())
    assert record(result.model)["r"] == "FLOAT [None]"
    assert_equivalent(proto, result.model, {"x": np.ones(2, np.float32)})


def test_sequences() -> None:
    proto = text_model(
        "g (float[4] x) => (float[2] y) <int64 two = {2}, int64 one = {1}> "
        "{ s = SplitToSequence<axis = 0>(x, two)\n t = SequenceAt(s, one)\n y = Neg(t) }"
    )
    found = record(run_pass(proto, InferShapes()).model)
    assert found["s"].startswith("Sequence(Tensor(FLOAT))")
    assert found["t"].startswith("FLOAT")


def test_calls_of_functions() -> None:
    proto = text_model(
        """<ir_version: 10, opset_import: ["" : 17, "d" : 1]>
        g (float[2, 3] x) => (float[?, ?] y) { a = d.f(x)\n y = Neg(a) }
        <domain: "d", opset_import: ["" : 17]> f (a) => (b) { b = Transpose(a) }"""
    )
    result = run_pass(proto, InferShapes())
    assert record(result.model)["a"] == "FLOAT [3,2]"
    assert_equivalent(proto, result.model)


def test_large_weights_are_not_copied() -> None:
    """A weight whose content cannot be had: its type and shape are enough."""

    def unavailable() -> ir.TensorProtocol:
        raise AssertionError("the weight was read")

    tensor = ir.LazyTensor(unavailable, ir.DataType.FLOAT, ir.Shape([3, 1000]), name="w")
    weight = ir.Value(name="w", const_value=tensor, type=ir.TensorType(tensor.dtype), shape=tensor.shape)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["N", 3]))
    product = ir.Node("", "MatMul", [x, weight])
    product.outputs[0].name = "a"
    last = ir.Node("", "Neg", product.outputs)
    last.outputs[0].name = "y"
    graph = ir.Graph(
        [x], last.outputs, nodes=[product, last], initializers=[weight], opset_imports={"": 17}, name="g"
    )
    InferShapes().apply(ir.Model(graph, ir_version=10), Ledger(pass_name="infer-shapes"))
    assert str(product.outputs[0].shape) == "[N,1000]"


def test_nothing_is_claimed_where_all_is_known() -> None:
    proto = onnx.shape_inference.infer_shapes(
        text_model("g (float[2, 3] x) => (float[3, 2] y) { a = Transpose(x)\n y = Neg(a) }")
    )
    assert run_pass(proto, InferShapes()).changes == 0


def test_axes_of_a_squeeze_in_any_order() -> None:
    proto = text_model(
        """<ir_version: 8, opset_import: ["" : 9]> g (float[1, 5, 1] x) => (float[A] y) {
            a = Squeeze<axes = [2, 0]>(x)
            y = Neg(a)
        }"""
    )
    result = run_pass(proto, InferShapes())
    assert record(result.model)["a"] == "FLOAT [5]"
    assert_equivalent(proto, result.model)


def test_onnx_is_asked_once_about_nodes_that_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def counted(original: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object, **options: object) -> object:
            asked.append(args)
            return original(*args, **options)

        return call

    for name in ("infer_node_outputs", "infer_shapes"):
        monkeypatch.setattr(onnx.shape_inference, name, counted(getattr(onnx.shape_inference, name)))
    counts = []
    for length in (500, 2000):
        onnxopt.inference._infer.cache_clear()
        asked.clear()
        model = load(chain(length))
        InferShapes().apply(model, Ledger(pass_name="infer-shapes"))
        assert all(str(value.shape) in ("[batch,16]", "[16,batch]", "[16]") for value in outputs(model))
        counts.append(len(asked))
    assert counts[0] == counts[1] < 12


def outputs(model: ir.Model) -> list[ir.Value]:
    return [value for node in nodes(model) for value in node.outputs]


@given(seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 12))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_node_by_node_loses_nothing_that_the_whole_graph_tells(seed: int, steps: int) -> None:
    proto = random_model(seed, steps).proto
    del proto.graph.value_info[:]
    both, whole = load(proto), load(proto)
    InferShapes().apply(both, Ledger(pass_name="infer-shapes"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(infer_shapes, "_node_by_node", lambda model, names: ())
        InferShapes().apply(whole, Ledger(pass_name="infer-shapes"))
    for have, want in zip(outputs(both), outputs(whole), strict=True):
        assert want.type is None or have.type == want.type
        if want.shape is not None:
            assert have.shape is not None
            known = [(a, b) for a, b in zip(have.shape, want.shape, strict=True) if b != ir.SymbolicDim(None)]
            assert all(a == b for a, b in known)


def test_operators_that_give_one_type_only() -> None:
    """onnx's inference passes over most of ai.onnx.ml."""
    text = """<ir_version: 8, opset_import: ["" : 17, "ai.onnx.ml" : 1]>
    g (float[N, 3] x) => (float[A, B] y) {
      s = ai.onnx.ml.Scaler <offset = [0.0], scale = [2.0]> (x)
      y = Neg (s)
    }"""
    result = run_pass(text, InferShapes())
    assert record(result.model)["s"] == "FLOAT None"


@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.sampled_from(["all", "movement", "sizes"]))
def test_what_is_on_record_holds_at_every_size(seed: int, steps: int, family: str) -> None:
    random = random_model(seed, steps, family)
    del random.proto.graph.value_info[:]
    found = run_pass(random.proto, InferShapes()).model
    known = {v.name: v for node in found.graph for v in node.outputs if v.name and v.shape is not None}
    all_of_it = onnx.ModelProto()
    all_of_it.CopyFrom(random.proto)
    del all_of_it.graph.output[:]
    all_of_it.graph.output.extend(onnx.ValueInfoProto(name=name) for name in known)
    for feeds in random.feeds:
        sizes = dict[str | None, int]()
        for port in random.proto.graph.input:
            dims = port.type.tensor_type.shape.dim
            if port.name in feeds:
                sizes |= dict(zip([dim.dim_param for dim in dims], feeds[port.name].shape, strict=True))
        for (name, value), array in zip(known.items(), execute(all_of_it, feeds), strict=True):
            assert value.shape is not None
            assert len(value.shape) == array.ndim, name
            for dim, size in zip(value.shape.dims, array.shape, strict=True):
                assert (dim if isinstance(dim, int) else sizes.get(dim.value, size)) == size, name
