"""Read what a Concat, Split, Slice, Gather or Scatter passes on along one axis from where it comes.

Before: y = Slice(Concat(a, b), ...)                    inside of a
After:  y = Slice(a, ...), or a itself
Before: y = Concat of all results of Split(x), or of Slices that follow each other in x
After:  y = x, or one Slice of x
Before: y = ScatterND(ScatterND(x, [[0]], a), [[1]], b)     with float[2, N] x
After:  y = Concat[axis=0](a, b)
Declines: nothing; sizes along the axis have to be known, indices constant, and no reduction asked for.

A rewrite is made only if fewer nodes are left, or if a Slice or Gather then no longer waits for a Concat or
Scatter that it does not need all of.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import DimsOf
from onnxopt.graph import constant_array
from onnxopt.passes.shared.chain import freed_by
from onnxopt.passes.shared.pieces import PIECEWISE, Piece, Tracer, axis_of
from onnxopt.rewrite import Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergePieces"]


@dataclass(frozen=True)
class MergePieces(Pass):
    """Let the readers of pieces that were joined or cut read what they come from."""

    name = "merge-pieces"
    example: ClassVar[str] = """agraph (float[2, 3] a, float[4, 3] b) => (float[4, 3] y)
      <int64[1] start = {2}, int64[1] end = {6}> {
        joined = Concat <axis = 0> (a, b)
        part = Slice (joined, start, end)
        y = Relu (part)
      }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("pieces along an axis", PIECEWISE, functools.partial(_merge, DimsOf())),)


def _merge(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    dims = dims_of(scope)
    axis = axis_of(node, dims, scope.opset)
    if axis is None:
        return None
    tracer = Tracer(dims, scope.opset, axis)
    picked = _picked(node, tracer) if node.op_type == "Gather" else None
    used = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    lists = [picked] if picked else [tracer.pieces(value) for value in used]
    pieces = [piece for one in lists for piece in one or ()]
    if not used or not all(lists) or any(piece.value in node.outputs for piece in pieces):
        return None
    parts = dict.fromkeys(p for p in pieces if picked or p.stop - p.start != tracer.size(p.value))
    made = len(parts) + sum(len(one or ()) > 1 for one in lists)
    if (
        made
        and not node.op_type.startswith("Scatter")
        and all(piece.value in node.inputs for piece in pieces)
    ):
        return None
    freed = freed_by(node, {piece.value for piece in pieces})
    early = made == freed and tracer.joined and len(pieces) == 1
    if made >= freed and not early:
        return None
    edit = Edit(node, scope)
    values = {piece: piece.value for piece in pieces}
    for part in parts:
        values[part] = _taken(edit, part, axis) if picked else _sliced(edit, part, axis, scope.opset)
    for value, one in zip(used, lists, strict=True):
        inputs = [values[piece] for piece in one or ()]
        edit.replace(value, inputs[0] if len(inputs) == 1 else edit.op("Concat", inputs, {"axis": axis}))
    return edit


def _picked(node: ir.Node, tracer: Tracer) -> list[Piece] | None:
    """The piece of one element that a Gather with a single number takes, whose axis goes."""
    index, source = constant_array(node.inputs[1], 64), node.inputs[0]
    if index is None or index.ndim or source is None:
        return None
    pieces, length = tracer.pieces(source), tracer.size(source)
    place = int(index) + (length or 0 if index < 0 else 0)
    for piece in pieces or ():
        if 0 <= place < piece.stop - piece.start:
            start = piece.start + place
            return None if piece.value is source else [Piece(piece.value, start, start + 1)]
        place -= piece.stop - piece.start
    return None


def _taken(edit: Edit, piece: Piece, axis: int) -> ir.Value:
    index = edit.constant(np.array(piece.start, np.int64), "index")
    return edit.op("Gather", (piece.value, index), {"axis": axis})


def _sliced(edit: Edit, piece: Piece, axis: int, opset: int) -> ir.Value:
    lists = {"starts": [piece.start], "ends": [piece.stop], "axes": [axis]}
    if opset < 10:
        return edit.op("Slice", (piece.value,), lists)
    return edit.op(
        "Slice", (piece.value, *(edit.constant(np.array(n, np.int64), k) for k, n in lists.items()))
    )
