"""Sizes that are worked out from other sizes, and what reads them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import helper

from tests.random_graphs.growing import Attributes, Graph, Known
from tests.random_graphs.movement import with_axes


def _sizes(x: Known, axis: int) -> list[int]:
    return [array.shape[axis] for array in x.arrays]


def _size(graph: Graph, x: Known, axis: int) -> Known | None:
    """The size of an axis, of x or of another value that is as large, as a number or a list of one."""
    rng, want = graph.rng, _sizes(x, axis)
    values = [v for v in graph.visible() if rng.random() < 0.5]
    same = [(v, a) for v in values for a in range(v.rank) if _sizes(v, a) == want]
    if same and rng.random() < 0.4:
        x, axis = rng.choice(same[:4])
    index = axis - x.rank if rng.random() < 0.3 else axis
    following = index + 1 if index != -1 else None
    if graph.model.opset >= 15 and rng.random() < 0.3:
        return graph.op("Shape", [x], start=index, end=following)
    whole = graph.op("Shape", [x])
    if whole is None:
        return None
    match rng.randrange(4):
        case 0:
            return graph.op("Gather", [whole, graph.constant(np.array(index))], axis=rng.choice((0, None)))
        case 1:
            return graph.op("Gather", [whole, graph.ints([index])], axis=0)
        case 2 if x.rank > 1 and graph.model.opset < 18:
            known = len(graph.known)
            graph.op("Split", [whole], x.rank, axis=0)
            return graph.known[-1 - axis] if len(graph.known) == known + x.rank else None
    if graph.model.opset < 10:
        return graph.op("Slice", [whole], starts=[axis], ends=[axis + 1])
    end = 2**63 - 1 if following is None else following
    inputs = [whole, graph.ints([index]), graph.ints([end])]
    return graph.op("Slice", [*inputs, graph.ints([0])] if rng.random() < 0.6 else inputs)


def _all(graph: Graph, x: Known) -> list[Known | None]:
    return [_size(graph, x, axis) for axis in range(x.rank)]


def _listed(graph: Graph, size: Known | None) -> Known | None:
    """A number as a list of one."""
    if size is None or size.rank == 1:
        return size
    if graph.rng.random() < 0.2:
        return graph.op("Reshape", [size, graph.ints([graph.rng.choice((1, -1))])])
    return with_axes(graph, "Unsqueeze", size, [0], 13)


def _joined(graph: Graph, parts: Sequence[Known | None]) -> Known | None:
    listed = [_listed(graph, part) for part in parts]
    found = [part for part in listed if part is not None]
    if len(found) < len(parts) or not found:
        return None
    return graph.op("Concat", found, axis=0)


def _number(graph: Graph, *numbers: int) -> Known:
    return graph.constant(np.full(graph.rng.choice(((), (1,))), graph.rng.choice(numbers), np.int64))


def _worked(graph: Graph, size: Known | None, times: int = 2) -> Known | None:
    """A size after some arithmetic, which may leave it as it is."""
    for _ in range(graph.rng.randint(0, times)):
        if size is None or size.arrays[0].dtype != np.int64:
            return size
        size = _changed(graph, size) or size
    return size


def _changed(graph: Graph, size: Known) -> Known | None:
    rng = graph.rng
    match rng.randrange(10):
        case 0:
            twice = graph.op("Mul", rng.sample((size, _number(graph, 2)), 2))
            return graph.op("Div", [twice, _number(graph, 2)]) if twice else None
        case 1:
            more = graph.op("Add", rng.sample((size, _number(graph, 3)), 2))
            return graph.op("Sub", [more, _number(graph, 3, 2)]) if more else None
        case 2:
            narrow = graph.op("Cast", [size], to=rng.choice((6, 7, 1, 10)))
            if narrow is not None and rng.random() < 0.3:
                narrow = graph.op(rng.choice(("Floor", "Ceil")), [narrow]) or narrow
            return graph.op("Cast", [narrow], to=7) if narrow else None
        case 3:
            return graph.op(rng.choice(("Max", "Min")), [size, _number(graph, 1, 2, 100)])
        case 4:
            return graph.op("Div", [size, _number(graph, 1, 2, 3)])
        case 5:
            return graph.op("Mod", [size, _number(graph, 2, 3, 100)])
        case 6:
            same = graph.op("Equal", [size, _number(graph, -1, 1, 2)])
            return graph.op("Where", [same, _number(graph, 1), size]) if same else None
        case 7:
            return graph.op("Mul", [size, _number(graph, 1, 2, -1)])
        case 8:
            other = graph.pick(
                lambda v: v.arrays[0].dtype == np.int64 and v.rank < 2 and v.shape in ((), (1,))
            )
            return graph.op(rng.choice(("Add", "Sub", "Mul", "Max")), [size, other or size])
        case _:
            return graph.op("Add", [size, _number(graph, 0, 1, -1)])


def shape_arithmetic(graph: Graph) -> None:
    """A Reshape to sizes that are merged, split and put in order, each written in one of many ways."""
    rng, x = graph.rng, graph.pick(lambda v: 0 < v.rank < 6)
    if x is None:
        return
    since, axis = len(graph.known), 0
    parts: list[Known | None] = []
    while axis < x.rank:
        whole, way = _size(graph, x, axis), rng.random()
        if way < 0.25 and axis + 1 < x.rank:
            other = _size(graph, x, axis + 1)
            parts.append(graph.op("Mul", rng.sample((whole, other), 2)) if whole and other else None)
            axis += 1
        elif way < 0.4:
            factor = rng.choice([f for f in (1, 2, 3) if all(size % f == 0 for size in _sizes(x, axis))])
            half = graph.op("Div", [whole, graph.constant(np.array(factor))]) if whole else None
            parts += rng.sample((half, graph.ints([factor])), 2)
        elif way < 0.6 and x.fixed(axis):
            parts.append(graph.ints([x.shape[axis]]))
        elif way < 0.7:
            parts.append(graph.ints([0]))
        else:
            parts.append(_worked(graph, whole, 1) if rng.random() < 0.5 else whole)
        axis += 1
    if rng.random() < 0.2:
        rng.shuffle(parts)
    if rng.random() < 0.4:
        parts[rng.randrange(len(parts))] = graph.ints([-1])
    target = _joined(graph, parts)
    if target is None:
        return
    allow = rng.choice((0, None, None)) if graph.model.opset >= 14 else None
    made = graph.op("Reshape", [x, target], allowzero=allow)
    graph.hide(since)
    if made is not None and rng.random() < 0.4:
        changed = graph.op(rng.choice(("Neg", "Abs", "Identity")), [made]) or made
        back = graph.op("Shape", [x]) if rng.random() < 0.5 else _joined(graph, _all(graph, x))
        if back is not None:
            graph.op("Reshape", [changed, back])


def _expand(graph: Graph, x: Known, axis: int) -> None:
    other = graph.pick(lambda v: v.rank > 0) or x
    shape = graph.op("Shape", [other]) if graph.rng.random() < 0.5 else _joined(graph, _all(graph, x))
    if shape is not None:
        graph.op("Expand", [x, shape])


def _cut(graph: Graph, x: Known, axis: int) -> None:
    end = _listed(graph, _worked(graph, _size(graph, x, axis)))
    start = _worked(graph, _size(graph, x, axis)) if graph.rng.random() < 0.4 else None
    start = _listed(graph, start) or graph.ints([0])
    if end is not None and graph.model.opset >= 10:
        graph.op("Slice", [x, start, end, graph.ints([axis])])


def _filled(graph: Graph, x: Known, axis: int) -> None:
    rng, dtype = graph.rng, x.arrays[0].dtype
    shape = graph.op("Shape", [x]) if rng.random() < 0.5 else _joined(graph, _all(graph, x))
    if shape is not None:
        value = helper.make_tensor(
            "v", int(helper.np_dtype_to_tensor_dtype(dtype)), [1], [rng.choice((0, 1))]
        )
        made = graph.op("ConstantOfShape", [shape], value=value)
        if made is not None and dtype.kind == "f":
            graph.op(rng.choice(("Add", "Mul", "Sub")), rng.sample((made, x), 2))


def _repeated(graph: Graph, x: Known, axis: int) -> None:
    repeats: list[Known | None] = [graph.ints([1]) for _ in range(x.rank)]
    if max(_sizes(x, axis)) < 4:
        repeats[axis] = _worked(graph, _size(graph, x, axis))
    many = _joined(graph, repeats)
    if many is not None and max(int(array.max()) for array in many.arrays) < 20:
        graph.op("Tile", [x, many])


def _counted(graph: Graph, x: Known, axis: int) -> None:
    limit = _worked(graph, _size(graph, x, x.rank - 1))
    if limit is None or limit.rank or any(abs(int(a)) > 20 for a in limit.arrays):
        return
    count = graph.op("Range", [graph.constant(np.array(0)), limit, graph.constant(np.array(1))])
    if count is not None:
        place = graph.op("Cast", [count], to=int(helper.np_dtype_to_tensor_dtype(x.arrays[0].dtype)))
        if place is not None:
            graph.op("Add", [x, place])


def _last(graph: Graph, x: Known, axis: int) -> None:
    size = _size(graph, x, axis)
    index = graph.op("Sub", [size, graph.constant(np.array(1))]) if size else None
    if index is not None:
        graph.op("Gather", [x, index], axis=axis)


def _resized(graph: Graph, x: Known, axis: int) -> None:
    rng, opset = graph.rng, graph.model.opset
    if x.rank not in (3, 4) or opset < 11 or not x.is_float or not x.filled:
        return
    wanted = _all(graph, x)
    factor = graph.constant(np.array(rng.choice((1, 2))))
    wanted[2] = graph.op("Mul", [wanted[2], factor]) if wanted[2] else None
    target = _joined(graph, wanted)
    if target is not None:
        empty = None if opset >= 13 else graph.constant(np.zeros(0, np.float32))
        given: Attributes = {
            "coordinate_transformation_mode": rng.choice(("asymmetric", None)),
            "mode": "nearest",
        }
        graph.op("Resize", [x, empty, empty, target], nearest_mode=rng.choice(("floor", None)), **given)


def _padded(graph: Graph, x: Known, axis: int) -> None:
    rng = graph.rng
    if graph.model.opset < 11 or not x.is_float:
        return
    amounts: list[Known | None] = [graph.ints([0]) for _ in range(2 * x.rank)]
    size, whole = _size(graph, x, axis), graph.constant(np.array(rng.choice((x.shape[axis], 8))))
    amounts[rng.choice((axis, axis + x.rank))] = graph.op("Sub", [whole, size]) if size else None
    pads = _joined(graph, amounts)
    if pads is not None:
        graph.op("Pad", [x, pads])


def _parted(graph: Graph, x: Known, axis: int) -> None:
    if graph.model.opset < 13:
        return
    first = _listed(graph, _worked(graph, _size(graph, x, axis)))
    whole = _listed(graph, _size(graph, x, axis))
    rest = graph.op("Sub", [whole, first]) if whole and first else None
    parts = graph.op("Concat", graph.rng.sample((first, rest), 2), axis=0) if first and rest else None
    if parts is not None:
        graph.op("Split", [x, parts], 2, axis=axis)


def _compared(graph: Graph, x: Known, axis: int) -> None:
    size = _worked(graph, _size(graph, x, axis))
    number = graph.constant(np.array(graph.rng.choice((0, 1, 2, 3, x.shape[axis]))))
    if size is not None and size.arrays[0].dtype == np.int64:
        same = graph.op(graph.rng.choice(("Equal", "Greater", "Less")), [size, number])
        if same is not None and graph.rng.random() < 0.3:
            graph.op("Not", [same])


_READERS = (
    *(_expand, _cut, _cut, _filled, _repeated, _counted, _last, _resized, _padded, _parted),
    *(_compared, _compared),
)


def read_size(graph: Graph) -> None:
    """An operator that takes a size."""
    x = graph.pick(lambda v: 0 < v.rank < 6)
    if x is not None:
        graph.rng.choice(_READERS)(graph, x, graph.rng.randrange(x.rank))


def sizes(graph: Graph) -> None:
    """Shapes as values: sums, products, comparisons of whole shapes."""
    rng, x = graph.rng, graph.pick(lambda v: v.rank > 0)
    whole = graph.op("Shape", [x]) if x is not None else None
    if x is None or whole is None:
        return
    if graph.model.opset >= 15 and rng.random() < 0.3:
        bounds = [rng.choice((None, rng.randint(-x.rank - 1, x.rank + 1))) for _ in range(2)]
        whole = graph.op("Shape", [x], start=bounds[0], end=bounds[1]) or whole
    match rng.randrange(7):
        case 0:
            graph.op("Size", [x])
        case 1:
            graph.op("ReduceProd", [whole], keepdims=rng.choice((0, 1, None)))
        case 2 | 3:
            _expand_to(graph, x, whole)
        case 4:
            rank = graph.op("Size", [whole])
            if rank is not None:
                graph.op("Range", [graph.constant(np.array(0)), rank, graph.constant(np.array(1))])
        case 5 if whole.shape == (x.rank,):
            turned = graph.op("Gather", [whole, graph.ints(rng.sample(range(x.rank), x.rank))], axis=0)
            if turned is not None:
                graph.op("Reshape", [x, turned])
        case _:
            _worked(graph, whole, 3)


def _expand_to(graph: Graph, x: Known, whole: Known) -> None:
    """Expand to a shape without the sizes that are open, or to the larger of two."""
    if graph.rng.random() < 0.5:
        free = graph.op("Equal", [whole, graph.ints([-1])])
        target = graph.op("Where", [free, graph.ints([1]), whole]) if free else None
    else:
        other = graph.pick(lambda v: v.rank == x.rank)
        shape = graph.op("Shape", [other]) if other else None
        target = graph.op("Max", [whole, shape]) if shape else None
    if target is not None:
        graph.op("Expand", [x, target])
