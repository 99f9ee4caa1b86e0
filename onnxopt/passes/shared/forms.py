"""New nodes in the form that the opset takes: a list that was an attribute, and is an input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.rewrite import AttributeValue, Edit

__all__ = ["split", "with_axes"]

_SINCE = {"ReduceMean": 18, "ReduceSum": 13, "Split": 13, "Squeeze": 13, "Unsqueeze": 13}
"""Operator -> the opset that made its list an input."""


def with_axes(
    edit: Edit,
    op_type: str,
    value: ir.Value | None,
    axes: Sequence[int],
    opset: int,
    attributes: Mapping[str, AttributeValue] | None = None,
) -> ir.Value:
    """A Squeeze, Unsqueeze or reduction along axes; its output."""
    return _with_list(edit, op_type, value, "axes", axes, opset, attributes or {}, 1)[0]


def split(
    edit: Edit, value: ir.Value | None, sizes: Sequence[int], axis: int, opset: int
) -> Sequence[ir.Value]:
    """A Split into parts of these sizes; the parts."""
    return _with_list(edit, "Split", value, "split", sizes, opset, {"axis": axis}, len(sizes))


def _with_list(
    edit: Edit,
    op_type: str,
    value: ir.Value | None,
    name: str,
    numbers: Sequence[int],
    opset: int,
    attributes: Mapping[str, AttributeValue],
    outputs: int,
) -> Sequence[ir.Value]:
    if opset < _SINCE[op_type]:
        return edit.ops(op_type, (value,), {**attributes, name: tuple(numbers)}, outputs=outputs)
    given = edit.constant(np.array(numbers, np.int64), name)
    return edit.ops(op_type, (value, given), attributes, outputs=outputs)
