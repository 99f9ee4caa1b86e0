"""Fuse x / sqrt(mean square + epsilon) into RMSNormalization.

Before: square = ReduceMean(Pow(x, 2), axes=[-1])
        y = Mul(x, Reciprocal(Sqrt(Add(square, epsilon))))
After:  y = RMSNormalization(x, ones, axis=-1, epsilon=epsilon)            opset 23

Square, quotient and root are found in the spellings that fuse-layernorm knows. A scale that follows is merged
    by merge-normalization.
Declines: several axes that are not the last; the size of one is not known; the type is float64, for which the
    operator normalizes in float32; the opset is below 23; a value inside is read elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.passes.shared.normalization import pieces_of, squares
from onnxopt.rewrite import Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["FuseRmsnorm"]


@dataclass(frozen=True)
class FuseRmsnorm(Pass):
    """Make one operator of the parts of a root-mean-square normalization."""

    name: ClassVar[str] = "fuse-rmsnorm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """<ir_version: 11, opset_import: ["" : 23]>
    agraph (float[N,8] x) => (float[N,8] y) {
        last = Constant<value_ints = [-1]>()
        two = Constant<value_float = 2.0>()
        epsilon = Constant<value_float = 0.00001>()
        square = Pow(x, two)
        mean = ReduceMean(square, last)
        sum = Add(mean, epsilon)
        root = Sqrt(sum)
        y = Div(x, root)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("parts of a root-mean-square normalization", _patterns().op_types, _fuse),)


_patterns = functools.cache(squares)


def _fuse(node: ir.Node, scope: Scope) -> Edit | None:
    match = _patterns().find(node, scope)
    if match is None or _subtracts_mean(match["x"].producer()):
        return None
    pieces, edit = pieces_of(match), Edit(node, scope)
    if scope.opset < 23:
        raise NewerOpset("RMSNormalization", 23)
    return edit.replace(node.outputs[0], pieces.rest(edit, pieces.operator(edit, "RMSNormalization")))


def _subtracts_mean(node: ir.Node | None) -> bool:
    """Whether it is the difference that a layer normalization starts with."""
    mean = node.inputs[1] if node is not None and node.op_type == "Sub" else None
    producer = mean.producer() if mean is not None else None
    return producer is not None and producer.op_type == "ReduceMean"
