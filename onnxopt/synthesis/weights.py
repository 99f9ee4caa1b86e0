"""The sizes that weights ask of the values they meet: exact ones where they meet, hints from further on."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.graph import constant_array, constant_of, int_attr

__all__ = ["Links", "hints_for", "pins_of"]

Links = dict[ir.Value, list[ir.Value]]
"""The names under which a value goes on inside bodies and functions, and after them."""

_RECURRENT = frozenset({"LSTM", "GRU", "RNN"})
_NEAR_NODES = 200
_MOST_HINTS = 24
_LARGEST_HINT = 1 << 16


def pins_of(node: ir.Node, index: int) -> Iterator[tuple[int, int]]:
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


def hints_for(start: ir.Value, onward: Links) -> tuple[int, ...]:
    """Sizes of weights and small integer constants on the way forward from `start`, nearest first."""
    found: dict[int, None] = {}
    seen_values = {start}
    seen_nodes: set[ir.Node] = set()
    queue = deque([start])
    while queue and len(seen_nodes) < _NEAR_NODES and len(found) < _MOST_HINTS:
        value = queue.popleft()
        following = list(onward.get(value, ()))
        for node in value.consumers():
            if node not in seen_nodes:
                seen_nodes.add(node)
                found.update(dict.fromkeys(_numbers(node)))
                following += node.outputs
        queue.extend(other for other in following if other not in seen_values)
        seen_values.update(following)
    return tuple(found)[:_MOST_HINTS]


def _weight(node: ir.Node, index: int) -> tuple[int, ...]:
    """The shape of a weight; () where the input is computed or absent."""
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = constant_of(value)
    if tensor is None and value is not None and value.is_initializer():
        tensor = value.const_value
    return () if tensor is None else tuple(tensor.shape.numpy())


def _numbers(node: ir.Node) -> Iterator[int]:
    """Sizes of a node's weights, last axis but one first, its small integer constants and their product."""
    for index, value in enumerate(node.inputs):
        shape = _weight(node, index)
        yield from (size for size in (*shape[-2:], *shape[:-2]) if size > 1)
        array = constant_array(value, 64)
        if array is not None and array.dtype.kind in "iu":
            positive = [int(number) for number in array.flat if 0 < number < _LARGEST_HINT]
            yield from (number for number in (*positive, math.prod(positive)) if 1 < number < _LARGEST_HINT)
