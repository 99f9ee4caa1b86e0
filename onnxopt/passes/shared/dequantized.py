"""What is done to a constant behind a DequantizeLinear, so that nothing is dequantized in vain."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, has_reference, int_attr, sizes_of, sole_user
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope

__all__ = ["gathered", "turned"]

_GATHERED = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16)


@dataclass(frozen=True)
class Quantized:
    """A constant behind a DequantizeLinear: elements, scales and, if there are any, zero points."""

    node: ir.Node
    tensors: tuple[ir.TensorProtocol, ...]

    @classmethod
    def of(cls, value: ir.Value | None) -> Quantized | None:
        node = value.producer() if value is not None else None
        if node is None or node.op_type != "DequantizeLinear" or node.domain:
            return None
        tensors = tuple(map(constant_of, node.inputs))
        found = tuple(tensor for tensor in tensors if tensor is not None)
        return cls(node, found) if len(found) == len(tensors) else None

    @property
    def name(self) -> str | None:
        """That of the stored elements."""
        stored = self.node.inputs[0]
        return stored.name if stored is not None else None

    @property
    def axis(self) -> int | None:
        """The axis along which scales differ."""
        rank = len(sizes_of(self.tensors[0]))
        return int_attr(self.node, "axis", 1) % rank if self.tensors[1].size > 1 else None


def gathered(node: ir.Node, scope: Scope) -> Edit | None:
    """Gather(DequantizeLinear(q, scale), ids) dequantizes the wanted rows only.

    Raises:
        Declined: scales differ in blocks, or along an axis in front of the rows.
    """
    found = Quantized.of(node.inputs[0])
    if (
        found is None
        or found.tensors[0].dtype not in _GATHERED
        or found.tensors[1].dtype != ir.DataType.FLOAT
    ):
        return None
    rank = len(sizes_of(found.tensors[0]))
    rows, scales = int_attr(node, "axis", 0) % rank, found.axis
    if int_attr(found.node, "block_size", 0) or (scales is not None and scales < rows):
        raise Declined("the scales differ in blocks, or along an axis in front of the rows")
    edit = Edit(node, scope)

    def taken(tensor: ir.TensorProtocol) -> ir.Value:
        array = tensor.numpy().astype(np.float32)
        if scales is not None:
            array = array.reshape((1,) * (rows if scales == rows else 0) + (-1,) + (1,) * (rank - 1 - scales))
        value = edit.constant(array, found.name)
        return edit.op("Gather", [value, node.inputs[1]], {"axis": rows}) if scales == rows else value

    value = edit.op("Gather", [found.node.inputs[0], node.inputs[1]], {"axis": rows}, name=node.name)
    value = edit.op("Cast", [value], {"to": ir.DataType.FLOAT})
    if len(found.tensors) > 2:
        value = edit.op("Sub", [value, taken(found.tensors[2])])
    return edit.replace(node.outputs[0], edit.op("Mul", [value, taken(found.tensors[1])]))


def turned(node: ir.Node, scope: Scope) -> Edit | None:
    """A Gemm that transposes a dequantized weight reads it transposed, as ONNX Runtime's fusion takes it.

    Raises:
        Declined: the weight is read elsewhere, too.
    """
    found = Quantized.of(node.inputs[1]) if len(node.inputs) > 1 else None
    if found is None or not int_attr(node, "transB", 0) or has_reference(node):
        return None
    source = found.node
    if sole_user(source.outputs[0]) is not node or source.graph is not node.graph:
        raise Declined("the weight is read in other ways, too")
    edit, like = Edit(node, scope), found.name
    turned = [
        edit.constant(ir.Tensor(tensor.numpy().T.copy(), dtype=tensor.dtype), like)
        for tensor in found.tensors
    ]
    attributes = {**source.attributes.data}
    if found.axis is not None:
        attributes["axis"] = ir.AttrInt64("axis", 1 - found.axis)
    weight = edit.op("DequantizeLinear", turned, attributes, name=source.name or None)
    kept = {name: attr for name, attr in node.attributes.data.items() if name != "transB"}
    inputs = [node.inputs[0], weight, *node.inputs[2:]]
    return edit.replace(node.outputs[0], edit.op("Gemm", inputs, kept, name=node.name))
