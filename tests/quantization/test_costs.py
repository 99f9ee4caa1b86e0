"""The costs of float and int8 kernels: features in closed form, fusions as the runtime does them."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.quantization.costs import COLD_NS, NodeCost, features, node_cost, row_of, shipped_costs
from tests.support import text_model

HEAD = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'


def shapes(value: ir.Value) -> tuple[int, ...]:
    assert value.shape is not None
    return tuple(int(size) for size in value.shape.numpy())


def proto_of(
    body: str, types: str, x: str = "float[1,32,28,28]", y: str = "float[1,32,28,28]"
) -> onnx.ModelProto:
    """A graph from x to y in ONNX text; `types` declares what lies between and the weights."""
    proto = text_model(f"{HEAD} g ({x} x) => ({y} y) <{types}> {{ {body} }}")
    made = {name for node in proto.graph.node for name in node.output}
    for info in proto.graph.value_info:
        sizes = [size.dim_value for size in info.type.tensor_type.shape.dim]
        if info.name not in made:
            proto.graph.initializer.append(
                onnx.numpy_helper.from_array(np.full(sizes, 0.1, np.float32), info.name)
            )
    return proto


def costs_of(
    body: str, types: str, x: str = "float[1,32,28,28]", y: str = "float[1,32,28,28]"
) -> list[NodeCost]:
    return [node_cost(node, shapes) for node in ir.from_proto(proto_of(body, types, x, y)).graph]


def conv(cin: int, cout: int, size: int, kernel: int = 3, group: int = 1) -> ir.Node:
    weight = f"float[{cout},{cin // group},{kernel},{kernel}] w"
    attrs = f'kernel_shape=[{kernel},{kernel}], auto_pad="SAME_UPPER", group={group}'
    x, y = (f"float[1,{channels},{size},{size}]" for channels in (cin, cout))
    return next(iter(ir.from_proto(proto_of(f"y = Conv<{attrs}>(x, w)", weight, x, y)).graph))


def kernels(proto: onnx.ModelProto, folder: Path) -> list[str]:
    """The operators that the runtime makes of a graph at level ALL."""
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    options.log_severity_level = 4
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return [node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node]


def test_the_table_is_whole() -> None:
    table = shipped_costs()
    assert table is shipped_costs()
    assert (table.runtime, table.machine, table.vnni) == ("1.31.1", "AMD EPYC", True)
    numbers = [x for pair in table.rows.values() for row in pair if row is not None for x in row]
    numbers += [x for row in table.borders.values() for x in row]
    assert min(numbers) >= 0
    assert all(map(math.isfinite, numbers))
    assert all(any(row) for pair in table.rows.values() for row in pair if row is not None)
    assert {*table.borders} == {"dequantize", "quantize", "reorder", "transpose"}


@pytest.mark.parametrize("quantized", [False, True])
def test_features_of_a_dense_convolution(quantized: bool) -> None:
    node = conv(32, 48, 10)
    taps = 100 * 9
    gathered = taps // 3 if quantized else taps
    assert features(node, shapes, quantized=quantized) == (1, taps * 32 * 48, 100 * 48, gathered, 0)
    assert row_of(node, shapes) == "Conv-kxk"


def test_float_channels_come_in_blocks() -> None:
    assert features(conv(20, 20, 10), shapes, quantized=False)[1] == 100 * 9 * 32 * 32
    assert features(conv(20, 20, 10), shapes, quantized=True)[1] == 100 * 9 * 20 * 32
    assert features(conv(3, 16, 10), shapes, quantized=False)[1] == 100 * 9 * 3 * 16


def test_channels_off_the_fast_path_of_int8() -> None:
    assert features(conv(3, 16, 10), shapes, quantized=True)[-1] == 100
    assert features(conv(3, 8, 10), shapes, quantized=True)[-1] == 200
    assert features(conv(40, 40, 10, group=40), shapes, quantized=True)[-1] == 100 * 9 * 48
    assert features(conv(48, 48, 10, group=48), shapes, quantized=True)[-1] == 0


@pytest.mark.parametrize(
    ("node", "lowest", "highest"),
    [
        pytest.param(conv(64, 64, 28), 0.2, 0.4, id="dense 3x3"),
        pytest.param(conv(128, 128, 28, 1), 0.2, 0.45, id="dense 1x1"),
        pytest.param(conv(16, 16, 56), 0.5, 1.0, id="narrow 3x3"),
        pytest.param(conv(3, 32, 112), 1.5, 4.0, id="first layer"),
        pytest.param(conv(16, 16, 112, group=16), 2.0, 5.0, id="narrow depthwise"),
        pytest.param(conv(480, 480, 14, 5, group=480), 0.8, 1.3, id="wide depthwise"),
    ],
)
def test_what_gains_and_what_loses(node: ir.Node, lowest: float, highest: float) -> None:
    cost = node_cost(node, shapes)
    assert lowest < cost.int8_ns / cost.float_ns < highest


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.sampled_from([4, 12, 16, 30, 64]), st.sampled_from([1, 3, 5]), st.integers(1, 40), st.booleans())
def test_more_pixels_never_cost_less(channels: int, kernel: int, size: int, depthwise: bool) -> None:
    group = channels if depthwise else 1
    small, large = (
        node_cost(conv(channels, channels, side, kernel, group), shapes) for side in (size, size + 1)
    )
    assert 0 < small.float_ns < large.float_ns
    assert 0 < small.int8_ns < large.int8_ns < math.inf


CONV = "a = Conv<kernel_shape=[1,1]>(x, w)"
TYPES = "float[32,32,1,1] w, float[1,32,28,28] a"


@pytest.mark.parametrize("op", ["HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh"])
def test_activations_behind_a_float_convolution_are_free(op: str, tmp_path: Path) -> None:
    body, types = f"{CONV} b = {op}(a) y = Conv<kernel_shape=[1,1]>(b, w)", f"{TYPES}, float[1,32,28,28] b"
    _, cost, _ = costs_of(body, types)
    assert cost.float_ns == 0 < cost.apart_ns
    assert [name for name in kernels(proto_of(body, types), tmp_path) if "Reorder" not in name] == [
        "Conv"
    ] * 2
    free, kernel = op == "Relu", op in ("HardSigmoid", "HardSwish", "LeakyRelu", "Sigmoid")
    assert cost.int8_ns == 0 if free else math.isfinite(cost.int8_ns) == kernel


def test_the_sum_with_a_residual_is_free_in_float(tmp_path: Path) -> None:
    body, types = f"{CONV} b = Conv<kernel_shape=[1,1]>(a, w) y = Add(a, b)", f"{TYPES}, float[1,32,28,28] b"
    cost = costs_of(body, types)[-1]
    assert cost.float_ns == 0 < min(cost.int8_ns, cost.apart_ns)
    assert "Add" not in kernels(proto_of(body, types), tmp_path)


def test_silu_is_one_kernel_in_float(tmp_path: Path) -> None:
    body, types = f"{CONV} b = Sigmoid(a) y = Mul(b, a)", f"{TYPES}, float[1,32,28,28] b"
    _, gate, product = costs_of(body, types)
    assert gate.float_ns == 0 < gate.apart_ns
    assert 0 < product.float_ns < (gate.int8_ns + product.int8_ns) / 2
    assert "QuickGelu" in kernels(proto_of(body, types), tmp_path)


def test_a_shared_convolution_fuses_nothing() -> None:
    body = f"{CONV} b = HardSwish(a) y = Sub(a, b)"
    assert costs_of(body, f"{TYPES}, float[1,32,28,28] b")[1].float_ns > 0


def test_float_leaves_its_blocks_for_what_knows_none(tmp_path: Path) -> None:
    body, types = f"{CONV} b = Erf(a) y = Conv<kernel_shape=[1,1]>(b, w)", f"{TYPES}, float[1,32,28,28] b"
    table = shipped_costs()
    elements = 32 * 28 * 28
    plain = sum(a * b for a, b in zip(table.rows["Erf"][0], (1, elements), strict=False))
    cost = costs_of(body, types)[1]
    assert cost == NodeCost(COLD_NS[False] + plain + 2 * table.layout_ns(elements, quantized=False), math.inf)
    made = kernels(proto_of(body, types), tmp_path)
    assert made[made.index("Erf") - 1 : made.index("Erf") + 2] == ["ReorderOutput", "Erf", "ReorderInput"]


def test_a_gate_of_one_number_a_channel_leaves_the_blocks() -> None:
    gate = f"{CONV} b = GlobalAveragePool(a) y = Mul(a, b)"
    same = f"{CONV} b = Sqrt(a) y = Mul(a, b)"
    gated = costs_of(gate, f"{TYPES}, float[1,32,1,1] b")[-1]
    plain = costs_of(same, f"{TYPES}, float[1,32,28,28] b")[-1]
    assert gated.float_ns > plain.float_ns + shipped_costs().layout_ns(32 * 28 * 28, quantized=False) / 2
    assert gated.int8_ns > plain.int8_ns


def test_max_pool_is_slow_in_int8_without_a_convolution_before_it() -> None:
    pool = "MaxPool<kernel_shape=[3,3], pads=[1,1,1,1]>"
    (plain,) = costs_of(f"y = {pool}(x)", "")
    assert plain.int8_ns > 10 * plain.float_ns
    behind = costs_of(f"{CONV} b = Relu(a) y = {pool}(b)", f"{TYPES}, float[1,32,28,28] b")[-1]
    assert behind.int8_ns < 3 * behind.float_ns
    types = f"{TYPES}, float[1,32,28,28] b, float[1,32,28,28] c"
    gated = costs_of(f"{CONV} b = HardSwish(a) y = {pool}(b)", types)[-1]
    assert gated.int8_ns > 5 * behind.int8_ns
    between = costs_of(f"{CONV} b = HardSwish(a) c = {pool}(b) y = Conv<kernel_shape=[1,1]>(c, w)", types)[2]
    assert between.int8_ns == behind.int8_ns


@pytest.mark.parametrize(
    ("body", "types", "x", "y", "row"),
    [
        ("y = MatMul(x, w)", "float[64,32] w", "float[8,64]", "float[8,32]", "MatMul"),
        ("y = Gemm<transB=1>(x, w)", "float[32,64] w", "float[8,64]", "float[8,32]", "MatMul"),
        ("y = MatMul(x, x)", "", "float[8,8]", "float[8,8]", "MatMul-computed"),
        ("y = Conv(x, w)", "float[8,4,3] w", "float[1,4,12]", "float[1,8,10]", "Conv-1d"),
        ("y = ConvTranspose(x, w)", "float[4,8,3,3] w", "float[1,4,5,5]", "float[1,8,7,7]", "ConvTranspose"),
        ("y = Softmax(x)", "", "float[4,8]", "float[4,8]", "Softmax"),
        ("y = Softmax<axis=0>(x)", "", "float[4,8]", "float[4,8]", "Softmax-inner"),
        ("y = Conv<group=2>(x, w)", "float[8,4,1,1] w", "float[1,8,5,5]", "float[1,8,5,5]", "Conv-grouped"),
    ],
)
def test_rows(body: str, types: str, x: str, y: str, row: str) -> None:
    node = next(iter(ir.from_proto(proto_of(body, types, x, y)).graph))
    assert row_of(node, shapes) == row
    assert row in shipped_costs().rows
    cost = node_cost(node, shapes)
    assert cost.float_ns > 0
    assert math.isinf(cost.int8_ns) == (row == "ConvTranspose")


def test_one_row_of_a_matmul_is_bound_by_its_weight() -> None:
    table = shipped_costs()
    body, types = "y = MatMul(x, w)", "float[1024,1024] w"
    one, many = (costs_of(body, types, f"float[{m},1024]", f"float[{m},1024]")[0] for m in (1, 64))
    assert many.float_ns < 20 * one.float_ns
    assert one.float_ns > table.rows["MatMul"][0][3] * 2**20


def test_few_pixels_of_one_dimension_cost_floats_as_much_as_sixteen() -> None:
    body, types = "y = Conv<pads=[1,1]>(x, w)", "float[64,64,3] w"
    few, many = (costs_of(body, types, f"float[1,64,{n}]", f"float[1,64,{n}]")[0] for n in (2, 16))
    assert few.float_ns > 0.9 * many.float_ns > 2 * few.int8_ns
    assert many.int8_ns > 1.2 * few.int8_ns


def test_moves_are_free_and_the_unknown_is_float() -> None:
    (cost,) = costs_of("y = Identity(x)", "")
    assert cost == NodeCost(0, 0)
    (cost,) = costs_of("y = Cos(x)", "")
    assert 0 < cost.float_ns < math.inf == cost.int8_ns


def test_a_table_of_ones_own() -> None:
    table = shipped_costs()
    rows = {**table.rows, "Conv-kxk": ((7.0,), (3.0,))}
    mine = dataclasses.replace(table, rows=rows, borders={**table.borders, "transpose": (0.0, 0.0)})
    assert node_cost(conv(32, 32, 5), shapes, mine) == NodeCost(7 + COLD_NS[False], 3 + COLD_NS[True])


def test_hard_gates_cost_the_kernels_that_they_become() -> None:
    def int8_ns(body: str) -> float:
        return costs_of(body, "")[0].int8_ns

    assert int8_ns("y = HardSigmoid(x)") == int8_ns("y = Add(x, x)")
    assert int8_ns("y = HardSwish(x)") == int8_ns("y = Add(x, x)") + int8_ns("y = Mul(x, x)")


def test_one_channel_in_and_out_is_depthwise_and_rows_are_gathered_at_once() -> None:
    assert row_of(conv(1, 1, 8), shapes) == "Conv-depthwise"
    assert row_of(conv(1, 2, 8), shapes) == "Conv-kxk"
    tall, wide = (
        features(
            next(iter(ir.from_proto(proto_of(f"y = Conv<kernel_shape=[{k}]>(x, w)", types, x, y)).graph)),
            shapes,
            quantized=True,
        )
        for k, types, x, y in [
            ("9,1", "float[8,8,9,1] w", "float[1,8,24,16]", "float[1,8,16,16]"),
            ("1,9", "float[8,8,1,9] w", "float[1,8,16,24]", "float[1,8,16,16]"),
        ]
    )
    assert (tall[3], wide[3]) == (9 * 256, 256)
    assert tall[:3] == wide[:3]


def test_concat_of_channels_last_copies_pixel_by_pixel() -> None:
    (cost,) = costs_of("y = Concat<axis=1>(x, x)", "", y="float[1,64,28,28]")
    table = shipped_costs()
    assert cost.int8_ns == pytest.approx(
        sum(a * b for a, b in zip(table.rows["Concat"][1] or (), (1, 50176, 2 * 784), strict=True))
        + COLD_NS[True]
    )


def test_borders_are_linear() -> None:
    table = shipped_costs()
    for cost in (table.quantize_ns, table.dequantize_ns):
        assert cost(3000) - cost(2000) == pytest.approx(cost(2000) - cost(1000))
        assert 0 < cost(1000) < cost(100_000) < 100_000


def test_sizes_that_are_not_known_are_the_callers_error() -> None:
    def unknown(value: ir.Value) -> tuple[int, ...]:
        raise KeyError(value.name)

    with pytest.raises(KeyError, match="w"):
        node_cost(conv(4, 4, 4), unknown)
