"""Types and shapes of a single node's outputs, as its operator infers them."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import onnx_ir as ir

from onnxopt.graph import constant_of, has_reference, subgraphs_of

__all__ = ["infer_outputs", "refine", "sort_axes"]

_READABLE = 4096
"""Bytes of a constant that shape inference is shown: shapes, axes and the like."""


def infer_outputs(node: ir.Node, opsets: Mapping[str, int]) -> dict[str, onnx.TypeProto]:
    """Output name -> type, as far as the operator tells; nothing where an input's type is not known.

    Args:
        node: of an operator that these opsets have.
        opsets: version by domain.

    Raises:
        onnx.shape_inference.InferenceError: the inputs do not fit the operator.
    """
    known = {v.name: v for v in node.inputs if v is not None and v.type is not None and v.name}
    missing = any(v is not None and v.name not in known for v in node.inputs)
    if missing or has_reference(node) or any(True for _ in subgraphs_of(node)):
        return {}
    types = {name: ir.serde.serialize_value(value).type for name, value in known.items()}
    data = {
        name: ir.serde.serialize_tensor(tensor)
        for name, value in known.items()
        if (tensor := constant_of(value)) is not None and tensor.nbytes <= _READABLE
    }
    imports = [onnx.OperatorSetIdProto(domain=domain, version=number) for domain, number in opsets.items()]
    schema = onnx.defs.get_schema(node.op_type, opsets[node.domain], node.domain)
    proto = ir.serde.serialize_node(node)
    sort_axes(proto)
    inferred: dict[str, onnx.TypeProto] = onnx.shape_inference.infer_node_outputs(
        schema, proto, types, data, opset_imports=imports
    )
    return inferred


def refine(node: ir.Node, opsets: Mapping[str, int]) -> list[ir.Value]:
    """Complete the types and shapes of a node's outputs; those outputs that are known better now.

    Graph outputs are left as they are declared. Nothing on record is overwritten.
    """
    if not onnx.defs.has(node.op_type, opsets.get(node.domain, 0), node.domain):
        return []
    try:
        inferred = infer_outputs(node, opsets)
    except onnx.shape_inference.InferenceError:
        return []
    return [v for v in node.outputs if v.name in inferred and _complete(v, inferred[v.name])]


def sort_axes(node: onnx.NodeProto) -> None:
    """Sort a Squeeze's axes: before opset 11, onnx's inference passes over those that are out of order."""
    if node.op_type == "Squeeze" and not node.domain:
        for attr in node.attribute:
            attr.ints.sort()


def _complete(value: ir.Value, inferred: onnx.TypeProto) -> bool:
    """Add what is inferred to what is on record; whether there was anything to add."""
    tensor = inferred.tensor_type
    if value.is_graph_output() or not inferred.HasField("tensor_type") or not tensor.elem_type:
        return False
    before = (value.type, value.shape)
    if value.type is None:
        value.type = ir.TensorType(ir.DataType(tensor.elem_type))
    if not tensor.HasField("shape"):
        return value.type != before[0]
    dims = tensor.shape.dim
    found = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in dims]
    if value.shape is None:
        value.shape = ir.Shape(found)
    elif len(value.shape) == len(found):
        pairs = zip(value.shape.dims, found, strict=True)
        value.shape = ir.Shape(
            [new if isinstance(new, int) and not isinstance(old, int) else old for old, new in pairs]
        )
    return (value.type, value.shape) != before
