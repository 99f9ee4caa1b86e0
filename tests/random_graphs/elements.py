"""What works element by element, reduces, or is rare."""

from __future__ import annotations

import numpy as np
from onnx import helper

from tests.random_graphs.growing import Graph, Known
from tests.random_graphs.movement import some_axes, with_axes


def activation(graph: Graph) -> None:
    rng, x = graph.rng, graph.tensor()
    if x is not None:
        kinds = ("Relu", "Relu", "Tanh", "Sigmoid", "LeakyRelu", "Neg", "Abs", "Softmax", "Exp", "Erf", "Elu")
        rare = (
            "Softplus",
            "Softsign",
            "HardSigmoid",
            "LogSoftmax",
            "Celu",
            "Selu",
            "Reciprocal",
            "Sqrt",
            "Log",
        )
        newer = ("HardSwish",) if graph.model.opset >= 14 else ()
        kind = rng.choice((*kinds, *kinds, *newer, *rare))
        axis = rng.randrange(-x.rank if graph.model.opset > 10 else 0, x.rank) if x.rank else None
        graph.op(kind, [x], axis=rng.choice((None, axis)) if "Softmax" in kind else None)


def clip(graph: Graph) -> None:
    rng = graph.rng
    x = graph.pick(lambda v: v.is_float or (v.is_int and graph.model.opset >= 12))
    if x is None:
        return
    dtype, high = x.arrays[0].dtype, rng.choice((0, 1, 3, 6))
    low = rng.choice((0, 1, 2) if dtype.kind == "u" else (-1, 0, 1, 2))
    match rng.randrange(4):
        case 0:
            graph.op("Relu", [x])
        case 1:
            shape = rng.choice(((), (1,), (1,) * x.rank))
            bound = graph.constant(np.full(shape, rng.choice((low, high)), dtype))
            graph.op(rng.choice(("Min", "Max")), rng.choice(([x, bound], [bound, x])))
        case _ if graph.model.opset < 11:
            graph.op("Clip", [x], min=rng.choice((None, float(low))), max=rng.choice((None, float(high))))
        case _:
            ends = [
                graph.constant(np.array(end, dtype)) if rng.random() < 0.7 else None for end in (low, high)
            ]
            graph.op("Clip", [x, *ends])


def cast(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.exact)
    kinds = ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
    for _ in range(rng.randint(1, 2)):
        if x is not None:
            kind = rng.choice((*kinds, str(graph.model.dtype), str(x.arrays[0].dtype)))
            x = graph.op("Cast", [x], to=int(helper.np_dtype_to_tensor_dtype(np.dtype(kind)))) or x


