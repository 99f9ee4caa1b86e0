"""Questions and edits that every pass needs; subgraphs and functions are graphs too."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

__all__ = [
    "FLOATS",
    "NONDETERMINISTIC",
    "constant_array",
    "constant_of",
    "detach",
    "domains",
    "float_attr",
    "function_name",
    "graphs",
    "has_reference",
    "int_attr",
    "ints_attr",
    "is_deterministic",
    "nbytes",
    "nested",
    "nodes",
    "read_once",
    "rename_nodes_apart",
    "roots",
    "set_constant",
    "sizes_of",
    "sole_user",
    "static_shape",
    "str_attr",
    "subgraphs_of",
    "tensor_bytes",
    "tensors",
    "tensors_of",
    "use_count",
    "uses_external_data",
    "value_names",
    "walk",
]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
"""The floating-point types that operators compute in; those of 8 bits and less are for storage."""

_GRAPH, _GRAPHS = ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS
_TENSOR, _TENSORS = ir.AttributeType.TENSOR, ir.AttributeType.TENSORS

NONDETERMINISTIC = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)
"""Standard ops that draw random numbers, whatever their inputs; Dropout does so only in training."""


def roots(model: ir.Model) -> Iterator[ir.Graph]:
    """The main graph and the body of each model-local function."""
    yield model.graph
    for function in model.functions.values():
        yield function.graph


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Every graph: the main graph, function bodies, and all graphs nested in their nodes."""
    for root in roots(model):
        yield root
        yield from nested(root)


def nested(graph: ir.Graph) -> Iterator[ir.Graph]:
    """The graphs in the nodes of a graph, and those in theirs."""
    for node in graph:
        if node.attributes.data:
            for body in subgraphs_of(node):
                yield body
                yield from nested(body)


def nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node of every graph, outer nodes before those in their bodies."""
    for root in roots(model):
        yield from walk(root)


def walk(graph: ir.Graph) -> Iterator[ir.Node]:
    """The nodes of a graph and of the graphs nested in them, a node before those in its bodies."""
    for node in graph:
        yield node
        if node.attributes.data:  # the dict inside; this is asked of each node again and again
            for body in subgraphs_of(node):
                yield from walk(body)


def domains(model: ir.Model) -> set[str]:
    """The domains of all operators; that of ONNX's own is empty."""
    return {node.domain for node in nodes(model)}


def function_name(key: tuple[str, str, str]) -> str:
    """A function's domain, name and overload as one text: `my.ops::Twist`."""
    return "::".join(filter(None, key))


def subgraphs_of(node: ir.Node) -> Sequence[ir.Graph]:
    """The graphs that a node holds in its attributes (If, Loop, Scan and the like)."""
    return _held(node, _GRAPH, _GRAPHS)


def tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Every tensor in the model: initializers, then tensor attributes, graph by graph."""
    for graph in graphs(model):
        for value in graph.initializers.data.values():
            if value.const_value is not None:
                yield value.const_value
        for node in graph:
            if node.attributes.data:
                yield from tensors_of(node)


def tensors_of(node: ir.Node) -> Sequence[ir.TensorProtocol]:
    """The tensors that a node holds in its attributes."""
    return _held(node, _TENSOR, _TENSORS)


def _held(node: ir.Node, one: ir.AttributeType, many: ir.AttributeType) -> tuple[Any, ...]:
    """The values of the node's attributes of one type, and of the type that lists those."""
    held: tuple[Any, ...] = ()
    for attr in node.attributes.data.values():
        kind = attr.type
        if kind in (one, many) and not attr.is_ref():
            held += (attr.value,) if kind == one else tuple(attr.value)
    return held


