"""A layer as a product of matrices, held against the runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from onnxopt.calibration.windows import from_rows, operand_rows, result_rows, weight_rows
from onnxopt.graph import nodes
from tests.support import execute, random_feeds, sqnr, text_model


def node_of(proto: onnx.ModelProto) -> ir.Node:
    return next(iter(nodes(ir.from_proto(proto))))


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_rows_of_a_convolution_multiply_to_what_the_runtime_computes(data: st.DataObject) -> None:
    rank, group = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 2, 4]))

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    kernel, strides, dilations, sizes = draw(1, 3), draw(1, 3), draw(1, 2), draw(5, 8)
    mode = data.draw(st.sampled_from(["NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"]))
    assume(mode == "NOTSET" or not mode.startswith("S") or max(dilations) == 1)
    pads = f", pads = {[*draw(0, 2), *draw(0, 2)]}" if mode == "NOTSET" else ""
    image, weight_shape = (", ".join(map(str, one)) for one in ((2, 4, *sizes), (8, 4 // group, *kernel)))
    proto = text_model(f"""
        conv (float[{image}] x, float[{weight_shape}] w) => (float[] y) {{
            y = Conv<group = {group}, strides = {[*strides]}, dilations = {[*dilations]},
                     kernel_shape = {[*kernel]}, auto_pad = "{mode}"{pads}>(x, w)
        }}""")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds, node = random_feeds(proto), node_of(proto)
    [expected] = execute(proto, feeds)
    rows, weight = operand_rows(node, feeds["x"], kernel, 1 << 30), weight_rows(node, feeds["w"])
    found = np.einsum("pgk,gok->pgo", rows, weight).reshape(2, *expected.shape[2:], 8)
    assert sqnr(expected, np.moveaxis(found, -1, 1)) > 100
    np.testing.assert_array_equal(from_rows(node, weight, feeds["w"].shape), feeds["w"])
    few = operand_rows(node, feeds["x"], kernel, 3)
    assert len(few) == min(3, len(rows))
    assert all((rows == one).all((1, 2)).any() for one in few)


@given(st.data())
@settings(derandomize=True, deadline=None, max_examples=60)
def test_rows_of_a_transposed_convolution_multiply_to_what_the_runtime_computes(data: st.DataObject) -> None:
    rank, group = data.draw(st.integers(1, 2)), data.draw(st.sampled_from([1, 2, 4]))

    def draw(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(rank))

    kernel, strides, dilations, sizes = draw(1, 3), draw(1, 3), draw(1, 2), draw(4, 6)
    pads = draw(0, min(kernel) - 1) + draw(0, min(kernel) - 1)
    more = tuple(data.draw(st.integers(0, step - 1)) for step in strides)
    image, weight_shape = (", ".join(map(str, one)) for one in ((2, 4, *sizes), (4, 3, *kernel)))
    proto = text_model(f"""
        conv (float[{image}] x, float[{weight_shape}] w) => (float[] y) {{
            y = ConvTranspose<group = {group}, strides = {[*strides]}, dilations = {[*dilations]},
                              kernel_shape = {[*kernel]}, pads = {[*pads]}, output_padding = {[*more]}>(x, w)
        }}""")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds, node = random_feeds(proto), node_of(proto)
    [expected] = execute(proto, feeds)
    rows, weight = operand_rows(node, feeds["x"], kernel, 1 << 30), weight_rows(node, feeds["w"])
    found = np.einsum("pgk,gok->pgo", rows, weight).reshape(2, *expected.shape[2:], 3 * group)
    assert sqnr(expected, np.moveaxis(found, -1, 1)) > 100
    np.testing.assert_array_equal(from_rows(node, weight, feeds["w"].shape), feeds["w"])
    np.testing.assert_array_equal(
        result_rows(node, expected, 1 << 30), np.moveaxis(expected, 1, -1).reshape(-1, 3 * group)
    )


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("y = MatMul(x, w)", (6, 5)),
        ("y = Gemm(x, w)", (6, 5)),
        ("y = Gemm<transB = 1>(x, w)", (5, 6)),
    ],
)
def test_rows_of_a_product_of_matrices(text: str, weight: tuple[int, int]) -> None:
    lead = "2, 3, 6" if "MatMul" in text else "4, 6"
    proto = text_model(f"m (float[{lead}] x, float[{weight[0]}, {weight[1]}] w) => (float[] y) {{ {text} }}")
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds, node = random_feeds(proto), node_of(proto)
    [expected] = execute(proto, feeds)
    rows = weight_rows(node, feeds["w"])
    found = np.einsum("pgk,gok->pgo", operand_rows(node, feeds["x"], (), 1 << 30), rows)
    assert sqnr(expected, found.reshape(expected.shape)) > 100
    np.testing.assert_array_equal(from_rows(node, rows, weight), feeds["w"])
