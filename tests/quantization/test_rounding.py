"""Weights of few bits, layer after layer: for what comes out, with the scales that are best for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onnxopt.data import Feeds
from onnxopt.graph import constant_array
from onnxopt.quantization.formats import dequantize, find_format, quantize
from onnxopt.quantization.rounding import has_few_levels, round_in_turn
from onnxopt.quantization.weights import quantize_weight, weight_axis
from tests.support import execute, text_model

RNG = np.random.default_rng
INT4 = find_format("int4")
by_channel: Callable[[ir.Node], int | None] = partial(weight_axis, position=1)

NET = """agraph (float[N, 6, 9, 9] x) => (float[N, 5] y) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)  r = Relu(a)
    c = Conv<group=12>(r, w2, b2)  q = Relu(c)
    d = ConvTranspose<group=2>(q, w3)
    m = ReduceMean<axes=[2, 3], keepdims=0>(d)
    e = Gemm<transB=1>(m, w4, b4)  p = Relu(e)
    f = MatMul(p, w5)  y = Add(f, b5)
}"""
FIRST = """agraph (float[N, 6, 9, 9] x) => (float[N, 12, 9, 9] a) {
    a = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)
}"""
SHAPES = {
    "w1": (12, 6, 3, 3), "b1": (12,), "w2": (12, 1, 3, 3), "b2": (12,), "w3": (12, 8, 2, 2),
    "w4": (10, 16), "b4": (10,), "w5": (10, 5), "b5": (5,),
}  # fmt: skip


def built(text: str, arrays: dict[str, np.ndarray]) -> ir.Model:
    model = ir.from_proto(text_model(text))
    for name, array in arrays.items():
        value = next(v for node in model.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.tensor(array, name=name)
        value.dtype, value.shape = value.const_value.dtype, ir.Shape(array.shape)
        model.graph.register_initializer(value)
    return model


def net(seed: int = 0) -> ir.Model:
    rng = RNG(seed)
    return built(NET, {name: rng.standard_normal(shape, np.float32) for name, shape in SHAPES.items()})


def array_of(model: ir.Model, name: str) -> np.ndarray:
    array = constant_array(model.graph.initializers[name])
    assert array is not None
    return array


def layers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]


def samples(seed: int, count: int = 24) -> list[Feeds]:
    """Of which neighbours are alike."""
    rng = RNG(seed)
    noise = rng.standard_normal((count, 6, 9, 9)).cumsum(2).cumsum(3) / 4
    return [{"x": (one[None] + 0.5).astype(np.float32)} for one in noise]


def loss(model: ir.Model, seed: int = 9) -> float:
    """Of outputs, against those of the float net, on samples that nothing was fitted to."""
    feeds = samples(seed)
    lost = [np.square(execute(model, one)[0] - execute(net(), one)[0]).mean() for one in feeds]
    return float(np.mean(lost))


def to_nearest(model: ir.Model) -> ir.Model:
    for node in layers(model):
        value = node.inputs[1]
        array = constant_array(value)
        assert value is not None
        assert array is not None
        ints, params = quantize_weight(array, INT4, axis=by_channel(node), clip=True)
        value.const_value = ir.tensor(dequantize(ints, params), name=value.name)
    return model


def test_layers_make_up_for_what_rounding_costs() -> None:
    model = net()
    told: list[float] = []
    found = round_in_turn(
        model, layers(model), samples(1), INT4, by_channel, lambda _, share: told.append(share)
    )
    assert loss(model) < 0.4 * loss(to_nearest(net()))
    assert len(found) == 5
    assert told == [0, 0.2, 0.4, 0.6, 0.8]


def test_a_layer_gets_what_its_integers_stand_for() -> None:
    model = net()
    for node, (ints, params) in round_in_turn(model, layers(model), samples(1), INT4, by_channel).items():
        np.testing.assert_array_equal(constant_array(node.inputs[1]), dequantize(ints, params))
        assert ints.dtype == INT4.dtype.numpy()
        assert ints.astype(int).min() >= -7
        assert params.scale.dtype == np.float32


def test_one_scale_for_all_channels() -> None:
    model, alike = net(), net()
    found = round_in_turn(model, layers(model), samples(1), INT4, lambda _: None)
    assert all(params.scale.shape == () for _, params in found.values())
    assert all(isinstance(params.scale, np.ndarray) for _, params in found.values())
    round_in_turn(alike, layers(alike), samples(1), INT4, by_channel)
    assert loss(alike) < loss(model)


def test_the_bias_keeps_the_mean() -> None:
    model = net()
    round_in_turn(model, layers(model)[:1], samples(1), INT4, by_channel)
    means = []
    for one in (model, net()):
        first = built(FIRST, {name: array_of(one, name) for name in ("w1", "b1")})
        means.append(np.mean([execute(first, feeds)[0] for feeds in samples(1)], axis=(0, 1, 3, 4)))
    np.testing.assert_allclose(means[0], means[1], atol=1e-4)
    assert not np.allclose(array_of(model, "b1"), array_of(net(), "b1"), atol=1e-3)


@given(st.integers(1, 40), st.integers(1, 6), st.booleans(), st.integers(0, 99))
@settings(derandomize=True, deadline=None, max_examples=40)
def test_a_single_layer_is_no_worse_than_to_nearest_at_any_of_the_scales(
    summands: int, channels: int, dead: bool, seed: int
) -> None:
    """By the second moments of what it reads, its own on the diagonal by a fifth more."""
    rng = RNG(seed)
    weight = rng.standard_normal((summands, channels), np.float32)
    x = rng.standard_normal((50, summands), np.float32) @ rng.standard_normal(
        (summands, summands), np.float32
    )
    x[:, 0] *= not dead
    text = f"agraph (float[N, {summands}] x) => (float[N, {channels}] y) {{ y = MatMul(x, w) }}"
    model = built(text, {"w": weight})
    (one,) = round_in_turn(model, layers(model), [{"x": x}], INT4, by_channel).values()
    moments = x.T.astype(np.float64) @ x
    moments += 0.2 * np.diag(np.diag(moments))
    moments += 0.01 * np.diag(moments).mean() * np.eye(summands)

    def lost(array: np.ndarray) -> np.ndarray:
        change = (array - weight).astype(np.float64)
        return np.asarray(np.einsum("sc,st,tc->c", change, moments, change))

    _, whole = quantize_weight(weight, INT4, axis=1)
    found = lost(dequantize(*one))
    for ratio in (1.0, 0.7, 0.4):
        params = type(whole)(np.float32(ratio) * whole.scale, whole.zero_point, INT4, 1)
        nearest = dequantize(quantize(weight, params).clip(-7, 7), params)
        assert (found <= lost(nearest) * (1 + 1e-5) + 1e-9).all()


def test_an_outlier_does_not_set_the_scale() -> None:
    weight = RNG(0).standard_normal((64, 3), np.float32) / 10
    weight[5] = 2.0
    x = RNG(1).standard_normal((400, 64), np.float32)
    x[:, 5] *= 0.01  # it is hardly ever heard
    model = built("agraph (float[N, 64] x) => (float[N, 3] y) { y = MatMul(x, w) }", {"w": weight})
    ((_, params),) = round_in_turn(model, layers(model), [{"x": x}], INT4, by_channel).values()
    assert (params.scale < 0.5 * 2.0 / 7).all()


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("a = MatMul(x, w) b = MatMul(a, w) y = Add(a, b)", np.ones((8, 8), np.float32)),
        ("h = Cast<to=10>(x) a = MatMul(h, w) y = Cast<to=1>(a)", np.ones((8, 8), np.float16)),
        ("y = Gemm<transA=1>(x, w)", np.ones((8, 8), np.float32)),
        ("y = MatMul(w, x)", np.ones((8, 8), np.float32)),
        (f"r = Concat<axis=1>({', '.join(['x'] * 257)}) y = MatMul(r, w)", np.ones((2056, 1), np.float32)),
    ],
)
def test_layers_that_are_left_out(text: str, weight: np.ndarray) -> None:
    model = built(f"agraph (float[8, 8] x) => (float[N, M] y) {{ {text} }}", {"w": weight})
    found = round_in_turn(model, layers(model), [{"x": np.ones((8, 8), np.float32)}], INT4, by_channel)
    assert not found
    np.testing.assert_array_equal(array_of(model, "w"), weight)


@pytest.mark.parametrize(
    ("name", "few"),
    [("int8", False), ("int4", True), ("uint4", True), ("int2", True), ("float8e4m3fn", False)],
)
def test_what_has_few_levels(name: str, few: bool) -> None:
    assert has_few_levels(find_format(name)) is few


def test_unsigned_integers_around_a_zero_point() -> None:
    model, form = net(), find_format("uint4")
    found: dict[Any, Any] = round_in_turn(model, layers(model), samples(1), form, by_channel)
    for ints, params in found.values():
        assert (params.zero_point == 8).all()
        assert ints.astype(int).min() >= 1
    assert loss(model) < 0.4 * loss(to_nearest(net()))
