"""Reductions as parts of a pattern: along which axes, and whether what follows sees the axes kept."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import onnx_ir as ir

from onnxopt.graph import constant_array, int_attr
from onnxopt.passes.shared.chain import axes_of, normalised
from onnxopt.pattern import Match
from onnxopt.rewrite import Declined

__all__ = ["common_axes", "kept"]


def kept(text: str) -> str:
    """The pattern of a reduction whose axes are kept, or put back by a Reshape or Unsqueeze."""
    return f"({text} | Reshape({text}, ...) | Unsqueeze({text}, ...))"


def common_axes(match: Match, source: ir.Value, operands: Iterable[ir.Value | None]) -> tuple[int, ...]:
    """The axes along which all reductions of a match go, counted from the front.

    Args:
        match: what was found.
        source: what is reduced.
        operands: values of the match that meet the source, or one of its shape, element by element.

    Raises:
        Declined: the axes differ or are not known, or an operand has not the source's shape with ones there.
    """
    rank = len(source.shape) if source.shape is not None else None
    reductions = [node for node in match.nodes if node.op_type.startswith("Reduce")]
    found = set()
    for node in reductions:
        axes = axes_of(node)
        if not axes:
            raise Declined("a reduction goes along all axes")
        found.add(tuple(sorted(normalised(axes, rank))))
    if rank is None:
        raise Declined("its number of axes is not known")
    if len(found) > 1:
        raise Declined("its reductions go along different axes")
    axes = found.pop()
    if all(int_attr(node, "keepdims", 1) for node in reductions) and not _reshapes(match):
        return axes
    if not all(_has_ones(operand, source, axes) for operand in operands):
        raise Declined("a reduction drops its axes, and what follows is not known to put them back")
    return axes


def _reshapes(match: Match) -> bool:
    return any(node.op_type in ("Reshape", "Unsqueeze") for node in match.nodes)


def _has_ones(value: ir.Value | None, source: ir.Value, axes: Sequence[int]) -> bool:
    """Whether the value surely has the shape of the source, with one element along each of the axes."""
    if value is None or source.shape is None:
        return False
    wanted = [1 if axis in axes else size for axis, size in enumerate(source.shape.dims)]
    if value.shape is not None and _same(value.shape.dims, wanted):
        return True
    node = value.producer()
    if node is None or node.op_type != "Reshape" or int_attr(node, "allowzero", 0):
        return False
    sizes = constant_array(node.inputs[1])
    if sizes is None or len(sizes) != len(wanted) or (sizes == -1).sum() > 1:
        return False
    copied = [size == 0 and axis < min(axes) for axis, size in enumerate(sizes)]
    return all(
        size == want or ((copy or size == -1) and axis not in axes)
        for axis, (size, want, copy) in enumerate(zip(sizes, wanted, copied, strict=True))
    )


def _same(have: Sequence[object], wanted: Sequence[object]) -> bool:
    """Whether two shapes are surely the same."""
    known = all(isinstance(one, int) or (isinstance(one, ir.SymbolicDim) and one.value) for one in have)
    return known and list(have) == list(wanted)
