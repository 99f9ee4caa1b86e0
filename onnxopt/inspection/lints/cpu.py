"""What ONNX Runtime's CPU provider runs slowly in a quantized model.

Source: measurements of single operators and whole nets with ONNX Runtime 1.31, on x86 with VNNI.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from onnxopt.graph import sole_user
from onnxopt.inspection.lints.sight import WEIGHTED, Sight, dequantizer, numbers, ops, quantized_type, rule

__all__ = ["RULES"]

_MEASURED = "ONNX Runtime 1.31 on x86 with VNNI: measured"

_OPERANDS = {"MatMulInteger": (0, 1), "QLinearConv": (0, 3), "QLinearMatMul": (0, 3)}
"""Operators on integers: the numbers of the inputs that are multiplied."""
_NEVER = (
    *(
        "Clip",
        "ConvTranspose",
        "Div",
        "Elu",
        "Erf",
        "GlobalMaxPool",
        "HardSigmoid",
        "HardSwish",
        "Max",
        "Min",
    ),
    *("InstanceNormalization", "LayerNormalization", "PRelu", "Pad", "Pow", "ReduceMean", "ReduceSum"),
    *("Relu", "SpaceToDepth", "Sub", "Sum", "Tanh"),
)
"""Operators without an integer kernel."""
_MOVES = (
    *("DepthToSpace", "Expand", "Flatten", "Gather", "Identity", "MaxPool", "ReduceMax", "ReduceMin"),
    *("Reshape", "Slice", "Squeeze", "Tile", "Transpose", "Unsqueeze"),
)
"""Operators that work on integers as they are, if scale and zero point are the same on both sides."""
_ROUNDING = 1e-6
"""Of float32, relative: 255 times a rounded scale may lie above the bound that it was made from."""


@rule("signed-activations", "warning", _MEASURED, ops(*WEIGHTED, *_OPERANDS))
def _signed(node: ir.Node, seen: Sight) -> str | None:
    found = any(seen.dtype(one) == ir.DataType.INT8 and not seen.is_settled(one) for one in _operands(node))
    return f"{node.op_type} on activations in int8; quantize them to uint8 on x86" if found else None


@rule("unsigned-weights", "warning", _MEASURED, ops(*WEIGHTED, *_OPERANDS))
def _unsigned(node: ir.Node, seen: Sight) -> str | None:
    found = any(seen.dtype(one) == ir.DataType.UINT8 and seen.is_settled(one) for one in _operands(node))
    return f"{node.op_type} with weights in uint8; store them in int8" if found else None


def _operands(node: ir.Node) -> Iterator[ir.Value | None]:
    """The integers that a layer multiplies, where it does so in integers."""
    if node.op_type in _OPERANDS:
        yield from (node.inputs[index] for index in _OPERANDS[node.op_type])
        return
    quantizers = [one for one in map(dequantizer, node.inputs[:2]) if one is not None]
    yield from (one.inputs[0] for one in quantizers if len(quantizers) == 2)


@rule("signed-conv-integer", "warning", _MEASURED, ops("ConvInteger"))
def _conv_integer(node: ir.Node, seen: Sight) -> str | None:
    text = "ConvInteger with weights in int8, slower than float; quantize statically, or to uint8"
    return text if seen.dtype(node.inputs[1]) == ir.DataType.INT8 else None


@rule("conv-output-not-quantized", "warning", _MEASURED, ops("Conv"))
def _open_conv(node: ir.Node, seen: Sight) -> str | None:
    user = sole_user(node.outputs[0])
    if user is not None and _vanishes(user, seen):
        user = _quantizer(user)
    if not any(_operands(node)) or (user is not None and user.op_type == "QuantizeLinear"):
        return None
    return "a quantized Conv that gives float, and so computes in float; quantize its output"


@rule("no-integer-kernel", "warning", _MEASURED, ops(*_NEVER))
def _no_kernel(node: ir.Node, seen: Sight) -> str | None:
    advice = "write it as Add" if node.op_type == "Sum" else "leave it in float"
    between = dequantizer(node.inputs[0]) is not None and _quantizer(node) is not None
    found = between and not _vanishes(node, seen)
    return (
        f"{node.op_type} is quantized on both sides, but has no integer kernel; {advice}" if found else None
    )


@rule("unequal-scales", "warning", _MEASURED, ops(*_MOVES))
def _unequal(node: ir.Node, _: Sight) -> str | None:
    sides = [one for one in (dequantizer(node.inputs[0]), _quantizer(node)) if one is not None]
    known = [[numbers(value).tobytes() for value in one.inputs[1:]] for one in sides]
    text = f"{node.op_type} with another scale or zero point behind it than in front; use the same"
    return text if len(known) == 2 and known[0] != known[1] else None


@rule("sixteen-bits", "warning", _MEASURED, ops("QuantizeLinear"))
def _sixteen(node: ir.Node, seen: Sight) -> str | None:
    found = quantized_type(node, seen) in (ir.DataType.INT16, ir.DataType.UINT16)
    return "activations in 16 bits, for which there are no integer kernels; quantize to 8" if found else None


def _quantizer(node: ir.Node) -> ir.Node | None:
    """The QuantizeLinear that alone reads a node's output."""
    user = sole_user(node.outputs[0])
    return user if user is not None and user.op_type == "QuantizeLinear" else None


def _vanishes(node: ir.Node, seen: Sight) -> bool:
    """Whether it is a Relu or Clip that cuts off nothing but what the QuantizeLinear behind it does, too."""
    quantizer = _quantizer(node)
    if quantizer is None or node.op_type not in ("Relu", "Clip") or len(quantizer.inputs) < 3:
        return False
    scale, zero_point = map(numbers, quantizer.inputs[1:])
    kind = quantized_type(quantizer, seen)
    if scale.size != 1 or zero_point.size != 1 or kind is None:
        return False
    low, high = ((end - zero_point.item()) * scale.item() for end in (kind.min, kind.max))
    bounds = [numbers(value) for value in node.inputs[1:]]
    if node.op_type == "Relu" or [bound.size for bound in bounds] != [1, 1]:
        return node.op_type == "Relu" and low >= 0
    return bool(bounds[0].item() <= low and high * (1 - _ROUNDING) <= bounds[1].item())


RULES = (_signed, _unsigned, _conv_integer, _open_conv, _no_kernel, _unequal, _sixteen)
