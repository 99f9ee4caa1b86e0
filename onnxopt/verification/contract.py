"""What a model promises its users, read from the graph alone, and what a rewrite broke of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import onnx_ir as ir

from onnxopt.graph import constant_of, nodes, subgraphs_of, walk

__all__ = ["Contract", "Port"]

_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_QUANTIZERS = frozenset({"QuantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger"})


@dataclass(frozen=True)
class Port:
    """A graph input or output as declared: a symbol or None is a dynamic axis, no shape an unknown rank."""

    name: str
    type: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Contract:
    """Names, types and declared shapes; `overridable` are initializers that are also graph inputs.

    `dependent` are the outputs that some graph input reaches (through its shape only counts where that shape
    is dynamic); `quantized` says that activations are rounded to integers on the way, `half` that some are of
    16 bits, around which ONNX Runtime's CPU provider puts Casts as it sees fit.
    """

    inputs: tuple[Port, ...]
    overridable: tuple[Port, ...]
    outputs: tuple[Port, ...]
    dependent: frozenset[str]
    quantized: bool
    half: bool

    @classmethod
    def of(cls, model: ir.Model) -> Self:
        graph = model.graph
        overridable = [value for value in graph.inputs if value.name in graph.initializers]
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        return cls(
            tuple(map(_port, inputs)),
            tuple(map(_port, overridable)),
            tuple(map(_port, graph.outputs)),
            _dependent(graph, inputs),
            any(map(_rounds_activations, nodes(model))),
            any(
                value.dtype in _HALF
                for node in nodes(model)
                for value in (*node.inputs, *node.outputs)
                if value
            ),
        )

    def broken_by(self, after: Contract, *, frozen: bool) -> list[str]:
        """Each way in which `after` no longer serves a user of this; `frozen` allows lost overridables."""
        broken = []
        for what, mine, theirs in (
            ("inputs", self.inputs, after.inputs),
            ("outputs", self.outputs, after.outputs),
        ):
            if [port.name for port in mine] != [port.name for port in theirs]:
                broken.append(f"{what} {_names(mine)} became {_names(theirs)}")
                continue
            for port, other in zip(mine, theirs, strict=True):
                broken.extend(_contradictions(what[:-1], port, other))
        if not frozen:
            kept = {port.name for port in after.overridable}
            lost = [port for port in self.overridable if port.name not in kept]
            if lost:
                broken.append(f"initializers that could be overridden no longer can: {_names(lost)}")
        return broken


def _port(value: ir.Value) -> Port:
    dims = None
    if value.shape is not None:
        dims = tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)
    return Port(value.name or "", str(value.type), dims)


def _names(ports: list[Port] | tuple[Port, ...]) -> str:
    shown = ", ".join(port.name for port in ports[:5])
    return f"({shown})" if len(ports) <= 5 else f"({shown}, ... {len(ports)} in all)"


def _contradictions(what: str, mine: Port, theirs: Port) -> list[str]:
    if mine.type != theirs.type:
        return [f"{what} {mine.name!r}: type {mine.type} became {theirs.type}"]
    if mine.shape is None or theirs.shape is None:
        return []
    if len(mine.shape) != len(theirs.shape):
        return [f"{what} {mine.name!r}: rank {len(mine.shape)} became {len(theirs.shape)}"]
    for axis, (old, new) in enumerate(zip(mine.shape, theirs.shape, strict=True)):
        narrowed = what == "input" and not _fixed(old) and _fixed(new)
        if narrowed or (_fixed(old) and _fixed(new) and old != new):
            return [f"{what} {mine.name!r}: axis {axis} was {old} and became {new}"]
    return []


def _fixed(dim: int | str | None) -> bool:
    """Some exporters write -1 for a dynamic axis."""
    return isinstance(dim, int) and dim >= 0


def _dependent(graph: ir.Graph, inputs: list[ir.Value]) -> frozenset[str]:
    """The graph outputs that an input reaches; overridable initializers count as constants here."""
    reached = set(inputs)
    sizes_vary = any(port.shape is None or not all(map(_fixed, port.shape)) for port in map(_port, inputs))
    for node in graph:
        if node.op_type in ("Shape", "Size") and not node.domain and not sizes_vary:
            continue
        if any(value in reached for value in _read(node)):
            reached.update(node.outputs)
    return frozenset(value.name or "" for value in graph.outputs if value in reached)


def _read(node: ir.Node) -> set[ir.Value | None]:
    """What a node reads, its subgraphs included: values of outer graphs are the same objects there."""
    found = set(node.inputs)
    for graph in subgraphs_of(node):
        for inner in walk(graph):
            found.update(inner.inputs)
        found.update(graph.outputs)
    return found


def _rounds_activations(node: ir.Node) -> bool:
    if node.op_type not in _QUANTIZERS and not node.op_type.startswith("QLinear"):
        return False
    return constant_of(node.inputs[0]) is None
