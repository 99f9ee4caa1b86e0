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
from onnxopt.graph import sole_user
from onnxopt.passes._steps import LAYOUT_OPS, Step, cost, layout_of, steps_for, take, weight_of
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["MergeLayout"]

_LONGEST = 12
"""Ops in a row that are looked at."""


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
    """Try rows that end in this node; each one op longer than the last."""
    dims = dims_of(scope)
    whole = layout_of(node, dims)
    if whole is None or scope.opset < 5:
        return None
    # Runtimes have DepthToSpace and SpaceToDepth for few other types.
    modes = ("DCR", "CRD")[: 1 + (scope.opset >= 11)] if node.outputs[0].dtype == ir.DataType.FLOAT else ()
    best: tuple[tuple[int, int], ir.Value | None, list[Step]] | None = None
    first, freed, stays, unwritten = node, (1, weight_of(node)), False, False
    for length in range(1, _LONGEST + 1):
        steps = steps_for(whole, modes)
        unwritten |= steps is None and length > 1
        if steps is not None:
            count, weight = cost(steps)
            gain = freed[0] - count, freed[1] - weight
            if gain > max((0, 0), best[0] if best else (0, 0)):
                best = gain, first.inputs[0], steps
        source = first.inputs[0]
        before = None if source is None else source.producer()
        layout = layout_of(before, dims)
        joined = None if layout is None else layout.then(whole)
        if source is None or before is None or joined is None:
            break
        stays |= sole_user(source) is not first
        freed = freed if stays else (freed[0] + 1, freed[1] + weight_of(before))
        first, whole = before, joined
    if best is None:
        if unwritten:
            raise Declined("the shape of the Reshape that would be needed cannot be written down")
        return None
    edit = Edit(node, scope)
    value = take(edit, best[1], best[2], scope.opset)
    assert value is not None  # what a change of layout reads is there
    return edit.replace(node.outputs[0], value)
