"""What a graph says about the values and sizes its inputs may take.

Each input is followed forward through casts, reshapes, slices, affine steps, subgraphs and functions until
something reads it: a table bounds it, a comparison offers constants, a weight fixes the size of an axis.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, constant_of, int_attr, nodes, subgraphs_of
from onnxopt.inputs import Dim, axis_name

__all__ = ["Clues", "Limit", "clues_of"]

_COMPARISONS = frozenset({"Equal", "Less", "LessOrEqual", "Greater", "GreaterOrEqual"})
_SAME = frozenset({"Identity", "Cast", "Clip", "Dropout", "Floor", "Ceil", "Round", "Relu"})
_MOVES = frozenset(
    {
        "Reshape", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Flatten", "Expand", "Tile", "Pad",
        "Gather", "GatherElements", "GatherND", "Mod", "ReduceMax", "ReduceMin", "Max", "Min",
    }
)  # fmt: skip
# Arguments that steer an operator: (operator, input) -> lowest and highest value that always work.
_ARGUMENTS = {
    ("Loop", 0): (1, 3), ("TopK", 1): (1, 1), ("Range", 0): (0, 0), ("Range", 1): (2, 6), ("Range", 2): (1, 1),
    ("Slice", 1): (0, 0), ("Slice", 2): (2, 4), ("Slice", 3): (0, 0), ("Slice", 4): (1, 1), ("Expand", 1): (1, 1),
    ("Reshape", 1): (1, 1), ("ConstantOfShape", 0): (1, 4), ("Tile", 1): (1, 2), ("Pad", 1): (0, 1),
    ("Resize", 2): (1, 2), ("Resize", 3): (4, 8), ("OneHot", 1): (4, 8), ("Squeeze", 1): (0, 0),
    ("Unsqueeze", 1): (0, 0), ("CumSum", 1): (0, 0), ("Trilu", 1): (0, 1),
    ("LSTM", 4): (1, 1), ("GRU", 4): (1, 1), ("RNN", 4): (1, 1),
    **{(f"Reduce{kind}", 1): (0, 0) for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare")},
}  # fmt: skip
_POSITIVE = frozenset({"Sqrt", "Log", "Pow"})
_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_SMALL = 1 << 16
_NEAR_NODES = 200
_MOST_HINTS = 24


@dataclass(frozen=True)
class Limit:
    """``scale * x + offset`` indexes an axis of `size` entries, a string being the name of a dynamic axis."""

    size: Dim
    scale: float = 1.0
    offset: float = 0.0


@dataclass(frozen=True)
class Clues:
    """All that was found for one input; empty where the graph says nothing."""

    limits: list[Limit] = field(default_factory=list)
    compared: list[int] = field(default_factory=list)
    """Constants it is compared with, or their neighbours where the order is asked for."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Lowest and highest value as an argument: trip count, k, bound, axis."""
    infers_shape: bool = False
    """It is the shape argument of a Reshape."""
    is_mask: bool = False
    is_positive: bool = False
    pins: dict[int, int] = field(default_factory=dict)
    """Axis -> the size that a weight asks for."""
    hints: tuple[int, ...] = ()
    """Sizes and small integer constants close to the input, nearest first."""


@dataclass(frozen=True)
class _Step:
    """A value that is ``scale * input + offset``; `intact`: with the input's own axes."""

    value: ir.Value
    scale: float = 1.0
    offset: float = 0.0
    intact: bool = True


def clues_of(model: ir.Model) -> dict[str, Clues]:
    """The clues for every input without a default, by name."""
    onward, origins = _links(model)
    return {
        value.name or "": replace(_trace(value, onward, origins), hints=_hints(value, onward))
        for value in model.graph.inputs
        if not value.is_initializer()
    }


_Links = dict[ir.Value, list[ir.Value]]


def _links(model: ir.Model) -> tuple[_Links, _Links]:
    """Where values go on under another name (into and out of bodies and functions), and where they come from."""
    onward: _Links = defaultdict(list)
    origins: _Links = defaultdict(list)

    def link(sources: Iterable[ir.Value | None], targets: Iterable[ir.Value]) -> None:
        for source, target in zip(sources, targets, strict=False):
            if source is not None:
                onward[source].append(target)
                origins[target].append(source)

    for node in nodes(model):
        function = model.functions.get(node.op_identifier())
        if function is not None:
            link(node.inputs, function.inputs)
            link(function.outputs, node.outputs)
        for body in subgraphs_of(node):
            if node.op_type == "If":
                link(body.outputs, node.outputs)
            elif node.op_type == "Loop":
                link(node.inputs[2:], body.inputs[2:])
                link(body.outputs[1:], node.outputs)
            elif node.op_type == "Scan":
                link(node.inputs, body.inputs)
                link(body.outputs, node.outputs)
    return onward, origins


