"""Merge Squeeze and Unsqueeze in a row.

Before: z = Unsqueeze(Unsqueeze(x)), or Squeeze(Squeeze(x))
After:  z = one of them, with the axes of both
Before: z = Squeeze(Unsqueeze(x)), or Unsqueeze(Squeeze(x))
After:  z = x where the axes are the same; the axes left over where Squeeze takes out some of what
    Unsqueeze put in, or more
Declines: axes that are no constant, or count from the end of an unknown number of axes; a Squeeze that
    names no axes, unless it comes last; the value in between is read elsewhere, unless both go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.passes.shared.chain import axes_of, before, normalised, rank_of, require_alone
from onnxopt.passes.shared.forms import with_axes
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeSqueeze"]

_Axes = tuple[int, ...]


@dataclass(frozen=True)
class MergeSqueeze(Pass):
    """Let one Squeeze or Unsqueeze do the work of two, or none where they undo each other."""

    name = "merge-squeeze"
    example = """
agraph (float[2] x) => (float[1, 2, 1] y) <int64[1] front = {0}, int64[1] back = {2}> {
    a = Unsqueeze(x, front)
    y = Unsqueeze(a, back)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("Squeeze and Unsqueeze in a row", ("Squeeze", "Unsqueeze"), _merge),)


def _merge(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Squeeze", "Unsqueeze"))
    if first is None or first.inputs[0] is None:
        return None
    inner, outer = axes_of(first), axes_of(node)
    if inner == () or outer == ():
        raise Declined("an empty list of axes")
    if outer is None:
        require_alone(first, node)
        return _made(node, scope, first.inputs[0], "Squeeze", None)
    if inner is None:
        raise Declined("the first Squeeze names no axes")
    if inner == outer and node.op_type != first.op_type and len({axis < 0 for axis in inner}) == 1:
        return Edit(node, scope).replace(node.outputs[0], first.inputs[0])
    inner, outer = _counted(first, node, inner, outer)
    op_type, axes = _combined(first.op_type, node.op_type, inner, outer)
    if op_type is None:
        return None
    if not axes:
        return Edit(node, scope).replace(node.outputs[0], first.inputs[0])
    require_alone(first, node)
    return _made(node, scope, first.inputs[0], op_type, axes)


def _made(node: ir.Node, scope: Scope, source: ir.Value, op_type: str, axes: _Axes | None) -> Edit:
    """One Squeeze or Unsqueeze in the form of the opset."""
    edit = Edit(node, scope)
    if axes is None:
        value = edit.op(op_type, (source,))
    else:
        value = with_axes(edit, op_type, source, axes, scope.opset)
    return edit.replace(node.outputs[0], value)


def _counted(first: ir.Node, node: ir.Node, inner: _Axes, outer: _Axes) -> tuple[_Axes, _Axes]:
    """Both lists counted from the front, each in the axes of the op's larger side."""
    step, last = _growth(first, inner), _growth(node, outer)
    rank = rank_of(first.inputs[0])
    if rank is None and (between := rank_of(first.outputs[0])) is not None:
        rank = between - step
    if rank is None and (after := rank_of(node.outputs[0])) is not None:
        rank = after - last - step
    if rank is None:
        return normalised(inner, None), normalised(outer, None)
    return normalised(inner, max(rank, rank + step)), normalised(outer, max(rank + step, rank + step + last))


def _growth(node: ir.Node, axes: _Axes) -> int:
    return len(axes) if node.op_type == "Unsqueeze" else -len(axes)


def _combined(first: str, second: str, inner: _Axes, outer: _Axes) -> tuple[str | None, _Axes]:
    """The one op that does the work of both, and its axes; None where there is no such op."""
    if first == second:
        # The axes of the last Unsqueeze, or of the first Squeeze, are already those of the merged op.
        fixed, moving = (outer, inner) if first == "Unsqueeze" else (inner, outer)
        return first, tuple(sorted((*fixed, *_spread(moving, fixed))))
    if first == "Squeeze":
        return (first, ()) if set(inner) == set(outer) else (None, ())
    if set(outer) <= set(inner):
        return "Unsqueeze", _closed_up(inner, outer)
    if set(inner) <= set(outer):
        return "Squeeze", _closed_up(outer, inner)
    return None, ()


def _spread(axes: _Axes, gaps: _Axes) -> _Axes:
    """Where axes come to lie when the axes `gaps` are put in."""
    spread = []
    for axis in axes:
        for gap in sorted(gaps):
            axis += gap <= axis
        spread.append(axis)
    return tuple(spread)


def _closed_up(axes: _Axes, gone: _Axes) -> _Axes:
    """Where the other axes come to lie when the axes `gone` are taken out."""
    return tuple(axis - sum(other < axis for other in gone) for axis in sorted(set(axes) - set(gone)))
