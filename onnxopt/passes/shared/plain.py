"""Quantized operators in the words of floating-point ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, float_attr, has_reference, int_attr
from onnxopt.index import operator_of
from onnxopt.passes.shared.quantized import QUANTIZED, SMALL, Quantized, carried, input_of, shape_of
from onnxopt.pattern import Patterns
from onnxopt.quantization.formats import FORMATS, QuantParams, dequantize
from onnxopt.rewrite import AttributeValue, Declined, Edit, NewerOpset
from onnxopt.scope import Scope

__all__ = ["PLAIN", "SCALED", "plain", "scaled", "unpacked"]

PLAIN = tuple(operator for operator, row in QUANTIZED.items() if row.float_op)
"""Operators that `plain` knows."""

_PATTERNS = Patterns(
    {name: f"Mul(Cast((p := {name}(a, b, ...))), s, t)" for name in ("ConvInteger", "MatMulInteger")}
)
SCALED = _PATTERNS.op_types
"""Operators that `scaled` ends in."""


def plain(node: ir.Node, scope: Scope) -> Edit | None:
    """A quantized operator as a floating-point one between DequantizeLinear and QuantizeLinear.

    Raises:
        Declined: scales are computed at run time or have unknown shapes; the layout is channels-last.
    """
    row, attributes = QUANTIZED[operator_of(node)], _plain_attributes(node, scope)
    edit, axis = Edit(node, scope), {"Conv": 0, "Gemm": 1 - int_attr(node, "transB", 0)}.get(row.float_op, -1)
    inputs = [node.inputs[0]] if row.ports(node)[0].data == 1 else []  # a condition, or an operand in floats
    for index, port in enumerate(row.ports(node)):
        data, scale, zero = (input_of(node, place) for place in port)
        inputs.append(_floats(edit, data, scale, zero, axis if index == row.weight else None, scope))
    bias = input_of(node, row.bias)
    if bias is not None and row.float_op != "MatMul":
        inputs.append(_float_bias(edit, node, row, bias, scope))
    result = edit.op(row.float_op, inputs, attributes)
    if bias is not None and row.float_op == "MatMul":
        result = edit.op("Add", (result, bias))
    if row.result is not None and (scale := input_of(node, row.result.scale)) is not None:
        scale, zero = _numbers(edit, scale, input_of(node, row.result.zero), None, scope)
        if zero is None:
            kind = node.outputs[0].dtype
            if kind is None:
                raise Declined("the type of the result is unknown")
            zero = edit.constant(np.zeros((), kind.numpy()), "zero_point")
        result = edit.op("QuantizeLinear", (result, scale, zero))
    return edit.replace(node.outputs[0], result)


def scaled(node: ir.Node, scope: Scope) -> Edit | None:
    """A product of integers that is scaled afterwards as one of operands that are scaled before.

    Raises:
        Declined: the scales are not those of the operands.
    """
    match = _PATTERNS.find(node, scope, shared=True)
    if match is None:
        return None
    product, scales, source = match.node("p"), [match["s"], match["t"]], match["a"]
    while (maker := source.producer()) is not None and (moves := carried(maker)) and len(moves[0]) == 1:
        source = maker.inputs[0] or source
    if maker is None or maker.op_type != "DynamicQuantizeLinear" or source is not maker.outputs[0]:
        raise Declined("its first operand is not quantized dynamically")
    if maker.outputs[1] not in scales or input_of(product, 2) is not maker.outputs[2]:
        raise Declined("its first operand has another scale or zero point")
    scales.remove(maker.outputs[1])
    shape, rank = shape_of(scales[0]), len(shape_of(match["b"]) or ())
    axis = -1 if product.op_type == "MatMulInteger" else -rank
    along = axis if axis == -1 else 1 - rank  # where the products have the channels
    if shape is None or not rank or any(size > 1 for i, size in enumerate(shape) if i - len(shape) != along):
        raise Declined("the scale of its second operand is of an unknown shape or no row of channels")
    edit = Edit(node, scope)
    first = edit.op("DequantizeLinear", (match["a"], *maker.outputs[1:]))
    second = _floats(edit, match["b"], scales[0], input_of(product, 3), axis, scope)
    op_type = product.op_type.removesuffix("Integer")
    return edit.replace(node.outputs[0], edit.op(op_type, (first, second), product.attributes))


def unpacked(node: ir.Node, scope: Scope) -> Edit | None:
    """A MatMulNBits as MatMul by the floats that its blocks of integers stand for.

    Raises:
        Declined: an operand is computed at run time, or rows are in another order.
    """
    if has_reference(node) or input_of(node, 4) is not None:
        raise Declined("its rows are in another order, or an attribute refers to the enclosing function")
    rows, columns, bits = (int_attr(node, name, 4) for name in ("N", "K", "bits"))
    blocks = -(-columns // int_attr(node, "block_size", 1))
    packed, scales = constant_array(input_of(node, 1)), constant_array(input_of(node, 2))
    given = input_of(node, 3)
    zeros = np.full((rows, blocks), 1 << (bits - 1)) if given is None else constant_array(given)
    if packed is None or scales is None or zeros is None or bits not in (2, 4, 8):
        raise Declined("an operand is computed at run time")
    if zeros.dtype == np.uint8:
        zeros = _unpack(zeros.reshape(rows, -1), bits)[:, :blocks]
    params = QuantParams(scales.reshape(rows, blocks, 1), zeros.reshape(rows, blocks, 1), FORMATS["uint8"])
    integers = _unpack(packed.reshape(rows, blocks, -1), bits)
    floats = dequantize(integers, params).reshape(rows, -1)[:, :columns].T.astype(scales.dtype)
    edit = Edit(node, scope)
    result = edit.op("MatMul", (node.inputs[0], edit.constant(np.ascontiguousarray(floats), "weight")))
    bias = input_of(node, 5)
    return edit.replace(node.outputs[0], result if bias is None else edit.op("Add", (result, bias)))


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Bytes as numbers of so many bits, the lowest first."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    numbers = (packed[..., None] >> shifts) & np.uint8((1 << bits) - 1)
    return numbers.reshape(*packed.shape[:-1], -1)


def _plain_attributes(node: ir.Node, scope: Scope) -> dict[str, AttributeValue]:
    """The attributes of the floating-point operator."""
    if has_reference(node):
        raise Declined("an attribute refers to one of the enclosing function")
    if int_attr(node, "channels_last", 0):
        raise Declined("its channels are last")
    attributes: dict[str, AttributeValue] = dict(node.attributes)
    attributes.pop("channels_last", None)
    if node.op_type == "QLinearSoftmax":
        if (int_attr(node, "opset", 13) >= 13) != (scope.opset >= 13):
            raise Declined("it is the Softmax of another opset")
        attributes.pop("opset", None)
        attributes.setdefault("axis", -1)
    return attributes


def _floats(
    edit: Edit,
    data: ir.Value | None,
    scale: ir.Value | None,
    zero: ir.Value | None,
    axis: int | None,
    scope: Scope,
) -> ir.Value:
    """A DequantizeLinear of an operand, which may have a scale for each index of `axis`."""
    scale, zero = _numbers(edit, scale, zero, axis, scope)
    attributes = {} if shape_of(scale) in ((), None) or axis is None else {"axis": axis}
    inputs = (data, scale) if zero is None else (data, scale, zero)
    return edit.op("DequantizeLinear", inputs, attributes)


def _numbers(
    edit: Edit, scale: ir.Value | None, zero: ir.Value | None, axis: int | None, scope: Scope
) -> tuple[ir.Value, ir.Value | None]:
    """Scale and zero point as DequantizeLinear takes them: one of each, or one for each index of an axis."""
    maker = None if scale is None else scale.producer()
    if scale is not None and maker is not None and maker.op_type == "DynamicQuantizeLinear":
        return scale, zero
    scales, zeros = constant_array(scale, SMALL), constant_array(zero, SMALL)
    if scale is None or scales is None or (zero is not None and zeros is None):
        raise Declined("scale or zero point are computed at run time")
    size = max(scales.size, 1 if zeros is None else zeros.size)
    if size > 1 and axis is None:
        raise Declined("an activation is quantized by channel")
    if size > 1 and scope.opset < 13:
        raise NewerOpset("DequantizeLinear by channel", 13)
    shape: tuple[int, ...] = () if size == 1 else (size,)

    def fitted(value: ir.Value, array: np.ndarray) -> ir.Value:
        if array.shape == shape:
            return value
        return edit.constant(np.broadcast_to(array.reshape(-1), size).reshape(shape).copy(), value.name)

    return fitted(scale, scales), None if zero is None or zeros is None else fitted(zero, zeros)


def _float_bias(edit: Edit, node: ir.Node, row: Quantized, bias: ir.Value, scope: Scope) -> ir.Value:
    """An int32 bias, whose scale is the product of the operands' scales."""
    scales = [constant_array(input_of(node, port.scale), SMALL) for port in row.inputs]
    if scales[0] is None or scales[1] is None:
        raise Declined("a scale is computed at run time")
    product = scales[0].reshape(-1) * scales[1].reshape(-1) * np.float32(float_attr(node, "alpha", 1.0))
    size, rank = product.size, len(shape_of(bias) or ())
    if size > 1 and scope.opset < 13:
        raise NewerOpset("DequantizeLinear by channel", 13)
    scale = edit.constant(product.astype(np.float32).reshape(() if size == 1 else size), "scale")
    return edit.op("DequantizeLinear", (bias, scale), {} if size == 1 else {"axis": max(rank, 1) - 1})
