"""A model as shape inference sees it: one small protobuf of nodes, types and shapes, functions inlined.

Large tensors are there by type and shape only, so that no weight is loaded and a model above 2 GB is never
one protobuf; the model itself is read, never changed or cloned.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import onnx
import onnx.inliner
import onnx_ir as ir

from onnxopt.evaluation.extents import KEEPERS
from onnxopt.inspection.values import LARGEST

__all__ = ["Dims", "inline", "outline"]

Dims = tuple[int | str | None, ...]
"""A shape: numbers, names, and None where not even a name is known."""

DimsOf = Callable[[ir.Value], Dims | None]


def outline(model: ir.Model, dims_of: DimsOf) -> onnx.ModelProto:
    """The model without its weights, with the shapes that `dims_of` gives."""
    proto = onnx.ModelProto(ir_version=model.ir_version, opset_import=_imports(model.opset_imports))
    _write_graph(proto.graph, model.graph, dims_of)
    for function in model.functions.values():
        twin = proto.functions.add(
            domain=function.domain,
            name=function.name,
            overload=function.overload,
            opset_import=_imports(function.opset_imports),
            input=[value.name or "" for value in function.inputs],
            output=[value.name or "" for value in function.outputs],
        )
        for attr in function.attributes.values():
            if attr.value is None:
                twin.attribute.append(attr.name)
            else:
                _write_attribute(twin.attribute_proto.add(), attr, dims_of)
        for node in function:
            _write_node(twin.node.add(), node, dims_of)
    return proto


def _imports(versions: Mapping[str, int]) -> list[onnx.OperatorSetIdProto]:
    return [onnx.OperatorSetIdProto(domain=domain, version=number) for domain, number in versions.items()]


def _write_graph(proto: onnx.GraphProto, graph: ir.Graph, dims_of: DimsOf) -> None:
    proto.name = graph.name or "graph"
    for value in graph.inputs:
        _write_port(proto.input.add(), value, dims_of)
    for name, value in graph.initializers.items():
        if value.const_value is not None:
            proto.initializer.append(_hollow(value.const_value, name))
        elif not value.is_graph_input():
            _write_port(proto.value_info.add(), value, dims_of)
    for node in graph:
        _write_node(proto.node.add(), node, dims_of)
        for value in node.outputs:
            if value.name and value.type is not None and not value.is_graph_output():
                _write_port(proto.value_info.add(), value, dims_of)
    for value in graph.outputs:
        _write_port(proto.output.add(), value, dims_of)


def _write_port(proto: onnx.ValueInfoProto, value: ir.Value, dims_of: DimsOf) -> None:
    proto.name = value.name or ""
    if value.type is None:
        return
    dims = dims_of(value)
    if not isinstance(value.type, ir.TensorType):
        ir.serde.serialize_type_into(proto.type, value.type)
        if dims is not None:
            ir.serde.serialize_shape_into(proto.type, ir.Shape(dims))
        return
    tensor = proto.type.tensor_type
    tensor.elem_type = value.type.dtype.value
    if dims is None:
        return
    tensor.shape.SetInParent()
    for dim in dims:
        if isinstance(dim, int):
            tensor.shape.dim.add(dim_value=dim)
        else:
            tensor.shape.dim.add(**({} if dim is None else {"dim_param": dim}))


def _write_node(proto: onnx.NodeProto, node: ir.Node, dims_of: DimsOf) -> None:
    if node.domain == "com.microsoft" and node.op_type in KEEPERS and len(node.outputs) == 1:
        proto.op_type, proto.name = "Identity", node.name or ""  # inference knows no shapes of that domain
        proto.input.append((node.inputs[0] and node.inputs[0].name) or "")
        proto.output.append(node.outputs[0].name or "")
        return
    proto.op_type = node.op_type
    if node.domain:
        proto.domain = node.domain
    if node.overload:
        proto.overload = node.overload
    if node.name:
        proto.name = node.name
    proto.input.extend([(value.name or "") if value is not None else "" for value in node.inputs])
    proto.output.extend([value.name or "" for value in node.outputs])
    for attr in node.attributes.values():
        _write_attribute(proto.attribute.add(), attr, dims_of)


def _write_attribute(proto: onnx.AttributeProto, attr: ir.Attr, dims_of: DimsOf) -> None:
    if attr.is_ref():
        ir.serde.serialize_reference_attribute_into(proto, attr)
        return
    proto.name, proto.type = attr.name, onnx.AttributeProto.AttributeType.ValueType(attr.type.value)
    if attr.type == ir.AttributeType.TENSOR:
        proto.t.CopyFrom(_hollow(attr.as_tensor(), ""))
    elif attr.type == ir.AttributeType.TENSORS:
        proto.tensors.extend(_hollow(tensor, "") for tensor in attr.as_tensors())
    elif attr.type == ir.AttributeType.GRAPH:
        _write_graph(proto.g, attr.as_graph(), dims_of)
    elif attr.type == ir.AttributeType.GRAPHS:
        for graph in attr.as_graphs():
            _write_graph(proto.graphs.add(), graph, dims_of)
    else:
        ir.serde.serialize_attribute_into(proto, attr)


def _hollow(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    """A small tensor as it is, a large one by type and shape only."""
    if tensor.size <= LARGEST:
        read = tensor.numpy() if isinstance(tensor, ir.ExternalTensor) else None
        proto = ir.serde.serialize_tensor(tensor if read is None else ir.Tensor(read, dtype=tensor.dtype))
        proto.name = name
        return proto
    proto = onnx.TensorProto(name=name, data_type=tensor.dtype.value, dims=tensor.shape.numpy())
    proto.data_location = onnx.TensorProto.EXTERNAL
    proto.external_data.add(key="location", value="hollow")
    return proto


def inline(proto: onnx.ModelProto) -> str | None:
    """Put function bodies in the place of their calls, in place; gives the reason where that fails.

    A function of another opset version than the model's is inlined where its operators mean the same in
    both; where they do not, its calls stay. Where inlining fails, all calls stay and the functions are
    removed.
    """
    imports = {entry.domain: entry.version for entry in proto.opset_import}
    for function in proto.functions:
        own = {entry.domain: entry.version for entry in function.opset_import}
        imports = {**own, **imports}
        if all(_same(node, own, imports) for node in function.node):
            del function.opset_import[:]
            function.opset_import.extend(_imports({domain: imports[domain] for domain in own}))
        _own_outputs(function)
    del proto.opset_import[:]
    proto.opset_import.extend(_imports(imports))
    try:
        inlined = onnx.inliner.inline_local_functions(proto)
    except (RuntimeError, ValueError, onnx.checker.ValidationError) as error:
        del proto.functions[:]
        return " ".join(str(error).split())
    proto.CopyFrom(inlined)
    return None


def _same(node: onnx.NodeProto, here: Mapping[str, int], there: Mapping[str, int]) -> bool:
    """Whether a node and those in its bodies mean the same under two sets of opset imports."""
    versions = here.get(node.domain), there.get(node.domain)
    if versions[0] != versions[1] and _since(node, versions[0]) != _since(node, versions[1]):
        return False
    bodies = (body for attr in node.attribute for body in (attr.g, *attr.graphs))
    return all(_same(inner, here, there) for body in bodies for inner in body.node)


def _since(node: onnx.NodeProto, version: int | None) -> int | None:
    """The opset that gave the operator the meaning it has in this one; None where onnx does not know it."""
    if version is None or not onnx.defs.has(node.op_type, version, node.domain):
        return None
    return int(onnx.defs.get_schema(node.op_type, version, node.domain).since_version)


def _own_outputs(function: onnx.FunctionProto) -> None:
    """Let no output of a function be one of its inputs: the inliner would leave it undefined."""
    inputs: Iterable[str] = set(function.input)
    for index, name in enumerate(function.output):
        if name in inputs:
            function.output[index] = f"{name}_output_{index}"
            function.node.add(op_type="Identity", input=[name], output=[function.output[index]])
