"""merge-matmul against the runtime: the product of operators, biases, factors and transposes."""

from __future__ import annotations

from collections.abc import Sequence

import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.passes.merge.merge_matmul import MergeMatmul
from tests.passes.layers import Kind, Sketch
from tests.support import assert_equivalent, run_pass, text_model

OVERRIDABLE = "is a graph input (overridable; --freeze-initializers folds it)"
ROWS, K, M, N = 3, 5, 6, 4


def merged(model: onnx.ModelProto, left: Sequence[str]) -> None:
    after = run_pass(model, MergeMatmul())
    assert after.op_types == list(left)
    assert after.declined == ()
    assert_equivalent(model, after.model, kind="reorder")


def kept(model: onnx.ModelProto, *reasons: str) -> None:
    after = run_pass(model, MergeMatmul())
    assert after.changes == 0
    assert after.declined == reasons


def matmul(inputs: int, outputs: int) -> Kind:
    return Kind("MatMul", (), (inputs, outputs), outputs, inputs)


def gemm(inputs: int, outputs: int, **attributes: float) -> Kind:
    shape = (outputs, inputs) if attributes.get("transB") else (inputs, outputs)
    return Kind("Gemm", (), shape, outputs, inputs, attributes)


def pair(first: Kind, second: Kind, biases: tuple[bool, bool], x: tuple[int, ...] = (ROWS, K)) -> Sketch:
    sketch = Sketch(x)
    sketch.layer(second, sketch.layer(first, "x", "c", biases[0]), "y", biases[1])
    return sketch


