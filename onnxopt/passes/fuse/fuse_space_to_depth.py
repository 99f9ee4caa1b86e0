"""Recognise SpaceToDepth in the Concat of every r-th row and column of one value.

Before: y = Concat[axis=1](Slice(x, [i, j], [end, end], [2, 3], [r, r]) for all i, j below r)
After:  y = SpaceToDepth[blocksize=r](x), and where i and j come in another order a Gather of the channels
Declines: nothing; height and width have to be known multiples of r, the type float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import Dims, DimsOf
from onnxopt.graph import has_reference, int_attr
from onnxopt.rewrite import Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseSpaceToDepth"]


@dataclass(frozen=True)
class FuseSpaceToDepth(Pass):
    """Take blocks of an image to the channels in one op."""

    name = "fuse-space-to-depth"
    example: ClassVar[str] = """agraph (float[1, 3, 4, 4] x) => (float[1, 12, 2, 2] y)
      <int64[2] o = {0, 0}, int64[2] p = {1, 0}, int64[2] q = {0, 1}, int64[2] s = {1, 1},
       int64[2] end = {4, 4}, int64[2] axes = {2, 3}, int64[2] steps = {2, 2}> {
        a = Slice (x, o, end, axes, steps)
        b = Slice (x, p, end, axes, steps)
        c = Slice (x, q, end, axes, steps)
        d = Slice (x, s, end, axes, steps)
        y = Concat <axis = 1> (a, b, c, d)
      }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("every r-th row and column", ("Concat",), functools.partial(_concat, DimsOf())),)


def _concat(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    block = round(len(node.inputs) ** 0.5)
    if block < 2 or block**2 != len(node.inputs) or has_reference(node):
        return None
    if int_attr(node, "axis", 0) not in (1, -3):
        return None
    makers = [None if value is None else value.producer() for value in node.inputs]
    slices = [
        maker for maker in makers if maker is not None and maker.op_type == "Slice" and not maker.domain
    ]
    if len(slices) < len(makers) or len({one.inputs[0] for one in slices}) > 1 or scope.opset < 10:
        return None
    source, dims = slices[0].inputs[0], dims_of(scope)
    shape = dims.of(source)
    if source is None or shape is None or len(shape) != 4 or source.dtype != ir.DataType.FLOAT:
        return None
    if any(not isinstance(size, int) or size % block for size in shape[2:]) or not isinstance(shape[1], int):
        return None
    offsets = [_offset(one, block, dims) for one in slices]
    places = [row * block + column for offset in offsets if offset is not None for row, column in (offset,)]
    if sorted(places) != list(range(block**2)):
        return None
    edit = Edit(node, scope)
    value = edit.op("SpaceToDepth", (source,), {"blocksize": block})
    if places != sorted(places):
        channels = np.arange(block**2 * shape[1]).reshape(-1, shape[1])[places].ravel()
        value = edit.op("Gather", (value, edit.constant(channels, "channels")), {"axis": 1})
    return edit.replace(node.outputs[0], value)


def _offset(node: ir.Node, block: int, dims: Dims) -> tuple[int, int] | None:
    """The first row and column of a Slice that takes each block-th to the end."""
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (dims.ints(node, name, index) for index, name in enumerate(names, 1))
    shape = dims.of(node.inputs[0])
    if starts is None or ends is None or axes is None or steps != [block, block] or has_reference(node):
        return None
    by_axis = dict(zip((axis % 4 for axis in axes), zip(starts, ends, strict=True), strict=True))
    if set(by_axis) != {2, 3} or shape is None:
        return None
    whole = all(isinstance(s, int) and by_axis[axis][1] >= s for axis, s in ((2, shape[2]), (3, shape[3])))
    first = by_axis[2][0], by_axis[3][0]
    return first if whole and all(0 <= start < block for start in first) else None
