"""Move Transpose, Reshape, Squeeze and Unsqueeze across other ops to where they cancel or merge.

Before: z = Transpose[perm=(0, 3, 1, 2)](Relu(Add(Transpose[perm=(0, 2, 3, 1)](x), c)))
After:  z = Relu(Add(x, c'))
Before: y = ReduceMax[axes=(1, 2), keepdims=0](Transpose[perm=(0, 2, 3, 1)](x))
After:  y = ReduceMax[axes=(2, 3), keepdims=0](x)
Before: y = Concat[axis=3](Transpose(a), Transpose(b))
After:  y = Transpose(Concat[axis=1](a, b))
Before: y = Unsqueeze(ReduceSum[keepdims=0](x))
After:  y = ReduceSum[keepdims=1](x)
Before: a, b = Split(x); c = Transpose(a); d = Transpose(b)
After:  c, d = Split(Transpose(x))
Declines: a Reshape would be needed whose shape cannot be written down.

What is crossed: element-wise ops, Reduce, Softmax, Concat, Slice, Pad, Gather, and MatMul with a matrix, as
long as nobody else reads their result. The other inputs are brought into line, constants at no cost. A
rewrite is made only if fewer nodes are left, or as many of which fewer move elements.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.evaluation import DimsOf
from onnxopt.graph import has_reference, int_attr, sole_user
from onnxopt.passes.shared.moves import MOVABLE
from onnxopt.passes.shared.plan import DEEPEST, Planner, cheapest
from onnxopt.passes.shared.steps import LAYOUT_OPS, PLAIN, layout_of, steps_for, take
from onnxopt.rewrite import AttributeValue, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeDistantLayout"]


@dataclass(frozen=True)
class MergeDistantLayout(Pass):
    """Let changes of layout meet that have other ops between them."""

    name = "merge-distant-layout"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[
        str
    ] = """agraph (float[1, 3, 8, 8] x) => (float[1, 3, 8, 8] y) <float[3] c = {1, 2, 3}> {
        a = Transpose <perm = [0, 2, 3, 1]> (x)
        b = Add (a, c)
        d = Relu (b)
        y = Transpose <perm = [0, 3, 1, 2]> (d)
      }"""

    def rules(self) -> Sequence[Rule]:
        ops = (*LAYOUT_OPS, *(op for op in MOVABLE if op not in LAYOUT_OPS))
        dims_of = DimsOf()
        return (
            Rule("changes of layout apart from each other", ops, functools.partial(_merge, dims_of)),
            Rule("Split in front of changes of layout", ("Split",), functools.partial(_split, dims_of)),
        )


def _merge(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    """Start where a change of layout is: in the node itself, or right in front of it and none behind."""
    if scope.opset < 7 or not (node.op_type in LAYOUT_OPS or (_follows(node) and not _leads(node))):
        return None
    return cheapest(Planner(dims_of(scope), scope.opset, through=True), node, scope)


def _follows(node: ir.Node) -> bool:
    """Whether an input comes from what may be a change of layout."""
    makers = (value.producer() for value in node.inputs if value is not None)
    return any(maker.op_type in LAYOUT_OPS for maker in makers if maker is not None)


def _leads(node: ir.Node) -> bool:
    """Whether a row of ops leads to a change of layout, from which more can be seen than from here."""
    for _ in range(DEEPEST // 2):
        reader = sole_user(node.outputs[0])
        if reader is None or reader.op_type not in MOVABLE:
            return reader is not None and reader.op_type in PLAIN
        node = reader
    return False


def _split(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    """Where each result has the same change of layout behind it, it can as well be in front of the Split."""
    dims, readers = dims_of(scope), [sole_user(value) for value in node.outputs]
    shapes = [dims.of(value) for value in node.outputs]
    layouts = [layout.coarse() for reader in readers if (layout := layout_of(reader, dims)) is not None]
    if node.domain or has_reference(node) or scope.opset < 7 or len(layouts) < len(readers):
        return None
    axis = int_attr(node, "axis", 0) % len(layouts[0].source)
    first = next(
        (layout for layout in layouts if layout.source[axis]), layouts[0]
    )  # one that is longer than 1
    own = first.source[axis]
    if len(own) != 1 or own not in first.target:
        return None
    parts = [shape[axis] for shape in shapes if shape is not None]
    if any(one != first.resized({own[0]: part}).coarse() for one, part in zip(layouts, parts, strict=True)):
        return None
    steps = steps_for(first.resized({own[0]: sum(parts[1:], parts[0])}))
    source = node.inputs[0]
    if steps is None or len(steps) >= len(readers) or source is None:
        return None
    edit = Edit(node, scope)
    values = take(edit, source, steps, scope.opset), *node.inputs[1:]
    attributes: dict[str, AttributeValue] = {**node.attributes, "axis": first.target.index(own)}
    for reader, value in zip(
        readers, edit.ops("Split", values, attributes, outputs=len(readers)), strict=True
    ):
        assert reader is not None  # it has a layout
        edit.replace(reader.outputs[0], value)
    return edit
