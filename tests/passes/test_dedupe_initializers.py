"""dedupe-initializers: equal bytes are stored once, in a graph that all readers see."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from onnxopt.graph import tensors
from onnxopt.ledger import Ledger
from onnxopt.model import load
from onnxopt.passes import dedupe_initializers
from onnxopt.passes.dedupe_initializers import DedupeInitializers
from onnxopt.storage import save
from onnxopt.streamed import pieces
from tests.support import assert_equivalent, run_pass, text_model


def model_of(*arrays: np.ndarray) -> onnx.ModelProto:
    """The sum of the input and each array, cast to float32."""
    helper, nodes, last = onnx.helper, [], "x"
    for number, _ in enumerate(arrays):
        nodes.append(helper.make_node("Cast", [f"w{number}"], [f"c{number}"], to=onnx.TensorProto.FLOAT))
        nodes.append(helper.make_node("Add", [last, f"c{number}"], [f"s{number}"]))
        last = f"s{number}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)],
        [ir.to_proto(ir.tensor(array, name=f"w{number}")) for number, array in enumerate(arrays)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def test_equal_initializers_are_stored_once() -> None:
    a, b = np.arange(6, dtype=np.float32), np.arange(1, 7, dtype=np.float32)
    proto = model_of(a, b, a, a)
    result = run_pass(proto, DedupeInitializers())
    assert list(result.model.graph.initializers) == ["w0", "w1"]
    assert result.changes == 2
    assert_equivalent(proto, result.model)


@pytest.mark.parametrize(
    "other",
    [
        np.zeros(4, np.int32),
        np.zeros((2, 2), np.float32),
        np.array([0, 0, 0, -0.0], np.float32),
        np.array([0, 0, 0, 1], np.float32),
        np.zeros(4, np.float16),
    ],
    ids=["type", "shape", "negative zero", "content", "width"],
)
def test_different_ones_stay(other: np.ndarray) -> None:
    proto = model_of(np.zeros(4, np.float32), other)
    assert run_pass(proto, DedupeInitializers()).changes == 0


@pytest.mark.parametrize(
    "dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.float16, np.bool_, np.int8]
)
def test_any_type(dtype: type) -> None:
    array: np.ndarray = np.array([0, 1, 1, 0]).astype(dtype)
    proto = model_of(array, array.copy())
    result = run_pass(proto, DedupeInitializers())
    assert result.changes == 1
    if dtype is not ml_dtypes.float8_e4m3fn:
        assert_equivalent(proto, result.model)


def test_a_difference_behind_the_first_bytes() -> None:
    a = np.zeros(5000, np.float32)
    b = a.copy()
    b[-1] = 1
    proto = model_of(a, b, a.copy())
    result = run_pass(proto, DedupeInitializers())
    assert list(result.model.graph.initializers) == ["w0", "w1"]
    assert_equivalent(proto, result.model)


def test_strings() -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 9, opset_import: ["" : 19]>
        g () => (bool[2] y, bool[2] z) {
            y = Equal(a, b)
            z = Equal(a, c)
        }"""
    )
    for name, texts in {"a": ["x", "yz"], "b": ["xy", "z"], "c": ["x", "yz"]}.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(texts, object), name))
    result = run_pass(proto, DedupeInitializers())
    assert list(result.model.graph.initializers) == ["a", "b"]
    assert_equivalent(proto, result.model)


def test_graph_inputs_and_outputs_stay() -> None:
    proto = text_model(
        """g (float[2] x, float[2] k) => (float[2] y, float[2] w)
        <float[2] k = {1, 2}, float[2] w = {1, 2}, float[2] v = {1, 2}> { y = Sum(x, k, w, v) }"""
    )
    result = run_pass(proto, DedupeInitializers())
    assert result.changes == 0
    assert_equivalent(proto, result.model)


def test_bodies_use_what_lies_around_them_but_not_beside() -> None:
    proto = text_model(
        """g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
            u = Add(x, w)
            y = If(c) <
                then_branch = t () => (float[2] p)
                    <float[2] a = {1, 2}, float[2] b = {3, 4}> { p = Sum(u, a, b) },
                else_branch = f () => (float[2] q) <float[2] d = {3, 4}> { q = Mul(u, d) }>
        }"""
    )
    result = run_pass(proto, DedupeInitializers())
    assert result.changes == 1
    assert sum(1 for _ in tensors(result.model)) == 3
    x = np.array([1, -2], np.float32)
    assert_equivalent(proto, result.model, [{"x": x, "c": np.array(c)} for c in (True, False)])


def test_external_data_is_read_in_pieces_and_stays_external(tmp_path: Path) -> None:
    a = np.arange(3000, dtype=np.float32)
    save(load(model_of(a, a + 1, a)), tmp_path / "m.onnx", external_data=True)
    model = load(tmp_path / "m.onnx")
    DedupeInitializers().apply(model, Ledger(pass_name="dedupe-initializers"))
    assert list(model.graph.initializers) == ["w0", "w1"]
    assert all(isinstance(tensor, ir.ExternalTensor) for tensor in tensors(model))


def test_weights_are_read_no_further_than_to_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = 1 << 18
    arrays = [np.zeros(size, np.float32) for _ in range(5)]
    arrays[0][0] = arrays[1][100_000] = arrays[2][100_000] = arrays[3][size - 1] = 1
    save(load(model_of(*arrays)), tmp_path / "m.onnx", external_data=True)
    model, read = load(tmp_path / "m.onnx"), Counter[str]()

    def counted(tensor: ir.TensorProtocol, chunk: int) -> Iterator[bytes | memoryview]:
        for piece in pieces(tensor, chunk):
            read[tensor.name or ""] += len(piece)
            yield piece

    monkeypatch.setattr(dedupe_initializers, "pieces", counted)
    DedupeInitializers().apply(model, Ledger(pass_name="dedupe-initializers"))
    assert list(model.graph.initializers) == ["w0", "w1", "w3", "w4"]
    assert read["w0"] < read["w1"] == read["w3"] == size * 4


def test_weights_that_cannot_be_equal_are_not_read() -> None:
    read: list[str] = []

    def lazy(name: str, size: int) -> ir.Value:
        def produce() -> ir.TensorProtocol:
            read.append(name)
            return ir.tensor(np.zeros(size, np.float32))

        tensor = ir.LazyTensor(produce, ir.DataType.FLOAT, ir.Shape([size]), name=name)
        return ir.Value(name=name, const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT))

    weights = [lazy("a", 3), lazy("b", 4), lazy("c", 5)]
    node = ir.Node("", "Concat", weights, [ir.AttrInt64("axis", 0)], name="n")
    node.outputs[0].name = "y"
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=weights, opset_imports={"": 17}, name="g")
    DedupeInitializers().apply(ir.Model(graph, ir_version=10), Ledger(pass_name="dedupe-initializers"))
    assert read == []
