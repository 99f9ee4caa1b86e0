"""Values that are the parts of one sequence, or are joined to one."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from onnxopt.graph import constant_array, int_attr, sole_user
from onnxopt.passes.shared.chain import axes_of
from onnxopt.rewrite import Declined

__all__ = ["place_of", "readers_of", "sequence_of", "stack_of"]


def readers_of(value: ir.Value, inside: Collection[ir.Node]) -> list[ir.Node | None]:
    """Who reads a value outside of some nodes; None stands for the user."""
    readers: list[ir.Node | None] = [use.node for use in value.uses() if use.node not in inside]
    return [*readers, None] if value.is_graph_output() else readers


def stack_of(values: Sequence[ir.Value], inside: Collection[ir.Node]) -> tuple[ir.Node | None, int]:
    """The Concat that joins just these values, in their order, along a new axis; and the axis."""
    for reader in readers_of(values[0], inside):
        axes = axes_of(reader) if reader is not None and reader.op_type == "Unsqueeze" else None
        concat = sole_user(reader.outputs[0]) if reader is not None and axes in ((0,), (1,)) else None
        if axes is None or concat is None or concat.op_type != "Concat" or concat.domain:
            continue
        makers = [value.producer() if value is not None else None for value in concat.inputs]
        sources = [
            node.inputs[0]
            if node is not None and node.op_type == "Unsqueeze" and axes_of(node) == axes
            else None
            for node in makers
        ]
        if sources == list(values) and int_attr(concat, "axis", 0) == axes[0]:
            return concat, axes[0]
    return None, 0


def sequence_of(values: Sequence[ir.Value]) -> tuple[ir.Value, int, bool]:
    """What falls into just these values along an axis; the axis, and whether they come from its end."""
    places = [place for value in values if (place := place_of(value))]
    whole, axis, _ = places[0] if places else (values[0], 0, 0)
    order = [index for source, along, index in places if source is whole and along == axis]
    size = whole.shape.dims[axis] if whole.shape is not None and len(whole.shape) == 3 and axis < 2 else None
    if size != len(values) or sorted(order) != list(range(len(values))):
        raise Declined("the inputs of the steps are not the parts of one sequence")
    if order != sorted(order, reverse=order[0] > 0):
        raise Declined("the steps do not take the parts of the sequence in order")
    return whole, axis, order[0] > 0


def place_of(value: ir.Value) -> tuple[ir.Value, int, int] | None:
    """Which value of three axes it is a part of, along which axis, and the number of the part."""
    node = value.producer()
    if node is None or node.domain or node.inputs[0] is None:
        return None
    if node.op_type == "Gather":
        index = constant_array(node.inputs[1], 8)
        return (
            None
            if index is None or index.ndim
            else (node.inputs[0], int_attr(node, "axis", 0) % 3, int(index))
        )
    part = node.inputs[0].index()
    split = node.inputs[0].producer() if node.op_type == "Squeeze" else None
    if part is None or split is None or split.op_type != "Split" or split.domain or split.inputs[0] is None:
        return None
    whole, axis, axes = split.inputs[0], int_attr(split, "axis", 0) % 3, axes_of(node)
    alone = whole.shape is not None and len(whole.shape) == 3 and whole.shape.dims[axis] == len(split.outputs)
    same = axes is not None and [one % 3 for one in axes] == [axis]
    return (whole, axis, part) if alone and same else None
