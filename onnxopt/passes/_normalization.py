"""Normalizations in pieces: (x - mean) / sqrt(variance + epsilon), or x / sqrt(mean square + epsilon)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, int_attr, static_shape
from onnxopt.passes._chain import axes_of, normalised
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope

__all__ = ["FLOATS", "Pieces", "layers", "of_one_shape", "pieces_of", "shape_of", "squares"]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types that are normalized in float32; pieces in float64 are more precise than the operators."""

# The mean may be computed twice, once for each difference, or once; equal names stand for equal values only.
_DIFFERENCE = "Sub(x, ReduceMean(x, ...))"
_SQUARE = "(Pow({0}, 2) | Mul({0}, {0}))"
_SPREAD = f"ReduceMean({_SQUARE}, ...)"
_VARIANCE = _SPREAD.format(_DIFFERENCE)
_MOMENTS = f"Sub({_SPREAD.format('x')}, {_SQUARE.format('ReduceMean(x, ...)')})"
_SAFE = f"({_VARIANCE} | {_MOMENTS} | Relu({_MOMENTS}) | Max({_MOMENTS}, 0))"


def _forms(value: str, spread: str) -> dict[str, Sequence[str]]:
    """Spellings of `value` over the root of `spread`: alone, and with a factor in the denominator."""
    root = f"(Sqrt(Add({spread}, 'epsilon')) | Pow(Add({spread}, 'epsilon'), 0.5))"
    inverse = f"(Reciprocal({root}) | Div(1, {root}) | Pow(Add({spread}, 'epsilon'), -0.5))"
    return {
        "x": (f"Div({value}, {root})", f"Mul({value}, {inverse})"),
        "Mul(x, gamma)": (f"Mul({value}, Mul({inverse}, gamma))",),
        "inverse": (inverse,),
    }


def layers() -> Patterns:
    """Patterns with the mean subtracted, by what is left to do with the normalized x."""
    forms = _forms(_DIFFERENCE, _SAFE)
    (inverse,) = forms.pop("inverse")
    factor = f"(factor := Mul({inverse}, gamma))"
    return Patterns(
        {
            **forms,
            "Add(Mul(x, gamma), beta)": f"Add(Mul(x, {factor}), Sub(beta, Mul(ReduceMean(x, ...), factor)))",
        }
    )


def squares() -> Patterns:
    """Patterns without a mean, by what is left to do with the normalized x."""
    forms = _forms("x", _SPREAD.format("x"))
    del forms["inverse"]
    return Patterns(forms)


@dataclass(frozen=True)
class Pieces:
    """A normalization that was found: of `source` along the last axes from `axis` (negative) on."""

    match: Match
    source: ir.Value
    axis: int
    epsilon: float

    def constant(self, edit: Edit, number: float, sizes: Sequence[int]) -> ir.Value:
        """A constant that is this number everywhere, in the type of the source."""
        assert self.source.dtype is not None
        return edit.constant(np.full(sizes, number, self.source.dtype.numpy()), "scale" if number else "bias")

    def operator(self, edit: Edit, op_type: str) -> ir.Value:
        """The normalized source by a LayerNormalization or RMSNormalization.

        Raises:
            Declined: the size of a normalized axis is not known.
        """
        attributes = {"axis": self.axis, "epsilon": self.epsilon}
        return edit.op(op_type, (self.source, self.constant(edit, 1, self._sizes)), attributes)

    @property
    def _sizes(self) -> tuple[int, ...]:
        assert self.source.shape is not None
        sizes = tuple(self.source.shape.dims[self.axis :])
        if not all(isinstance(size, int) for size in sizes):
            raise Declined("the size of a normalized axis is not known")
        return tuple(size for size in sizes if isinstance(size, int))

    def rest(self, edit: Edit, normal: ir.Value) -> ir.Value:
        """What is left to do with the normalized value."""
        values = {**self.match.values, "x": normal}
        return replace(self.match, values=values).build(edit, self.match.name)


def pieces_of(patterns: Patterns, node: ir.Node, scope: Scope) -> Pieces | None:
    """The normalization that ends in this node.

    Raises:
        Declined: it is not along the last axes, or of another type.
    """
    match = patterns.find(node, scope)
    if match is None:
        return None
    source = match["x"]
    if source.dtype not in FLOATS:
        raise Declined("its type is unknown" if source.dtype is None else f"its type is {source.dtype.name}")
    rank = len(source.shape) if source.shape is not None else None
    means = [one for one in match.nodes if one.op_type == "ReduceMean"]
    found = {_axes(one, rank) for one in means}
    if len(found) > 1:
        raise Declined("mean and variance are taken along different axes")
    axes = found.pop()
    if rank is None:
        raise Declined("its number of axes is not known")
    if axes != tuple(range(rank - len(axes), rank)):
        raise Declined("it does not normalize along the last axes")
    return Pieces(match, source, -len(axes), match.number("epsilon"))


def _axes(node: ir.Node, rank: int | None) -> tuple[int, ...]:
    axes = axes_of(node)
    if not axes or not int_attr(node, "keepdims", 1):
        raise Declined("a mean is taken along all axes, or drops them")
    return tuple(sorted(normalised(axes, rank)))


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape as integers, where it is on record or the value is a constant."""
    tensor = constant_of(value)
    return static_shape(value) if tensor is None else tuple(tensor.shape.numpy())


def of_one_shape(one: ir.Value | None, other: ir.Value | None) -> bool:
    """Whether two values surely have the same shape."""
    if one is None or other is None or one.shape is None or other.shape is None:
        return False
    known = all(isinstance(dim, int) or dim.value is not None for dim in one.shape.dims)
    return known and one.shape.dims == other.shape.dims
