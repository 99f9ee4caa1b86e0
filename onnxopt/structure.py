"""Is the model still a model? Checked after each pass, where it changed; and the contract with its user.

The contract: graph inputs and outputs keep their names, order, types and shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxopt.graph import has_reference, nested, nodes, roots, subgraphs_of
from onnxopt.inference import infer_outputs
from onnxopt.protobuf import skeleton

__all__ = ["Signature", "all_problems", "checker_complaint", "find_problem", "signature_of"]


@dataclass(frozen=True)
class Port:
    """A graph input or output: its name, type and shape as text."""

    name: str
    type: str
    shape: str


@dataclass(frozen=True)
class Signature:
    """What the user of a model relies on."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


def signature_of(model: ir.Model) -> Signature:
    """The graph inputs and outputs, in order."""

    def ports(values: Iterable[ir.Value]) -> tuple[Port, ...]:
        return tuple(Port(v.name or "", str(v.type), str(v.shape)) for v in values)

    return Signature(ports(model.graph.inputs), ports(model.graph.outputs))


def find_problem(
    model: ir.Model, touched: Iterable[ir.Node] = (), tolerated: Callable[[], Container[str]] = tuple
) -> str | None:
    """The first thing that makes the graph invalid, as a sentence; None if all is well.

    The whole graph is walked for dangling values, order and single assignment; `touched` nodes are
    also held against their operator's schema, types and shapes. `tolerated` gives sentences that do
    not count; it is called only where there is one.
    """
    return next((problem for problem in _problems(model, touched) if problem not in tolerated()), None)


def all_problems(model: ir.Model) -> frozenset[str]:
    """Everything that `find_problem` would say of a model and of all its nodes."""
    return frozenset(_problems(model, nodes(model)))


def _problems(model: ir.Model, touched: Iterable[ir.Node]) -> Iterator[str]:
    for root in roots(model):
        yield from _walk(root, _Scopes())
    if model.ir_version < 4:
        inputs = set(model.graph.inputs)
        for value in model.graph.initializers.values():
            if value not in inputs:
                asks = f"as IR version {model.ir_version} asks"
                yield f"initializer {value.name!r} is no graph input, {asks}"
    opsets = {graph: root.opset_imports for root in roots(model) for graph in (root, *nested(root))}
    for node in touched:
        if isinstance(node.graph, ir.Graph) and node.graph in opsets:
            complaint = _node_problem(node, opsets[node.graph], model.ir_version)
            if complaint:
                yield complaint


class _Scopes:
    """The values that may be read at a place in the graph, and the names that are taken there."""

    def __init__(self) -> None:
        self._values: set[ir.Value] = set()
        self._names: dict[str, ir.Value] = {}

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._values

    def define(self, value: ir.Value) -> str | None:
        """Add a value; what is wrong with it."""
        if (
            value not in self._values
            and value.name
            and self._names.setdefault(value.name, value) is not value
        ):
            return f"two values are named {value.name!r}"
        self._values.add(value)
        return None

    def forget(self, values: Iterable[ir.Value]) -> None:
        """Leave the graph that defined these."""
        for value in values:
            self._values.discard(value)
            if value.name and self._names.get(value.name) is value:
                del self._names[value.name]


def _walk(graph: ir.Graph, scopes: _Scopes) -> Iterator[str]:
    """Problems of a graph; `scopes` holds what the graphs around it have defined so far."""
    own = dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    yield from filter(None, map(scopes.define, own))
    for node in graph:
        for value in node.inputs:
            if value is not None and value not in scopes:
                who = f"node {node.name!r} ({node.op_type})"
                yield f"{who} reads {value.name!r}, which nothing before it defines"
        for body in subgraphs_of(node):
            yield from _walk(body, scopes)
        yield from filter(None, map(scopes.define, node.outputs))
        if any(not v.name and (v.uses() or v.is_graph_output()) for v in node.outputs):
            yield f"an output of node {node.name!r} ({node.op_type}) is read and has no name"
        own.update(dict.fromkeys(node.outputs))
    for output in graph.outputs:
        if output not in scopes:
            yield f"graph output {output.name!r} is defined nowhere"
        elif not output.name:
            yield "a graph output has no name"
    scopes.forget(own)


def _node_problem(node: ir.Node, opsets: Mapping[str, int], ir_version: int) -> str | None:
    """Hold one node against its schema, and its outputs against what the schema infers."""
    version = opsets.get(node.domain)
    if version is None or has_reference(node) or any(True for _ in subgraphs_of(node)):
        return None
    if not onnx.defs.has(node.op_type, version, node.domain):
        known = onnx.defs.has(node.op_type, node.domain)
        return f"{node.op_type} is not in opset {version}" if known else None
    if node.op_type == "Constant":
        return None
    context = onnx.checker.C.CheckerContext()
    context.ir_version = ir_version
    context.opset_imports = dict(opsets)
    try:
        onnx.checker.check_node(ir.serde.serialize_node(node), context)
        inferred = infer_outputs(node, opsets)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"node {node.name!r} ({node.op_type}): {' '.join(str(error).split())}"
    for value in node.outputs:
        if value.name in inferred and (clash := _clash(value, inferred[value.name])):
            return f"node {node.name!r} ({node.op_type}): {value.name!r} {clash}"
    return None


def _clash(value: ir.Value, inferred: onnx.TypeProto) -> str | None:
    """How an inferred type contradicts the one on record, or None."""
    if not inferred.HasField("tensor_type") or not isinstance(value.type, ir.TensorType):
        return None
    found = inferred.tensor_type
    if found.elem_type and found.elem_type != value.type.dtype.value:
        return f"is {value.type.dtype.name} on record, {ir.DataType(found.elem_type).name} by its operator"
    if value.shape is None or not found.HasField("shape"):
        return None
    if len(found.shape.dim) != len(value.shape):
        return f"has rank {len(value.shape)} on record, {len(found.shape.dim)} by its operator"
    for axis, (on_record, dim) in enumerate(zip(value.shape.dims, found.shape.dim, strict=True)):
        if isinstance(on_record, int) and dim.HasField("dim_value") and dim.dim_value != on_record:
            return f"has size {on_record} on axis {axis} on record, {dim.dim_value} by its operator"
    return None


def checker_complaint(model: ir.Model) -> str | None:
    """What `onnx.checker` says of the model without its large weights, in one line; None if it passes."""
    try:
        onnx.checker.check_model(skeleton(model))
    except onnx.checker.ValidationError as error:
        return " ".join(str(error).split())
    return None
