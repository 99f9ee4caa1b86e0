"""Operators that are given by others: the function body of their schema, expanded when it first runs."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import torch

from onnxopt.graph import walk
from onnxopt.training.interpreter import registry
from onnxopt.training.interpreter.graph import Body
from onnxopt.training.interpreter.registry import Context, Operator
from onnxopt.training.interpreter.values import NATIVE, Host

__all__ = ["FunctionBody", "label", "operator_for"]

_TYPES = {torch_type: dtype for dtype, torch_type in NATIVE.items()}

_Types = tuple[tuple[ir.DataType | None, tuple[int, ...] | None], ...]


def label(node: ir.Node, version: int) -> str:
    """How messages call a node: operator, domain, version and name."""
    return f"{node.domain or 'ai.onnx'}::{node.op_type}-{version} (node {node.name!r})"


def operator_for(node: ir.Node, version: int) -> Operator | None:
    """The function of a node's operator: its row, else the body that its schema gives it."""
    found = registry.find(node.domain, node.op_type, version)
    if found is None and _has_function(node, version):
        return Operator(FunctionBody(ir.to_proto(node), version), raw=True, host=False)
    return found


def _has_function(node: ir.Node, version: int) -> bool:
    """Whether the operator's schema says how others compute it."""
    if not onnx.defs.has(node.op_type, version, node.domain):
        return False
    schema = _schema(node.op_type, version, node.domain)
    return bool(schema.has_function or schema.has_context_dependent_function)


class FunctionBody:
    """Runs a node by the function of its operator; one body for each combination of types and shapes."""

    def __init__(self, node: onnx.NodeProto, version: int) -> None:
        self._node, self._version = node.SerializeToString(deterministic=True), version
        self._bodies: dict[_Types, tuple[Body, tuple[int | None, ...]]] = {}

    def __call__(self, *args: Any, ctx: Context) -> Any:
        types = tuple(
            (known or _type_of(one), tuple(one.shape) if isinstance(one, torch.Tensor | Host) else None)
            for known, one in zip(ctx.inputs, args, strict=True)
        )
        if types not in self._bodies:
            self._bodies[types] = self._expand(types)
        anchor = next((one for one in args if isinstance(one, torch.Tensor)), torch.empty(0))
        body, places = self._bodies[types]
        found = body(args, (), anchor)
        return tuple(None if place is None else found[place] for place in places)

    def _expand(self, types: _Types) -> tuple[Body, tuple[int | None, ...]]:
        """The body, and where its outputs are among those that it really gives."""
        from onnxopt.training.interpreter.build import Builder

        node = onnx.NodeProto.FromString(self._node)
        proto = _function(node, self._version, types)
        given = {name: None for one in proto.node for name in one.output} | dict.fromkeys(proto.input)
        outputs = [name for name in proto.output if name in given]
        places = tuple(outputs.index(name) if name in given else None for name in proto.output)
        proto.output[:] = outputs
        function = ir.serde.deserialize_function(proto)
        _fill_in(function, node, self._version)
        for value, (dtype, _) in zip(function.inputs, types, strict=False):
            value.type = None if dtype is None else ir.TensorType(dtype)
        return Body(Builder(function.opset_imports, {}).build(function)), places


def _schema(op_type: str, version: int, domain: str) -> Any:
    """The stubs of onnx know little of what a schema has."""
    return onnx.defs.get_schema(op_type, version, domain)


def _type_of(value: Any) -> ir.DataType | None:
    if isinstance(value, list):
        return _type_of(value[0]) if value else None
    return _TYPES[value.dtype] if isinstance(value, torch.Tensor | Host) else None


def _function(node: onnx.NodeProto, version: int, types: _Types) -> onnx.FunctionProto:
    """The function that the schema has for this node: the one for the newest operator set."""
    schema = _schema(node.op_type, version, node.domain)
    if schema.has_function:
        newest = max(v for v in schema.function_opset_versions if v <= version)
        return onnx.FunctionProto.FromString(schema.get_function_with_opset_version(newest))
    given = []
    for dtype, shape in types:
        proto = onnx.TypeProto()
        if dtype is not None:
            proto.tensor_type.elem_type = dtype
        for size in shape or ():
            proto.tensor_type.shape.dim.add(dim_value=size)
        given.append(proto.SerializeToString())
    newest = max(v for v in schema.context_dependent_function_opset_versions if v <= version)
    data = schema.get_context_dependent_function_with_opset_version(newest, node.SerializeToString(), given)
    return onnx.FunctionProto.FromString(data)


def _fill_in(function: ir.Function, node: onnx.NodeProto, version: int) -> None:
    """Put the node's attributes, or their defaults, in the place of references to them."""
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    given = {name: one.default_value for name, one in schema.attributes.items() if one.default_value.type}
    given |= {one.name: one for one in node.attribute}
    for inner in walk(function.graph):
        for name, attr in tuple(inner.attributes.items()):
            if not attr.is_ref():
                continue
            proto = onnx.AttributeProto()
            if attr.ref_attr_name in given:
                proto.CopyFrom(given[attr.ref_attr_name])
                proto.name = name
                inner.attributes[name] = ir.serde.deserialize_attribute(proto)
            else:
                del inner.attributes[name]
