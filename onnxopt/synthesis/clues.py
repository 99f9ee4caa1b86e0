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
from onnxopt.synthesis.inputs import Dim, axis_name
from onnxopt.synthesis.weights import Links, hints_for, pins_of

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
    ("Loop", 0): (1, 3), ("TopK", 1): (1, 1), ("Tile", 1): (1, 2), ("Pad", 1): (0, 1),
    ("Range", 0): (0, 0), ("Range", 1): (2, 6), ("Range", 2): (1, 1),
    ("Slice", 1): (0, 0), ("Slice", 2): (2, 4), ("Slice", 3): (0, 0), ("Slice", 4): (1, 1),
    ("Expand", 1): (1, 1), ("Reshape", 1): (1, 1), ("ConstantOfShape", 0): (1, 4),
    ("Resize", 2): (1, 2), ("Resize", 3): (4, 8), ("OneHot", 1): (4, 8), ("Squeeze", 1): (0, 0),
    ("Unsqueeze", 1): (0, 0), ("CumSum", 1): (0, 0), ("Trilu", 1): (0, 1),
    ("LSTM", 4): (1, 1), ("GRU", 4): (1, 1), ("RNN", 4): (1, 1),
    **{(f"Reduce{kind}", 1): (0, 0) for kind in ("Sum", "Mean", "Max", "Min", "Prod", "L1", "L2")},
}  # fmt: skip
_POSITIVE = frozenset({"Sqrt", "Log", "Pow"})
_SMALL = 1 << 16


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
    pins: dict[int, dict[int, None]] = field(default_factory=dict)
    """Axis -> the sizes that weights ask for, in order; several where branches differ."""
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
        value.name or "": replace(_trace(value, onward, origins), hints=hints_for(value, onward))
        for value in model.graph.inputs
        if not value.is_initializer()
    }


def _links(model: ir.Model) -> tuple[Links, Links]:
    """Where values go on under another name, into and out of bodies and functions, and the way back."""
    onward: Links = defaultdict(list)
    origins: Links = defaultdict(list)

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


def _trace(start: ir.Value, onward: Links, origins: Links) -> Clues:
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


def _read(node: ir.Node, index: int, step: _Step, clues: Clues, origins: Links) -> Clues:
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
    if _masks(node, index, step):
        clues = replace(clues, is_mask=True)
    if node.op_type in _POSITIVE and index == 0 and not _takes_negatives(node):
        clues = replace(clues, is_positive=True)
    if step.intact:
        for axis, length in pins_of(node, index):
            clues.pins.setdefault(axis, {})[length] = None
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
    constants = np.unique(other[np.isfinite(other)]).tolist()
    numbers = [round((constant - step.offset) / step.scale) for constant in constants]
    if node.op_type == "Equal":
        return numbers
    return [near for number in numbers for near in (number - 1, number + 1)]


def _masks(node: ir.Node, index: int, step: _Step) -> bool:
    """Whether the input turns into a bool, or into ``(1 - x) * -10000`` to be added to attention scores."""
    if node.op_type == "Cast":
        return int_attr(node, "to", 0) == ir.DataType.BOOL
    if node.op_type != "Mul" or (step.scale, step.offset) != (-1, 1):
        return False
    factor = constant_array(node.inputs[1 - index], _SMALL)
    return factor is not None and bool(np.all(np.abs(factor) >= 1000))


def _takes_negatives(node: ir.Node) -> bool:
    """Whether a Pow has a constant whole exponent."""
    if node.op_type != "Pow":
        return False
    exponent = constant_array(node.inputs[1], _SMALL)
    return exponent is not None and bool(np.all(exponent == np.round(exponent)))


def _table_size(node: ir.Node, index: int, origins: Links) -> Dim | None:
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


def _axis(table: ir.Value | None, axis: int, origins: Links) -> Dim:
    shape = _shaped(table, origins)
    if shape is None or shape.shape is None or not -len(shape.shape) <= axis < len(shape.shape):
        return 1
    size = axis_name(shape, axis)
    return 1 if size is None else size


def _smallest_axis(table: ir.Value | None, first: int, origins: Links) -> Dim:
    """The smallest of the axes that a row of indices may address."""
    shape = _shaped(table, origins)
    if shape is None or shape.shape is None:
        return 1
    sizes = [axis_name(shape, axis) for axis in range(first, len(shape.shape))]
    known = [size for size in sizes if isinstance(size, int)]
    return min(known) if known and len(known) == len(sizes) else 1


def _shaped(value: ir.Value | None, origins: Links) -> ir.Value | None:
    """The first value with a shape on the way back through steps that keep it."""
    for _ in range(16):
        if value is None or value.shape is not None:
            return value
        tensor = constant_of(value)
        if tensor is not None:
            return ir.Value(name=value.name, shape=ir.Shape(tensor.shape.numpy()))
        node = value.producer()
        if node is None:
            value = next(iter(origins.get(value, ())), None)
        elif node.op_type in (*_SAME, "DequantizeLinear", "Mul", "Div", "Add", "Sub"):
            value = node.inputs[0]
        else:
            return None
    return None
