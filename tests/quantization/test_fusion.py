"""Which quantized nodes the runtime runs as integer kernels: all of those that the survey takes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from onnxopt.quantization.fusion import kernels_of
from tests.quantization.quantizing import Quantized, model_of, quantized, random, samples_for

Constants = dict[str, Any]
Row = tuple[str, str, str, Constants]
"""What it is called, inputs, the node, constants."""


def arrays(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: random(*shape, seed=len(name)) * np.float32(0.3) for name, shape in shapes.items()}


def windows() -> Iterator[Row]:
    for sizes in ((9,), (7, 9), (5, 6, 5)):
        rank = len(sizes)
        x, kernel = f"float[2,8,{','.join(map(str, sizes))}] x", (3,) * rank
        twos, ones = [2] * rank, [1] * 2 * rank
        full = arrays(w=(16, 8, *kernel), b=(16,))
        name = f"{rank}D"
        yield f"Conv {name}", x, f"Conv<pads = {ones}>(x, w, b)", full
        yield f"Conv {name} stride", x, f"Conv<strides = {twos}>(x, w)", arrays(w=(6, 8, *kernel))
        yield f"Conv {name} dilated", x, f"Conv<dilations = {twos}>(x, w, b)", full
        yield f"Conv {name} same", x, 'Conv<auto_pad = "SAME_UPPER">(x, w, b)', full
        yield f"Conv {name} grouped", x, "Conv<group = 2>(x, w, b)", arrays(w=(6, 4, *kernel), b=(6,))
        yield f"Conv {name} depthwise", x, "Conv<group = 8>(x, w, b)", arrays(w=(8, 1, *kernel), b=(8,))
        shape = f"kernel_shape = {twos}"
        yield f"MaxPool {name}", x, f"MaxPool<{shape}>(x)", {}
        yield f"MaxPool {name} dilated", x, f"MaxPool<{shape}, dilations = {twos}>(x)", {}
        ragged = f"{shape}, strides = {twos}, pads = {ones}, ceil_mode = 1"
        yield f"MaxPool {name} ragged", x, f"MaxPool<{ragged}>(x)", {}
        yield f"AveragePool {name}", x, f"AveragePool<{shape}, count_include_pad = 1, pads = {ones}>(x)", {}
        yield f"AveragePool {name} ragged", x, f"AveragePool<{ragged}>(x)", {}
        yield f"GlobalAveragePool {name}", x, "GlobalAveragePool(x)", {}
        double = np.array([1, 1, *twos], np.float32)
        yield f"Resize {name}", x, "Resize(x, , s)", {"s": double}


def products() -> Iterator[Row]:
    weights = arrays(w=(16, 8))
    for shape in ("16", "3,16", "2,3,16", "2,2,3,16"):
        yield f"MatMul [{shape}]", f"float[{shape}] x", "MatMul(x, w)", weights
    for shape in ("16", "16,5", "2,16,5"):
        yield f"MatMul from the left [{shape}]", f"float[{shape}] x", "MatMul(w, x)", arrays(w=(8, 16))
    yield "MatMul stack", "float[2,3,16] x", "MatMul(x, w)", arrays(w=(2, 16, 8))
    yield "MatMul stack of one", "float[3,16] x", "MatMul(x, w)", arrays(w=(2, 16, 8))
    yield "MatMul column", "float[3,16] x", "MatMul(x, w)", arrays(w=(16, 1))
    yield "MatMul of one summand", "float[4,1] x", "MatMul(x, w)", arrays(w=(1, 4))
    yield "MatMul computed", "float[2,3,16] x, float[2,16,5] z", "MatMul(x, z)", {}
    yield "MatMul self", "float[4,4] x", "MatMul(x, x)", {}
    for trans in (0, 1):
        w = (8, 16) if trans else (16, 8)
        gemm = f"Gemm<transB = {trans}>"
        yield f"Gemm {trans}", "float[3,16] x", f"{gemm}(x, w, b)", arrays(w=w, b=(8,))
        yield f"Gemm {trans} row", "float[3,16] x", f"{gemm}(x, w, b)", arrays(w=w, b=(1, 8))
        yield f"Gemm {trans} plain", "float[3,16] x", f"{gemm}(x, w)", arrays(w=w)
    yield "Gemm computed", "float[3,16] x, float[16,5] z", "Gemm(x, z)", {}


def elements() -> Iterator[Row]:
    x, z = "float[2,8,5,9] x", "float[2,8,5,9] z"
    for op in ("Add", "Mul"):
        yield f"{op} two", f"{x}, {z}", f"{op}(x, z)", {}
        yield f"{op} self", x, f"{op}(x, x)", {}
        yield f"{op} number", x, f"{op}(x, c)", {"c": np.float32(2.5)}
        yield f"{op} channels", x, f"{op}(c, x)", arrays(c=(8, 1, 1))
        yield f"{op} larger", "float[8,9] x", f"{op}(x, c)", arrays(c=(2, 8, 9))
        yield f"{op} gate", f"{x}, float[2,8,1,1] z", f"{op}(x, z)", {}
        yield f"{op} outer", "float[8,1] x, float[1,9] z", f"{op}(x, z)", {}
        yield f"{op} numbers", "float x, float z", f"{op}(x, z)", {}
    for alpha in (0.01, 1.5, -0.5):
        yield f"LeakyRelu {alpha}", x, f"LeakyRelu<alpha = {alpha}>(x)", {}
    yield "Sigmoid", x, "Sigmoid(x)", {}
    for axis in (0, 1):
        yield f"Softmax {axis}", "float[4,8,9] x", f"Softmax<axis = {axis}>(x)", {}


def movements() -> Iterator[Row]:
    x = "float[2,8,9] x"
    yield "Concat", f"{x}, float[2,3,9] z", "Concat<axis = 1>(x, z)", {}
    yield "Concat self", x, "Concat<axis = 2>(x, x)", {}
    yield "Concat one", x, "Concat<axis = 0>(x)", {}
    yield "Concat constant", x, "Concat<axis = 1>(c, x)", arrays(c=(2, 1, 9))
    yield "Concat constants", x, "Concat<axis = 1>(c, x, dd)", arrays(c=(2, 1, 9), dd=(2, 2, 9))
    yield "Transpose", x, "Transpose<perm = [0, 2, 1]>(x)", {}
    yield "Reshape", x, "Reshape(x, s)", {"s": np.array([16, 9])}
    yield "Flatten", x, "Flatten(x)", {}
    ends = {"s": np.array([8]), "e": np.array([0]), "a": np.array([2]), "t": np.array([-2])}
    yield "Slice", x, "Slice(x, s, e, a, t)", ends
    yield "Gather", x, "Gather<axis = 1>(x, i)", {"i": np.array([0, 2])}
    yield "Gather one", x, "Gather<axis = 1>(x, i)", {"i": np.array(1, np.int32)}
    yield "Squeeze", "float[2,1,4] x", "Squeeze(x, a)", {"a": np.array([1])}
    yield "Unsqueeze", x, "Unsqueeze(x, a)", {"a": np.array([1])}
    yield "Expand", "float[2,1,4] x", "Expand(x, s)", {"s": np.array([2, 3, 4])}
    yield "Tile", "float[2,1,4] x", "Tile(x, s)", {"s": np.array([2, 3, 1])}
    for mode in ("DCR", "CRD"):
        yield (
            f"DepthToSpace {mode}",
            "float[1,8,4,4] x",
            f'DepthToSpace<blocksize = 2, mode = "{mode}">(x)',
            {},
        )
    for mode in ("half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel"):
        how = f'coordinate_transformation_mode = "{mode}", nearest_mode = "floor"'
        yield (
            f"Resize {mode}",
            "float[1,8,5,5] x",
            f"Resize<{how}>(x, , s)",
            {"s": np.array([1, 1, 1.7, 0.6], np.float32)},
        )
    yield "Resize sizes", "float[1,8,5,5] x", "Resize(x, , , s)", {"s": np.array([1, 8, 3, 11])}


ROWS = {row[0]: row[1:] for family in (windows, products, elements, movements) for row in family()}


def single(row: tuple[str, str, Constants], opset: int) -> Quantized:
    inputs, node, constants = row
    model = model_of(f"agraph ({inputs}) => (float[] y) {{ y = {node} }}", opset=opset, **constants)
    return quantized(model, samples_for(model))


@pytest.mark.parametrize("opset", [13, 23])
@pytest.mark.parametrize("row", ROWS.values(), ids=list(ROWS))
def test_what_the_survey_takes_becomes_an_integer_kernel(row: tuple[str, str, Constants], opset: int) -> None:
    done = single(row, opset)
    assert list(done.sites) == ["y"]
    done.check()
    found = done.fusion
    assert found.unfused == ()
    assert found.borders == len(done.model.graph.inputs) + 1
    assert min(done.least_sqnr(), done.least_sqnr("none")) >= 17


TAILS = {
    "Relu": "Relu(a)",
    "Clip": "Clip(a, zero, six)",
    "Clip without end": "Clip(a, zero)",
    "Clip far": "Clip(a, zero, far)",
}


@pytest.mark.parametrize("tail", TAILS.values(), ids=list(TAILS))
@pytest.mark.parametrize(
    "layer",
    [
        "Conv(x, w)",
        "Add(x, x)",
        "Mul(x, x)",
        "LeakyRelu(x)",
        "Concat<axis = 1>(x, x)",
        "AveragePool<kernel_shape=[2,2]>(x)",
    ],
)
def test_a_range_from_zero_on_takes_the_place_of_its_activation(layer: str, tail: str) -> None:
    model = model_of(
        f"agraph (float[1,8,9,9] x) => (float[] y) {{ a = {layer} y = {tail} }}",
        w=random(16, 8, 3, 3),
        zero=0.0,
        six=6.0,
        far=1e9,
    )
    done = quantized(model)
    assert done.fusion.unfused == ()
    assert not {"Relu", "Clip"} & set(done.fusion.kernels)
    assert min(done.least_sqnr(), done.least_sqnr("none")) >= 30


def test_a_node_that_the_runtime_leaves_in_floats_is_named_and_so_are_kernels() -> None:
    text = "agraph (float[1,8,9,9] x) => (float[] y) { a = Conv(x, w) y = Conv(a, v) }"
    done = quantized(model_of(text, w=random(8, 8, 3, 3), v=random(8, 8, 3, 3)))
    last = done.model.graph.outputs[0].producer()
    assert last is not None
    assert last.op_type == "DequantizeLinear"
    before, after = last.inputs[0], done.sites["y"].outputs[0]
    assert before is not None
    last.outputs[0].replace_all_uses_with(after, replace_graph_outputs=True)  # Conv without its Q
    found = done.fusion
    assert (found.fused, found.unfused) == (("a",), ("y",))
    assert found.kernels["QLinearConv"] == found.integer == 1
    assert found.kernels == kernels_of(done.model)
