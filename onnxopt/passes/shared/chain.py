"""What the merging passes ask of two nodes in a row."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import onnx_ir as ir

from onnxopt.graph import constant_array, has_reference, ints_attr, use_count
from onnxopt.rewrite import Declined

__all__ = ["axes_of", "before", "constant_ints", "dies", "freed_by", "normalised", "rank_of", "require_alone"]

_SMALL = 4096
"""Bytes: no list of axes, sizes or pads is larger."""


def before(value: ir.Value | None, node: ir.Node, op_types: Sequence[str]) -> ir.Node | None:
    """The standard op of one of these types that makes the value which `node` reads, or None.

    Raises Declined where an attribute of the two nodes gets its value from the enclosing function's caller.
    """
    first = None if value is None else value.producer()
    if first is None or first.domain or first.op_type not in op_types:
        return None
    if has_reference(first) or has_reference(node):
        raise Declined("an attribute refers to one of the enclosing function")
    return first


def require_alone(first: ir.Node, node: ir.Node) -> None:
    """Raise Declined unless only `node` reads the output of `first`, in the same graph."""
    value = first.outputs[0]
    alone = use_count(value) <= len(node.inputs) and first.graph is node.graph
    alone = alone and all(usage.node is node for usage in value.uses())
    if not alone or value.is_graph_output():
        raise Declined("the value in between is read elsewhere too")


def constant_ints(value: ir.Value | None, what: str) -> tuple[int, ...]:
    """The elements of a constant list of integers; Declined where `what` is no constant."""
    array = constant_array(value, _SMALL)
    if array is None:
        raise Declined(f"{what} no constant")
    return tuple(int(element) for element in array.reshape(-1))


def axes_of(node: ir.Node, position: int = 1) -> tuple[int, ...] | None:
    """The axes as they stand, from the attribute or the input at `position`; None where neither is there."""
    if "axes" in node.attributes:
        return ints_attr(node, "axes")
    value = node.inputs[position] if len(node.inputs) > position else None
    return None if value is None else constant_ints(value, "the axes are")


def normalised(axes: Sequence[int], rank: int | None) -> tuple[int, ...]:
    """Axes counted from the front; Declined where that takes an unknown rank, or they repeat or overrun."""
    if rank is None and any(axis < 0 for axis in axes):
        raise Declined("an axis counts from the end of an unknown number of axes")
    counted = tuple(axis + (rank or 0) if axis < 0 else axis for axis in axes)
    beyond = max((0, *counted)) + 1 if rank is None else rank
    if len(set(counted)) < len(counted) or any(not 0 <= axis < beyond for axis in counted):
        raise Declined("the axes repeat or do not exist")
    return counted


def rank_of(*values: ir.Value | None) -> int | None:
    """The rank of the first of these values whose shape is on record."""
    return next((len(v.shape) for v in values if v is not None and v.shape is not None), None)


def freed_by(node: ir.Node, kept: Collection[ir.Value | None]) -> int:
    """How many nodes go when this one goes, Constants aside; those that make the values `kept` stay."""
    dying, work = {node}, [node]
    while work:
        for value in work.pop().inputs:
            maker = None if value is None else value.producer()
            if maker is None or maker in dying or any(not dies(v, dying) or v in kept for v in maker.outputs):
                continue
            dying.add(maker)
            work.append(maker)
    return sum(one.op_type != "Constant" for one in dying)


def dies(value: ir.Value, dying: Collection[ir.Node]) -> bool:
    """Whether nobody but nodes that go away reads the value."""
    return not value.is_graph_output() and all(usage.node in dying for usage in value.uses())