def _trace(start: ir.Value, onward: _Links, origins: _Links) -> Clues:
    clues = Clues()
    seen = {start}
    queue = deque([_Step(start)])
    while queue:
        step = queue.popleft()
        following = [replace(step, value=value, intact=False) for value in onward.get(step.value, ())]
        for node, index in step.value.uses():
            clues = _read(node, index, step, clues, origins)
            following += _follow(node, index, step)
        for other in following:
            if other.value not in seen:
                seen.add(other.value)
                queue.append(other)
    return clues


def _read(node: ir.Node, index: int, step: _Step, clues: Clues, origins: _Links) -> Clues:
    """What one use of the value adds."""
    size = _table_size(node, index, origins)
    if size is not None:
        clues.limits.append(Limit(size, step.scale, step.offset))
    if (node.op_type, index) in _ARGUMENTS:
        clues.spans.append(_ARGUMENTS[node.op_type, index])
        if node.op_type == "Reshape" and step.intact:
            clues = replace(clues, infers_shape=True)
    if node.op_type in _COMPARISONS:
        fresh = [number for number in _compared(node, index, step) if number not in clues.compared]
        clues.compared.extend(fresh)
    # (1 - mask) * -10000, added to attention scores; scale * 1 + offset = 0 tells it from other affine steps
    inverted = abs(step.scale) >= 1000 and step.scale + step.offset == 0
    if inverted or (node.op_type == "Cast" and int_attr(node, "to", 0) == ir.DataType.BOOL):
        clues = replace(clues, is_mask=True)
    if node.op_type in _POSITIVE and index == 0 and not _takes_negatives(node):
        clues = replace(clues, is_positive=True)
    if step.intact:
        for axis, length in _pins(node, index):
            clues.pins.setdefault(axis, length)
    return clues


def _follow(node: ir.Node, index: int, step: _Step) -> Iterator[_Step]:
    """The outputs of `node` that still carry the input's value."""
    op = node.op_type
    if op in _SAME and index == 0:
        yield replace(step, value=node.outputs[0])
    elif (op in _MOVES and index == 0) or op == "Concat" or (op == "Where" and index > 0):
        for output in node.outputs:
            yield replace(step, value=output, intact=False)
    elif op in ("Add", "Sub", "Mul", "Div"):
        other = constant_array(node.inputs[1 - index], _SMALL)
        if other is not None and other.size:
            affine = _affine(op, index, step, float(np.max(other)))
            yield from [replace(affine, value=node.outputs[0])] if affine else []


def _affine(op: str, index: int, step: _Step, constant: float) -> _Step | None:
    scale, offset = step.scale, step.offset
    if op == "Add":
        return replace(step, offset=offset + constant)
    if op == "Sub":
        sign = 1 if index == 0 else -1
        return replace(step, scale=sign * scale, offset=sign * (offset - constant))
    if constant == 0 or (op == "Div" and index == 1):
        return None
    factor = constant if op == "Mul" else 1 / constant
    return replace(step, scale=scale * factor, offset=offset * factor)


def _compared(node: ir.Node, index: int, step: _Step) -> list[int]:
    other = constant_array(node.inputs[1 - index], _SMALL)
    if other is None or other.dtype.kind not in "iuf":
        return []
    numbers = [round((float(number) - step.offset) / step.scale) for number in np.unique(other)]
    if node.op_type == "Equal":
        return numbers
    return [near for number in numbers for near in (number - 1, number + 1)]


def _takes_negatives(node: ir.Node) -> bool:
    """Whether a Pow has a constant whole exponent."""
    if node.op_type != "Pow":
        return False
    exponent = constant_array(node.inputs[1], _SMALL)
    return exponent is not None and bool(np.all(exponent == np.round(exponent)))


