"""Merge two Transposes in a row.

Before: z = Transpose[perm=q](Transpose[perm=p](x))
After:  z = Transpose[perm=p[q]](x), or x itself where p[q] changes nothing
Declines: the value in between is read elsewhere, unless both go; perm is no permutation of the same axes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import ints_attr
from onnxopt.passes.shared.chain import before, require_alone
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeTranspose"]


@dataclass(frozen=True)
class MergeTranspose(Pass):
    """Let one Transpose do the work of two, or none where they undo each other."""

    name = "merge-transpose"
    example = """
agraph (float[2, 3, 4] x) => (float[4, 2, 3] y) {
    a = Transpose<perm = [1, 2, 0]>(x)
    y = Transpose<perm = [1, 2, 0]>(a)
}
    """

    def rules(self) -> Sequence[Rule]:
        return (Rule("Transpose after Transpose", ("Transpose",), _transpose),)


def _transpose(node: ir.Node, scope: Scope) -> Edit | None:
    first = before(node.inputs[0], node, ("Transpose",))
    if first is None:
        return None
    perm = _composed(ints_attr(first, "perm"), ints_attr(node, "perm"))
    edit = Edit(node, scope)
    if perm == tuple(range(len(perm))):
        source = first.inputs[0]
        return None if source is None else edit.replace(node.outputs[0], source)
    require_alone(first, node)
    return edit.replace(node.outputs[0], edit.op("Transpose", first.inputs, {"perm": perm}))


def _composed(first: tuple[int, ...] | None, second: tuple[int, ...] | None) -> tuple[int, ...]:
    """Axis i of the result is axis second[i] of the value in between, and first[second[i]] of the input.

    None is the default, the axes in reverse; two reversals change nothing, whatever the rank.
    """
    if first is None and second is None:
        return ()
    rank = len(first if first is not None else second or ())
    backwards = tuple(reversed(range(rank)))
    p, q = backwards if first is None else first, backwards if second is None else second
    if sorted(p) != sorted(backwards) or sorted(q) != sorted(backwards):
        raise Declined("perm is no permutation of the same axes")
    return tuple(p[axis] for axis in q)
