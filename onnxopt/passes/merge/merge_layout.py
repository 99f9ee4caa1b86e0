"""Merge Transpose, Reshape, Flatten, Squeeze and Unsqueeze in a row into the fewest ops that do the same.

Before: z = Reshape(Transpose(Reshape(x)))      z = Transpose[perm=(0, 2, 1)](x), with float[N, 1, 8] x
After:  z = Transpose(x)                        z = Reshape(x)
Before: y = Reshape(Transpose(Reshape(x)))      [N, C r r, H, W] to [N, C, H r, W r]
After:  y = DepthToSpace(x), or SpaceToDepth
Declines: a Reshape would be needed whose shape cannot be written down: two sizes are neither numbers nor
    those of the same axes of its input, or one beside a size that may be 0 when the model runs.

Two sizes that are not known are taken for different, and each size of unknown name for one of its own. An
op whose result is read elsewhere stays, so the row is shortened only where that needs fewer new ops.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import DimsOf
from onnxopt.passes.shared.plan import Planner, cheapest
from onnxopt.passes.shared.steps import LAYOUT_OPS
from onnxopt.rewrite import Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeLayout"]


@dataclass(frozen=True)
class MergeLayout(Pass):
    """Let few ops do what a row of ops does that only changes order and grouping of the axes."""

    name = "merge-layout"
    example: ClassVar[str] = """agraph (float[2, 12, 4, 8] x) => (float[2, 12, 8, 4] y)
      <int64[3] flat = {24, 4, 8}, int64[4] full = {2, 12, 8, 4}> {
        a = Reshape (x, flat)
        b = Transpose <perm = [0, 2, 1]> (a)
        y = Reshape (b, full)
      }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("changes of layout in a row", LAYOUT_OPS, functools.partial(_merge, DimsOf())),)


def _merge(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    return (
        cheapest(Planner(dims_of(scope), scope.opset, through=False), node, scope)
        if scope.opset >= 5
        else None
    )
