"""Types and shapes of a single node's outputs, as its operator infers them."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Mapping
from typing import NamedTuple

import onnx
import onnx_ir as ir

from onnxopt.graph import constant_of, nbytes, sizes_of

__all__ = [
    *("REMEMBERED", "Form", "Type", "form_of", "hide_misread", "infer_outputs", "refine", "sort_axes"),
    "type_from",
]

REMEMBERED = 1 << 13
"""Answers that are kept: graphs repeat their layers."""

_READABLE = 4096
"""Bytes of an integer constant that shape inference is shown: shapes, axes and the like."""
_SHORT = frozenset({(), *((size,) for size in range(9))})
"""Shapes of other constants that it is shown: scales, one for each axis, and single numbers."""

_MISREAD_SLICE = 10
"""The version of Slice whose result has the names of its input's sizes in onnx, whatever is cut off."""
_BODIES = (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
_TENSOR, _GRAPHS = ir.AttributeType.TENSOR, (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
_SCALARS = (ir.AttributeType.FLOAT, ir.AttributeType.INT, ir.AttributeType.STRING)
_LISTS = (ir.AttributeType.FLOATS, ir.AttributeType.INTS, ir.AttributeType.STRINGS)
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)

Type = tuple[ir.DataType, tuple[int | str | None, ...] | None] | bytes
"""Of a tensor its element type and its sizes, if its rank is known; of any other value the protobuf."""

_Data = tuple[ir.DataType, tuple[int, ...], bytes]
"""Element type, sizes and content."""


class Form(NamedTuple):
    """A node without its names and its surroundings; onnx says the same of equal ones.

    attributes: name, type and value, or the serialized attribute. inputs, outputs: which are there.
    """

    domain: str
    op_type: str
    opsets: tuple[tuple[str, int], ...]
    attributes: tuple[Hashable, ...]
    inputs: tuple[bool, ...]
    outputs: tuple[bool, ...]

    def node(self) -> onnx.NodeProto:
        """A node of this form, whose inputs and outputs are named by their number."""
        proto = onnx.NodeProto(domain=self.domain, op_type=self.op_type)
        proto.input.extend(f"i{number}" if there else "" for number, there in enumerate(self.inputs))
        proto.output.extend(f"o{number}" if there else "" for number, there in enumerate(self.outputs))
        for attribute in self.attributes:
            if isinstance(attribute, bytes):
                proto.attribute.add().ParseFromString(attribute)
            elif isinstance(attribute, tuple):
                ir.serde.serialize_attribute_into(proto.attribute.add(), ir.Attr(*attribute))
        return proto


def form_of(node: ir.Node, opsets: Mapping[str, int]) -> Form | None:
    """The form of a node; None where an attribute is a reference, holds a graph or is a large tensor."""
    attributes: list[Hashable] = []
    for attr in node.attributes.data.values():
        kind = attr.type
        if attr.is_ref() or kind in _GRAPHS or (kind == _TENSOR and nbytes(attr.value) > _READABLE):
            return None
        if kind in _SCALARS or kind in _LISTS:
            attributes.append((attr.name, kind, attr.value))
        else:
            attributes.append(ir.serde.serialize_attribute(attr).SerializeToString())
    inputs = tuple([value is not None for value in node.inputs])
    outputs = tuple([bool(value.name) for value in node.outputs])
    return Form(node.domain, node.op_type, tuple(opsets.items()), tuple(attributes), inputs, outputs)


def infer_outputs(node: ir.Node, form: Form) -> dict[ir.Value, Type]:
    """Output -> type, as far as the operator tells; nothing where an input's type is not known.

    Args:
        node: of an operator that its opsets have.
        form: the node's.

    Raises:
        onnx.shape_inference.InferenceError: the inputs do not fit the operator.
    """
    types, data = [], []
    for value in node.inputs:
        known = None if value is None else _type_of(value)
        if value is not None and known is None:
            return {}
        types.append(known)
        data.append(_data_of(value, known))
    inferred = _infer(form, tuple(types), tuple(data))
    return {value: found for value, found in zip(node.outputs, inferred, strict=True) if found is not None}


def type_from(proto: onnx.TypeProto) -> Type:
    """A type as it is written here."""
    if not proto.HasField("tensor_type"):
        return bytes(proto.SerializeToString(deterministic=True))
    tensor = proto.tensor_type
    dims = [dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim]
    return ir.DataType(tensor.elem_type), tuple(dims) if tensor.HasField("shape") else None


def _type_of(value: ir.Value) -> Type | None:
    kind, shape = value.type, value.shape
    if isinstance(kind, ir.TensorType):
        if shape is None:
            return kind.dtype, None
        return kind.dtype, tuple([size if isinstance(size, int) else size.value for size in shape.dims])
    return None if kind is None else ir.serde.serialize_value(value).type.SerializeToString()


def _data_of(value: ir.Value | None, known: Type | None) -> _Data | None:
    """The content of a small constant."""
    if not isinstance(known, tuple) or (known[0] not in _INTEGERS and known[1] not in _SHORT):
        return None
    tensor = constant_of(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or nbytes(tensor) > _READABLE:
        return None
    return tensor.dtype, sizes_of(tensor), tensor.tobytes()


@functools.lru_cache(maxsize=REMEMBERED)
def _infer(
    form: Form, types: tuple[Type | None, ...], data: tuple[_Data | None, ...]
) -> tuple[Type | None, ...]:
    """What onnx says of a node of this form with inputs of these types and contents."""
    node, opsets = form.node(), dict(form.opsets)
    sort_axes(node)
    contents = {
        f"i{number}": onnx.TensorProto(data_type=known[0], dims=known[1], raw_data=known[2])
        for number, known in enumerate(data)
        if known
    }
    try:
        inferred = onnx.shape_inference.infer_node_outputs(
            onnx.defs.get_schema(form.op_type, opsets[form.domain], form.domain),
            node,
            {f"i{number}": _type_proto(known) for number, known in enumerate(types) if known},
            contents,
            opset_imports=[onnx.OperatorSetIdProto(domain=key, version=opsets[key]) for key in opsets],
        )
    except onnx.checker.ValidationError as error:  # of a type that the operator does not take
        raise onnx.shape_inference.InferenceError(str(error)) from None
    found = {name: type_from(proto) for name, proto in inferred.items()}
    if form.op_type == "Slice" and opsets[form.domain] == _MISREAD_SLICE:
        found = {name: _without_names(known) for name, known in found.items()}
    return tuple([found.get(f"o{number}") for number in range(len(form.outputs))])


def _without_names(known: Type) -> Type:
    if isinstance(known, bytes) or known[1] is None:
        return known
    return known[0], tuple(size if isinstance(size, int) else None for size in known[1])


def _type_proto(known: Type) -> onnx.TypeProto:
    proto = onnx.TypeProto()
    if isinstance(known, bytes):
        proto.ParseFromString(known)
        return proto
    proto.tensor_type.elem_type = known[0]
    if known[1] is not None:
        proto.tensor_type.shape.SetInParent()
        for size in known[1]:
            dim = proto.tensor_type.shape.dim.add()
            if isinstance(size, int):
                dim.dim_value = size
            elif size is not None:
                dim.dim_param = size
    return proto


def refine(node: ir.Node, opsets: Mapping[str, int]) -> list[ir.Value]:
    """Complete the types and shapes of a node's outputs; those outputs that are known better now.

    Graph outputs are left as they are declared. Nothing on record is overwritten.
    """
    form = form_of(node, opsets)
    if form is None or not onnx.defs.has(node.op_type, opsets.get(node.domain, 0), node.domain):
        return []
    try:
        inferred = infer_outputs(node, form)
    except onnx.shape_inference.InferenceError:
        return []
    return [value for value, found in inferred.items() if _complete(value, found)]


def sort_axes(node: onnx.NodeProto) -> None:
    """Sort a Squeeze's axes: before opset 11, onnx's inference passes over those that are out of order."""
    if node.op_type == "Squeeze" and not node.domain:
        for attr in node.attribute:
            attr.ints.sort()


def hide_misread(model: onnx.ModelProto) -> None:
    """Hide Slices of lists by what is no constant from onnx: following shapes, it takes such an end for 0.

    Likewise each Slice of opset 10.
    """
    every = any(one.version == _MISREAD_SLICE and not one.domain for one in model.opset_import)
    _hide(model.graph, every, set(), {})


def _hide(graph: onnx.GraphProto, every: bool, constants: set[str], types: dict[str, onnx.TypeProto]) -> None:
    """In a graph and those in its nodes; `constants`, `types`: of the graphs around it, added to."""
    types.update((info.name, info.type) for info in (*graph.input, *graph.value_info))
    constants.difference_update(name for node in graph.node for name in node.output)
    constants.update(name for node in graph.node if node.op_type == "Constant" for name in node.output)
    constants.update(tensor.name for tensor in graph.initializer)
    for node in graph.node:
        if node.op_type == "Slice" and (every or not constants.issuperset(filter(None, node.input[1:]))):
            tensor = types.get(node.input[0], onnx.TypeProto()).tensor_type
            if every or (tensor.elem_type in (0, *_INTEGERS) and len(tensor.shape.dim) < 2):
                node.op_type = "?"
        for attr in node.attribute:
            for body in (attr.g, *attr.graphs) if attr.type in _BODIES else ():
                _hide(body, every, constants, types)


def _complete(value: ir.Value, inferred: Type) -> bool:
    """Add what is inferred to what is on record; whether there was anything to add."""
    if value.is_graph_output() or isinstance(inferred, bytes) or inferred[0] == ir.DataType.UNDEFINED:
        return False
    before, found = (value.type, value.shape), inferred[1]
    if value.type is None:
        value.type = ir.TensorType(inferred[0])
    if found is not None and value.shape is None:
        value.shape = ir.Shape(found)
    elif found is not None and value.shape is not None and len(value.shape) == len(found):
        pairs = zip(value.shape.dims, found, strict=True)
        value.shape = ir.Shape(
            [new if isinstance(new, int) and not isinstance(old, int) else old for old, new in pairs]
        )
    return (value.type, value.shape) != before
