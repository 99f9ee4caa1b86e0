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

import itertools
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import nbytes, tensor_bytes, walk
from onnxopt.inference import Type, form_of, hide_misread, infer_outputs, sort_axes, type_from
from onnxopt.ledger import Ledger
from onnxopt.protobuf import LARGEST_PROTOBUF, skeleton

__all__ = ["InferShapes"]

_RULE = "types and shapes"
_UNDEFINED = ir.DataType.UNDEFINED
_GRAPHS = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)

_Names = Mapping[str, ir.SymbolicDim]
"""What sizes may be called."""


@dataclass(frozen=True)
class _Refined:
    value: ir.Value
    type: ir.TypeProtocol | None
    shape: ir.Shape | None


@dataclass(frozen=True)
class InferShapes(Pass):
    """Add to the types and shapes on record what onnx's shape inference finds."""

    name = "infer-shapes"
    example = """
agraph (float[N, 2] x) => (float[N, 1] y) <float[2, 1] w = {1, 2}> {
    a = Relu(x)
    y = MatMul(a, w)
}
    """

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        shapes = [value.shape for value in model.graph.inputs if value.shape is not None]
        sizes = [size for shape in shapes for size in shape.dims if isinstance(size, ir.SymbolicDim)]
        names, claimed = {size.value: size for size in sizes if size.value is not None}, False
        for found in itertools.chain(
            _node_by_node(model, names), _as_a_whole(model, names, ledger), _only_types(model.graph)
        ):
            claimed = claimed or ledger.claim(_RULE, "")
            if not claimed:
                return
            found.value.type, found.value.shape = found.type, found.shape


def _node_by_node(model: ir.Model, names: _Names) -> Iterator[_Refined]:
    """What follows from each node of the main graph alone, in order; it is recorded before the next is asked.

    This is enough for many graphs, and onnx is asked only once about nodes that are alike.
    """
    opsets = model.graph.opset_imports
    for node in model.graph:
        if all(_is_known(value) for value in node.outputs):
            continue
        form = form_of(node, opsets)
        if form is None or not onnx.defs.has(node.op_type, opsets.get(node.domain, 0), node.domain):
            continue
        try:
            inferred = infer_outputs(node, form)
        except onnx.shape_inference.InferenceError:
            continue
        for value, known in inferred.items():
            if not value.is_graph_output() and (refined := _refine(value, known, names)):
                yield refined


def _as_a_whole(model: ir.Model, names: _Names, ledger: Ledger) -> Iterator[_Refined]:
    """What follows from the whole graph, bodies and the contents of shapes included."""
    fixed = set(model.graph.outputs)
    values = (value for node in walk(model.graph) for value in node.outputs if value not in fixed)
    if all(_is_known(value, names) for value in values):
        return
    weights = (value.const_value for value in model.graph.initializers.values())
    stored = sum(nbytes(tensor) for tensor in weights if tensor is not None)
    if tensor_bytes(model) - stored > LARGEST_PROTOBUF:
        ledger.decline(_RULE, "", "constants outside the initializers do not fit one protobuf (2 GB)")
        return
    try:
        inferred = onnx.shape_inference.infer_shapes(_question(model), data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        ledger.decline(_RULE, "", " ".join(str(error).split()))
        return
    yield from _compare(model.graph, inferred.graph, names, fixed)


def _is_known(value: ir.Value, names: Container[str | None] = ()) -> bool:
    """Whether there is nothing left to find out; a size that is called by one of `names` is known."""
    if not isinstance(value.type, ir.TensorType):
        return value.type is not None or not value.name
    sizes = () if value.shape is None else value.shape.dims
    return value.shape is not None and all(isinstance(size, int) or size.value in names for size in sizes)


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
    hide_misread(proto)
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
    graph: ir.Graph, proto: onnx.GraphProto, names: _Names, fixed: set[ir.Value]
) -> Iterator[_Refined]:
    """What the inferred graph, which has the same nodes, says beyond the record."""
    inferred = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for node, twin in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            known = value not in fixed and inferred.get(value.name or "")
            if known and (refined := _refine(value, type_from(known), names)):
                yield refined
        for attr in twin.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                yield from _compare(node.attributes[attr.name].as_graph(), attr.g, names, fixed)
            elif attr.type == onnx.AttributeProto.GRAPHS:
                for body, other in zip(node.attributes[attr.name].as_graphs(), attr.graphs, strict=True):
                    yield from _compare(body, other, names, fixed)


def _only_types(graph: ir.Graph) -> Iterator[_Refined]:
    """Values without a type whose operator can give one type only, as many of ai.onnx.ml can."""
    for node in walk(graph):
        version = graph.opset_imports.get(node.domain, 0)
        missing = [value for value in node.outputs if value.type is None and value.name]
        if not missing or not onnx.defs.has(node.op_type, version, node.domain):
            continue
        formal = onnx.defs.get_schema(node.op_type, version, node.domain).outputs
        for value, output in zip(node.outputs, formal, strict=False):
            kind = re.fullmatch(r"tensor\((\w+)\)", "".join(output.types))
            if value in missing and kind is not None:
                yield _Refined(value, ir.TensorType(ir.DataType[kind[1].upper()]), value.shape)


def _refine(value: ir.Value, inferred: Type, names: _Names) -> _Refined | None:
    """The value's type and shape with what was inferred; None if that adds nothing or contradicts."""
    if isinstance(inferred, bytes):
        found = ir.serde.deserialize_type_proto_for_type(onnx.TypeProto.FromString(inferred))
        return None if found is None or value.type is not None else _Refined(value, found, value.shape)
    (dtype, sizes), shape = inferred, value.shape
    on_record = value.type.dtype if isinstance(value.type, ir.TensorType) else value.type
    if dtype == _UNDEFINED or on_record not in (None, dtype):
        return None
    if sizes is not None and shape is None:
        shape = ir.Shape([size if isinstance(size, int) else names.get(size or "") for size in sizes])
    elif sizes is not None and shape is not None:
        if len(sizes) != len(shape):
            return None
        better: dict[int, int | ir.SymbolicDim] = {}
        for axis, (known, size) in enumerate(zip(shape.dims, sizes, strict=True)):
            if isinstance(known, int):
                if isinstance(size, int) and known != size:
                    return None
            elif isinstance(size, int):
                better[axis] = size
            elif size is not None and size in names and known.value is None:
                better[axis] = names[size]
        shape = shape.copy() if better else shape
        for axis in better:
            shape[axis] = better[axis]
    unchanged = value.type is not None and shape is value.shape
    return None if unchanged else _Refined(value, value.type or ir.TensorType(dtype), shape)
