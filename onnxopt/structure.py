"""Is the model still a model? Checked after each pass, where it changed; and the contract with its user.

The contract: graph inputs and outputs keep their names, order, types and shapes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxopt.graph import nested, nodes, roots, subgraphs_of
from onnxopt.inference import REMEMBERED, Form, Type, form_of, infer_outputs
from onnxopt.protobuf import skeleton

__all__ = ["Signature", "all_problems", "checker_complaint", "find_problem", "signature_of"]


_UNDEFINED = ir.DataType.UNDEFINED


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
        yield from _walk(root, {None}, {})
    if model.ir_version < 4:
        inputs = set(model.graph.inputs)
        for value in model.graph.initializers.values():
            if value not in inputs:
                asks = f"as IR version {model.ir_version} asks"
                yield f"initializer {value.name!r} is no graph input, {asks}"
    opsets: dict[ir.Graph, Mapping[str, int]] = {root: root.opset_imports for root in roots(model)}
    for node in touched:
        if isinstance(node.graph, ir.Graph) and node.graph not in opsets:
            opsets.update((graph, root.opset_imports) for root in roots(model) for graph in nested(root))
        if isinstance(node.graph, ir.Graph) and node.graph in opsets:
            complaint = _node_problem(node, opsets[node.graph], model.ir_version)
            if complaint:
                yield complaint


def _walk(graph: ir.Graph, defined: set[ir.Value | None], names: dict[str, ir.Value]) -> Iterator[str]:
    """Problems of a graph, and of those nested in it.

    Args:
        graph: to walk.
        defined: None, and the values that may be read where the graph stands; its own are added.
        names: what those are called; likewise.
    """
    for ports in (graph.inputs, graph.initializers.data.values()):
        defined.update(ports)
        yield from _misnamed(ports, names)
    for node in graph:
        if not defined.issuperset(node.inputs):
            yield from _undefined(node, defined)
        for body in subgraphs_of(node):
            yield from _walk(body, defined, names)
            _forget(body, defined, names)
        defined.update(node.outputs)
        for value in node.outputs:
            name = value.name
            if not name or names.setdefault(name, value) is not value:
                yield from _misnamed([value], names)
    for output in graph.outputs:
        if output not in defined:
            yield f"graph output {output.name!r} is defined nowhere"
        elif not output.name:
            yield "a graph output has no name"


def _forget(body: ir.Graph, defined: set[ir.Value | None], names: dict[str, ir.Value]) -> None:
    """Take out the values of a graph: those beside it do not see them."""
    outputs = (value for node in body for value in node.outputs)
    for value in (*body.inputs, *body.initializers.values(), *outputs):
        defined.discard(value)
        if value.name and names.get(value.name) is value:
            del names[value.name]


def _undefined(node: ir.Node, defined: set[ir.Value | None]) -> Iterator[str]:
    for value in node.inputs:
        if value is not None and value not in defined:
            who = f"node {node.name!r} ({node.op_type})"
            yield f"{who} reads {value.name!r}, which nothing before it defines"


def _misnamed(values: Iterable[ir.Value], names: dict[str, ir.Value]) -> Iterator[str]:
    for value in values:
        if value.name:
            if names.setdefault(value.name, value) is not value:
                yield f"two values are named {value.name!r}"
        elif (node := value.producer()) is not None and (value.uses() or value.is_graph_output()):
            yield f"an output of node {node.name!r} ({node.op_type}) is read and has no name"


def _node_problem(node: ir.Node, opsets: Mapping[str, int], ir_version: int) -> str | None:
    """Hold one node against its schema, and its outputs against what the schema infers."""
    version, form = opsets.get(node.domain), form_of(node, opsets)
    if version is None or form is None:
        return None
    if not onnx.defs.has(node.op_type, version, node.domain):
        known = onnx.defs.has(node.op_type, node.domain)
        return f"{node.op_type} is not in opset {version}" if known else None
    if node.op_type == "Constant":
        return None
    try:
        _check(form, ir_version)
        inferred = infer_outputs(node, form)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return f"node {node.name!r} ({node.op_type}): {' '.join(str(error).split())}"
    for value, found in inferred.items():
        if clash := _clash(value, found):
            return f"node {node.name!r} ({node.op_type}): {value.name!r} {clash}"
    return None


@functools.lru_cache(maxsize=REMEMBERED)
def _check(form: Form, ir_version: int) -> None:
    """Raise `onnx.checker.ValidationError` where a node of this form is none of its operator."""
    context = onnx.checker.C.CheckerContext()
    context.ir_version = ir_version
    context.opset_imports = dict(form.opsets)
    onnx.checker.check_node(form.node(), context)


def _clash(value: ir.Value, inferred: Type) -> str | None:
    """How an inferred type contradicts the one on record, or None."""
    if isinstance(inferred, bytes) or not isinstance(value.type, ir.TensorType):
        return None
    dtype, sizes = inferred
    if dtype not in (_UNDEFINED, value.type.dtype):
        return f"is {value.type.dtype.name} on record, {dtype.name} by its operator"
    if value.shape is None or sizes is None:
        return None
    if len(sizes) != len(value.shape):
        return f"has rank {len(value.shape)} on record, {len(sizes)} by its operator"
    for axis, (on_record, size) in enumerate(zip(value.shape.dims, sizes, strict=True)):
        if isinstance(on_record, int) and isinstance(size, int) and size != on_record:
            return f"has size {on_record} on axis {axis} on record, {size} by its operator"
    return None


def checker_complaint(model: ir.Model) -> str | None:
    """What `onnx.checker` says of the model without its large weights, in one line; None if it passes."""
    try:
        onnx.checker.check_model(skeleton(model))
    except onnx.checker.ValidationError as error:
        return " ".join(str(error).split())
    return None
