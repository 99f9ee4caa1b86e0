"""How an op reads inputs whose layout is not changed yet, and what is left to change in its result."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import BROADCAST, Dim, Dims, divide, product
from onnxopt.graph import has_reference, int_attr
from onnxopt.passes.shared.layout import Axes, Layout, Shape
from onnxopt.rewrite import AttributeValue, Edit

__all__ = ["MOVABLE", "Move", "moves"]

_UNARY = str.split(
    "Abs Acos Acosh Asin Asinh Atan Atanh BitwiseNot Cast Ceil Celu Clip Cos Cosh Elu Erf Exp Floor Gelu"
    " HardSigmoid HardSwish Identity IsInf IsNaN LeakyRelu Log Mish Neg Not Reciprocal Relu Round Selu Shrink"
    " Sigmoid Sign Sin Sinh Softplus Softsign Sqrt Swish Tan Tanh ThresholdedRelu"
)
_REDUCE = tuple(f"Reduce{kind}" for kind in ("L1", "L2", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare"))


@dataclass(frozen=True)
class Move:
    """An op in front of a change of layout.

    inputs: by position, the change of layout that each input has behind it and that is left away.
    output: the change of layout that the result needs instead.
    attributes, others: what of the op changes: attributes, and inputs that are lists of integers.
    """

    inputs: Mapping[int, Layout]
    output: Layout
    attributes: Mapping[str, AttributeValue]
    others: Mapping[int, Sequence[int]]

    def build(self, node: ir.Node, edit: Edit, inputs: Mapping[int, ir.Value]) -> ir.Value:
        """The op with these inputs; those that are not named are the node's own."""
        values: list[ir.Value | None] = list(node.inputs)
        for index, numbers in self.others.items():
            values += [None] * (index + 1 - len(values))
            old = node.inputs[index] if index < len(node.inputs) else None
            dtype = np.int32 if old is not None and old.dtype == ir.DataType.INT32 else np.int64
            values[index] = edit.constant(np.array(numbers, dtype), "axes")
        for index, value in inputs.items():
            values[index] = value
        return edit.op(node.op_type, values, {**node.attributes, **self.attributes})


@dataclass(frozen=True)
class _Seen:
    """An op whose input `index` has the change of layout `layout` behind it."""

    node: ir.Node
    index: int
    layout: Layout
    dims: Dims
    opset: int

    def axis(self, default: int) -> int:
        """The attribute, counted from the front."""
        return int_attr(self.node, "axis", default) % len(self.layout.target)

    def ints(self, name: str, index: int) -> list[int] | None:
        return self.dims.ints(self.node, name, index)

    def shape(self, index: int) -> Shape | None:
        return self.dims.of(self.node.inputs[index])

    def places(self, axis: int) -> list[int]:
        """The axes of the source that are this axis of the target; any of size 1 if it has size 1."""
        return [place for place, other in enumerate(self.layout.source) if other == self.layout.target[axis]]


def moves(node: ir.Node, index: int, layout: Layout, dims: Dims, opset: int) -> Iterator[Move]:
    """The ways to put an op before the change of layout `layout`, which one of its inputs has behind it."""
    family = MOVABLE.get(node.op_type)
    if family is None or node.domain or has_reference(node) or opset < 7:
        return
    if index == 0 or node.op_type in (*BROADCAST, "Concat"):
        yield from family(_Seen(node, index, layout.coarse(), dims, opset))


def _unary(seen: _Seen) -> Iterator[Move]:
    yield Move({0: seen.layout}, seen.layout, {}, {})


def _nary(seen: _Seen) -> Iterator[Move]:
    """Inputs that are broadcast have 1 for some leaves: for all of an axis, or for none."""
    layout, whole, parts = seen.layout, seen.dims.of(seen.node.outputs[0]), dict[int, Layout]()
    if layout.target_shape != whole:
        return
    for other in range(len(seen.node.inputs)):
        shape = seen.shape(other)
        if shape is None:
            return
        padded = (1,) * (len(whole) - len(shape)) + shape
        if any(size not in (1, full) for size, full in zip(padded, whole, strict=True)):
            return
        ones = {
            leaf: 1 for axis, size in zip(layout.target, padded, strict=True) if size == 1 for leaf in axis
        }
        if any(0 < sum(leaf in ones for leaf in axis) < len(axis) for axis in layout.source):
            return
        parts[other] = layout.resized(dict(ones))
    yield Move(parts, layout, {}, {})


def _replaced(layout: Layout, place: int, axis: int, sizes: Sequence[Dim]) -> Layout:
    """The layout where axis `place` of the source and `axis` of the target become axes of these sizes."""
    first = len(layout.sizes)
    new: Axes = tuple((first + number,) for number in range(len(sizes)))
    source = (*layout.source[:place], *new, *layout.source[place + 1 :])
    target = (*layout.target[:axis], *new, *layout.target[axis + 1 :])
    return Layout((*layout.sizes, *sizes), source, target).resized({})


def _along(seen: _Seen) -> Iterator[Move]:
    """Softmax and its like, over one axis."""
    for place in seen.places(seen.axis(-1)) if seen.opset >= 13 else ():
        yield Move({0: seen.layout}, seen.layout, {"axis": place}, {})


