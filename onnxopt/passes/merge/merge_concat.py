"""Merge a Concat into the Concat that reads it.

Before: z = Concat[axis](a, Concat[axis](b, c), d)
After:  z = Concat[axis](a, b, c, d)
Declines: the inner result is read elsewhere too; an axis counts from the end and the rank is unknown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import int_attr
from onnxopt.passes.shared.chain import before, normalised, rank_of, require_alone
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeConcat"]


@dataclass(frozen=True)
class MergeConcat(Pass):
    """Let one Concat join what nested ones join along the same axis."""

    name = "merge-concat"
    example = """
agraph (float[2] a, float[2] b, float[2] c) => (float[6] y) {
    ab = Concat<axis = 0>(a, b)
    y = Concat<axis = 0>(ab, c)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("Concat after Concat", ("Concat",), _concat),)


def _concat(node: ir.Node, scope: Scope) -> Edit | None:
    inputs: list[ir.Value | None] = []
    reason = None
    for value in node.inputs:
        try:
            inputs.extend(_parts(value, node))
        except Declined as why:
            reason = reason or why
            inputs.append(value)
    if tuple(inputs) == tuple(node.inputs):
        if reason is not None:
            raise reason
        return None
    edit = Edit(node, scope)
    return edit.replace(node.outputs[0], edit.op("Concat", inputs, {"axis": _axis(node)}))


def _parts(value: ir.Value | None, node: ir.Node) -> Sequence[ir.Value | None]:
    """What the Concat `node` can read in place of this input."""
    first = before(value, node, ("Concat",))
    if first is None:
        return (value,)
    inner, outer = _axis(first), _axis(node)
    if inner != outer:
        rank = rank_of(*first.outputs, *node.outputs, *first.inputs, *node.inputs)
        if normalised((inner,), rank) != normalised((outer,), rank):
            return (value,)
    require_alone(first, node)
    return first.inputs


def _axis(node: ir.Node) -> int:
    """Axis 1 was the default below opset 4."""
    return int_attr(node, "axis", 1)
