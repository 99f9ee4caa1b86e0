"""Weights as products of two, held against the runtime and against the truncated decomposition itself."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from onnxopt.graph import constant_array, nodes
from onnxopt.inspection.costs import macs_of, sizes_read
from onnxopt.inspection.sizes import sized
from onnxopt.passes.factorize.factorize_weights import FactorizeWeights
from tests.support import Rewritten, assert_equivalent, execute, random_feeds, run_pass

RNG = np.random.default_rng(0)
FLOAT = onnx.TensorProto.FLOAT


def low_rank(outputs: int, inputs: int, rank: int) -> np.ndarray:
    """A matrix of that rank, [outputs, inputs]."""
    rng = np.random.default_rng(rank)
    product: np.ndarray = rng.standard_normal((outputs, rank)) @ rng.standard_normal((rank, inputs))
    return product


def layer(
    op_type: str,
    weight: np.ndarray,
    x: tuple[int | str, ...],
    y: tuple[int | str | None, ...],
    bias: int = 0,
    dtype: int = FLOAT,
    **attributes: Any,
) -> onnx.ModelProto:
    """A model of one layer."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    constants = {"w": weight.astype(kind)}
    if bias:
        constants["b"] = RNG.standard_normal(bias).astype(kind)
    node = helper.make_node(op_type, ["x", *constants], ["y"], name="layer", **attributes)
    value = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph([node], "g", [value("x", dtype, x)], [value("y", dtype, y)], tensors)
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 17)])


def macs(model: Any) -> int:
    found = sized(model, None, sizes_read)
    return macs_of(found.graph, found.shapes).weight


def shapes_of(done: Rewritten) -> list[tuple[int, ...]]:
    return [
        array.shape for node in nodes(done.model) if (array := constant_array(node.inputs[1])) is not None
    ]


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize(
    ("op_type", "attributes", "bias"),
    [
        ("MatMul", {}, 0),
        ("Gemm", {"alpha": 0.5, "beta": 2.0}, 40),
        ("Gemm", {"transB": 1}, 0),
        ("Gemm", {"transB": 1, "alpha": -2.0}, 40),
    ],
)
def test_a_matrix_of_low_rank_becomes_a_product(
    op_type: str, attributes: dict[str, Any], bias: int, multiple: int
) -> None:
    weight = low_rank(40, 48, 5)
    lead: tuple[int | str, ...] = ("N", 3) if op_type == "MatMul" else ("N",)
    stored = weight if "transB" in attributes else weight.T
    proto = layer(op_type, stored, (*lead, 48), (*lead, 40), bias, **attributes)
    done = run_pass(proto, FactorizeWeights(energy=1 - 1e-9, multiple=multiple))
    assert done.op_types == ["MatMul", op_type]
    assert shapes_of(done)[0] == (48, 5 if multiple == 1 else 8)
    assert_equivalent(proto, done.model, kind="reorder")


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_a_convolution_of_low_rank_is_the_same_in_whatever_way_it_is_written(data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, 3))
    kernel = tuple(data.draw(st.integers(1, 3)) for _ in range(rank))
    along = tuple(data.draw(st.booleans()) for _ in range(rank))
    inputs, outputs = data.draw(st.integers(3, 8)), data.draw(st.integers(3, 8))
    early = [k for k, one in zip(kernel, along, strict=True) if one]
    late = [k for k, one in zip(kernel, along, strict=True) if not one]
    matrix = low_rank(inputs * int(np.prod(early)), outputs * int(np.prod(late)), 1)
    order = [
        1,
        *(a for a, one in enumerate(along, 2) if one),
        0,
        *(a for a, one in enumerate(along, 2) if not one),
    ]
    weight = matrix.reshape(inputs, *early, outputs, *late).transpose(np.argsort(order))
    attributes: dict[str, Any] = {"strides": [data.draw(st.integers(1, 3)) for _ in kernel]}
    attributes["dilations"] = [data.draw(st.integers(1, 2)) for _ in kernel]
    mode = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    assume(not mode.startswith("SAME") or max(attributes["dilations"]) == 1)
    pads = [data.draw(st.integers(0, 2)) for _ in range(2 * rank)]
    attributes |= {"pads": pads} if mode == "NOTSET" else {"auto_pad": mode}
    sizes = tuple(data.draw(st.integers(5, 9)) for _ in kernel)
    known = data.draw(st.booleans())
    proto = layer("Conv", weight, (2, inputs, *sizes), (None,) * (2 + rank), outputs, **attributes)
    want = execute(proto, random_feeds(proto))[0]
    if known:
        proto.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", FLOAT, want.shape))
    done = run_pass(proto, FactorizeWeights(energy=1 - 1e-9))
    if done.changes:
        assert done.op_types == ["Conv", "Conv"]
        assert_equivalent(proto, done.model, kind="reorder")
        if known:
            assert macs(done.model) < macs(proto_model(proto))
    else:
        assert done.declined == ("no fewer multiply-adds",)


def proto_model(proto: onnx.ModelProto) -> Any:
    import onnx_ir as ir

    return ir.from_proto(proto)
