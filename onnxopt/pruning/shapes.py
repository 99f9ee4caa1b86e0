"""How operators that read sizes, or make what they are told the sizes of, relate axes."""

from __future__ import annotations

import onnx_ir as ir

from onnxopt.graph import constant_of, int_attr
from onnxopt.pruning.elements import Elements
from onnxopt.pruning.movement import Rule, UnrelatedError, align, axes_of, output_axes

__all__ = ["SHAPES"]

_TOLD = (("ConstantOfShape", 0), ("Expand", 1))
"""Inputs that tell sizes to make."""


def _shape(e: Elements, node: ir.Node) -> None:
    """Sizes that are read stay, but for those that the readers leave out."""
    source = e.axes(node.inputs[0]) or []  # of unknown rank: nothing to pin
    start, end = (int_attr(node, name, default) for name, default in (("start", 0), ("end", len(source))))
    read = list(range(*slice(start, end).indices(len(source))))
    wanted: set[int] = set() if not node.outputs[0].is_graph_output() else set(read)
    for usage in node.outputs[0].uses():
        made = output_axes(e, usage.node) if (usage.node.op_type, usage.idx) in _TOLD else []
        if made and read == list(range(len(made))):
            align(e, source, made)
        else:
            wanted.update(_elements_read(e, usage.node, usage.idx, read))
    e.pin("their number is read by Shape", *(source[axis] for axis in sorted(wanted)))


def _elements_read(e: Elements, reader: ir.Node, index: int, read: list[int]) -> list[int]:
    if reader.op_type == "Gather" and index == 0:
        chosen = e.dims.elements(reader.inputs[1])
        if chosen is not None and all(isinstance(one, int) for one in chosen.ravel()):
            return [read[int(one)] for one in chosen.ravel() if -len(read) <= one < len(read)]
    if reader.op_type == "Slice" and index == 0:
        numbers = [
            e.dims.ints(reader, name, n) for n, name in enumerate(("starts", "ends", "axes", "steps"), 1)
        ]
        if all(one is not None and len(one) < 2 for one in numbers) and numbers[0] and numbers[1]:
            step = numbers[3][0] if numbers[3] else 1
            return read[slice(numbers[0][0], numbers[1][0], step)]
    return read


def _expand(e: Elements, node: ir.Node) -> None:
    told = axes_of(e, node.inputs[1])[0]
    if told is None or (e.opset < 9 and constant_of(node.inputs[1]) is None):
        raise UnrelatedError("a shape is computed at run time")
    align(e, axes_of(e, node.inputs[0]), output_axes(e, node))


SHAPES: dict[str, Rule] = {"Expand": _expand, "Shape": _shape}
