"""Nodes that move, join or pool elements: what passes them, and where an axis is on their other side."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from math import prod

import numpy as np
import onnx_ir as ir

from onnxopt.graph import has_reference, int_attr, ints_attr, str_attr
from onnxopt.passes.shared.chain import axes_of, normalised, rank_of
from onnxopt.passes.shared.padding import ZERO, fill_of, pads_of, require_constant_mode
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope

__all__ = ["across", "joined_axis", "passed", "require_passage", "sections_of"]

Dim = int | ir.SymbolicDim
Spread = Callable[[np.ndarray], np.ndarray]

_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceSum")
_POOLS = ("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool")
_SAME = ("LeakyRelu", "Pad", "Relu")
_MOVES = frozenset({"Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze", *_SAME, *_REDUCTIONS, *_POOLS})
_POSITIVE = frozenset({"GlobalMaxPool", "LeakyRelu", "MaxPool", "ReduceMax", "Relu"})
_SCALES_ONLY = frozenset({"LeakyRelu", "Pad", "ReduceSum", "Relu"})


def passed(node: ir.Node) -> Sequence[ir.Value | None]:
    """The inputs whose elements a node moves, joins or pools; none where it does something else."""
    if node.domain or has_reference(node) or len(node.outputs) != 1:
        return ()
    if node.op_type == "Concat":
        return node.inputs
    return node.inputs[:1] if node.op_type in _MOVES else ()


def across(node: ir.Node, axis: int | None, *, up: bool) -> tuple[int | None, Spread]:
    """The axis on the other side of a node, and how what runs along the one runs along the other.

    Args:
        node: moves or pools its first input.
        axis: of its output if `up`, else of its input.
        up: whether the other side is its input.
    """
    if axis is None or node.op_type in _SAME:
        return axis, _as_it_is
    source, result = node.inputs[0], node.outputs[0]
    if node.op_type in _POOLS:
        if axis != 1:
            raise Declined("the constant runs along an axis that is pooled")
        return axis, _as_it_is
    if node.op_type in ("Flatten", "Reshape"):
        near, far = (_dims(value) for value in ((result, source) if up else (source, result)))
        return _regrouped(near, far, axis)
    if node.op_type == "Transpose":
        rank = rank_of(source, result)
        perm = ints_attr(node, "perm") or (tuple(reversed(range(rank))) if rank is not None else ())
        if axis >= len(perm):
            raise Declined("the number of axes is unknown")
        return perm[axis] if up else perm.index(axis), _as_it_is
    axes, rank = axes_of(node), rank_of(result if node.op_type == "Unsqueeze" else source)
    if not axes or rank is None:
        raise Declined("the axes that a node drops are unknown")
    axes = normalised(axes, rank)
    if node.op_type in _REDUCTIONS and int_attr(node, "keepdims", 1):
        kept = [place if place not in axes else -1 for place in range(rank)]
    else:
        kept = [place for place in range(rank) if place not in axes]
    if up != (node.op_type == "Unsqueeze"):
        return kept[axis], _as_it_is
    if axis not in kept:
        raise Declined("the constant runs along an axis that is dropped")
    return kept.index(axis), _as_it_is


def _as_it_is(vector: np.ndarray) -> np.ndarray:
    return vector


def _regrouped(near: Sequence[Dim], far: Sequence[Dim], axis: int) -> tuple[int, Spread]:
    """Which axis of the shape `far` takes in an axis of `near`, of the same elements in the same order."""
    inner, place, behind = prod(_sizes(near[axis + 1 :])), len(far) - 1, 1
    while place >= 0 and behind * prod(_sizes(far[place : place + 1])) <= inner:
        behind *= prod(_sizes(far[place : place + 1]))
        place -= 1
    stops = [stop for stop in range(axis + 1, len(near) + 1) if prod(_sizes(near[stop:])) == behind]
    for start in range(axis, -1, -1) if stops and place >= 0 else ():
        group = _sizes(near[start : stops[0]])
        if prod(group) == far[place]:
            return place, functools.partial(_repeated, axis=axis - start, group=group)
    raise Declined("a Reshape mixes the channels with other axes")


def _repeated(vector: np.ndarray, axis: int, group: Sequence[int]) -> np.ndarray:
    """What runs along one axis of a group, for each element of the group."""
    if vector.size == 1:
        return vector
    shape = [size if place == axis else 1 for place, size in enumerate(group)]
    return np.broadcast_to(vector.reshape(shape), group).reshape(-1)


def _dims(value: ir.Value | None) -> tuple[Dim, ...]:
    if value is None or value.shape is None:
        raise Declined("the shapes around a Reshape are unknown")
    return value.shape.dims


def _sizes(dims: Sequence[Dim]) -> tuple[int, ...]:
    """The dimensions as numbers; Declined where one is unknown, or 0."""
    sizes = tuple(dim for dim in dims if isinstance(dim, int) and dim)
    if len(sizes) < len(dims):
        raise Declined("the sizes around a Reshape are unknown")
    return sizes


def joined_axis(node: ir.Node) -> int:
    return normalised((int_attr(node, "axis", 1),), rank_of(*node.outputs, *node.inputs))[0]


def sections_of(node: ir.Node) -> list[slice]:
    """Where the inputs of a Concat lie in its output."""
    axis, start, sections = joined_axis(node), 0, list[slice]()
    for value in node.inputs:
        size = value.shape.dims[axis] if value is not None and value.shape is not None else None
        if not isinstance(size, int):
            raise Declined("the sizes of what is joined are unknown")
        sections.append(slice(start, start + size))
        start += size
    return sections


def require_passage(
    node: ir.Node, axis: int | None, scale: np.ndarray, shift: np.ndarray, scope: Scope
) -> None:
    """Raise Declined where a node does not let a scale and a shift pass."""
    op_type = node.op_type
    if op_type in _POSITIVE and not (scale > 0).all():
        raise Declined(f"a scale that is not positive does not pass a {op_type}")
    counted = op_type == "AveragePool" and int_attr(node, "count_include_pad", 0)
    if shift.any() and (op_type in _SCALES_ONLY or (counted and not _is_plain(node))):
        raise Declined(f"a shift does not pass a {op_type}")
    if op_type == "Pad":
        require_constant_mode(node)
        pads = pads_of(node, scope.opset)
        if fill_of(node, scope.opset) != ZERO:
            raise Declined("a scale does not pass a Pad of other values than 0")
        if axis is not None and any(any(pads[key]) for key in pads if key < 0 or key == axis):
            raise Declined("a Pad adds channels")


def _is_plain(node: ir.Node) -> bool:
    """Whether a pool surely adds no padding."""
    auto = str_attr(node, "auto_pad", "NOTSET")
    padded = auto not in ("NOTSET", "VALID") or any(ints_attr(node, "pads") or ())
    return not padded and not int_attr(node, "ceil_mode", 0)