def _table_size(node: ir.Node, index: int, origins: _Links) -> Dim | None:
    """Entries of the table that input `index` looks up: 1 where unknown, None where it is no index."""
    op = node.op_type
    if op == "OneHot":
        depth = constant_array(node.inputs[1], _SMALL) if index == 0 else None
        return int(depth.flat[0]) if depth is not None else None
    if op == "EmbedLayerNormalization" and index < 2:
        return _axis(node.inputs[2 + 2 * index], 0, origins)
    if op == "ArrayFeatureExtractor" and index == 1:
        return _axis(node.inputs[0], -1, origins)
    if index != 1:
        return None
    if op in ("Gather", "GatherElements", "ScatterElements", "Scatter", "GatherBlockQuantized"):
        name = "gather_axis" if op == "GatherBlockQuantized" else "axis"
        return _axis(node.inputs[0], int_attr(node, name, 0), origins)
    if op in ("GatherND", "ScatterND"):
        return _smallest_axis(node.inputs[0], int_attr(node, "batch_dims", 0), origins)
    return None


def _axis(table: ir.Value | None, axis: int, origins: _Links) -> Dim:
    shape = _shaped(table, origins)
    if shape is None or shape.shape is None or not -len(shape.shape) <= axis < len(shape.shape):
        return 1
    size = axis_name(shape, axis)
    return 1 if size is None else size


def _smallest_axis(table: ir.Value | None, first: int, origins: _Links) -> Dim:
    """The smallest of the axes that a row of indices may address."""
    shape = _shaped(table, origins)
    if shape is None or shape.shape is None:
        return 1
    sizes = [axis_name(shape, axis) for axis in range(first, len(shape.shape))]
    known = [size for size in sizes if isinstance(size, int)]
    return min(known) if known and len(known) == len(sizes) else 1


def _shaped(value: ir.Value | None, origins: _Links) -> ir.Value | None:
    """The first value with a shape on the way back through steps that keep it."""
    for _ in range(16):
        if value is None or value.shape is not None:
            return value
        tensor = constant_of(value)
        if tensor is not None:
            return ir.Value(name=value.name, shape=ir.Shape(tensor.shape))
        node = value.producer()
        if node is None:
            value = next(iter(origins.get(value, ())), None)
        elif node.op_type in (*_SAME, "DequantizeLinear", "Mul", "Div", "Add", "Sub"):
            value = node.inputs[0]
        else:
            return None
    return None


def _weight(node: ir.Node, index: int) -> tuple[int, ...]:
    """The shape of a weight; () where the input is computed or absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = constant_of(value)
    if tensor is None and value is not None and value.is_initializer():
        tensor = value.const_value
    return () if tensor is None else tuple(int(size) for size in tensor.shape.dims)


def _pins(node: ir.Node, index: int) -> Iterator[tuple[int, int]]:
    """The axes of input `index` whose size a weight fixes."""
    op = node.op_type
    if op in ("Add", "Sub", "Mul", "Div"):
        other = _weight(node, 1 - index)
        yield from ((axis - len(other), size) for axis, size in enumerate(other) if size > 1)
    elif op in _RECURRENT and index in (0, 5, 6):
        weight = _weight(node, 1 if index == 0 else 2)
        yield from [(2, weight[-1])] if weight else []
    elif index == 0:
        weight = _weight(node, 1)
        if op == "Conv" and len(weight) > 2:
            yield 1, weight[1] * int_attr(node, "group", 1)
        elif op in ("ConvTranspose", "BatchNormalization", "InstanceNormalization") and weight:
            yield 1, weight[0]
        elif op == "LayerNormalization" and weight:
            yield -1, weight[-1]
        elif op == "MatMul" and len(weight) > 1:
            yield -1, weight[-2]
        elif op == "Gemm" and len(weight) == 2:
            yield 1 - int_attr(node, "transA", 0), weight[int_attr(node, "transB", 0)]


def _hints(start: ir.Value, onward: _Links) -> tuple[int, ...]:
    found: dict[int, None] = {}
    seen: set[ir.Node] = set()
    queue = deque([start])
    while queue and len(seen) < _NEAR_NODES and len(found) < _MOST_HINTS:
        value = queue.popleft()
        queue.extend(onward.get(value, ()))
        for node in value.consumers():
            if node in seen:
                continue
            seen.add(node)
            found.update(dict.fromkeys(_numbers(node)))
            queue.extend(node.outputs)
    return tuple(found)[:_MOST_HINTS]


def _numbers(node: ir.Node) -> Iterator[int]:
    """Sizes of a node's weights, last axis but one first, and its small integer constants."""
    for index, value in enumerate(node.inputs):
        shape = _weight(node, index)
        yield from (size for size in (*shape[-2:], *shape[:-2]) if size > 1)
        array = constant_array(value, 64)
        if array is not None and array.dtype.kind in "iu":
            yield from (int(number) for number in array.flat if 1 < number < _SMALL)
