"""What TensorRT 10 asks of QuantizeLinear and DequantizeLinear, and where it wants them.

Sources: the parser of onnx-tensorrt 10.1 and 10.15, NVIDIA's documents on explicit quantization, and what
ModelOpt leaves out.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from onnxopt.graph import int_attr
from onnxopt.inspection.contents import dtype_name
from onnxopt.inspection.lints.sight import (
    WEIGHTED,
    Sight,
    dequantizer,
    is_quantized,
    numbers,
    ops,
    quantized_type,
    readers,
    rule,
)
from onnxopt.inspection.lints.tensorrt import DOCUMENTS, SOURCE
from onnxopt.inspection.outline import Dims

__all__ = ["RULES"]

_LOG = f"{SOURCE}; 10.16: a published log"
_MODELOPT = "TensorRT 10: what ModelOpt leaves out"

_FOUR_BITS = (ir.DataType.INT4, ir.DataType.FLOAT4E2M1)
_TAKEN = (ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN, *_FOUR_BITS)
_NAMED = (ir.DataType.UINT8, ir.DataType.INT32)
"""Types that are refused by a rule of their own."""
_INSIDE = frozenset({"BatchNormalization", "Relu"})
_IN_INTEGERS = frozenset({*WEIGHTED, "Add", "AveragePool", "Concat", "GlobalAveragePool", "MaxPool"})
"""What is computed on int8, or passes it on, where its inputs are quantized."""
_NARROW = 16
"""Channels below which a layer in int8 is slow, or has no kernel at all."""

_BOTH = ops("QuantizeLinear", "DequantizeLinear")


@rule("uint8-quantization", "error", SOURCE, _BOTH)
def _uint8(node: ir.Node, seen: Sight) -> str | None:
    found = quantized_type(node, seen) == ir.DataType.UINT8 and not _is_default(node)
    return f"{node.op_type} of uint8, refused or read as int8; quantize to int8" if found else None


@rule("default-zero-point", "error", SOURCE, ops("QuantizeLinear"))
def _default(node: ir.Node, _: Sight) -> str | None:
    text = "no zero point, which means uint8 in ONNX and int8 in TensorRT; give it an int8 zero point of 0"
    return text if _is_default(node) else None


def _is_default(node: ir.Node) -> bool:
    typed = (len(node.inputs) > 2 and node.inputs[2] is not None) or int_attr(node, "output_dtype", 0)
    return node.op_type == "QuantizeLinear" and not typed


@rule("int32-dequantize", "error", _LOG, ops("DequantizeLinear"))
def _int32(node: ir.Node, seen: Sight) -> str | None:
    found = quantized_type(node, seen) == ir.DataType.INT32
    return "DequantizeLinear of int32; leave the bias in float" if found else None


@rule("quantized-type", "error", SOURCE, _BOTH)
def _other_type(node: ir.Node, seen: Sight) -> str | None:
    kind = quantized_type(node, seen)
    text = f"{node.op_type} of {dtype_name(kind)}; quantize to int8 or float8e4m3fn (weights also to int4)"
    return None if kind in (*_TAKEN, *_NAMED, None) else text


@rule("nonzero-zero-point", "error", _LOG, _BOTH)
def _nonzero(node: ir.Node, _: Sight) -> str | None:
    found = len(node.inputs) > 2 and numbers(node.inputs[2]).any()
    return "a zero point other than 0; quantize symmetrically" if found else None


@rule("scale-not-positive", "error", SOURCE, _BOTH)
def _scale(node: ir.Node, _: Sight) -> str | None:
    found = not (numbers(node.inputs[1]) > 0).all()
    return "a scale that is not positive; give it a small positive one" if found else None


@rule("scale-not-constant", "error", DOCUMENTS, _BOTH)
def _computed_scale(node: ir.Node, seen: Sight) -> str | None:
    found = not all(map(seen.is_settled, node.inputs[1:]))
    return "a scale or zero point that depends on the data; quantize with fixed ones" if found else None


@rule("scale-size", "error", SOURCE, _BOTH)
def _size(node: ir.Node, seen: Sight) -> str | None:
    data, scale, zero_point = (*map(seen.dims, node.inputs), None)[:3]
    number = _volume(scale)
    if number is None:
        return None
    if _volume(zero_point) not in (number, None):
        return f"{number} scales with {_volume(zero_point)} zero points; give as many of both"
    problem = _misfit(node, data, scale or ()) if number != 1 and data is not None else None
    return problem and f"{problem}; give one scale a channel, or a block along one axis"


def _misfit(node: ir.Node, data: Dims, scale: Dims) -> str | None:
    """What keeps several scales from their data, one for a channel or a block."""
    if len(scale) == 1:
        axis = int_attr(node, "axis", 1)
        size = data[axis] if -len(data) <= axis < len(data) else 0
        fits = not isinstance(size, int) or size == scale[0]
        return None if fits else f"{scale[0]} scales for {size} channels"
    if len(scale) != len(data):
        return f"scales in {len(scale)} dimensions for data in {len(data)}"
    pairs = [(a, b) for a, b in zip(data, scale, strict=True) if isinstance(a, int) and isinstance(b, int)]
    blocked = [(a, b) for a, b in pairs if a != b]
    whole = len(blocked) < 2 and all(b and a % b == 0 for a, b in blocked)
    return None if whole else f"scales of {list(scale)} for data of {list(data)}"


def _volume(dims: Dims | None) -> int | None:
    known = [dim for dim in dims or () if isinstance(dim, int)]
    return None if dims is None or len(known) < len(dims) else math.prod(known)


@rule("per-axis-activation", "error", DOCUMENTS, _BOTH)
def _per_axis(node: ir.Node, seen: Sight) -> str | None:
    found = _volume(seen.dims(node.inputs[1])) not in (1, None) and not seen.is_settled(node.inputs[0])
    return "activations with more than one scale; quantize them with one" if found else None


@rule("int4-odd-dimension", "error", SOURCE, _BOTH)
def _four_bits(node: ir.Node, seen: Sight) -> str | None:
    dims = seen.dims(node.inputs[0]) if quantized_type(node, seen) in _FOUR_BITS else None
    odd = dims and isinstance(dims[-1], int) and dims[-1] % 2
    return "4-bit data of an odd last dimension; pad it (10.15 asks only for an even size)" if odd else None


@rule("partly-quantized", "warning", DOCUMENTS, ops(*WEIGHTED))
def _partly(node: ir.Node, seen: Sight) -> str | None:
    quantizers = [dequantizer(value) for value in node.inputs[:2]]
    kinds = [quantized_type(one, seen) for one in quantizers if one is not None]
    if len(kinds) != 1 or kinds[0] in _FOUR_BITS:
        return None
    free = quantizers.index(None)
    return f"input {free} of {node.op_type} is float, the other quantized; quantize both, or neither"


@rule("quantize-inside-fusion", "warning", DOCUMENTS, ops(*WEIGHTED))
def _inside(node: ir.Node, _: Sight) -> str | None:
    after = sorted(_readers_of_quantized(node) & _INSIDE)
    return f"{node.op_type} is quantized in front of its {after[0]}; quantize behind that" if after else None


@rule("output-quantized", "warning", DOCUMENTS, ops(*WEIGHTED))
def _output(node: ir.Node, _: Sight) -> str | None:
    after = _readers_of_quantized(node)
    found = after and not after & (_INSIDE | _IN_INTEGERS)
    return f"{node.op_type} gives int8, but no layer in int8 reads it; leave it in float" if found else None


def _readers_of_quantized(node: ir.Node) -> set[str]:
    """What reads the output of a quantized layer, dequantized; "" is an output of the graph."""
    behind = [user for user in readers(node.outputs[0]) if user.op_type == "QuantizeLinear"]
    values = [user.outputs[0] for one in behind if is_quantized(node) for user in readers(one.outputs[0])]
    found = {user.op_type for value in values for user in readers(value)}
    return found | {"" for value in values if value.is_graph_output()}


@rule("residual-not-quantized", "warning", DOCUMENTS, ops("Add"))
def _residual(node: ir.Node, seen: Sight) -> str | None:
    free = not any(dequantizer(value) is not None or seen.is_settled(value) for value in node.inputs)
    found = free and any(map(_is_layer, node.inputs))
    return "a quantized layer is added to a float residual; quantize that, so they fuse" if found else None


def _is_layer(value: ir.Value | None) -> bool:
    """Whether a value is of a quantized layer, a BatchNormalization behind it or not."""
    node = None if value is None else value.producer()
    if node is not None and node.op_type == "BatchNormalization" and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node is not None and node.op_type in WEIGHTED and is_quantized(node)


@rule("narrow-layer", "warning", _MODELOPT, ops(*WEIGHTED))
def _narrow(node: ir.Node, seen: Sight) -> str | None:
    if not is_quantized(node):
        return None
    if node.op_type in ("Gemm", "MatMul"):
        single = 1 in (seen.dims(node.outputs[0]) or ())[-2:]
        return f"{node.op_type} of a single row or column in int8; leave it in float" if single else None
    first, second = (*(seen.dims(node.inputs[1]) or ()), None, None)[:2]
    if not isinstance(first, int) or not isinstance(second, int):
        return None
    channels = min(first, second * int_attr(node, "group", 1))
    text = f"{node.op_type} of {channels} channels in int8; leave it in float, there may be no kernel"
    return text if channels < _NARROW else None


RULES = (
    *(_uint8, _default, _int32, _other_type, _nonzero, _scale, _computed_scale, _size, _per_axis, _four_bits),
    *(_partly, _inside, _output, _residual, _narrow),
)
