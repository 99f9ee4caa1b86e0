"""The trips of a Loop or Scan as nodes: its body placed for each, and what they give put together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import int_attr, ints_attr, static_shape, walk
from onnxopt.passes.shared.forms import with_axes
from onnxopt.passes.shared.inline import Inliner
from onnxopt.rewrite import Declined, Edit

__all__ = ["empty_stack", "is_one_step", "unroll", "unroll_step"]


def empty_stack(value: ir.Value) -> np.ndarray:
    """What a Loop without trips gives for an output that stacks this value of its body.

    Raises:
        Declined: its shape is not known.
    """
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        raise Declined("no trip, and the shape of a stacked output is not known")
    return np.zeros((0, *shape), value.dtype.numpy())


def unroll(node: ir.Node, trips: int, inliner: Inliner) -> None:
    """Replace a Loop that goes on to the last of its trips."""
    body, carried = node.attributes["body"].as_graph(), list(node.inputs[2:])
    last, rows = len(body.inputs) - 1, list[list[ir.Value | None]]()
    inliner.lift(body)
    for trip in range(trips):
        edit = Edit(node, inliner.scope)
        number = _scalar(edit, np.array(trip, np.int64), body.inputs[0])
        condition = _scalar(edit, np.array(True), body.inputs[1])
        inliner.add(edit, node)
        one = body if trip == trips - 1 else inliner.copy(body)
        _forget_shapes(one, one.inputs[2:], carried)
        outputs = inliner.place(one, node, [number, condition, *carried])
        carried = outputs[1:last]
        rows.append(outputs[last:])
    edit = Edit(node, inliner.scope)
    if trips:
        stacked = [_stack(edit, column, inliner) for column in zip(*rows, strict=True)]
    else:
        stacked = [edit.constant(empty_stack(value), value.name) for value in body.outputs[last:]]
        inliner.drop(body)
    inliner.add(edit, node)
    inliner.finish(node, [*carried, *stacked])


def is_one_step(node: ir.Node, opset: int) -> bool:
    """Whether a Scan goes over axes of size 1; before opset 9 it had a batch axis."""
    _, count = _split(node)
    scanned = zip(node.inputs[-count:], _axes(node, "scan_input_axes", count), strict=True)
    return opset >= 9 and all(
        value is not None and value.shape is not None and value.shape[axis] == 1 for value, axis in scanned
    )


def unroll_step(node: ir.Node, inliner: Inliner) -> None:
    """Replace a Scan of one step."""
    body, (states, count) = node.attributes["body"].as_graph(), _split(node)
    edit = Edit(node, inliner.scope)
    axes = _axes(node, "scan_input_axes", count)
    taken = [
        with_axes(edit, "Squeeze", value, (axis,), inliner.scope.opset)
        for value, axis in zip(node.inputs[states:], axes, strict=True)
    ]
    inliner.add(edit, node)
    inputs = [*node.inputs[:states], *taken]
    _forget_shapes(body, body.inputs, inputs)
    outputs = inliner.place(body, node, inputs)
    edit, axes = Edit(node, inliner.scope), _axes(node, "scan_output_axes", len(outputs) - states)
    given = [
        with_axes(edit, "Unsqueeze", value, (axis,), inliner.scope.opset)
        for value, axis in zip(outputs[states:], axes, strict=True)
    ]
    inliner.add(edit, node)
    inliner.finish(node, [*outputs[:states], *given])


def _split(node: ir.Node) -> tuple[int, int]:
    """How many states a Scan carries, and how many inputs it goes over."""
    count = int_attr(node, "num_scan_inputs", 0)
    return len(node.inputs) - count, count


def _axes(node: ir.Node, name: str, count: int) -> tuple[int, ...]:
    return ints_attr(node, name) or (0,) * count


def _scalar(edit: Edit, array: np.ndarray, formal: ir.Value) -> ir.Value | None:
    """A constant for the trip's number or condition, in the body's rank for it; None if it reads none."""
    if not formal.uses() and not formal.is_graph_output():
        return None
    rank = 0 if formal.shape is None else len(formal.shape)
    return edit.constant(array.reshape((1,) * rank), formal.name)


def _forget_shapes(body: ir.Graph, formals: Sequence[ir.Value], inputs: Sequence[ir.Value | None]) -> None:
    """Give up the shapes on record in a body that may be those of another trip."""
    shapes = [
        (static_shape(formal), static_shape(value)) for formal, value in zip(formals, inputs, strict=True)
    ]
    if any(formal is None or formal != value for formal, value in shapes):
        for value in (value for inner in walk(body) for value in inner.outputs):
            value.shape = None


def _stack(edit: Edit, values: Sequence[ir.Value | None], inliner: Inliner) -> ir.Value:
    """The values of all trips along a new first axis."""
    rows = [with_axes(edit, "Unsqueeze", value, (0,), inliner.scope.opset) for value in values]
    return rows[0] if len(rows) == 1 else edit.op("Concat", rows, {"axis": 0})
