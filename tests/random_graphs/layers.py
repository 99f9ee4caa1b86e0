"""Layers with weights, and what is folded into them."""

from __future__ import annotations

import numpy as np

from tests.random_graphs.elements import clip
from tests.random_graphs.growing import Attributes, Graph, Known
from tests.random_graphs.movement import some_axes, transpose


def layer(graph: Graph) -> None:
    # Of no elements, some windows end the runtime's process.
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank >= 2 and v.filled)
    if x is None:
        return
    if x.rank >= 3 and rng.random() < 0.85 and x.fixed(1):
        convolution(graph, x)
    elif x.rank == 2 and rng.random() < 0.6 and (x.fixed(0) or x.fixed(1)):
        gemm(graph, x)
    elif x.fixed(-1):
        n = rng.randint(1, 5)
        graph.op("MatMul", [x, graph.weights((x.shape[-1], n))])


def convolution(graph: Graph, x: Known) -> None:
    rng, channels, spatial = graph.rng, x.shape[1], x.rank - 2
    transposed = rng.random() < 0.25
    group = rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
    each = rng.randint(1, 3)
    kernel = [rng.randint(1, 3) for _ in range(spatial)]
    shape = (channels, each, *kernel) if transposed else (each * group, channels // group, *kernel)
    inputs: list[Known | None] = [x, graph.weights(shape)]
    if rng.random() < 0.5:
        inputs.append(graph.weights((each * group,)))
    given: Attributes = {"group": group if group > 1 or rng.random() < 0.3 else None}
    match rng.randrange(4):
        case 0:
            given["pads"] = [rng.randint(0, 1) for _ in range(2 * spatial)]
        case 1:
            given["auto_pad"] = rng.choice(("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET"))
    if rng.random() < 0.4:
        given["strides"] = [rng.randint(1, 2) for _ in range(spatial)]
    if rng.random() < 0.2 and not given.get("auto_pad"):
        given["dilations"] = [rng.randint(1, 2) for _ in range(spatial)]
    if rng.random() < 0.5:
        given["kernel_shape"] = kernel
    graph.op("ConvTranspose" if transposed else "Conv", inputs, **given)


def gemm(graph: Graph, x: Known) -> None:
    rng, n = graph.rng, graph.rng.randint(1, 5)
    trans_a, trans_b = rng.random() < 0.25 or not x.fixed(1), rng.random() < 0.5
    if not x.fixed(0 if trans_a else 1):
        return
    k, m = (x.shape[0], x.shape[1]) if trans_a else (x.shape[1], x.shape[0])
    inputs: list[Known | None] = [x, graph.weights((n, k) if trans_b else (k, n))]
    if graph.model.opset < 11 or rng.random() < 0.8:
        inputs.append(graph.weights(rng.choice(((n,), (1, n), (1,), (), (m, 1), (m, n), (1, 1)))))
    graph.op(
        "Gemm",
        inputs,
        transA=rng.choice((int(trans_a), int(trans_a) or None)),
        transB=int(trans_b) or None,
        alpha=rng.choice((None, 0.5, -1.5)),
        beta=rng.choice((None, 2.0, 0.0)),
    )


def channel_shapes(graph: Graph, x: Known) -> tuple[int, ...]:
    """A shape for a constant beside x: by channel, by column, a number, or larger than x."""
    rng, rank = graph.rng, x.rank
    shapes: list[tuple[int, ...]] = [(), (1,), (1,) * rank, (1,) * (rank + 1)]
    if rank:
        shapes += [(x.shape[-1],), (1, x.shape[-1])]
    if rank >= 2:
        channel = (x.shape[1], *(1,) * (rank - 2))
        shapes += [channel, channel, channel, (1, *channel), (1, *channel), (1, 1, *channel), x.shape]
    return rng.choice(shapes)


def affine(graph: Graph) -> None:
    rng, x = graph.rng, graph.tensor()
    if x is None:
        return
    op_type = rng.choice(("Add", "Sub", "Mul", "Div"))
    shape = channel_shapes(graph, x)
    if rng.random() < 0.25:
        neutral = 0 if op_type in ("Add", "Sub") else 1
        c = graph.constant(np.full(shape, neutral, graph.model.dtype))
    else:
        c = graph.weights(shape, 0.5, 2) if rng.random() < 0.7 else graph.weights(shape, -2, -0.5)
    graph.op(op_type, [c, x] if rng.random() < 0.35 else [x, c])


def batchnorm(graph: Graph) -> None:
    rng = graph.rng
    x = graph.pick(lambda v: v.is_float and v.rank >= 2 and v.fixed(1))
    if x is None:
        return
    size = (x.shape[1],)
    parameters = [graph.weights(size, *span) for span in ((0.5, 2), (-1, 1), (-1, 1), (0.3, 3))]
    graph.op("BatchNormalization", [x, *parameters], epsilon=rng.choice((None, 1e-3, 0.1)))


def parallel(graph: Graph) -> None:
    """Layers of one kind that read the same value, and what is done alike with each."""
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank >= 2 and v.filled)
    if x is None:
        return
    made: list[Known | None] = []
    spatial, same = [rng.choice((1, 1, 3)) for _ in range(x.rank - 2)], rng.random() < 0.8
    convolve = x.rank > 2 and x.fixed(1) and rng.random() < 0.6
    gemm = not convolve and x.rank == 2 and rng.random() < 0.5
    given: Attributes = {"pads": [size // 2 for size in spatial] * 2} if convolve else {}
    given |= {"transB": 1, "alpha": rng.choice((None, 0.5))} if gemm else {}
    bias, after = rng.random() < 0.6, rng.choice((None, None, "Relu", "Sigmoid", "LeakyRelu", "Tanh"))
    for _ in range(rng.randint(2, 4)):
        n = rng.randint(1, 4)
        if convolve:
            inputs = [x, graph.weights((n, x.shape[1], *spatial))]
        elif x.fixed(-1):
            inputs = [x, graph.weights((n, x.shape[-1]) if gemm else (x.shape[-1], n))]
        else:
            return
        inputs += [graph.weights((n,))] if bias and (convolve or gemm) else []
        one = graph.op("Conv" if convolve else "Gemm" if gemm else "MatMul", inputs, **given)
        if one is not None and bias and not convolve and not gemm:
            one = graph.op("Add", rng.sample((one, graph.weights((n,))), 2))
        if one is not None and after:
            one = graph.op(after if same or rng.random() < 0.7 else "Relu", [one])
        made.append(one)
    found = [one for one in made if one is not None]
    if found and rng.random() < 0.6:
        graph.op("Concat", found, axis=1 if convolve else x.rank - 1)


def einsum(graph: Graph) -> None:
    """An Einsum of one value, or of two; MatMul of two values."""
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and 2 <= v.rank <= 4 and v.filled)
    if x is None:
        return
    y = graph.pick(lambda v: v.arrays[0].dtype == x.arrays[0].dtype and 2 <= v.rank <= 4 and v.filled) or x
    if rng.random() < 0.3:
        turned = graph.op("Transpose", [y], perm=[*range(y.rank - 2), y.rank - 1, y.rank - 2])
        graph.op("MatMul", rng.sample((x, rng.choice((turned or y, y))), 2))
        return
    letters = "abcd"[: x.rank]
    if rng.random() < 0.3:
        kept = rng.sample(letters, rng.randint(0, x.rank))
        graph.op("Einsum", [x], equation=f"{letters}->{''.join(kept)}")
    elif x.fixed(-1) and rng.random() < 0.6:
        w = graph.weights((x.shape[-1], 3)) if rng.random() < 0.5 else graph.weights((3, x.shape[-1]))
        inner = letters[-1]
        right = f"{inner}z" if w.shape[0] == x.shape[-1] else f"z{inner}"
        graph.op("Einsum", [x, w], equation=f"{letters},{right}->{letters[:-1]}z")
    else:
        other = "".join(rng.choice(letters) if rng.random() < 0.7 else "wxyz"[i] for i in range(y.rank))
        shared = [(letters.index(one), other.index(one)) for one in other if one in letters]
        alike = all(
            a.shape[i] == b.shape[j] for i, j in shared for a, b in zip(x.arrays, y.arrays, strict=True)
        )
        if len(set(other)) == len(other) and alike:
            every = sorted(set(letters + other))
            kept = rng.sample(every, min(len(every), rng.randint(1, 4)))
            graph.op("Einsum", [x, y], equation=f"{letters},{other}->{''.join(kept)}")


def block(graph: Graph) -> None:
    """A layer with what is folded into it around it."""
    for step in (affine, pad, transpose, batchnorm):
        if graph.rng.random() < 0.2:
            step(graph)
    layer(graph)
    for step in (batchnorm, affine, affine, clip):
        if graph.rng.random() < 0.5:
            step(graph)
    if graph.rng.random() < 0.3:
        layer(graph)


def pad(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0 and v.arrays[0].dtype.kind in "fi")
    if x is None:
        return
    opset, mode = graph.model.opset, rng.choice((None, None, None, "constant", "edge", "reflect"))
    axes = list(range(x.rank))
    amounts = [rng.choice((0, 1, 2)) if axis % x.rank > 1 or rng.random() < 0.2 else 0 for axis in axes * 2]
    if rng.random() < 0.1:
        amounts[-1] = -1
    value = rng.choice((None, None, 0.0, 1.0))
    if opset < 11:
        graph.op("Pad", [x], pads=amounts, mode=mode, value=value)
        return
    fill = None if value is None else graph.constant(np.array(value, x.arrays[0].dtype))
    inputs: list[Known | None] = [x, graph.ints(amounts)]
    if opset >= 18 and rng.random() < 0.4:
        chosen = some_axes(graph, x.rank, rng.randint(1, x.rank))
        inputs[1] = graph.ints([rng.randint(0, 2) for _ in range(2 * len(chosen))])
        graph.op("Pad", [*inputs, fill, graph.ints(chosen)], mode=mode)
    else:
        graph.op("Pad", [*inputs, fill] if fill is not None else inputs, mode=mode)


def pool(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.is_float and v.rank in (3, 4) and v.filled)
    if x is None:
        return
    spatial = x.rank - 2
    kernel = [rng.randint(1, 3) for _ in range(spatial)]
    given: Attributes = {"kernel_shape": kernel, "strides": rng.choice((None, [2] * spatial))}
    if rng.random() < 0.5:
        given["pads"] = [rng.randint(0, size - 1) for size in kernel * 2]
    if rng.random() < 0.5:
        graph.op("MaxPool", [x], **given)
    else:
        graph.op("AveragePool", [x], count_include_pad=rng.choice((None, 1)), **given)
