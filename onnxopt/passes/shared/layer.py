"""Layers with stored weights: what Conv, ConvTranspose, Gemm and MatMul have in common.

Each is y = W x + b along the channels. Weights and biases are computed in float64 and rounded once, to
the type of the weight. New constants get new names, so that a shared weight stays as it is for its
other readers; one above 1 MiB is not duplicated that way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxopt.graph import (
    FLOATS,
    constant_of,
    float_attr,
    has_reference,
    int_attr,
    sizes_of,
    sole_user,
    use_count,
)
from onnxopt.passes.shared.weight import Weight, rounded
from onnxopt.rewrite import Declined, Edit

__all__ = [
    "LAYERS",
    "Layer",
    "along",
    "constant",
    "is_stored",
    "layer_of",
    "require_sole_reader",
]

LAYERS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def is_stored(value: ir.Value | None) -> bool:
    """Whether the value comes with the model: a constant, or an initializer that may be a graph input too."""
    return value is not None and (value.is_initializer() or constant_of(value) is not None)


def constant(value: ir.Value | None, what: str) -> ir.TensorProtocol:
    """The floating-point tensor of a value.

    Raises:
        Declined: it is no constant, or of another type; `what` names it.
    """
    tensor = constant_of(value)
    if tensor is None:
        if value is not None and value.is_graph_input() and value.is_initializer():
            raise Declined(f"the {what} is a graph input (overridable; --freeze-initializers folds it)")
        raise Declined(f"the {what} is computed at run time")
    if tensor.dtype not in FLOATS:
        raise Declined(f"the {what} is of type {tensor.dtype.name}")
    return tensor


def require_sole_reader(node: ir.Node) -> None:
    """Raise `Declined` unless exactly one node, in the same graph, reads the (first) output of `node`."""
    value = node.outputs[0]
    if value.is_graph_output():
        raise Declined(f"the output of the {node.op_type} is also a graph output")
    if sole_user(value) is None:
        where = "elsewhere" if use_count(value) > 1 else "in another graph"
        raise Declined(f"the output of the {node.op_type} is also read {where}")


def along(tensor: ir.TensorProtocol, channels: int, trailing: int, rank: int | None) -> bool:
    """Whether a constant acts on the channel axis alone, without making the other operand larger.

    Args:
        tensor: the constant; only its shape is looked at.
        channels: size of the other operand's channel axis.
        trailing: how many axes that operand has after its channel axis.
        rank: of that operand; None where unknown, but at least 1.
    """
    shape = sizes_of(tensor)
    if len(shape) > (1 if rank is None else rank):
        return False
    position = len(shape) - 1 - trailing
    return all(size == 1 or (axis == position and size == channels) for axis, size in enumerate(shape))


@dataclass(frozen=True)
class Layer:
    """A Conv, ConvTranspose, Gemm or MatMul; with the Add of a constant that gives a MatMul its bias."""

    node: ir.Node
    add: ir.Node | None = None

    @property
    def source(self) -> ir.Value:
        """What the layer reads."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def end(self) -> ir.Node:
        """Its last node."""
        return self.add or self.node

    @property
    def bias(self) -> ir.Value | None:
        """The bias, if it has one."""
        if self.add is not None:
            return next(value for value in self.add.inputs if value is not self.node.outputs[0])
        return self.node.inputs[2] if len(self.node.inputs) > 2 else None

    @property
    def stored(self) -> bool:
        """Whether the weight comes with the model; False for a product of two run-time values."""
        return is_stored(self.node.inputs[1])

    @property
    def transposes(self) -> bool:
        """Whether it is a Gemm that transposes what it reads."""
        return self.node.op_type == "Gemm" and bool(int_attr(self.node, "transA", 0))

    @property
    def axis(self) -> int | None:
        """The axis of its output, from the front, that holds the channels; None where unknown."""
        return self.rank and self.rank - 1 if self.node.op_type == "MatMul" else 1

    @property
    def rank(self) -> int | None:
        """The rank of input and output, None where unknown."""
        if self.node.op_type != "MatMul":
            return len(self.weight().shape)
        shapes = (self.source.shape, self.node.outputs[0].shape)
        return next((len(shape) for shape in shapes if shape is not None), None)

    def weight(self) -> Weight:
        """The weight; its elements are not read.

        Raises:
            Declined: it is no constant, or of a form that is not handled.
        """
        return self._weight

    @cached_property
    def _weight(self) -> Weight:
        if has_reference(self.node):
            raise Declined("an attribute of the layer is a parameter of the function")
        value, op_type = self.node.inputs[1], self.node.op_type
        tensor = constant(value, "weight")
        assert value is not None
        shape = sizes_of(tensor)
        rank = len(shape)
        if 0 in shape or rank < 2 or (rank > 2) != ("Conv" in op_type):
            raise Declined(f"the weight of the {op_type} has rank {rank} or is empty")
        if "Conv" in op_type:
            return Weight(value, tensor, int_attr(self.node, "group", 1), op_type == "ConvTranspose")
        return Weight(value, tensor, 1, not int_attr(self.node, "transB", 0))

    def bias_array(self) -> np.ndarray:
        """What is added to W x, in float64: of shape `()`, `[outputs]`, or for a Gemm any that broadcasts.

        Raises:
            Declined: it is no constant, or does not run along the output channels.
        """
        if self.bias is None:
            return np.zeros(())
        tensor = constant(self.bias, "bias")
        array = tensor.numpy().astype(np.float64)
        if self.node.op_type == "Gemm":
            return array * float_attr(self.node, "beta", 1.0)
        if self.add is None:
            return array
        require_sole_reader(self.node)
        if not along(tensor, self.weight().outputs, 0, self.rank):
            raise Declined("the bias of the MatMul does not run along its output channels alone")
        return array.reshape(-1) if array.size > 1 else array.reshape(())

    def rebuilt(
        self, edit: Edit, source: ir.Value, tensor: ir.TensorProtocol, bias: np.ndarray | None
    ) -> ir.Value:
        """The layer anew in `edit`; its output.

        Args:
            edit: takes the new nodes and constants.
            source: what the layer reads.
            tensor: the weight, laid out as now; the present one is not stored again.
            bias: what is added to W x, as `bias_array` gives it; None leaves the bias as it is.

        Raises:
            Declined: the bias does not fit the weight's type, or would be larger than the weight.
        """
        old, bias_value, attributes = self.weight(), self.bias, dict(self.node.attributes.data)
        if bias is not None and (bias_value is not None or bias.any()):
            like = f"{old.value.name}_bias" if bias_value is None else bias_value.name
            bias_value = edit.constant(self._bias_tensor(bias, replace(old, tensor=tensor)), like)
            attributes.pop("beta", None)
        inputs = [source, old.value if tensor is old.tensor else edit.constant(tensor, old.value.name)]
        adds = self.node.op_type == "MatMul" and bias_value is not None
        inputs += [bias_value] if bias_value is not None and not adds else []
        output = edit.op(self.node.op_type, inputs, attributes, name=self.node.name or "")
        return (
            edit.op("Add", [output, bias_value], name=(self.add and self.add.name) or "") if adds else output
        )

    def _bias_tensor(self, bias: np.ndarray, weight: Weight) -> ir.TensorProtocol:
        if bias.size == 1 or self.node.op_type != "Gemm":
            bias = np.broadcast_to(bias.reshape(-1), weight.outputs)
        if bias.size > max(weight.outputs, weight.tensor.size):
            raise Declined("the bias would be larger than the weight")
        return rounded(bias, weight.tensor.dtype)


def layer_of(node: ir.Node | None) -> Layer | None:
    """The layer that ends in this node, if one does."""
    if node is None or node.domain:
        return None
    if node.op_type in LAYERS:
        return Layer(node) if len(node.inputs) > 1 and node.inputs[0] is not None else None
    for value, other in (node.inputs, node.inputs[::-1]) if node.op_type == "Add" else ():
        product = value.producer() if value is not None and is_stored(other) else None
        if product is not None and product.op_type == "MatMul" and not product.domain:
            return Layer(product, node)
    return None
