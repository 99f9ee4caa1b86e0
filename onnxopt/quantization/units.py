"""The nodes that a target has integer kernels for, and why the others stay in floating point.

A unit is such a node together with the Relu or Clip behind it, which a quantized range makes superfluous:
numbers below zero point or above the largest integer saturate.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.graph import (
    constant_array,
    constant_of,
    has_reference,
    int_attr,
    nodes,
    sizes_of,
    sole_user,
)
from onnxopt.ledger import site_of
from onnxopt.quantization.objections import OVERRIDABLE, objection_to
from onnxopt.targets import Placement

__all__ = ["HEAVY", "LAYERS", "MOVES", "Survey", "Unit", "survey"]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators that multiply and add, which is where integers save time."""

MOVES = (
    "DepthToSpace",
    "Expand",
    "Flatten",
    "Gather",
    "MaxPool",
    "Reshape",
    "Resize",
    "Slice",
    "Squeeze",
    "Tile",
    "Transpose",
    "Unsqueeze",
)
"""Operators whose output holds numbers of their first input alone: both sides have one scale."""

_RECURRENT = ("GRU", "LSTM", "RNN")
HEAVY = frozenset((*LAYERS, *_RECURRENT, "Attention", "Einsum", "DeformConv", "FusedMatMul"))
"""Operators that a user expects to be quantized: where they are not, that is said."""


@dataclass(frozen=True, eq=False)
class Unit:
    """A node that can become an integer kernel.

    reads: the positions of its computed float operands. weight: that of a constant operand. output: what it
    writes, behind the Relu or Clip where there is one. others: positions of further constants, of a Concat.
    layer: where only the residual of an Add is quantized, the layer that it becomes one kernel with.
    """

    node: ir.Node
    reads: tuple[int, ...]
    weight: int | None
    output: ir.Value
    others: tuple[int, ...] = ()
    layer: ir.Node | None = None

    @property
    def site(self) -> str:
        """What it is called in plans and reports: its first output."""
        return self.node.outputs[0].name or ""

    @property
    def is_move(self) -> bool:
        """Whether it only moves numbers, so that input and output have one scale."""
        return self.node.op_type in MOVES

    @property
    def is_layer(self) -> bool:
        """Whether it multiplies and adds."""
        return self.node.op_type in LAYERS

    @property
    def sources(self) -> tuple[ir.Value, ...]:
        """The computed float operands."""
        return tuple(value for place in self.reads if (value := self.node.inputs[place]) is not None)

    @property
    def bias(self) -> ir.Value | None:
        """The bias of a layer."""
        has_bias = self.node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(self.node.inputs) > 2
        return self.node.inputs[2] if has_bias else None


@dataclass(frozen=True)
class Survey:
    """The units of a model in the order of its nodes, and reason -> the heavy nodes left for it."""

    units: tuple[Unit, ...]
    left: Mapping[str, tuple[str, ...]]


def survey(model: ir.Model, placement: Placement, measured: Container[str]) -> Survey:
    """What of a model can be quantized for a target.

    Args:
        model: shapes inferred as far as can be.
        placement: what the target takes.
        measured: names of tensors whose ranges are known.
    """
    units: list[Unit] = []
    layers: dict[ir.Node | None, int] = {}
    left: dict[str, list[str]] = {}
    sizes = _sizes(model.graph)
    for node in nodes(model):
        reason = _reason(node, model.graph, placement, measured)
        if reason is None and node.outputs[0] in sizes:
            reason = "it computes sizes"
        if reason is None:
            layers[node] = len(units)
            units.append(_unit(node))
        elif (sum_ := _with_residual(node, layers, placement, measured)) is not None:
            units.append(sum_)
        elif node.op_type in HEAVY:
            left.setdefault(f"{node.op_type}: {reason}", []).append(site_of(node))
    return Survey(tuple(units), {reason: tuple(sites) for reason, sites in left.items()})


def _unit(node: ir.Node) -> Unit:
    constants = [place for place in _operands(node) if constant_of(node.inputs[place]) is not None]
    reads = tuple(place for place in _operands(node) if place not in constants)
    weight = constants[0] if constants else None
    return Unit(node, reads, weight, _tail(node), others=tuple(constants[1:]))


