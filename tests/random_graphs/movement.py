"""What moves, cuts and joins values."""

from __future__ import annotations

from typing import Any

from tests.random_graphs.growing import Graph, Known


def some_axes(graph: Graph, rank: int, count: int) -> list[int]:
    axes = graph.rng.sample(range(rank), count)
    return [axis - rank if graph.rng.random() < 0.3 else axis for axis in axes]


def with_axes(
    graph: Graph, op_type: str, x: Known, axes: list[int] | None, since: int, **given: Any
) -> Known | None:
    """An operator whose axes are an attribute below opset `since` and an input from there on."""
    if axes is None:
        return graph.op(op_type, [x], **given)
    if graph.model.opset < since:
        return graph.op(op_type, [x], axes=axes, **given)
    return graph.op(op_type, [x, graph.ints(axes)], **given)


def transpose(graph: Graph) -> None:
    x = graph.pick(lambda v: v.rank > 0)
    if x is not None:
        perm = graph.rng.sample(range(x.rank), x.rank)
        graph.op("Transpose", [x], perm=graph.rng.choice((perm, perm, None, list(range(x.rank)))))


def reshape(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    if rng.random() < 0.15:
        graph.op(
            "Flatten",
            [x],
            axis=rng.choice((None, rng.randint(-x.rank if graph.model.opset > 10 else 0, x.rank))),
        )
        return
    target = list(x.shape)
    match rng.randrange(5):
        case 0 if x.rank > 1:
            axis = rng.randrange(x.rank - 1)
            target[axis : axis + 2] = [target[axis] * target[axis + 1]]
        case 1:
            target.insert(rng.randrange(x.rank + 1), 1)
        case 2:
            rng.shuffle(target)
        case 3:
            axis = rng.randrange(x.rank)
            even = target[axis] % 2 == 0
            target[axis : axis + 1] = [2, target[axis] // 2] if even else [target[axis], 1]
    free = [axis for axis in range(len(target)) if not (axis < x.rank and x.fixed(axis))]
    if rng.random() < 0.5 or free:
        target[rng.choice(free or range(len(target)))] = -1
    target = [
        0 if i < x.rank and size == x.shape[i] and rng.random() < 0.4 else size
        for i, size in enumerate(target)
    ]
    allow = rng.choice((0, None)) if graph.model.opset >= 14 else None
    graph.op("Reshape", [x, graph.ints(target)], allowzero=allow)


def squeeze(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick()
    if x is None:
        return
    ones = [axis for axis in range(x.rank) if x.shape[axis] == 1 and x.fixed(axis)]
    if ones and rng.random() < 0.6:
        axes = rng.sample(ones, rng.randint(1, len(ones)))
        if graph.model.opset < 11:
            axes.sort()  # ONNX's own inference passes over those that are out of order
        negative = rng.random() < 0.3 and graph.model.opset >= 11
        axes = [axis - x.rank if negative else axis for axis in axes]
        with_axes(graph, "Squeeze", x, rng.choice((axes, axes, None)), 13)
    elif x.rank < 5:
        count = rng.randint(1, 2)
        axes = rng.sample(range(x.rank + count), count)
        if rng.random() < 0.3 and graph.model.opset >= 11:
            axes = [axis - x.rank - count for axis in axes]
        with_axes(graph, "Unsqueeze", x, axes, 13)


def slice_step(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axes = some_axes(graph, x.rank, rng.randint(1, min(2, x.rank)))
    starts = [rng.choice((0, 0, 1, -1, -2, -3, 2**31 - 1, -(2**31))) for _ in axes]
    ends = [rng.choice((2**31 - 1, 2**63 - 1, -1, 2, 3, x.shape[a], -(2**31), -(2**63) + 1)) for a in axes]
    steps = [rng.choice((1, 1, 1, 2, -1, -2)) for _ in axes]
    # Backwards to the largest integer, ONNX Runtime goes past index 0, where ONNX's text gives nothing.
    ends = [-end if step < 0 and end >= 2**31 - 1 else end for end, step in zip(ends, steps, strict=True)]
    if graph.model.opset < 10:
        graph.op("Slice", [x], starts=starts, ends=ends, axes=axes)
        return
    inputs: list[Known | None] = [x, graph.ints(starts), graph.ints(ends), graph.ints(axes)]
    graph.op("Slice", [*inputs, graph.ints(steps)] if rng.random() < 0.6 else inputs)


def concat(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axis = rng.randrange(x.rank)

    def fits(v: Known) -> bool:
        return v.arrays[0].dtype == x.arrays[0].dtype and all(
            len(a.shape) == len(b.shape)
            and all(i == axis or n == m for i, (n, m) in enumerate(zip(a.shape, b.shape, strict=True)))
            for a, b in zip(v.arrays, x.arrays, strict=True)
        )

    parts = [x, *(graph.pick(fits) for _ in range(rng.randint(0, 2)))]
    graph.op("Concat", rng.sample(parts, len(parts)), axis=axis - x.rank if rng.random() < 0.2 else axis)


def split(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axis = rng.randrange(x.rank)
    size, count = x.shape[axis], rng.randint(1, 3)
    cuts = sorted(rng.randint(0, size) for _ in range(count - 1))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)]
    if rng.random() < 0.4:
        number = count if graph.model.opset >= 18 else None
        graph.op("Split", [x], count, axis=axis, num_outputs=number)
    elif graph.model.opset < 13:
        graph.op("Split", [x], count, axis=axis, split=sizes)
    else:
        graph.op("Split", [x, graph.ints(sizes)], count, axis=axis)


def gather(graph: Graph) -> None:
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    if x is None:
        return
    axis = rng.randrange(x.rank)
    shape = rng.choice(((), (1,), (2,), (2, 2)))
    least = min(array.shape[axis] for array in x.arrays)
    if least:
        index = graph.model.numbers.integers(-least, least, shape)
        graph.op("Gather", [x, graph.constant(index, "int64")], axis=axis)
