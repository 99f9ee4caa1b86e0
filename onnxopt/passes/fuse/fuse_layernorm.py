"""Fuse (x - mean) / sqrt(variance + epsilon) into LayerNormalization.

Before: d = Sub(x, ReduceMean(x, axes=[-1]))
        y = Div(d, Sqrt(Add(ReduceMean(Pow(d, 2), axes=[-1]), epsilon)))
After:  y = LayerNormalization(x, ones, axis=-1, epsilon=epsilon)          opset 17
        y = InstanceNormalization(x, ones, zeros, epsilon=epsilon)         a factor for each channel follows

Before: y = Cast(LayerNormalization(Cast(x, to=float), s, b), to=float16)      x: float16
After:  y = LayerNormalization(x, s, b)                                        which normalizes in float32

The difference may be computed once or twice; the variance also as mean(x * x) - mean * mean, the quotient by
    a reciprocal or Pow, and as x * f + (beta - mean * f) with f = gamma / sqrt(variance + epsilon). Scale and
    bias that follow are merged by merge-normalization.
An axis that is not the last is brought there by a Transpose, and back by another.
Declines: several axes that are not the last; the size of one is not known; mean and variance differ in their
    axes; the type is float64, which LayerNormalization normalizes in float32; the opset is below 17; a value
    inside is read elsewhere; scale or bias are no numbers of the narrow type.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import int_attr, sole_user, static_shape
from onnxopt.passes.shared.chain import before
from onnxopt.passes.shared.layer import constant, require_sole_reader
from onnxopt.passes.shared.normalization import Pieces, layers, pieces_of
from onnxopt.passes.shared.weight import rounded
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["FuseLayernorm"]


@dataclass(frozen=True)
class FuseLayernorm(Pass):
    """Make one operator of the parts of a layer or instance normalization."""

    name: ClassVar[str] = "fuse-layernorm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[N,8] x) => (float[N,8] y) {
        two = Constant<value_float = 2.0>()
        epsilon = Constant<value_float = 0.00001>()
        mean = ReduceMean<axes = [-1]>(x)
        d = Sub(x, mean)
        square = Pow(d, two)
        variance = ReduceMean<axes = [-1]>(square)
        sum = Add(variance, epsilon)
        root = Sqrt(sum)
        y = Div(d, root)
    }"""

    def rules(self) -> Sequence[Rule]:
        return (
            Rule("parts of a normalization", _patterns().op_types, _fuse),
            Rule("casts around a normalization", ("Cast",), _casts),
        )


_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_patterns = functools.cache(layers)


def _fuse(node: ir.Node, scope: Scope) -> Edit | None:
    match = _patterns().find(node, scope)
    if match is None:
        return None
    pieces, edit = pieces_of(match), Edit(node, scope)
    channels = _channels(node, pieces)
    if channels is not None:
        affine = (pieces.constant(edit, number, (channels,)) for number in (1, 0))
        normal = edit.op("InstanceNormalization", (pieces.source, *affine), {"epsilon": pieces.epsilon})
    elif scope.opset < 17:
        raise NewerOpset("LayerNormalization", 17)
    else:
        normal = pieces.operator(edit, "LayerNormalization")
    return edit.replace(node.outputs[0], pieces.rest(edit, normal))


def _channels(node: ir.Node, pieces: Pieces) -> int | None:
    """The number of channels, where all axes after them are normalized and a factor for each follows."""
    assert pieces.source.shape is not None
    rank, after = pieces.rank, sole_user(node.outputs[0])
    if rank < 3 or pieces.axes != tuple(range(2, rank)):
        return None
    factors = [pieces.match.get("gamma")]
    if after is not None and after.op_type == "Mul" and not after.domain:
        factors += after.inputs
    for factor in factors:
        shape = static_shape(factor) or ()
        shape = (1,) * (rank - len(shape)) + shape
        if len(shape) == rank and 1 < shape[1] == pieces.source.shape[1] == math.prod(shape):
            return shape[1]
    return None


def _casts(node: ir.Node, scope: Scope) -> Edit | None:
    norm = before(node.inputs[0], node, ("LayerNormalization", "RMSNormalization"))
    x = norm.inputs[0] if norm is not None else None
    widening = x.producer() if x is not None and x.dtype == ir.DataType.FLOAT else None
    if norm is None or widening is None or widening.op_type != "Cast" or widening.domain:
        return None
    source, narrow = widening.inputs[0], ir.DataType(int_attr(node, "to", 0))
    if source is None or source.dtype != narrow or narrow not in _NARROW:
        return None
    require_sole_reader(norm)
    edit, affine = Edit(node, scope), list[ir.Value]()
    for value in filter(None, norm.inputs[1:]):
        array = constant(value, "scale or bias").numpy()
        if (array.astype(narrow.numpy()).astype(array.dtype) != array).any():
            raise Declined(f"scale or bias are no numbers of {narrow.name}")
        affine.append(edit.constant(rounded(array, narrow), value.name))
    output = edit.op(norm.op_type, (source, *affine), norm.attributes, name=norm.name)
    return edit.replace(node.outputs[0], output)
