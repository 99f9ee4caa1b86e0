"""Quantized graphs as they are trained: what is stored as integers is held as the floats they stand for.

An integer weight becomes a float that is rounded to its integers as the graph runs, and an int32 bias a float
that is not. QuantizeLinear and the DequantizeLinear behind it are one step; an operator on quantized data is
the float operator between DequantizeLinear and QuantizeLinear.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import onnx_ir as ir
from torch import Tensor

from onnxopt.graph import constant_array, constant_of, int_attr
from onnxopt.index import operator_of
from onnxopt.ledger import site_of
from onnxopt.passes.shared.quantized import (
    DEQUANTIZE,
    QUANTIZE,
    QUANTIZED,
    Port,
    input_of,
    quantized_kind,
    require_same,
)
from onnxopt.quantization.formats import INTEGERS
from onnxopt.rewrite import Declined
from onnxopt.training.interpreter.ops.quantize import dequantize, quantize, require_fit
from onnxopt.training.interpreter.values import CARRIERS, Host, host_of, tensor_of

if TYPE_CHECKING:
    from onnxopt.training.interpreter.build import Builder

__all__ = [
    "WITHIN",
    "BiasScale",
    "Reading",
    "add_quantized",
    "bias_scale",
    "called",
    "floats_of",
    "integers_of",
    "reading",
]

WITHIN = "onnxopt.training.within"
"""In the `meta` of a value: the least and the largest integer that training may give it."""


class Reading(NamedTuple):
    """How stored integers are read: by which node, with which scales (more than one: their product).

    within: the least and the largest integer, where that is less than the type holds.
    """

    node: ir.Node
    scales: tuple[ir.Value, ...]
    zero: ir.Value | None
    axis: int
    block_size: int
    within: tuple[int, int] | None = None

    def scale(self, now: Mapping[ir.Value, Tensor] | None = None) -> Tensor:
        """The scale, with what training has made of it."""
        found = [(now or {}).get(one, _constant(one)) for one in self.scales]
        return found[0] if len(found) == 1 else found[0].reshape(-1) * found[1].reshape(-1)


def _constant(value: ir.Value) -> Tensor:
    tensor = constant_of(value)
    assert tensor is not None
    return tensor_of(tensor.numpy(), tensor.dtype)


def reading(value: ir.Value) -> Reading | None:
    """How a constant of integers is read, if it is always dequantized, and always alike."""
    found: list[Reading] = []
    for node, position in value.uses():
        one = _reading(node, position)
        if one is None or any(constant_of(scale) is None for scale in one.scales):
            return None
        if one.zero is not None and constant_of(one.zero) is None:
            return None
        found.append(one)
    alike = len({one[1:] for one in found}) == 1
    if not alike or value.is_graph_output():
        return None
    return found[0]._replace(within=value.meta.get(WITHIN))


def _reading(node: ir.Node, position: int) -> Reading | None:
    row = QUANTIZED.get(operator_of(node))
    if row is None:
        return None
    if row.bias == position and row.float_op and len(row.inputs) == 2:
        scales = [input_of(node, port.scale) for port in row.inputs]
        given = tuple(scale for scale in scales if scale is not None)
        return Reading(node, given, None, 0, 0) if len(given) == 2 else None
    port = next((port for port in row.ports(node) if port.data == position), None)
    if port is None or port.scale is None:
        return None
    scale = input_of(node, port.scale)
    axis, block = _axis(node, port), int_attr(node, "block_size", 0)
    return None if scale is None else Reading(node, (scale,), input_of(node, port.zero), axis, block)


def _axis(node: ir.Node, port: Port) -> int:
    """The axis of scales and zero points that are more than one."""
    if operator_of(node) in (*DEQUANTIZE, *QUANTIZE):
        return int_attr(node, "axis", 1)
    if node.op_type == "QGemm":
        return 0 if int_attr(node, "transB", 0) else 1
    return 0 if node.op_type == "QLinearConv" else -1 if port.data else -2


class BiasScale(NamedTuple):
    """The scale of an int32 bias, and those of the operands that it is the product of."""

    scale: ir.Value
    factors: tuple[ir.Value, ir.Value]

    def product(self, now: Mapping[ir.Value, Tensor]) -> Tensor:
        """The scale as it should be, in the shape that it has."""
        first, second = (now.get(one, _constant(one)).reshape(-1) for one in self.factors)
        return (first * second).reshape(_constant(self.scale).shape)


def bias_scale(bias: ir.Value) -> BiasScale | None:
    """That of a bias behind DequantizeLinear, where both operands of its product are dequantized, too.

    A bias that several layers read has the scale of the first: it is one tensor, and so are its numbers.
    """
    one = reading(bias)
    if one is None or operator_of(one.node) not in DEQUANTIZE:
        return None
    for user, position in one.node.outputs[0].uses():
        product = user
        if user.op_type == "Add":
            other = user.inputs[1 - position]
            product = (other.producer() if other is not None else None) or user
        before = [value.producer() if value is not None else None for value in product.inputs[:2]]
        scales = [n.inputs[1] for n in before if n is not None and operator_of(n) in DEQUANTIZE]
        if product is not one.node and len(scales) == 2 and product.op_type != "Add":
            first, second = scales
            if first is not None and second is not None and constant_of(first) and constant_of(second):
                return BiasScale(one.scales[0], (first, second))
    return None


def _zero(one: Reading) -> Host | None:
    return None if one.zero is None else host_of(_constant(one.zero))


def floats_of(tensor: ir.TensorProtocol, one: Reading) -> Tensor:
    """The floats that stored integers stand for.

    Raises:
        ModelError: the scale is not of their shape.
    """
    integers, scale = tensor_of(tensor.numpy(), tensor.dtype), one.scale()
    require_fit(integers, scale, one.axis, one.block_size, called(one.node))
    return dequantize(integers, scale, _zero(one), one.axis, one.block_size)


def integers_of(x: Tensor, dtype: ir.DataType, one: Reading, scale: Tensor) -> Tensor:
    """The integers that stand for floats, in their carrier."""
    wide = x.double() if dtype == ir.DataType.INT32 else x
    found = quantize(wide, scale, _zero(one), dtype, one.axis, one.block_size)
    return (found.clamp(*one.within) if one.within else found).to(CARRIERS[dtype])


def called(node: ir.Node) -> str:
    """What messages call a node: ``DequantizeLinear 'x_dq'``, by its output."""
    return f"{node.op_type} {site_of(node)!r}"


def add_quantized(builder: Builder, node: ir.Node) -> bool:
    """Add the steps of a node on quantized data; False: it needs none of its own."""
    row = QUANTIZED.get(operator_of(node))
    if row is None:
        return False
    if operator_of(node) in QUANTIZE:
        return _add_pair(builder, node)
    if operator_of(node) in DEQUANTIZE:
        return _add_stored(builder, node.inputs[0], node.outputs[0])
    if row.float_op:
        _add_operator(builder, node)
    return bool(row.float_op)


def _add_pair(builder: Builder, node: ir.Node) -> bool:
    """QuantizeLinear of which there is nothing but its DequantizeLinear."""
    uses, value = list(node.outputs[0].uses()), node.outputs[0]
    dtype = quantized_kind(node)
    if not uses or value.is_graph_output() or dtype not in INTEGERS:
        return False
    if any(operator_of(use.node) not in DEQUANTIZE or use.node.graph is not node.graph for use in uses):
        return False
    try:
        for use in uses:
            require_same(node, use.node)
    except Declined:
        return False
    axis, block = int_attr(node, "axis", 1), int_attr(node, "block_size", 0)
    outputs = [use.node.outputs[0] for use in uses]
    scale = node.inputs[1]
    assert scale is not None
    slot = builder.slot(node.inputs[0], False)
    _fake(builder, slot, outputs, Reading(node, (scale,), input_of(node, 2), axis, block), dtype)
    builder.done.update(use.node for use in uses)
    return True


def _add_stored(builder: Builder, data: ir.Value | None, output: ir.Value | None) -> bool:
    """What is stored as integers and held as floats."""
    state = builder.states.get(data) if data is not None else None
    if state is None or data is None or output is None or state.form == "float":
        return False
    slot = builder.slot(data, False)
    if state.form == "bias":
        builder.slots[output, False] = slot
        return True
    tensor, one = constant_of(data), reading(data)
    assert tensor is not None
    assert one is not None
    _fake(builder, slot, [output], one, tensor.dtype)
    return True


def _fake(builder: Builder, slot: int, outputs: list[ir.Value], one: Reading, dtype: ir.DataType) -> None:
    """Rounding to the integers of a type and back. One zero point for all goes as a number."""
    options: dict[str, Any] = {"axis": one.axis, "block_size": one.block_size, "output_dtype": int(dtype)}
    options["within"] = one.within
    inputs = [slot, builder.slot(one.scales[0], False)]
    zeros = constant_array(one.zero)
    if zeros is not None and zeros.size and (zeros == zeros.flat[0]).all():
        options["offset"] = float(zeros.flat[0])
    elif one.zero is not None:
        inputs.append(builder.slot(one.zero, True))
    number = builder.emit("onnxopt", "FakeQuantize", inputs, options, one.node)
    for value in outputs:
        builder.slots[value, False] = number


def _add_operator(builder: Builder, node: ir.Node) -> None:
    """DequantizeLinear of each operand, the float operator, and QuantizeLinear of the result."""
    row = QUANTIZED[operator_of(node)]
    operands: dict[int, int] = {}
    for port in row.ports(node):
        data = node.inputs[port.data]
        assert data is not None
        between = ir.Value(name=data.name)
        if _add_stored(builder, data, between):
            operands[port.data] = builder.slots[between, False]
            continue
        inputs = [builder.slot(data, False), builder.slot(input_of(node, port.scale), False)]
        inputs.append(builder.slot(input_of(node, port.zero), True))
        options = {"axis": _axis(node, port)}
        operands[port.data] = builder.emit("", "DequantizeLinear", inputs, options, node)
    if (row.float_op == "MatMul" and len(operands) == 1) or row.float_op == "Where":
        operands[0] = builder.slot(node.inputs[0], False)
    bias = input_of(node, row.bias)
    if bias is not None and row.float_op != "MatMul":
        operands[row.bias or 0] = builder.slot(bias, False)
    ordered = [operands[place] for place in sorted(operands)]
    result = builder.emit("", row.float_op, ordered, builder.attributes(node), node)
    if bias is not None and row.float_op == "MatMul":
        result = builder.emit("", "Add", [result, builder.slot(bias, False)], {}, node)
    if row.result is not None:
        scale, zero = input_of(node, row.result.scale), input_of(node, row.result.zero)
        inputs = [result, builder.slot(scale, False), builder.slot(zero, True)]
        result = builder.emit("", "QuantizeLinear", inputs, {}, node, zero.dtype if zero else None)
    builder.slots[node.outputs[0], False] = result