def _sizes(graph: ir.Graph) -> dict[ir.Value, None]:
    """What is computed from sizes of tensors alone, which decide over shapes and must stay exact."""
    found: dict[ir.Value, None] = {}
    for node in graph:
        computed = [value for value in node.inputs if value is not None and constant_of(value) is None]
        if node.op_type in ("Shape", "Size") or (computed and all(value in found for value in computed)):
            found.update(dict.fromkeys(node.outputs))
    return found


def _with_residual(
    node: ir.Node, layers: Mapping[ir.Node | None, int], placement: Placement, measured: Container[str]
) -> Unit | None:
    """An Add behind a layer, where the target wants its other operand quantized.

    Of two layers the one that runs last becomes one kernel with the Add.
    """
    if not placement.residual or node.domain != "" or node.op_type != "Add":
        return None
    values = [value for value in node.inputs if value is not None and constant_of(value) is None]
    runs = [layers.get(value.producer(), -1) for value in values]
    if len(dict.fromkeys(values)) < 2 or max(runs) < 0:
        return None
    other = runs.index(min(runs))
    known = all(
        v.name in measured and v.dtype in (ir.DataType.FLOAT, None) for v in (values[other], node.outputs[0])
    )
    return Unit(node, (other,), None, node.outputs[0], layer=values[1 - other].producer()) if known else None


def _narrow(node: ir.Node, fewest: int) -> str | None:
    """Where a target wants layers to have some channels, at least: what of a layer is too narrow."""
    if not fewest or node.op_type not in LAYERS:
        return None
    if node.op_type in ("Gemm", "MatMul"):
        shape = node.outputs[0].shape
        single = shape is not None and any(size == 1 for size in shape[-2:])
        return (
            "it gives a single row or column, for which the target has no fast integers" if single else None
        )
    weight = constant_of(node.inputs[1])
    first, second = sizes_of(weight)[:2] if weight is not None else (fewest, fewest)
    few = min(first, second * int_attr(node, "group", 1)) < fewest
    return f"it has fewer than {fewest} channels, for which the target has no fast integers" if few else None


def _operands(node: ir.Node) -> tuple[int, ...]:
    """The positions of a node's float operands, constants included."""
    if node.op_type in LAYERS:
        return (0, 1)
    if node.op_type in MOVES or len(node.inputs) == 1:
        return (0,)
    return tuple(range(len(node.inputs)))


def _tail(node: ir.Node) -> ir.Value:
    value = node.outputs[0]
    user = sole_user(value) if node.op_type not in MOVES else None
    limits = user is not None and user.domain == "" and user.inputs[0] is value and _starts_at_zero(user)
    return user.outputs[0] if limits and user is not None else value


def _starts_at_zero(node: ir.Node) -> bool:
    if node.op_type != "Clip":
        return node.op_type == "Relu"
    low = constant_array(node.inputs[1], 64) if len(node.inputs) > 1 else None
    return low is not None and low.size == 1 and float(low.reshape(-1)[0]) == 0


def _reason(node: ir.Node, main: ir.Graph, placement: Placement, measured: Container[str]) -> str | None:
    """Why a node stays in floating point; None where it can be quantized."""
    if node.domain != "" or node.op_type not in placement.operators:
        return "the target has no integer kernel for it"
    if node.graph is not main:
        return "it is in a body or function, whose values are not calibrated"
    if has_reference(node) or len(node.outputs) != 1:
        return "its attributes or outputs are not all known"
    refused = objection_to(node) or _narrow(node, placement.narrow)
    if refused is not None:
        return refused
    computed = [node.inputs[p] for p in _operands(node) if constant_of(node.inputs[p]) is None]
    if not computed:
        return "its operands are constants"
    for value in computed:
        if value is None:
            return "an operand is missing"
        if value.is_initializer():
            return OVERRIDABLE.format("weight")
        if node.op_type in ("Conv", "ConvTranspose") and value is node.inputs[1]:
            return "its weight is computed at run time"
        if value.dtype is not None and value.dtype != ir.DataType.FLOAT:
            return f"its operands are of type {value.dtype.name}"
        if value.name not in measured:
            return "an operand has no known range (it was never finite)"
    return None if _tail(node).name in measured else "its output has no known range"