def sizes_of(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor; one that wraps a protobuf would make a new `ir.Shape` each time it is asked."""
    if type(tensor) is ir.TensorProtoTensor:  # isinstance takes long over a class that has protocols as bases
        return tuple(tensor.raw.dims)
    return tuple(tensor.shape.numpy())


def nbytes(tensor: ir.TensorProtocol) -> int:
    """Bytes of a tensor."""
    if type(tensor) is ir.TensorProtoTensor:
        return math.ceil(_itemsize(tensor.raw.data_type) * math.prod(sizes_of(tensor)))
    return tensor.nbytes


@functools.cache
def _itemsize(data_type: int) -> float:
    return ir.DataType(data_type).itemsize


def tensor_bytes(model: ir.Model) -> int:
    """Bytes of all tensors: initializers and tensor attributes, subgraphs and functions included."""
    return sum(map(nbytes, tensors(model)))


def uses_external_data(model: ir.Model) -> bool:
    """Whether any tensor lies in a file of its own, or is computed from one when it is read."""
    return any(isinstance(tensor, ir.ExternalTensor | ir.LazyTensor) for tensor in tensors(model))


def value_names(model: ir.Model) -> set[str]:
    """The names of all values in all graphs."""
    names: set[str] = set()
    for graph in graphs(model):
        names.update(v.name for v in graph.inputs if v.name)
        names.update(graph.initializers.data)
        for node in graph:
            names.update(v.name for v in node.outputs if v.name)
    return names


def rename_nodes_apart(model: ir.Model) -> bool:
    """Give each node a name of its own, where two share one; False where none do."""
    names = [node.name for node in nodes(model) if node.name]
    if len(names) == len(set(names)):
        return False
    for index, node in enumerate(nodes(model)):
        node.name = f"node_{index}"
    return True


def constant_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor a value always has, or None.

    An initializer that is also a graph input is the user's to override and no constant.
    """
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain or has_reference(node):
        return None
    for name, attr in node.attributes.items():
        if name == "value":
            tensor: ir.TensorProtocol = attr.value  # `as_tensor` looks long at what it is
            return tensor
        if name in ("value_float", "value_floats"):
            return ir.Tensor(np.array(attr.value, np.float32))
        if name in ("value_int", "value_ints"):
            return ir.Tensor(np.array(attr.value, np.int64))
    return None


def constant_array(value: ir.Value | None, limit: int | None = None) -> np.ndarray | None:
    """The constant's elements as numpy sees them, or None; `limit` (bytes) leaves larger ones unread."""
    tensor = constant_of(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING:
        return None
    if limit is not None and tensor.nbytes > limit:
        return None
    return tensor.numpy()


def set_constant(value: ir.Value, array: np.ndarray) -> None:
    """Give a constant, in an initializer or a Constant node, other elements, which are cast to its type."""
    old = constant_of(value)
    assert old is not None  # it is a constant
    cast = array.astype(old.dtype.numpy(), copy=False)
    tensor, producer = ir.Tensor(cast, dtype=old.dtype, name=old.name), value.producer()
    if producer is None:
        value.const_value = tensor
    else:
        producer.attributes.clear()
        producer.attributes["value"] = ir.AttrTensor("value", tensor)


def use_count(value: ir.Value) -> int:
    """How often nodes read a value. `uses` copies them all, which takes long where thousands read it."""
    return len(getattr(value, "_uses", None) or value.uses())


def read_once(value: ir.Value) -> bool:
    """Whether nodes read a value once in all, and nobody else does: it is no graph output."""
    return use_count(value) == 1 and not value.is_graph_output()


def sole_user(value: ir.Value) -> ir.Node | None:
    """The one node, in the value's own graph, that reads it, once; None if shared or a graph output."""
    if not read_once(value):
        return None
    user = next(iter(value.uses())).node
    producer = value.producer()
    return user if producer is None or user.graph is producer.graph else None


def detach(node: ir.Node) -> None:
    """Let a node that goes away read nothing."""
    for position, value in enumerate(node.inputs):
        if value is not None:
            node.replace_input_with(position, None)


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape as integers where every dimension is known, else None."""
    if value is None or value.shape is None:
        return None
    dims = value.shape.dims
    return tuple(d for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else None


def has_reference(node: ir.Node) -> bool:
    """Whether an attribute refers to one of the enclosing function, so that its value is unknown here."""
    return any(attr.is_ref() for attr in node.attributes.data.values())


def int_attr(node: ir.Node, name: str, default: int) -> int:
    """An int attribute, or the default where it is absent."""
    attr = node.attributes.data.get(name)
    return default if attr is None else attr.as_int()


def float_attr(node: ir.Node, name: str, default: float) -> float:
    """A float attribute, or the default where it is absent."""
    attr = node.attributes.data.get(name)
    return default if attr is None else attr.as_float()


def str_attr(node: ir.Node, name: str, default: str) -> str:
    """A string attribute, or the default where it is absent."""
    attr = node.attributes.data.get(name)
    return default if attr is None else attr.as_string()


def ints_attr(node: ir.Node, name: str) -> tuple[int, ...] | None:
    """A list-of-int attribute, or None where it is absent."""
    attr = node.attributes.data.get(name)
    return None if attr is None else tuple(attr.as_ints())


def is_deterministic(node: ir.Node) -> bool:
    """Whether the node surely gives the same outputs for the same inputs, each time it runs.

    Of ops of domains other than ONNX's own nothing is known.
    """
    if node.domain not in ("", "ai.onnx.ml") or node.op_type in NONDETERMINISTIC:
        return False
    if node.op_type == "Dropout" and len(node.inputs) > 2 and node.inputs[2] is not None:
        training = constant_array(node.inputs[2])
        if training is None or bool(training.any()):
            return False
    return all(is_deterministic(inner) for graph in subgraphs_of(node) for inner in graph)
