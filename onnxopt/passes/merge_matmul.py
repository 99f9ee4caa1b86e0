"""Multiply the weights of two fully connected layers that follow each other.

Before: y = MatMul(MatMul(x, A), B)            A: [K, M], B: [M, N]
After:  y = MatMul(x, A @ B)                   where K M + M N > K N

Before: y = Gemm(Gemm(x, A, a), B, b)
After:  y = Gemm(x, A @ B, a @ B + b)

Declines: a weight or a bias that matters is no constant; another node, graph or the user reads what lies
    between; the product takes no fewer multiply-adds; the second Gemm transposes what it reads; the first
    bias differs by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.graph import float_attr
from onnxopt.passes._layer import Layer, layer_of, require_sole_reader
from onnxopt.pipeline import Kind, Pass
from onnxopt.rewrite import Declined, Edit, Rule, Scope

__all__ = ["MergeMatmul"]

_OPS = ("Gemm", "MatMul")


@dataclass(frozen=True)
class MergeMatmul(Pass):
    """Make one layer of two fully connected ones with nothing between them."""

    name: ClassVar[str] = "merge-matmul"
    kind: ClassVar[Kind] = "reorder"

    def rules(self) -> Sequence[Rule]:
        return (Rule("two matrix products", _OPS, _merge),)


def _merge(node: ir.Node, scope: Scope) -> Edit | None:
    second = layer_of(node)
    first = layer_of(second.source.producer()) if second is not None else None
    if second is None or first is None or first.node.op_type not in _OPS:
        return None
    if not (first.stored and second.stored):
        return None
    if scope.opset < 7:
        raise Declined("a Gemm before opset 7 broadcasts by its own rules")
    if second.transposes:
        raise Declined("the second Gemm transposes what it reads")
    require_sole_reader(first.end)
    if first.add is not None:
        require_sole_reader(first.node)
    a, b = first.weight(), second.weight()
    if a.inputs * a.outputs + b.inputs * b.outputs <= a.inputs * b.outputs:
        raise Declined("the product of the weights takes no fewer multiply-adds")
    bias = _bias(first, second)
    kept = second if second.node.op_type == "Gemm" and not first.transposes else first
    other = first if kept is second else second
    return _product(kept, other, first, second, bias, Edit(node, scope))
