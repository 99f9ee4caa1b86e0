"""Rows of recurrent cells with the same weights, as one recurrent operator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import onnx_ir as ir

from onnxopt.graph import nested
from onnxopt.ledger import Ledger
from onnxopt.passes.shared.forms import split, with_axes
from onnxopt.passes.shared.parts import readers_of, sequence_of, stack_of
from onnxopt.passes.shared.weight import rounded
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule, visit
from onnxopt.scope import Scope, scopes

__all__ = ["Cell", "Rows", "fuse_cells"]


@dataclass(frozen=True)
class Cell:
    """One step: from an input and the states before it to the states after it.

    states, results: the hidden state, then the cell state of an LSTM. w, r, b: `[1, gates * H, I]`,
    `[1, gates * H, H]` and `[1, 2 * gates * H]`, in float64, as the operator takes them. anchor: a node that
    needs the input and the states, and that the results need. nodes: all of the step.
    """

    x: ir.Value
    states: tuple[ir.Value, ...]
    results: tuple[ir.Value, ...]
    w: np.ndarray
    r: np.ndarray
    b: np.ndarray
    anchor: ir.Node
    nodes: tuple[ir.Node, ...]
    linear_before_reset: int = 0

    def follows(self, other: Cell) -> bool:
        """Whether it is the step after another."""
        pairs = ((self.w, other.w), (self.r, other.r), (self.b, other.b))
        same = self.linear_before_reset == other.linear_before_reset
        return same and self.states == other.results and all(np.array_equal(*pair) for pair in pairs)


Rows = Mapping[ir.Value, Sequence[Cell]]
"""The rows of cells so far, by the hidden state that they end with."""

Find = Callable[[ir.Node, Scope, Rows], Cell | None]
"""The cell that a node is the anchor of, if one is; it is given the rows before it."""


def fuse_cells(model: ir.Model, ledger: Ledger, op_type: str, find: Find, steps: int) -> None:
    """Make one operator of each row of at least `steps` cells."""
    for scope in scopes(model):
        for graph in (scope.graph, *nested(scope.graph)):
            for row in reversed(_rows(graph, find, scope)):  # what a row reads is replaced after it
                if len(row) >= steps:
                    rule = Rule(f"{op_type} in pieces", (), partial(_fused, row, op_type))
                    visit(row[-1].anchor, (rule,), scope, ledger)


def _rows(graph: ir.Graph, find: Find, scope: Scope) -> list[list[Cell]]:
    """The cells, those together that are steps after each other."""
    rows: list[list[Cell]] = []
    ends: dict[ir.Value, list[Cell]] = {}
    for node in graph:
        try:
            cell = find(node, scope, ends)
        except Declined:
            continue  # a pattern that others read into is no cell
        if cell is None:
            continue
        row = ends.pop(cell.states[0], [])
        if not row or not cell.follows(row[-1]):
            row = []
            rows.append(row)
        row.append(cell)
        ends[cell.results[0]] = row
    return rows


def _fused(row: Sequence[Cell], op_type: str, _node: ir.Node, scope: Scope) -> Edit:
    inside = {node for cell in row for node in cell.nodes}
    given = {row[-1].results[-1], *(cell.results[0] for cell in row)}
    values = (value for cell in row for node in cell.nodes for value in node.outputs)
    if any(value not in given and readers_of(value, inside) for value in values):
        raise Declined("a value inside the cell is read elsewhere")
    first, in_time, attributes = row[0], row, dict[str, AttributeValue]()
    _require_shapes(first, 4 if op_type == "LSTM" else 3)
    edit = Edit(first.anchor, scope)
    if len(row) == 1:
        x = with_axes(edit, "Unsqueeze", first.x, (0,), scope.opset)
    else:
        x, axis, backwards = sequence_of([cell.x for cell in row])
        if axis == 1:
            x = edit.op("Transpose", [x], {"perm": (1, 0, 2)})
        if backwards:
            in_time, attributes["direction"] = row[::-1], "reverse"
    dtype = first.x.dtype
    if dtype is None:
        raise Declined("the type of the input is unknown")
    weights = [edit.constant(rounded(getattr(first, name), dtype), name.upper()) for name in "wrb"]
    states = [with_axes(edit, "Unsqueeze", state, (0,), scope.opset) for state in first.states]
    attributes["hidden_size"] = first.r.shape[2]
    if first.linear_before_reset:
        attributes["linear_before_reset"] = 1
    every, *ends = edit.ops(op_type, [x, *weights, None, *states], attributes, outputs=1 + len(states))
    if not _replace_steps(edit, every, in_time, inside, scope):
        edit.replace(row[-1].results[0], with_axes(edit, "Squeeze", ends[0], (0,), scope.opset))
    for old, end in zip(row[-1].results[1:], ends[1:], strict=True):
        edit.replace(old, with_axes(edit, "Squeeze", end, (0,), scope.opset))
    return edit


def _require_shapes(cell: Cell, gates: int) -> None:
    """Raise Declined where a step may broadcast, or is of a type that runtimes have no kernel for."""
    _, rows, hidden = cell.r.shape
    batch = cell.x.shape.dims[0] if cell.x.shape is not None else None
    known = isinstance(batch, int) or (batch is not None and batch.value is not None)
    fits = (value.shape is not None and value.shape.dims == (batch, hidden) for value in cell.states)
    if not known or rows != gates * hidden or not all(fits):
        raise Declined("the states are not known to be as large as the step")
    if cell.x.dtype == ir.DataType.DOUBLE:
        raise Declined("the runtime has no kernel for double")


def _replace_steps(
    edit: Edit, every: ir.Value, in_time: Sequence[Cell], inside: Collection[ir.Node], scope: Scope
) -> bool:
    """Let those that read hidden states read `[T, 1, N, H]`; False where only the last one is left to do."""
    hidden = [cell.results[0] for cell in in_time]
    read = [readers_of(value, inside) for value in hidden]
    last = 0 if len(hidden) > 1 and in_time[0].states[0] is hidden[1] else len(hidden) - 1
    middle = [readers for step, readers in enumerate(read) if step != last]
    if not any(middle):
        return False
    steps = with_axes(edit, "Squeeze", every, (1,), scope.opset)
    concat, axis = stack_of(hidden, inside)
    if concat is not None and all(len(readers) == 1 for readers in middle):
        steps = edit.op("Transpose", [steps], {"perm": (1, 0, 2)}) if axis == 1 else steps
        edit.replace(concat.outputs[0], steps)
        return False
    parts = split(edit, steps, (1,) * len(hidden), 0, scope.opset)
    for value, readers, part in zip(hidden, read, parts, strict=True):
        if readers:
            edit.replace(value, with_axes(edit, "Squeeze", part, (0,), scope.opset))
    return True
