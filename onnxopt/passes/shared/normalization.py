"""Normalizations in pieces: (x - mean) / sqrt(variance + epsilon), or x / sqrt(mean square + epsilon)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, static_shape
from onnxopt.passes.shared.reduction import common_axes, kept
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit

__all__ = ["FLOATS", "Pieces", "layers", "of_one_shape", "pieces_of", "shape_of", "squares"]

FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
"""Types that are normalized in float32; pieces in float64 are more precise than the operators."""

# The mean may be computed once, or anew for each difference: only equal names stand for equal values.
_LAYER = {
    "Mean": "ReduceMean(x, ...)",
    "KeptMean": kept("Mean"),
    "Difference": "Sub(x, KeptMean)",
    "Moments": "Sub(ReduceMean(Pow(x, 2) | Mul(x, x), ...), Pow(Mean, 2) | Mul(Mean, Mean))",
    "Spread": """ReduceMean(Pow(Difference, 2) | Mul(Difference, Difference), ...)
        | Moments | Relu(Moments) | Max(Moments, 0)""",
}
_SQUARE = {"Difference": "x", "Spread": "ReduceMean(Pow(x, 2) | Mul(x, x), ...)"}
_QUOTIENT = {
    "Sum": f"Add({kept('Spread')}, 'epsilon')",
    "Root": "Sqrt(Sum) | Pow(Sum, 0.5)",
    "Inverse": "Reciprocal(Root) | Div(1, Root) | Pow(Sum, -0.5)",
    "Factor": "Mul(Inverse, gamma) | Div(gamma, Root)",
}
_FORMS = {
    "x": ("Div(Difference, Root)", "Mul(Difference, Inverse)"),
    "Mul(x, gamma)": "Mul(Difference, Factor)",
}
_MOVED = {
    "Add(Mul(x, gamma), beta)": "Add(Mul(x, (factor := Factor)), Sub(beta, Mul((mean := Mean), factor)))"
}


def layers() -> Patterns:
    """Patterns with the mean subtracted, by what is left to do with the normalized x."""
    return Patterns({**_FORMS, **_MOVED}, {**_LAYER, **_QUOTIENT})


def squares() -> Patterns:
    """Patterns without a mean, by what is left to do with the normalized x."""
    return Patterns(_FORMS, {**_SQUARE, **_QUOTIENT})


@dataclass(frozen=True)
class Pieces:
    """A normalization that was found: of `source` along axes that are counted from the front, in order."""

    match: Match
    source: ir.Value
    axes: tuple[int, ...]
    epsilon: float

    @property
    def rank(self) -> int:
        """The number of axes of the source."""
        assert self.source.shape is not None
        return len(self.source.shape)

    def constant(self, edit: Edit, number: float, sizes: Sequence[int]) -> ir.Value:
        """A constant that is this number everywhere, in the type of the source."""
        assert self.source.dtype is not None
        return edit.constant(np.full(sizes, number, self.source.dtype.numpy()), "scale" if number else "bias")

    def operator(self, edit: Edit, op_type: str) -> ir.Value:
        """The normalized source by a LayerNormalization or RMSNormalization.

        They go along the last axes. One that is not the last is brought there, and back.

        Raises:
            Declined: the size of a normalized axis is not known, or several are not the last.
        """
        others = [axis for axis in range(self.rank) if axis not in self.axes]
        order, moved = [*others, *self.axes], self.axes[-1] != self.rank - 1
        if len(self.axes) > 1 and order != sorted(order):
            raise Declined("it goes along several axes that are not the last")
        ones = self.constant(edit, 1, self._sizes)
        source = edit.op("Transpose", (self.source,), {"perm": order}) if moved else self.source
        attributes = {"axis": -len(self.axes), "epsilon": self.epsilon}
        normal = edit.op(op_type, (source, ones), attributes)
        back = [order.index(axis) for axis in range(self.rank)]
        return edit.op("Transpose", (normal,), {"perm": back}) if moved else normal

    @property
    def _sizes(self) -> tuple[int, ...]:
        assert self.source.shape is not None
        sizes = [self.source.shape[axis] for axis in self.axes]
        if not all(isinstance(size, int) for size in sizes):
            raise Declined("the size of a normalized axis is not known")
        return tuple(size for size in sizes if isinstance(size, int))

    def rest(self, edit: Edit, normal: ir.Value) -> ir.Value:
        """What is left to do with the normalized value."""
        values = {**self.match.values, "x": normal}
        return replace(self.match, values=values).build(edit, self.match.name)


def pieces_of(match: Match) -> Pieces:
    """The normalization that a match of these patterns is.

    Raises:
        Declined: its axes are not known, or its type is one of which the operators know less.
    """
    source = match["x"]
    if source.dtype not in FLOATS:
        raise Declined("its type is unknown" if source.dtype is None else f"its type is {source.dtype.name}")
    return Pieces(match, source, common_axes(match, source, _operands(match)), match.number("epsilon"))


def _operands(match: Match) -> Iterator[ir.Value | None]:
    """What meets x, or the epsilon, element by element."""
    for node in match.nodes:
        if node.op_type == "Sub" and node.inputs[0] is match["x"]:
            yield node.inputs[1]
        elif node.op_type == "Add" and match["epsilon"] in node.inputs:
            yield from (value for value in node.inputs if value is not match["epsilon"])
    if "mean" in match.values:
        yield match["mean"]


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
