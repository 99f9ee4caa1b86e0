"""Quantized values, and arithmetic of integers and truth values."""

from __future__ import annotations

import numpy as np

from tests.random_graphs.growing import Graph, Known
from tests.random_graphs.movement import concat, reshape, slice_step, squeeze, transpose


def _quantize(graph: Graph, x: Known, scale: Known, zero: Known | None, axis: int | None) -> Known | None:
    inputs: list[Known | None] = [x, scale]
    return graph.op("QuantizeLinear", [*inputs, zero] if zero else inputs, axis=axis)


def quantized(graph: Graph) -> None:
    """Quantize, give back, move or bound, and quantize again; the same numbers, mostly."""
    rng, x = graph.rng, graph.pick(lambda v: v.exact and v.arrays[0].dtype in (np.float32, np.float16))
    if x is None or graph.model.opset < 10:
        return
    dtype = x.arrays[0].dtype
    if dtype == np.float16 and graph.model.opset < 19:
        return
    per_axis = x.rank > 1 and graph.model.opset >= 13 and rng.random() < 0.25
    axis = rng.randrange(x.rank) if per_axis else None
    if axis is not None and not x.fixed(axis):
        return
    shape = () if axis is None else (x.shape[axis],)
    steps = graph.model.numbers.choice([0.25, 0.5, 0.03125, 0.1, 0.013], shape)
    kind = np.dtype(rng.choice(("int8", "uint8")))
    points = graph.model.numbers.integers(0, 4, shape) if rng.random() < 0.5 else np.zeros(shape)
    points = np.asarray(points - (128 if kind == np.int8 and rng.random() < 0.3 else 0), kind)
    scale, zero = graph.constant(np.asarray(steps, dtype)), graph.constant(points)
    without = zero if kind == np.int8 or points.any() or rng.random() < 0.6 else None
    q = _quantize(graph, x, scale, without, axis)
    for _ in range(rng.randint(1, 3)):
        if q is None:
            return
        inputs = [q, scale] if without is None and rng.random() < 0.5 else [q, scale, zero]
        value = graph.op("DequantizeLinear", inputs, axis=axis)
        if value is None:
            return
        graph.focus = value
        for _ in range(rng.randint(0, 2)):
            rng.choice((transpose, reshape, squeeze, slice_step, concat, _bound))(graph)
        value, graph.focus = graph.focus, None
        if rng.random() < 0.15:
            other = rng.choice((0.25, 0.5))
            scale = graph.constant(np.full(shape, other, dtype))
        if value is None or not value.is_float:
            return
        node_exact = Known(value.name, value.arrays, exact=True)
        q = _quantize(graph, node_exact, scale, without, axis)


def _bound(graph: Graph) -> None:
    rng, x = graph.rng, graph.focus
    if x is None:
        return
    dtype = x.arrays[0].dtype
    match rng.randrange(3):
        case 0:
            graph.op("Relu", [x])
        case 1 if graph.model.opset >= 11:
            low, high = rng.choice(((-128, 127), (0, 63.75), (0, 6), (-1, 1)))
            graph.op("Clip", [x, *(graph.constant(np.array(end, dtype)) for end in (low, high))])
        case _:
            graph.op("MaxPool", [x], kernel_shape=[1] * max(x.rank - 2, 1))


def integers(graph: Graph) -> None:
    """Arithmetic of integers, which may wrap around."""
    rng, x = graph.rng, graph.pick(lambda v: v.is_int)
    if x is None:
        return
    for _ in range(rng.randint(1, 3)):
        if x is None or not x.is_int:
            return
        dtype = x.arrays[0].dtype
        ends = np.iinfo(dtype)
        kind = rng.choice(
            ("Add", "Sub", "Mul", "Div", "Mod", "Max", "Min", "Neg", "Abs", "Where", "Equal", "Sum")
        )
        number = rng.choice((1, 2, 3))
        if kind not in ("Div", "Mod"):
            number = rng.choice((0, 1, 2, 3, ends.max, ends.min, ends.max // 2 + 1, ends.max // 3))
        shapes: tuple[tuple[int, ...], ...] = ((), (1,), (1,) * x.rank)
        c = graph.constant(np.full(rng.choice(shapes), number, dtype))
        if kind in ("Neg", "Abs"):
            x = graph.op(kind, [x])
        elif kind == "Where":
            same = graph.op("Equal", [x, c])
            x = graph.op("Where", [same, *rng.sample((x, c), 2)]) if same else None
        elif kind in ("Div", "Mod"):
            x = graph.op(kind, [x, c])
        else:
            x = graph.op(kind, rng.sample((x, c), 2))


def truth(graph: Graph) -> None:
    """Not, And, Or, Xor, and Where by what they give; constants among them."""
    rng = graph.rng
    x = graph.pick(lambda v: v.arrays[0].dtype == bool)
    if x is None:
        source = graph.pick(
            lambda v: v.exact and v.arrays[0].dtype.kind in "fi" and v.arrays[0].dtype.itemsize > 2
        )
        if source is None:
            return
        zero = graph.constant(np.zeros((), source.arrays[0].dtype))
        x = graph.op(rng.choice(("Greater", "Less", "Equal")), [source, zero])
    for _ in range(rng.randint(1, 3)):
        if x is None:
            return
        if rng.random() < 0.4:
            x = graph.op("Not", [x])
        else:
            c = graph.constant(np.full(rng.choice(((), (1,))), rng.random() < 0.5))
            other = graph.pick(lambda v: v.arrays[0].dtype == bool) if rng.random() < 0.3 else c
            x = graph.op(rng.choice(("And", "Or", "Xor")), rng.sample((x, other or c), 2))
    a = graph.pick(lambda v: v.is_float)
    b = graph.pick(lambda v: a is not None and v.arrays[0].dtype == a.arrays[0].dtype)
    if x is not None and a is not None and b is not None and rng.random() < 0.6:
        graph.op("Where", [x, a, b])
