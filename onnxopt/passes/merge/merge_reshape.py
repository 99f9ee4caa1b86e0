"""Merge a Reshape or Flatten with the op before it that only changes the shape, too.

Before: z = Reshape(V(x), shape)    with V one of Reshape, Flatten, Squeeze, Unsqueeze
After:  z = Reshape(x, shape')      a 0 in shape, which copies a size of V(x), resolved
Before: z = Flatten(V(x))
After:  z = Flatten(x)              where the axes in front of the cut are those of x
Before: z = Unsqueeze(Reshape(x, shape), axes), or Squeeze
After:  z = Reshape(x, shape')      sizes of 1 put in or taken out
Declines: a shape that is no constant, since a 0 in it would copy a size of V(x); a 0 that cannot be
    resolved; the value in between is read elsewhere too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, int_attr
from onnxopt.passes.shared.chain import axes_of, before, constant_ints, normalised, rank_of, require_alone
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeReshape"]

_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeReshape(Pass):
    """Let one Reshape or Flatten do the work of two ops that only change the shape."""

    name = "merge-reshape"
    example = """
agraph (float[2, 6] x) => (float[3, 4] y) <int64[3] three = {2, 3, 2}, int64[2] two = {3, 4}> {
    a = Reshape(x, three)
    y = Reshape(a, two)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("Reshape after another change of shape", ("Reshape",), _reshape),
            Rule("Flatten after another change of shape", ("Flatten",), _flatten),
            Rule("Squeeze or Unsqueeze after Reshape", ("Squeeze", "Unsqueeze"), _ones),
        )


def _reshape(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, _VIEWS)
    if first is None or scope.opset < 5:
        return None
    require_alone(first, node)
    shape, edit = node.inputs[1], Edit(node, scope)
    if int_attr(node, "allowzero", 0) == 0:
        sizes = constant_ints(shape, "the shape is")
        resolved = [size or _copied(first, axis) for axis, size in enumerate(sizes)]
        if resolved != list(sizes):
            shape = edit.constant(np.array(resolved, np.int64), "shape")
    value = edit.op("Reshape", (first.inputs[0], shape), node.attributes)
    return edit.replace(node.outputs[0], value)


def _flatten(node: ir.Node, scope: Scope) -> Edit | None:
    """Flatten multiplies the sizes before and after its axis; those after can change where none is inferred.

    [0, 7] reshaped to [0, 5] has the same first size and as many elements, and flattens to another shape.
    """
    first = before(node.inputs[0], node, _VIEWS)
    if first is None or scope.opset < 5:
        return None
    require_alone(first, node)
    axis = int_attr(node, "axis", 1)
    if axis < 0:
        raise Declined("Flatten's axis counts from the end")
    inferred = axis == 0 or first.op_type != "Reshape" or -1 in _target(first)
    if not inferred or not all(_is_copy(first, position) for position in range(axis)):
        raise Declined("the axes in front of Flatten's cut are not those before the first change of shape")
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.op("Flatten", (first.inputs[0],), node.attributes))


def _ones(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Reshape",))
    if first is None or scope.opset < 5:
        return None
    require_alone(first, node)
    sizes, axes = list(constant_ints(first.inputs[1], "the shape is")), axes_of(node)
    if not axes:
        raise Declined("Squeeze names no axes")
    grows = node.op_type == "Unsqueeze"
    axes = normalised(axes, len(sizes) + len(axes) if grows else len(sizes))
    if int_attr(first, "allowzero", 0) == 0:
        sizes = [size or (0 if axis < min(axes) else _known(first, axis)) for axis, size in enumerate(sizes)]
    for axis in sorted(axes, reverse=not grows):
        if grows:
            sizes.insert(axis, 1)
        elif sizes.pop(axis) != 1:
            raise Declined("a size that Squeeze takes out is not given as 1")
    edit = Edit(node, scope)
    shape = edit.constant(np.array(sizes, np.int64), "shape")
    return edit.replace(node.outputs[0], edit.op("Reshape", (first.inputs[0], shape), first.attributes))


def _copied(first: ir.Node, axis: int) -> int:
    """What a 0 at this place, which copies a size of the first op's result, becomes when that op is gone."""
    return 0 if _is_copy(first, axis) else _known(first, axis)


def _known(first: ir.Node, axis: int) -> int:
    """The size of an axis of the first op's result; it must not be 0, which would be read as a copy."""
    target, shape = _target(first), first.outputs[0].shape
    if first.op_type == "Unsqueeze" and axis in _axes(first):
        return 1
    size = target[axis] if axis < len(target) else 0
    if size < 1 and shape is not None and axis < len(shape) and isinstance(recorded := shape.dims[axis], int):
        size = recorded
    if size < 1:
        raise Declined("a 0 in the shape copies a size that is not known to be positive")
    return size


def _is_copy(first: ir.Node, axis: int) -> bool:
    """Whether an axis of the first op's result surely has the size of the same axis of its input."""
    if first.op_type == "Flatten":
        return axis == 0 and int_attr(first, "axis", 1) == 1
    if first.op_type == "Reshape":
        return axis < len(_target(first)) and _target(first)[axis] == 0
    return axis < min(_axes(first), default=0)


def _axes(first: ir.Node) -> tuple[int, ...]:
    """The axes of a Squeeze or Unsqueeze from the front; empty where they are not known."""
    axes, rank = axes_of(first) or (), rank_of(first.inputs[0])
    if rank is None:
        return axes if min(axes, default=-1) >= 0 else ()
    return normalised(axes, rank + len(axes) if first.op_type == "Unsqueeze" else rank)


def _target(first: ir.Node) -> tuple[int, ...]:
    """The constant shape of a Reshape in which a 0 copies; empty where there is no such thing."""
    if first.op_type != "Reshape" or int_attr(first, "allowzero", 0):
        return ()
    array = constant_array(first.inputs[1])
    return () if array is None else tuple(int(size) for size in array)
