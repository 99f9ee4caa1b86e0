"""Fuse an InstanceNormalization of groups of channels into GroupNormalization.

Before: t = InstanceNormalization(Reshape(x, [0, groups, -1]), ones, zeros)
        y = Reshape(t, Shape(x))
After:  y = GroupNormalization(x, ones, zeros, num_groups=groups)          opset 21

Scale and bias that follow are merged by merge-normalization. It is guarded: version 1.31 of ONNX Runtime
    takes the operator apart on the CPU, to run twice as long or more.
Declines: the shapes do not say that channels are grouped and put back; the InstanceNormalization has a scale
    or bias of its own; the opset is below 21; a value inside is read elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_array, float_attr, int_attr
from onnxopt.passes.shared.normalization import FLOATS, of_one_shape
from onnxopt.pattern import Patterns
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseGroupnorm"]

_MODEL = """<ir_version: 10, opset_import: ["" : 21]>
    agraph (float[1, {0}, 32, 32] x) => (float[1, {0}, 32, 32] y)
        <int64[3] grouped = {{0, 2, -1}}, float[2] ones = {{1.0, 1.0}}, float[2] zeros = {{0.0, 0.0}}> {{
        shape = Shape(x)
        groups = Reshape(x, grouped)
        normal = InstanceNormalization(groups, ones, zeros)
        y = Reshape(normal, shape)
    }}"""


@dataclass(frozen=True)
class FuseGroupnorm(Pass):
    """Make one operator of a normalization of groups of channels."""

    name: ClassVar[str] = "fuse-groupnorm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = _MODEL.format(4)
    pattern: ClassVar[str] = _MODEL.format(64)

    def rules(self) -> Sequence[Rule]:
        return (Rule("normalization of groups", _patterns().op_types, _fuse),)


@functools.cache
def _patterns() -> Patterns:
    groups = "(groups := Reshape(x, grouped))"
    return Patterns({"": f"Reshape((normal := InstanceNormalization({groups}, scale, bias)), shape)"})


def _fuse(node: ir.Node, scope: Scope) -> Edit | None:
    match = _patterns().find(node, scope)
    if match is None:
        return None
    x, grouped = match["x"], constant_array(match["grouped"])
    if x.dtype not in FLOATS or x.shape is None or len(x.shape) < 3:
        raise Declined("its type or number of axes is not known, or another")
    channels, batch = x.shape[1], x.shape[0]
    if grouped is None or len(grouped) != 3 or not isinstance(channels, int):
        raise Declined("the groups, or the number of channels, are not known")
    first, groups, _ = (int(size) for size in grouped)
    kept = (first == 0 and not int_attr(match.node("groups"), "allowzero", 0)) or first == batch
    if groups < 1 or channels % groups or not kept:
        raise Declined("it does not group the channels")
    if not _is_shape_of(match["shape"], x) and not of_one_shape(x, node.outputs[0]):
        raise Declined("it is not known to have the shape of its input")
    for name, number in (("scale", 1), ("bias", 0)):
        array = constant_array(match[name])
        if array is None or (array != number).any():
            raise Declined("the InstanceNormalization has a scale or bias of its own")
    if scope.opset < 21:
        raise Declined("GroupNormalization came with opset 21")
    edit, dtype = Edit(node, scope), x.dtype.numpy()
    affine = (edit.constant(np.full(channels, one, dtype), name) for one, name in ((1, "scale"), (0, "bias")))
    attributes = {"num_groups": groups, "epsilon": float_attr(match.node("normal"), "epsilon", 1e-5)}
    return edit.replace(node.outputs[0], edit.op("GroupNormalization", (x, *affine), attributes))


def _is_shape_of(value: ir.Value, x: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Shape" and not node.attributes and node.inputs[0] is x
