"""Write down the types and shapes that follow from the graph inputs and the operators.

Before: y = MatMul(x, w), with float[N, 3] x, float[3, 4] w and nothing on record for y
After:  the same graph, with float[N, 4] on record for y
Declines: constants outside the main graph's initializers do not fit one protobuf; onnx's inference fails.

What is on record is only added to: a missing type or shape, a number in place of a name or of an
unknown size. Where inference contradicts the record, that value is left as it is, and so are graph
inputs and outputs. A size is named only after the graph inputs' own names; overridable initializers
are taken for unknown values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import nodes, tensor_bytes, walk
from onnxopt.inference import sort_axes
from onnxopt.ledger import Ledger
from onnxopt.protobuf import LARGEST_PROTOBUF, skeleton

__all__ = ["InferShapes"]

_RULE = "types and shapes"
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)


@dataclass(frozen=True)
class _Refined:
    value: ir.Value
    type: ir.TypeProtocol | None
    shape: ir.Shape | None


@dataclass(frozen=True)
class InferShapes(Pass):
    """Add to the types and shapes on record what onnx's shape inference finds."""

    name = "infer-shapes"

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        if all(_is_complete(value) for node in nodes(model) for value in node.outputs):
            return
        stored = sum(
            v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None
        )
        if tensor_bytes(model) - stored > LARGEST_PROTOBUF:
            ledger.decline(_RULE, "", "constants outside the initializers do not fit one protobuf (2 GB)")
            return
        try:
            inferred = onnx.shape_inference.infer_shapes(_question(model), data_prop=True)
        except onnx.shape_inference.InferenceError as error:
            ledger.decline(_RULE, "", " ".join(str(error).split()))
            return
        shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
        names = {size.value for shape in shapes for size in shape.dims if isinstance(size, ir.SymbolicDim)}
        found = list(_compare(model.graph, inferred.graph, names - {None}, set(model.graph.outputs)))
        found += _only_types(model.graph, {refined.value for refined in found})
        if found and ledger.claim(_RULE, ""):
            for refined in found:
                refined.value.type, refined.value.shape = refined.type, refined.shape


def _is_complete(value: ir.Value) -> bool:
    """Whether there is nothing left to find out."""
    if not isinstance(value.type, ir.TensorType):
        return value.type is not None or not value.name
    return value.shape is not None and value.shape.is_static()


def _question(model: ir.Model) -> onnx.ModelProto:
    """The model as onnx's inference has to see it, with a Squeeze's axes in order.

    It takes overridable initializers for constants, and in a body it does not see the constants around it.
    """
    proto = skeleton(model)
    inputs = {value.name for value in model.graph.inputs}
    fixed = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name not in inputs}
    kept = list(fixed.values())
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _prepare_nodes(proto.graph, fixed)
    return proto


def _prepare_nodes(graph: onnx.GraphProto, fixed: Mapping[str, onnx.TensorProto]) -> None:
    for node in graph.node:
        sort_axes(node)
        for attr in node.attribute:
            for body in (attr.g, *attr.graphs) if attr.type in _GRAPHS else ():
                own = {port.name for port in (*body.input, *body.initializer)}
                read = dict.fromkeys(name for inner in body.node for name in inner.input)
                body.initializer.extend(fixed[name] for name in read if name in fixed and name not in own)
                _prepare_nodes(body, fixed)


def _compare(
    graph: ir.Graph, proto: onnx.GraphProto, names: set[str | None], fixed: set[ir.Value]
) -> Iterator[_Refined]:
    """What the inferred graph, which has the same nodes, says beyond the record."""
    inferred = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for node, twin in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            known = value not in fixed and inferred.get(value.name or "")
            if known and (refined := _refine(value, known, names)):
                yield refined
        for attr in twin.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                yield from _compare(node.attributes[attr.name].as_graph(), attr.g, names, fixed)
            elif attr.type == onnx.AttributeProto.GRAPHS:
                for body, other in zip(node.attributes[attr.name].as_graphs(), attr.graphs, strict=True):
                    yield from _compare(body, other, names, fixed)


def _only_types(graph: ir.Graph, found: set[ir.Value]) -> Iterator[_Refined]:
    """Values without a type whose operator can give one type only, as many of ai.onnx.ml can."""
    for node in walk(graph):
        version = graph.opset_imports.get(node.domain, 0)
        missing = [
            value for value in node.outputs if value.type is None and value.name and value not in found
        ]
        if not missing or not onnx.defs.has(node.op_type, version, node.domain):
            continue
        formal = onnx.defs.get_schema(node.op_type, version, node.domain).outputs
        for value, output in zip(node.outputs, formal, strict=False):
            kind = re.fullmatch(
                r"tensor\((\w+)\)", next(iter(output.types)) if len(output.types) == 1 else ""
            )
            if value in missing and kind is not None:
                yield _Refined(value, ir.TensorType(ir.DataType[kind[1].upper()]), value.shape)


def _refine(value: ir.Value, proto: onnx.TypeProto, names: set[str | None]) -> _Refined | None:
    """The value's type and shape with what was inferred; None if that adds nothing or contradicts."""
    found = ir.serde.deserialize_type_proto_for_type(proto)
    if found is None or (isinstance(found, ir.TensorType) and found.dtype == ir.DataType.UNDEFINED):
        return None
    if value.type is not None and value.type != found:
        return None
    shape, sizes = value.shape, ir.serde.deserialize_type_proto_for_shape(proto)
    if sizes is not None and isinstance(found, ir.TensorType):
        shape = ir.Shape([None] * len(sizes)) if shape is None else shape.copy()
        if len(shape) != len(sizes):
            return None
        for axis, size in enumerate(sizes.dims):
            known = shape[axis]
            if isinstance(size, int):
                if isinstance(known, int) and known != size:
                    return None
                shape[axis] = size
            elif not isinstance(known, int) and known.value is None and size.value in names:
                shape[axis] = size
    return None if value.type == found and value.shape == shape else _Refined(value, found, shape)