def _reduce(seen: _Seen) -> Iterator[Move]:
    """The axes that go are whole axes of the source; whether they are kept as ones is free to choose."""
    axes, node, layout = seen.ints("axes", 1), seen.node, seen.layout
    if axes is None or (not axes and int_attr(node, "noop_with_empty_axes", 0)):
        return
    rank = len(layout.target)
    gone = {axis % rank for axis in axes or range(rank)}
    leaves = {leaf for axis in gone for leaf in layout.target[axis]}
    places = [place for place, axis in enumerate(layout.source) if axis and leaves.issuperset(axis)]
    if not places or sum(len(layout.source[place]) for place in places) < len(leaves):
        return
    ones = dict[int, Dim].fromkeys(leaves, 1)
    kept = layout.resized(ones)
    target = kept.target
    if not int_attr(node, "keepdims", 1):
        target = tuple(axis for number, axis in enumerate(target) if number not in gone)
    less = tuple(axis for place, axis in enumerate(kept.source) if place not in places)
    as_input = seen.opset >= (13 if node.op_type == "ReduceSum" else 18)
    for keepdims, source in ((0, less), (1, kept.source)):
        attributes: dict[str, AttributeValue] = {"keepdims": keepdims}
        if not as_input:
            attributes["axes"] = places
        others = {1: places} if as_input else {}
        yield Move({0: layout}, Layout(kept.sizes, source, target), attributes, others)


def _concat(seen: _Seen) -> Iterator[Move]:
    """Along the first leaf of the axis, which is an axis of the source, or along any of size 1."""
    layout, axis, count = seen.layout, seen.axis(1), len(seen.node.inputs)
    shapes = [shape for number in range(count) if (shape := seen.shape(number)) is not None]
    if len(shapes) < count:
        return
    rest = product(layout.sizes[leaf] for leaf in layout.target[axis][1:])
    parts = [part for shape in shapes if (part := divide(shape[axis], rest)) is not None]
    if len(parts) < len(shapes):
        return
    for place, own in enumerate(layout.source):
        if own != layout.target[axis][:1]:
            continue
        leaf, open_ = (own[0], layout) if own else (len(layout.sizes), _opened(layout, place, axis))
        inputs = {number: open_.resized({leaf: part}) for number, part in enumerate(parts)}
        whole: Dim = sum(parts[1:], parts[0])
        yield Move(inputs, open_.resized({leaf: whole}), {"axis": place}, {})


def _opened(layout: Layout, place: int, axis: int) -> Layout:
    """The layout with a leaf of size 1 where both sides have an axis of that size."""
    leaf = (len(layout.sizes),)
    source = (*layout.source[:place], leaf, *layout.source[place + 1 :])
    target = (*layout.target[:axis], leaf, *layout.target[axis + 1 :])
    return Layout((*layout.sizes, 1), source, target)


def _slice(seen: _Seen) -> Iterator[Move]:
    starts, axes, result = seen.ints("starts", 1), seen.ints("axes", 3), seen.dims.of(seen.node.outputs[0])
    if starts is None or axes is None or result is None:
        return
    places, output = list[int](), seen.layout
    for axis in (axis % len(result) for axis in axes or range(len(starts))):
        found = seen.places(axis) if seen.layout.target[axis] else []
        if len(found) != 1:
            return
        places += found
        output = _replaced(output, found[0], axis, result[axis : axis + 1])
    older = seen.opset < 10
    yield Move({0: seen.layout}, output, {"axes": places} if older else {}, {} if older else {3: places})


def _pad(seen: _Seen) -> Iterator[Move]:
    pads, axes, result = seen.ints("pads", 1), seen.ints("axes", 3), seen.dims.of(seen.node.outputs[0])
    if pads is None or axes is None or result is None or seen.opset < 11:
        return
    padded, rank = [axis % len(result) for axis in axes] or list(range(len(result))), len(seen.layout.source)
    output, amounts = seen.layout, [0] * 2 * rank
    for number, axis in enumerate(padded):
        pair = pads[number], pads[number + len(padded)]
        if pair == (0, 0):
            continue
        places = seen.places(axis) if seen.layout.target[axis] else []
        if len(places) != 1:
            return
        amounts[places[0]], amounts[places[0] + rank] = pair
        output = _replaced(output, places[0], axis, result[axis : axis + 1])
    yield Move({0: seen.layout}, output, {}, {1: amounts, **({3: range(rank)} if axes else {})})


def _gather(seen: _Seen) -> Iterator[Move]:
    indices, axis = seen.shape(1), seen.axis(0)
    for place in seen.places(axis) if indices is not None else ():
        yield Move({0: seen.layout}, _replaced(seen.layout, place, axis, indices or ()), {"axis": place}, {})


def _matmul(seen: _Seen) -> Iterator[Move]:
    """A product with a matrix on the right: its rows are the last axis, all others do not matter."""
    matrix, last, end = seen.shape(1), len(seen.layout.source) - 1, len(seen.layout.target) - 1
    if matrix is not None and len(matrix) == 2 and min(last, end) > 0 and last in seen.places(end):
        yield Move({0: seen.layout}, _replaced(seen.layout, last, end, matrix[1:]), {}, {})


_Family = Callable[[_Seen], Iterator[Move]]

MOVABLE: dict[str, _Family] = {
    **dict.fromkeys(_UNARY, _unary),
    **dict.fromkeys(BROADCAST, _nary),
    **dict.fromkeys(_REDUCE, _reduce),
    **dict.fromkeys(("Hardmax", "LogSoftmax", "Softmax"), _along),
    "Concat": _concat,
    "Gather": _gather,
    "MatMul": _matmul,
    "Pad": _pad,
    "Slice": _slice,
}
"""Operators that a change of layout can be moved across."""
