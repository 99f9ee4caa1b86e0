"""What keeps single nodes from becoming integer kernels: their attributes and operands."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from onnxopt.graph import constant_of, float_attr, int_attr, sizes_of, str_attr

__all__ = ["OVERRIDABLE", "objection_to"]

OVERRIDABLE = "its {} is a graph input (overridable; --freeze-initializers makes it constant)"


def objection_to(node: ir.Node) -> str | None:
    """Why a node has no integer kernel, though its operator has one; None where it may have."""
    return _OBJECTIONS[node.op_type](node) if node.op_type in _OBJECTIONS else None


def _conv(node: ir.Node) -> str | None:
    tensor = constant_of(node.inputs[1])
    if tensor is not None and tensor.dtype != ir.DataType.FLOAT:
        return f"its weight is of type {tensor.dtype.name}"
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    if bias is not None and constant_of(bias) is None:
        return OVERRIDABLE.format("bias") if bias.is_initializer() else "its bias is no constant"
    return None


def _gemm(node: ir.Node) -> str | None:
    if float_attr(node, "alpha", 1.0) != 1 or int_attr(node, "transA", 0):
        return "its factors are scaled or transposed"
    if constant_of(node.inputs[0]) is not None:
        return "its first factor is a constant"
    c = node.inputs[2] if len(node.inputs) > 2 else None
    if c is None:
        return _conv(node)
    bias, weight = constant_of(c), constant_of(node.inputs[1])
    if weight is None and node.inputs[1] is not None and node.inputs[1].is_initializer():
        return OVERRIDABLE.format("weight")
    if weight is None:
        return "it has a bias, and its weight is computed at run time"
    if bias is None or float_attr(node, "beta", 1.0) != 1:
        return _conv(node) or "its bias is scaled"
    columns = sizes_of(weight)[0 if int_attr(node, "transB", 0) else 1]
    if sizes_of(bias) not in ((columns,), (1, columns)):
        return "its bias has not one number a column"
    return _conv(node)


def _matmul(node: ir.Node) -> str | None:
    for value in node.inputs:
        tensor = constant_of(value)
        if tensor is not None and (tensor.dtype != ir.DataType.FLOAT or len(sizes_of(tensor)) < 2):
            return "its weight is no matrix of float32"
    return None


def _resize(node: ir.Node) -> str | None:
    if str_attr(node, "mode", "nearest") != "nearest":
        return "it interpolates"
    crops = str_attr(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    return "it crops" if crops else None


def _average_pool(node: ir.Node) -> str | None:
    return "its windows are dilated" if "dilations" in node.attributes else None


def _softmax(node: ir.Node) -> str | None:
    """ONNX Runtime's kernel wants the range 0 to 1, which is too coarse for long axes."""
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    axis = int_attr(node, "axis", -1)
    if shape is None or axis in (-1, len(shape) - 1):
        return "along the last axis floats are ten times as fast"
    size = shape.dims[axis]
    known = isinstance(size, int) and size > 1
    return None if known else "its axis is not known to have two elements, and of one its kernel gives 0"


def _hard_sigmoid(node: ir.Node) -> str | None:
    return None if float_attr(node, "alpha", 0.2) > 0 else "it does not rise"


_OBJECTIONS: Mapping[str, Callable[[ir.Node], str | None]] = {
    "AveragePool": _average_pool,
    "Conv": _conv,
    "ConvTranspose": _conv,
    "Gemm": _gemm,
    "HardSigmoid": _hard_sigmoid,
    "MatMul": _matmul,
    "Resize": _resize,
    "Softmax": _softmax,
}
