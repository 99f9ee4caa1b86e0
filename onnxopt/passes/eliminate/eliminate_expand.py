"""Leave it to an element-wise op to broadcast what an Expand in front of it repeats.

Before: y = Add(Expand(x, shape), z)        with float[N, 1] x, [N, 8] as shape, float[N, 8] z
After:  y = Add(x, z)
Declines: nothing; the shape of the result has to be surely the same, by the names of its sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import BROADCAST, Dims, DimsOf, broadcast
from onnxopt.rewrite import Edit, Rule
from onnxopt.scope import Scope

__all__ = ["EliminateExpand"]

_ONLY = {"Expand": 0, "PRelu": 1}
"""The input that is broadcast, where not each of them is."""


@dataclass(frozen=True)
class EliminateExpand(Pass):
    """Let ops that broadcast read what was expanded."""

    name = "eliminate-expand"
    example: ClassVar[str] = """agraph (float[N, 1] x, float[N, 8] z) => (float[N, 8] y) {
        shape = Shape (z)
        a = Expand (x, shape)
        y = Add (a, z)
      }"""

    def rules(self) -> Sequence[Rule]:
        rule = functools.partial(_broadcast, DimsOf())
        return (Rule("Expand before an op that broadcasts", (*BROADCAST, "Expand"), rule),)


def _broadcast(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    one = _ONLY.get(node.op_type)
    sources = [_expanded(value) if one in (None, i) else None for i, value in enumerate(node.inputs)]
    if scope.opset < 8 or not any(sources):
        return None
    dims = dims_of(scope)
    whole = dims.of(node.outputs[0])
    for index, source in enumerate(sources):
        values = [*node.inputs[:index], source, *node.inputs[index + 1 :]]
        if source is not None and whole is not None and _result(node, values, dims) == whole:
            edit = Edit(node, scope)
            return edit.replace(node.outputs[0], edit.op(node.op_type, values, node.attributes))
    return None


def _expanded(value: ir.Value | None) -> ir.Value | None:
    """What an Expand makes this value of."""
    maker = None if value is None else value.producer()
    return maker.inputs[0] if maker is not None and maker.op_type == "Expand" and not maker.domain else None


def _result(node: ir.Node, values: Sequence[ir.Value | None], dims: Dims) -> tuple[object, ...] | None:
    """The shape of the result with these inputs."""
    shapes = [dims.of(value) for value in values]
    if node.op_type == "Expand":
        target = dims.integers(node, "shape", 1)
        shapes[1] = None if target is None else tuple(target)
    known = [shape for shape in shapes if shape is not None]
    return broadcast(known) if len(known) == len(shapes) else None
