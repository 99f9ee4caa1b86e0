"""Let one Split do what several Slices of a value do.

Before: a = Slice(x, 0, 8); b = Slice(x, 8, 12); c = Slice(x, 12, 16)     along one axis of size 16
After:  a, b, c = Split(x, [8, 4, 4])
Declines: another type than float, double, float16, int32 or int64, for which not each runtime has a Split;
    Slices that leave out a part of the axis, or overlap.

The sizes along the axis have to be known. Slices along other axes of the same value do not matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import Dims
from onnxopt.graph import nested
from onnxopt.ledger import Ledger
from onnxopt.passes.shared.forms import split
from onnxopt.passes.shared.pieces import Tracer, axis_of
from onnxopt.rewrite import Declined, Edit, Rule, visit
from onnxopt.scope import Scope, scopes

__all__ = ["MergeSplit"]

_TYPES = ("FLOAT", "DOUBLE", "FLOAT16", "INT32", "INT64")


@dataclass(frozen=True)
class MergeSplit(Pass):
    """Cut a value once."""

    name = "merge-split"
    example: ClassVar[str] = """agraph (float[2, 16] x) => (float[2, 8] y)
      <int64[1] zero = {0}, int64[1] one = {1}, int64[1] eight = {8}, int64[1] end = {16}> {
        a = Slice (x, zero, eight, one)
        b = Slice (x, eight, end, one)
        y = Mul (a, b)
      }"""

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for scope in scopes(model):
            dims = Dims(scope)
            for graph in (scope.graph, *nested(scope.graph)):
                for slices, axis in list(_groups(graph, dims, scope.opset)):
                    rule = Rule("Slices that make up a value", (), partial(_merge, slices, axis, dims))
                    visit(slices[0], (rule,), scope, ledger)


def _groups(graph: ir.Graph, dims: Dims, opset: int) -> Iterator[tuple[list[ir.Node], int]]:
    """The Slices of one value along one axis, where there are at least two, in the order of the graph."""
    found: dict[tuple[ir.Value, int], list[ir.Node]] = {}
    for node in graph:
        source = node.inputs[0] if node.op_type == "Slice" and not node.domain else None
        axis = None if source is None else axis_of(node, dims, opset)
        if source is not None and axis is not None:
            found.setdefault((source, axis), []).append(node)
    return ((slices, axis) for (_, axis), slices in found.items() if len(slices) > 1)


def _merge(slices: list[ir.Node], axis: int, dims: Dims, first: ir.Node, scope: Scope) -> Edit | None:
    source, tracer = first.inputs[0], Tracer(dims, scope.opset, axis)
    assert source is not None  # as _groups found it
    cuts = [tracer.cut(node) for node in slices]
    size = tracer.size(source)
    known = sorted((cut, index) for index, cut in enumerate(cuts) if cut is not None)
    if size is None or len(known) < len(slices):
        return None
    if source.dtype is None or source.dtype.name not in _TYPES:
        raise Declined("not each runtime has a Split for the type")
    ends = [0, *(stop for (_, stop), _ in known)]
    if [start for (start, _), _ in known] != ends[:-1] or ends[-1] != size:
        raise Declined("the Slices do not make up the value")
    edit = Edit(first, scope)
    parts = split(edit, source, [stop - start for (start, stop), _ in known], axis, scope.opset)
    for part, (_, index) in zip(parts, known, strict=True):
        edit.replace(slices[index].outputs[0], part)
    return edit