def identity(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick()
    if x is not None:
        mask = 2 if x.is_float and rng.random() < 0.2 else 1
        graph.op(rng.choice(("Identity", "Dropout")), [x], mask)


def binary(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.arrays[0].dtype.kind in "fi")
    if x is None:
        return
    other = graph.pick(lambda v: v.arrays[0].dtype == x.arrays[0].dtype)
    count = rng.choice((1, 2, 3))
    if rng.random() < 0.3:
        graph.op(rng.choice(("Sum", "Max", "Min", "Mean")), [x, other, x][:count])
    elif rng.random() < 0.3:
        condition = graph.op(rng.choice(("Less", "Greater", "Equal")), [x, other])
        if condition is not None:
            graph.op("Where", [condition, x, other])
    else:
        graph.op(rng.choice(("Add", "Mul", "Sub", "Div")), [x, other])


def reduce(graph: Graph) -> None:
    # A reduction of nothing keeps its axes in ONNX Runtime, whatever keepdims says.
    x = graph.pick(lambda v: v.rank > 0 and v.arrays[0].dtype.kind in "fi" and v.filled)
    rng = graph.rng
    if x is None:
        return
    kinds = ("ReduceSum", "ReduceMean", "ReduceMax", "ReduceL2")
    rare = ("ReduceMin", "ReduceProd", "ReduceSumSquare", "ReduceL1", "ReduceLogSumExp")
    kind = rng.choice((*kinds, *kinds, *rare))
    axes = some_axes(graph, x.rank, rng.randint(1, x.rank)) if rng.random() < 0.8 else None
    if graph.model.opset < 11 and axes is not None:
        axes = [axis % x.rank for axis in axes]
    keep = rng.choice((None, 0, 0, 1))
    made = with_axes(graph, kind, x, axes, 13 if kind == "ReduceSum" else 18, keepdims=keep)
    if made is not None and keep == 0 and axes is not None and rng.random() < 0.5:
        back = sorted(axis % x.rank for axis in axes)
        back = back if rng.random() < 0.8 else back[:1]
        made = with_axes(graph, "Unsqueeze", made, back, 13)
    if made is not None and rng.random() < 0.2 and made.rank:
        with_axes(graph, kind, made, some_axes(graph, made.rank, 1), 13 if kind == "ReduceSum" else 18)


def odd(graph: Graph) -> None:
    """One of the rarer operators."""
    x = graph.pick(lambda v: v.rank > 0)
    if x is not None:
        graph.rng.choice((_rare, _rare_index, _rare_layer))(graph, x)


def _rare(graph: Graph, x: Known) -> None:
    rng = graph.rng
    match rng.randrange(8):
        case 0:
            graph.op("Tile", [x, graph.ints([rng.randint(1, 2) for _ in range(x.rank)])])
        case 1:
            graph.op("Expand", [x, graph.ints([1] * rng.randint(0, x.rank + 1))])
        case 2:
            graph.op("NonZero", [x])
        case 3:
            graph.op("Pow", [x, graph.constant(np.ones(rng.choice(((), (1,))), graph.model.dtype))])
        case 4 if graph.model.opset >= 15:
            graph.op("CastLike", [x, graph.weights((1,))]) if x.exact else None
        case 5:
            step = rng.choice((1, 2, -1))
            graph.op("Range", [graph.constant(np.array(n, np.int64)) for n in (0, 4 * step, step)])
        case 6:
            graph.op("Trilu", [x], upper=rng.choice((0, 1, None)))
        case _:
            noise = graph.op("RandomNormal", [], shape=list(x.shape), seed=float(rng.randint(1, 9)))
            if noise is not None and rng.random() < 0.5:
                graph.op("RandomUniform", [], shape=list(x.shape), seed=float(rng.randint(1, 9)))


def _rare_index(graph: Graph, x: Known) -> None:
    rng, axis = graph.rng, graph.rng.randrange(x.rank)
    match rng.randrange(6):
        case 0:
            graph.op("ArgMax", [x], axis=axis, keepdims=rng.choice((0, None)))
        case 1 if graph.model.opset < 10:
            graph.op("TopK", [x], 2, axis=axis, k=1)
        case 1:
            graph.op("TopK", [x, graph.ints([rng.randint(1, 3)])], 2, axis=axis)
        case 2:
            graph.op("CumSum", [x, graph.constant(np.array(axis))], reverse=rng.choice((None, 1)))
        case 3:
            index = graph.model.numbers.integers(-1, 1, x.shape)
            graph.op("GatherElements", [x, graph.constant(index, "int64")], axis=axis)
        case 4:
            row = graph.constant(np.zeros((1, *x.shape[1:]), x.arrays[0].dtype))
            graph.op("ScatterND", [x, graph.constant(np.zeros((1, 1), np.int64)), row])
        case _:
            ends = graph.constant(np.array([0, 1], graph.model.dtype))
            if x.exact and x.is_int:
                graph.op("OneHot", [x, graph.constant(np.array(3)), ends], axis=rng.choice((-1, 0)))


def _rare_layer(graph: Graph, x: Known) -> None:
    rng, opset = graph.rng, graph.model.opset
    if not x.is_float or not x.filled or x.rank not in (3, 4):
        return
    match rng.randrange(4):
        case 0 if x.rank == 4:
            graph.op(rng.choice(("DepthToSpace", "SpaceToDepth")), [x], blocksize=2)
        case 1 if x.rank == 3 and x.fixed(2):
            kind, gates = rng.choice((("GRU", 3), ("LSTM", 4), ("RNN", 1)))
            weights = [graph.weights((1, gates * 2, size)) for size in (x.shape[2], 2)]
            graph.op(kind, [x, *weights], rng.choice((1, 2)), hidden_size=2)
        case 2:
            graph.op(rng.choice(("GlobalAveragePool", "GlobalMaxPool")), [x])
        case _:
            factors = [1, 1, *(rng.choice((1, 2)) for _ in range(x.rank - 2))]
            scales = graph.constant(np.array(factors, np.float32))
            roi = None if opset >= 13 else graph.constant(np.zeros(0, np.float32))
            inputs = [x, scales] if opset < 11 else [x, roi, scales]
            graph.op(
                "Upsample" if opset == 9 else "Resize", inputs, mode=rng.choice(("nearest", "linear", None))
            )