@pytest.mark.parametrize("biases", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("second", [matmul(M, N), gemm(M, N), gemm(M, N, alpha=2.0, beta=0.5, transB=1)])
@pytest.mark.parametrize(
    "first",
    [matmul(K, M), gemm(K, M), gemm(K, M, alpha=-1.5, beta=3.0, transB=1), gemm(K, M, alpha=0.5, transA=1)],
)
def test_two_layers(first: Kind, second: Kind, biases: tuple[bool, bool]) -> None:
    x = (K, ROWS) if "transA" in first.attributes else (ROWS, K)
    left = ["Gemm"] if "Gemm" in (first.op_type, second.op_type) else ["MatMul"]
    if left == ["MatMul"]:
        left += ["Add"] * sum(biases)
    elif second.op_type == "MatMul" and biases[1]:
        left += ["Add"]
    merged(pair(first, second, biases, x).model(), left)


@pytest.mark.parametrize("first", [(), (1,), (M,), (1, M), (1, 1), (ROWS, 1), (ROWS, M)], ids=str)
@pytest.mark.parametrize("second", [(), (N,), (1, N), (ROWS, 1), (ROWS, N)], ids=str)
def test_biases_of_every_shape(first: tuple[int, ...], second: tuple[int, ...]) -> None:
    sketch = Sketch((ROWS, K))
    sketch.op("Gemm", ["x", sketch.constant("a", (K, M)), sketch.constant("p", first)], "c", beta=2.0)
    sketch.op("Gemm", ["c", sketch.constant("b", (M, N)), sketch.constant("q", second)], "y", beta=-1.0)
    if len(first) == 2 and first[0] > 1:
        kept(sketch.model(), "the bias of the first Gemm differs by row")
    else:
        merged(sketch.model(), ["Gemm"])


@pytest.mark.parametrize("x", [(K,), (2, ROWS, K), (1, 2, ROWS, K)], ids=str)
def test_products_of_every_rank(x: tuple[int, ...]) -> None:
    merged(pair(matmul(K, M), matmul(M, N), (True, False), x).model(), ["MatMul", "Add"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
@pytest.mark.parametrize("opset", [7, 9, 13, 17])
def test_types_and_opsets(opset: int, dtype: str) -> None:
    sketch = pair(gemm(K, M), gemm(M, N), (True, True))
    sketch.dtype = dtype
    sketch.constants = {name: array.astype(dtype) for name, array in sketch.constants.items()}
    merged(sketch.model(opset=opset), ["Gemm"])


def test_a_chain_becomes_one() -> None:
    sketch = Sketch((ROWS, K))
    value = "x"
    for number in range(4):
        value = sketch.layer(gemm(K, K), value, f"c{number}", bias=True)
    merged(sketch.model(), ["Gemm"])


@pytest.mark.parametrize(("middle", "merges"), [(1, False), (2, False), (3, True)])
def test_a_bottleneck_stays(middle: int, merges: bool) -> None:
    sketch = pair(matmul(K, middle), matmul(middle, N), (False, False))
    if merges:
        merged(sketch.model(), ["MatMul"])
    else:
        kept(sketch.model(), "the product of the weights takes no fewer multiply-adds")


@pytest.mark.parametrize(
    ("name", "what"), [("c_w", "weight"), ("c_b", "bias"), ("y_w", "weight"), ("y_b", "bias")]
)
def test_an_overridable_initializer(name: str, what: str) -> None:
    sketch = pair(gemm(K, M), gemm(M, N), (True, True))
    kept(sketch.model(overridable=[name]), f"the {what} {OVERRIDABLE}")
    everything = list(sketch.constants)
    kept(sketch.model(opset=8, ir_version=3, overridable=everything), f"the weight {OVERRIDABLE}")


def test_the_bias_of_the_second_may_be_anything_where_the_first_has_none() -> None:
    sketch = pair(gemm(K, M), gemm(M, N, beta=0.5), (False, True))
    after = run_pass(model := sketch.model(overridable=["y_b"]), MergeMatmul())
    assert after.op_types == ["Gemm"]
    assert_equivalent(model, after.model, kind="reorder")


def test_what_lies_between_is_read_elsewhere() -> None:
    sketch = pair(gemm(K, M), gemm(M, N), (True, True))
    kept(sketch.model(outputs=["c", "y"]), "the output of the Gemm is also a graph output")
    sketch.op("Relu", ["c"], "z")
    kept(sketch.model(outputs=["y", "z"]), "the output of the Gemm is also read elsewhere")
    product = pair(matmul(K, M), matmul(M, N), (True, False))
    kept(product.model(outputs=["c_product", "y"]), "the output of the MatMul is also a graph output")


def test_the_second_transposes_what_it_reads() -> None:
    sketch = pair(gemm(K, M), gemm(ROWS, N, transA=1), (False, False))
    kept(sketch.model(), "the second Gemm transposes what it reads")


def test_products_of_run_time_values_stay() -> None:
    kept(
        text_model(
            """agraph (float[2, 2] x, float[2, 2] w) => (float[2, 2] y, float[2, 2] z)
            <float[2, 2] k = {1, 2, 3, 4}>
            { a = MatMul (x, k) y = MatMul (a, w)  b = MatMul (x, w) z = MatMul (b, k) }"""
        )
    )


@pytest.mark.parametrize("size", [16, 600])
def test_a_shared_weight(size: int) -> None:
    sketch = pair(matmul(size, size), matmul(size, size), (False, False), (1, size))
    sketch.op("MatMul", ["x", "y_w"], "z")
    sketch.op("MatMul", ["x", "c_w"], "p")
    model = sketch.model(outputs=["y", "z", "p"])
    if size > 512:
        kept(model, "the weights are shared and their product too large to add")
    else:
        merged(model, ["MatMul"] * 3)


def test_a_batch_of_weights_stays() -> None:
    sketch = Sketch((2, 3, 4))
    a = sketch.op("MatMul", ["x", sketch.constant("a", (2, 4, 4))], "c")
    sketch.op("MatMul", [a, sketch.constant("b", (4, 4))], "y")
    kept(sketch.model(), "the weight of the MatMul has rank 3 or is empty")


def test_in_a_function() -> None:
    model = text_model(
        """<ir_version: 9, opset_import: ["" : 17, "local" : 1]>
        agraph (float[2, 2] x) => (float[2, 2] y) { y = local.layer (x) }
        <opset_import: ["" : 17], domain: "local">
        layer (x) => (y) {
            w = Constant <value = float[2, 2] {1, 2, 3, 4}> ()
            c = MatMul (x, w)
            y = MatMul (c, w)
        }"""
    )
    merged(model, ["layer", "Constant", "MatMul"])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 4),
    biases=st.tuples(st.booleans(), st.booleans()),
    flags=st.tuples(*[st.integers(0, 1)] * 3),
    factors=st.tuples(*[st.sampled_from([1.0, -0.5, 2.0])] * 2),
    kinds=st.tuples(st.booleans(), st.booleans()),
)
def test_random_pairs(
    sizes: tuple[int, ...],
    biases: tuple[bool, bool],
    flags: tuple[int, ...],
    factors: tuple[float, float],
    kinds: tuple[bool, bool],
) -> None:
    rows, k, m, n = sizes
    turned = flags[0] if kinds[0] else 0
    first = gemm(k, m, alpha=factors[0], transA=turned, transB=flags[1]) if kinds[0] else matmul(k, m)
    second = gemm(m, n, alpha=factors[1], transB=flags[2]) if kinds[1] else matmul(m, n)
    model = pair(first, second, biases, (k, rows) if turned else (rows, k)).model()
    after = run_pass(model, MergeMatmul())
    assert after.changes == (k * m + m * n > k * n)
    assert_equivalent(model, after.model, kind="reorder")
