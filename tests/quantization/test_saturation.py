"""Saturation is predicted from the weights: held against closed forms, and against an emulated CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.emulation import run_emulated
from onnxopt.errors import UsageError
from onnxopt.quantization.formats import FORMATS, QuantParams, params_from_range, quantize
from onnxopt.quantization.saturation import find_saturation, kernel_rows, pair_excess, safe_params
from onnxopt.runtimes import open_session
from tests.support import text_model, why_no_emulator

emulated = pytest.mark.skipif(bool(why_no_emulator()), reason=why_no_emulator())

PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)


@pytest.mark.parametrize(
    ("row", "bounds", "excess"),
    [
        ([64, 64], (0, 255), 0),
        ([64, 65], (0, 255), 129 * 255 - 32767),
        ([-64, -64], (0, 255), 0),
        ([-65, -64], (0, 255), 129 * 255 - 32768),
        ([127, -128], (0, 255), 0),
        ([0, 127, 127, 0, 127], (0, 255), 0),
        ([1, 1, 127, 127], (0, 255), 254 * 255 - 32767),
        ([-128, -128], (0, 127), 0),
        ([127, 127], (0, 129), 0),
        ([127, 127], (0, 130), 254 * 130 - 32767),
        ([127, -1], (255, 255), 0),
        ([], (0, 255), 0),
    ],
)
def test_the_excess_of_one_row(row: list[int], bounds: tuple[int, int], excess: int) -> None:
    assert pair_excess(np.array([row], np.int8), *bounds).tolist() == [excess]


@PROPERTY
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=7), st.integers(0, 255), st.integers(0, 255))
def test_the_excess_is_that_of_the_worst_activations(row: list[int], one: int, other: int) -> None:
    low, high = sorted((one, other))
    padded = [*row, 0]
    sums = [
        a * padded[i] + b * padded[i + 1]
        for i in range(0, len(row), 2)
        for a in (low, high)
        for b in (low, high)
    ]
    expected = max(0, max(sums) - 32767, -32768 - min(sums))
    assert pair_excess(np.array([row], np.int8), low, high).tolist() == [expected]


@dataclass(frozen=True)
class Case:
    """An operator with U8 activations, in ONNX text, and its weight."""

    text: str
    weight: np.ndarray

    @property
    def model(self) -> onnx.ModelProto:
        proto = text_model(self.text)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(self.weight, "w"))
        return proto

    @property
    def excess(self) -> np.ndarray | None:
        (node,) = (one for one in ir.from_proto(self.model).graph if one.op_type in MAIN)
        rows = kernel_rows(node, self.weight)
        return None if rows is None else pair_excess(rows)


MAIN = ("QLinearConv", "MatMulInteger", "QLinearMatMul", "QGemm", "MatMul", "Gemm", "ConvInteger")
HEAD = '<ir_version: 9, opset_import: ["": 17, "com.microsoft": 1]>'


def two_large(shape: tuple[int, ...], channel_axis: int, seed: int) -> np.ndarray:
    """Channels with two large weights of one sign and zeros: 200 and more together, or one alone is there."""
    rng = np.random.default_rng(seed)
    size = int(np.prod(shape)) // shape[channel_axis]
    rows = np.zeros((shape[channel_axis], size), np.int8)
    for row in rows:
        first = int(rng.integers(0, size))
        near = {first ^ 1, first + 1, first - 1, int(rng.integers(0, size))}
        for place in (first, int(rng.choice([place for place in sorted(near) if 0 <= place < size]))):
            row[place] = 105
        row *= rng.choice([-1, 1])
    others = tuple(n for i, n in enumerate(shape) if i != channel_axis)
    return np.moveaxis(rows.reshape(shape[channel_axis], *others), 0, channel_axis)


def conv(shape: tuple[int, ...], group: int, seed: int) -> Case:
    """All activations are 255, so that pairs of one sign do what the worst do."""
    sizes = ",".join(map(str, (1, shape[1] * group, *(5 for _ in shape[2:]))))
    text = f"""{HEAD} g (uint8[{sizes}] x) => (uint8[?] y) <float s = {{1}}, float s512 = {{512}},
        uint8 z = {{0}}, int8 z8 = {{0}}, uint8 middle = {{128}}>
        {{ y = QLinearConv <group = {group}> (x, s, z, w, s, z8, s512, middle) }}"""
    return Case(text, two_large(shape, 0, seed))


def product(body: str, shape: tuple[int, ...], axis: int, seed: int, kind: str = "float") -> Case:
    depth = int(np.prod(shape)) // shape[axis]
    text = f"""{HEAD} g ({kind}[3,{depth}] x) => (float[?] y) <float s = {{1}}, float s512 = {{512}},
        uint8 z = {{0}}, int8 z8 = {{0}}, uint8 middle = {{128}}> {{ {body} }}"""
    return Case(text, two_large(shape, axis, seed))


Q = "d = DequantizeLinear(x, s, z) v = DequantizeLinear(w, s, z8)"
CASES = [
    *(
        conv(shape, group, seed)
        for seed, (shape, group) in enumerate(
            [
                ((24, 3, 3, 3), 1),
                ((24, 5, 3, 3), 1),
                ((24, 8, 3, 3), 1),
                ((24, 7, 1, 1), 1),
                ((16, 16, 1, 1), 1),
                ((24, 4, 2, 2), 2),
                ((24, 3, 3), 1),
                ((8, 4, 2, 2, 2), 1),
                ((16, 1, 3, 3), 16),
                ((12, 1, 3, 3), 12),
                ((16, 1, 3, 3), 8),
            ]
        )
    ),
    product("i = MatMulInteger(x, w) y = Cast <to = 1> (i)", (33, 24), 1, 20, "uint8"),
    product("i = MatMulInteger(x, w) y = Cast <to = 1> (i)", (400, 17), 1, 21, "uint8"),
    product(
        "q = QLinearMatMul(x, s, z, w, s, z8, s512, middle) y = Cast <to = 1> (q)", (20, 24), 1, 22, "uint8"
    ),
    product("y = com.microsoft.QGemm <transB = 1> (x, s, z, w, s, z8)", (24, 20), 0, 23, "uint8"),
    product(f"{Q} y = MatMul(d, v)", (19, 24), 1, 24, "uint8"),
    product(f"{Q} y = Gemm <transB = 1> (d, v)", (24, 30), 0, 25, "uint8"),
]


def joined(cases: list[Case]) -> onnx.ModelProto:
    """One model of all of them, to be emulated at once."""
    whole = cases[0].model
    for part in (whole.graph.node, whole.graph.initializer, whole.graph.input, whole.graph.output):
        del part[:]
    for number, case in enumerate(cases):
        one = onnx.compose.add_prefix(case.model, f"c{number}_").graph
        whole.graph.node.extend(one.node)
        whole.graph.initializer.extend(one.initializer)
        whole.graph.input.extend(one.input)
        whole.graph.output.extend(one.output)
    return whole


def full(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {
        value.name: np.full([dim.dim_value for dim in value.type.tensor_type.shape.dim], 255, np.uint8)
        for value in model.graph.input
    }


def channels(output: np.ndarray) -> np.ndarray:
    """[channels, all else]: of images the second axis, of products the last."""
    return np.moveaxis(output, 1, 0).reshape(output.shape[1], -1)


@emulated
def test_just_the_channels_that_are_predicted_to_saturate_do_so() -> None:
    model = joined(CASES)
    feeds = full(model)
    here: Mapping[str, Any] = open_session(model).run(feeds)
    (there,) = run_emulated(model, [feeds])
    found = 0
    for number, case in enumerate(CASES):
        names = f"c{number}_y"
        differ = (channels(here[names]) != channels(there[names])).any(axis=1)
        excess = case.excess
        expected = np.zeros(len(differ), bool) if excess is None else excess > 0
        assert differ.tolist() == expected.tolist(), case.text
        found += int(expected.sum())
    assert 60 < found < 250


@emulated
def test_the_excess_is_what_is_lost_of_a_sum() -> None:
    """Row r of the activations is full at the worst pair of channel r, and empty elsewhere."""
    rng = np.random.default_rng(3)
    weight = rng.integers(-128, 128, (62, 40)).astype(np.int8)
    sums = weight.T.reshape(40, -1, 2).astype(int)
    alike = np.where((sums > 0).all(2) | (sums < 0).all(2), sums.sum(2), 0)
    worst = (2 * np.abs(alike) + (alike > 0)).argmax(1)  # there is room for one more below than above
    x = np.zeros((40, 31, 2), np.uint8)
    x[np.arange(40), worst] = 255
    case = Case(f"{HEAD} g (uint8[40,62] x) => (int32[40,40] y) {{ y = MatMulInteger(x, w) }}", weight)
    feeds = {"x": x.reshape(40, 62)}
    (there,) = run_emulated(case.model, [feeds])
    lost = np.abs(np.diag(open_session(case.model).run(feeds)["y"] - there["y"]))
    assert case.excess is not None
    assert lost.tolist() == case.excess.tolist()
    assert 20 < np.count_nonzero(lost) <= 40


NODES = {
    "conv": ("Conv(x, w)", (4, 3, 3, 3), 0),
    "depthwise": ("Conv <group = 4> (x, w)", (4, 1, 3, 3), 0),
    "matmul": ("MatMul(x, w)", (9, 4), 1),
    "stack": ("MatMul(x, w)", (2, 9, 4), 2),
    "gemm": ("Gemm <transB = 1> (x, w)", (4, 9), 0),
}


def node_of(body: str) -> ir.Node:
    return ir.from_proto(text_model(f"g (float[?] x, float[?] w) => (float[?] y) {{ y = {body} }}")).graph[0]


@PROPERTY
@given(st.sampled_from(sorted(NODES)), st.booleans(), st.integers(0, 2**32 - 1), st.sampled_from([0.3, 1, 3]))
def test_scales_are_enlarged_where_needed_and_no_more(
    name: str, by_channel: bool, seed: int, power: float
) -> None:
    body, shape, axis = NODES[name]
    node, rng = node_of(body), np.random.default_rng(seed)
    weight = (np.sign(rng.standard_normal(shape)) * rng.random(shape) ** power).astype(np.float32)
    over = tuple(i for i in range(len(shape)) if i != axis) if by_channel else None
    largest = np.abs(weight).max(axis=over)
    params = params_from_range(
        -largest, largest, FORMATS["int8"], symmetric=True, axis=axis if by_channel else None
    )
    safe = safe_params(node, weight, params)
    factor = safe.scale / params.scale
    if name == "depthwise":
        assert safe is params
        return
    assert not excess_of(node, weight, safe).any()
    assert (factor <= 127 / 64).all()
    unsafe = excess_of(node, weight, params) > 0
    assert ((factor > 1) == unsafe).all()
    steps = np.rint(127 / factor)
    nearer = QuantParams(
        np.asarray(params.scale * (127 / (steps + 2)), np.float32),
        params.zero_point,
        params.format,
        params.axis,
    )
    assert (excess_of(node, weight, nearer) > 0)[unsafe & (steps < 125)].all()


def excess_of(node: ir.Node, weight: np.ndarray, params: QuantParams) -> np.ndarray:
    rows = kernel_rows(node, quantize(weight, params))
    assert rows is not None
    return np.asarray(pair_excess(rows).reshape(-1, params.scale.size).max(0).reshape(params.scale.shape))


def test_narrow_activations_need_no_larger_scales_and_far_zero_points_find_none() -> None:
    node, weight = node_of("MatMul(x, w)"), np.ones((8, 2), np.float32)
    params = params_from_range(-1.0, 1.0, FORMATS["int8"], symmetric=True)
    assert safe_params(node, weight, params, high=127).scale == params.scale
    assert safe_params(node, weight, params).scale == pytest.approx(1 / 64)
    far = QuantParams(np.array(1 / 255, np.float32), np.array(-128), FORMATS["int8"])
    with pytest.raises(UsageError, match="weights with zero point 0 are needed"):
        safe_params(node, -weight, far)


CONV = """<ir_version: 9, opset_import: ["": 17]> g (float[1,4,5,5] x) => (float[?] y)
    <float s = {1}, uint8 z = {0}, int8 z8 = {0}> {
    q = QuantizeLinear(x, s, z)
    a = DequantizeLinear(q, s, z)
    b = DequantizeLinear(w, s, z8)
    [conv] c = Conv(a, b)
    p = QuantizeLinear(c, s, z)
    y = DequantizeLinear(p, s, z)
}"""


def test_nodes_that_can_saturate_are_found_in_a_quantized_model() -> None:
    weight = np.full((3, 4, 1, 1), 60, np.int8)
    weight[1] = 120
    (found,) = find_saturation(ir.from_proto(Case(CONV, weight).model))
    assert (found.node.name, found.weight.name) == ("conv", "w")
    assert found.excess.tolist() == [0, 240 * 255 - 32767, 0]
    assert found.summary == "Conv 'conv': 1 of 3 channels can saturate, by up to 87%"


@pytest.mark.parametrize(
    ("text", "shape", "dtype"),
    [
        (CONV.replace("Conv(", "Conv <group = 4> ("), (4, 1, 1, 1), np.int8),
        (CONV.replace("int8 z8", "uint8 z8"), (3, 4, 1, 1), np.uint8),
        (CONV.replace("Conv(a, b)", "Conv(x, b)"), (3, 4, 1, 1), np.int8),
        (f"{HEAD} g (uint8[1,4,5,5] x) => (int32[?] y) {{ y = ConvInteger(x, w) }}", (3, 4, 1, 1), np.int8),
    ],
    ids=["depthwise", "unsigned weights", "float activations", "ConvInteger"],
)
def test_what_adds_in_32_bits_is_not_found(text: str, shape: tuple[int, ...], dtype: type) -> None:
    assert find_saturation(ir.from_proto(Case(text, np.full(shape, 127, dtype)).model)) == ()
