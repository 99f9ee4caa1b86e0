"""Weights on disk are folded without being read, to the same elements as in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from onnxopt import streamed
from onnxopt.ledger import Ledger
from onnxopt.model import load
from onnxopt.passes.fold import fold_constants
from onnxopt.passes.fold.fold_constants import FoldConstants
from onnxopt.storage import save
from onnxopt.streamed import Streamed
from onnxopt.structure import find_problem
from tests.support import assert_equivalent, text_model

TYPES = {"FLOAT": "float", "FLOAT16": "float16", "BFLOAT16": "bfloat16", "DOUBLE": "double", "INT32": "int32"}
MOVED = [
    "t = Transpose(w)",
    "t = Transpose<perm = [1, 0, 2]>(w)",
    "t = Reshape(w, r)",
    "u = Transpose(w) t = Reshape(u, r)",
    "u = Reshape(w, r) t = Transpose(u)",
    "t = Flatten<axis = 2>(w)",
    "t = Identity(w)",
    "u = Unsqueeze(w, one) v = Transpose(u) t = Squeeze(v, two)",
    "t = Slice(w, one, three)",
    "t = Slice(w, one, three, two)",
    "t = Slice(w, three, one, one, back)",
    "p, q = Split<axis = 1>(w, parts) t = Concat<axis = 1>(q, p)",
    "t = Concat<axis = -1>(w, w)",
    "t = Concat<axis = 0>(w, small)",
    "t = Gather(w, rows)",
    "t = Gather<axis = -2>(w, rows)",
]
COMPUTED = [
    "t = Neg(w)",
    "t = Mul(w, row)",
    "u = Transpose(w) v = Add(u, scalar) t = Transpose(v)",
    "u = Mul(w, row) t = Slice(u, one, three)",
    "p, q = Split<axis = 0>(w, halves) t = Sub(q, p)",
    "u = Abs(w) v = Relu(u) t = Div(v, row)",
    "t = Cast<to = 10>(w)",
    "t = Cast<to = 1>(w)",
]
UNREAD = (ir.ExternalTensor, Streamed)


def model_of(body: str, kind: str) -> onnx.ModelProto:
    """y is what `body` makes of the weight w, which holds numbers above zero."""
    dtype = ir.DataType[kind]
    rng = np.random.default_rng(0)
    weight = rng.integers(1, 9, (4, 5, 6)).astype(dtype.numpy())
    floats = f"{TYPES[kind]}[6] row = {{1, 2, 3, 4, 5, 6}}, {TYPES[kind]} scalar = {{2}}"
    proto = text_model(
        f"""agraph () => ({TYPES[kind]} y)
        <int64[2] r = {{10, 12}}, int64[1] one = {{1}}, int64[1] two = {{2}}, int64[1] three = {{3}},
         int64[1] back = {{-1}}, int64[2] parts = {{2, 3}}, int64[2] halves = {{2, 2}},
         int64[2, 3] rows = {{0, 3, -1, 2, 2, 1}}, {floats}> {{ {body} y = Identity(t) }}"""
    )
    for name, array in (("w", weight), ("small", weight[:1])):
        proto.graph.initializer.append(ir.to_proto(ir.tensor(array, dtype=dtype, name=name)))
    proto.graph.output[0].type.tensor_type.Clear()
    return onnx.shape_inference.infer_shapes(proto)


def folded(model: ir.Model) -> ir.TensorProtocol:
    ledger = Ledger()
    FoldConstants(max_growth=1 << 20).apply(model, ledger)
    assert find_problem(model, ledger.touched) is None
    (node,) = model.graph
    assert node.op_type == "Constant"
    return node.attributes["value"].as_tensor()


def test_what_needs_all_elements_is_worked_out_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = model_of("a = Transpose(w) t = ReduceSum(a)", "FLOAT")
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=200)
    monkeypatch.setattr(streamed, "LARGE", 0)
    monkeypatch.setattr(fold_constants, "LARGE", 0)
    expected = numpy_helper.to_array(
        next(t for t in model_of("t = Identity(w)", "FLOAT").graph.initializer if t.name == "w")
    ).sum()
    assert folded(load(tmp_path / "m.onnx")).numpy() == expected


def test_a_weight_that_is_moved_is_saved_and_runs(tmp_path: Path) -> None:
    proto = text_model(
        """agraph (float[2, 700] x) => (float[2, 600] y) <int64[1] zero = {0}, int64[1] end = {600}> {
        t = Transpose(w) c = Slice(t, zero, end, one) y = MatMul(x, c) }"""
    )
    weight = np.random.default_rng(0).normal(size=(650, 700)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1]), "one"))
    onnx.save(
        onnx.shape_inference.infer_shapes(proto),
        tmp_path / "m.onnx",
        save_as_external_data=True,
        location="w",
    )
    model = load(tmp_path / "m.onnx")
    FoldConstants().apply(model, Ledger())
    assert [node.op_type for node in model.graph] == ["MatMul"]
    assert model.graph[0].inputs[1] is not None
    assert isinstance(model.graph[0].inputs[1].const_value, Streamed)
    assert_equivalent(proto, model, kind="reorder")
    save(model, tmp_path / "out.onnx")
    assert_equivalent(proto, load(tmp_path / "out.onnx"), kind="reorder")


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("body", MOVED + COMPUTED)
def test_the_same_elements_as_in_memory(
    body: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = model_of(body, kind)
    expected = folded(load(proto))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="w", size_threshold=200)
    for module in (streamed, fold_constants):
        monkeypatch.setattr(module, "LARGE", 0)
    result = folded(load(tmp_path / "m.onnx"))
    assert isinstance(result, UNREAD) == (body in MOVED or kind != "INT32")
    assert (result.dtype, result.shape) == (expected.dtype, expected.shape)
    assert result.tobytes() == expected.tobytes()
