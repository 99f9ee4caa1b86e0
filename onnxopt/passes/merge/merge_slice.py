"""Merge two Slices in a row, and a Slice of one element with the Squeeze that takes its axis away.

Before: z = Slice(Slice(x, starts, ends, axes, steps), starts', ends', axes', steps')
After:  z = one Slice of x, with a start, end and step for each axis that either of the two cuts
Before: z = Squeeze(Slice(x, [i], [i + 1], [axis]), [axis])
After:  z = Gather[axis](x, i)
Declines: an axis that both cut, unless its size is known, or all steps are 1 and nothing counts from the
    end; a negative step whose end is the largest integer; starts, ends, axes or steps that are no
    constants; the value in between is read elsewhere too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import ints_attr
from onnxopt.passes.shared.chain import axes_of, before, constant_ints, normalised, rank_of, require_alone
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeSlice"]

_END = np.iinfo(np.int64).max
_OPEN_ENDS = (_END, np.iinfo(np.int32).max)
"""With a negative step, ONNX clamps these to the size; ONNX Runtime goes on past index 0."""


@dataclass(frozen=True)
class MergeSlice(Pass):
    """Let one Slice cut what two cut."""

    name = "merge-slice"
    example = """
agraph (float[9] x) => (float[4] y)
    <int64[1] zero = {0}, int64[1] one = {1}, int64[1] four = {4}, int64[1] eight = {8}> {
    a = Slice(x, one, eight, zero)
    y = Slice(a, zero, four, zero)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("Slice after Slice", ("Slice",), _slice),
            Rule("Squeeze after Slice of one element", ("Squeeze",), _one),
        )


@dataclass(frozen=True)
class _Cut:
    """Start, end and step on one axis, as ONNX means them."""

    start: int
    end: int
    step: int

    def of(self, size: int) -> range:
        """The indices that are kept of an axis of this size: ends beyond it are clamped."""
        start = self.start + size if self.start < 0 else self.start
        end = self.end + size if self.end < 0 else self.end
        if self.step > 0:
            return range(_clamp(start, 0, size), _clamp(end, 0, size), self.step)
        return range(_clamp(start, 0, size - 1), _clamp(end, -1, size - 1), self.step)


def _clamp(value: int, low: int, high: int) -> int:
    return min(max(value, low), high)


def _slice(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Slice",))
    if first is None:
        return None
    require_alone(first, node)
    source = first.inputs[0]
    rank = rank_of(source, *first.outputs, *node.outputs)
    inner, outer = _cuts(first, scope.opset), _cuts(node, scope.opset)
    if rank is not None or len({axis < 0 for axis in (*inner, *outer)}) > 1:
        inner, outer = (
            dict(zip(normalised(tuple(c), rank), c.values(), strict=True)) for c in (inner, outer)
        )
    cuts = dict(inner)
    for axis, cut in outer.items():
        cuts[axis] = _composed(inner[axis], cut, _size(source, axis)) if axis in inner else cut
    return _sliced(node, scope, source, cuts)


def _one(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Slice",))
    if first is None:
        return None
    require_alone(first, node)
    rank, cuts, gone = rank_of(*first.inputs[:1], *first.outputs), _cuts(first, scope.opset), axes_of(node)
    if gone is None or len(cuts) != 1 or normalised(tuple(cuts), rank) != normalised(gone, rank):
        return None
    (cut,) = cuts.values()
    last = cut.start == -1 and cut.end in _OPEN_ENDS and scope.opset >= 11
    if cut.step != 1 or not (last or 0 <= cut.start == cut.end - 1):
        return None
    edit = Edit(node, scope)
    index = edit.constant(np.array(cut.start, np.int64), "index")
    return edit.replace(node.outputs[0], edit.op("Gather", (first.inputs[0], index), {"axis": gone[0]}))


def _sliced(node: ir.Node, scope: Scope, source: ir.Value | None, cuts: dict[int, _Cut]) -> Edit:
    """One Slice in the form of the opset."""
    edit = Edit(node, scope)
    starts, ends = [c.start for c in cuts.values()], [c.end for c in cuts.values()]
    if scope.opset < 10:
        value = edit.op("Slice", (source,), {"starts": starts, "ends": ends, "axes": tuple(cuts)})
        return edit.replace(node.outputs[0], value)
    lists = {"starts": starts, "ends": ends, "axes": list(cuts), "steps": [c.step for c in cuts.values()]}
    if set(lists["steps"]) == {1}:
        del lists["steps"]
    constants = [edit.constant(np.array(entries, np.int64), name) for name, entries in lists.items()]
    return edit.replace(node.outputs[0], edit.op("Slice", (source, *constants)))


def _cuts(node: ir.Node, opset: int) -> dict[int, _Cut]:
    """What a Slice keeps, by axis as it is spelt."""
    if opset < 10:
        starts, ends, steps = ints_attr(node, "starts") or (), ints_attr(node, "ends") or (), None
    else:
        starts, ends = constant_ints(node.inputs[1], "starts are"), constant_ints(node.inputs[2], "ends are")
        given = node.inputs[4] if len(node.inputs) > 4 else None
        steps = None if given is None else constant_ints(given, "steps are")
    axes = axes_of(node, 3)
    axes = tuple(range(len(starts))) if axes is None else axes
    steps = (1,) * len(starts) if steps is None else steps
    if not len(set(axes)) == len(axes) == len(starts) == len(ends) == len(steps) or 0 in steps:
        raise Declined("starts, ends, axes and steps do not fit")
    return {a: _Cut(*cut) for a, *cut in zip(axes, starts, ends, steps, strict=True)}


def _size(source: ir.Value | None, axis: int) -> int | None:
    """The size of an axis, where it is on record."""
    if source is None or source.shape is None:
        return None
    size = source.shape.dims[axis]
    return size if isinstance(size, int) else None


def _composed(first: _Cut, second: _Cut, size: int | None) -> _Cut:
    """One cut for two of the same axis."""
    if any(cut.step < 0 and cut.end in _OPEN_ENDS for cut in (first, second)):
        raise Declined("a negative step to the largest integer, on which runtimes disagree")
    if size is not None:
        kept = first.of(size)
        again = second.of(len(kept))
        if not again:
            return _Cut(0, 0, 1)
        step = kept.step * again.step if len(again) > 1 else 1
        end = kept[again[-1]] + (1 if step > 0 else -1)
        return _Cut(kept[again[0]], end if end >= 0 else -size - 1, step)
    if first.step != 1 or second.step != 1 or min(first.start, first.end, second.start, second.end) < 0:
        raise Declined("both cut the same axis, whose size is unknown")
    return _Cut(min(first.start + second.start, _END), min(first.end, first.start + second.end), 1)
