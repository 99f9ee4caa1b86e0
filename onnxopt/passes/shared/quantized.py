"""Operators on quantized data: which inputs are integers, and where their scales and zero points are.

Sources: ONNX operators, and ContribOperators.md of ONNX Runtime for the domain com.microsoft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import onnx_ir as ir

from onnxopt.graph import (
    constant_array,
    constant_of,
    has_reference,
    int_attr,
    sizes_of,
    static_shape,
    str_attr,
)
from onnxopt.index import operator_of
from onnxopt.quantization.formats import FORMATS, Format, QuantParams, dequantize, quantize
from onnxopt.rewrite import Declined
from onnxopt.streamed import is_on_disk, mapped

__all__ = [
    "CARRIERS",
    "DEQUANTIZE",
    "MS",
    "QUANTIZE",
    "QUANTIZED",
    "SMALL",
    "Port",
    "Quantized",
    "carried",
    "input_of",
    "pads_with_number",
    "quantized_kind",
    "require_same",
    "shape_of",
    "spread",
    "stored_floats",
    "stored_integers",
]

SMALL = 1 << 20
"""Bytes: no scale or zero point that is looked at is larger."""

_BIAS = Format("int32", ir.DataType.INT32, -(2**31), 2**31 - 1, 10, 32)
_BY_TYPE = {form.dtype: form for form in (*FORMATS.values(), _BIAS)}

MS = "com.microsoft::"
QUANTIZE = ("QuantizeLinear", MS + "QuantizeLinear")
DEQUANTIZE = ("DequantizeLinear", MS + "DequantizeLinear")


class Port(NamedTuple):
    """Positions of quantized data (of a result: the output), its scale (None: it has none) and zero point."""

    data: int
    scale: int | None
    zero: int


@dataclass(frozen=True)
class Quantized:
    """An operator on quantized data.

    inputs: the quantized operands. result: where it gives one. float_op: what it computes, in floats.
    weight: which of `inputs` may be of another type than the rest. bias: position of a bias; an int32 one has
    the product of the operands' scales.
    """

    inputs: tuple[Port, ...]
    result: Port | None = None
    float_op: str = ""
    weight: int | None = None
    bias: int | None = None

    def ports(self, node: ir.Node) -> tuple[Port, ...]:
        """The quantized operands of a node; those of QLinearConcat are as many as there are."""
        if self.float_op != "Concat":
            return self.inputs
        return tuple(Port(i, i + 1, i + 2) for i in range(2, len(node.inputs), 3))


_ONE, _TWO = (Port(0, 1, 2),), (Port(0, 1, 2), Port(3, 4, 5))
_UNARY, _BINARY = (_ONE, Port(0, 3, 4)), (_TWO, Port(0, 6, 7))
_INTEGERS = Quantized((Port(0, None, 2), Port(1, None, 3)), weight=1)
QUANTIZED = {
    **dict.fromkeys(QUANTIZE, Quantized((), Port(0, 1, 2))),
    **dict.fromkeys(DEQUANTIZE, Quantized(_ONE)),
    "ConvInteger": _INTEGERS,
    "MatMulInteger": _INTEGERS,
    "QLinearConv": Quantized(*_BINARY, "Conv", weight=1, bias=8),
    "QLinearMatMul": Quantized(*_BINARY, "MatMul", weight=1),
    MS + "QGemm": Quantized(_TWO, Port(0, 7, 8), "Gemm", weight=1, bias=6),
    MS + "MatMulIntegerToFloat": Quantized((Port(0, 2, 4), Port(1, 3, 5)), None, "MatMul", weight=1, bias=6),
    MS + "DynamicQuantizeMatMul": Quantized((Port(1, 2, 3),), None, "MatMul", weight=0, bias=4),
    MS + "QLinearAdd": Quantized(*_BINARY, "Add"),
    MS + "QLinearMul": Quantized(*_BINARY, "Mul"),
    MS + "QLinearWhere": Quantized((Port(1, 2, 3), Port(4, 5, 6)), Port(0, 7, 8), "Where"),
    MS + "QLinearConcat": Quantized((), Port(0, 0, 1), "Concat"),
    MS + "QLinearSigmoid": Quantized(*_UNARY, "Sigmoid"),
    MS + "QLinearLeakyRelu": Quantized(*_UNARY, "LeakyRelu"),
    MS + "QLinearSoftmax": Quantized(*_UNARY, "Softmax"),
    MS + "QLinearAveragePool": Quantized(*_UNARY, "AveragePool"),
    MS + "QLinearGlobalAveragePool": Quantized(*_UNARY, "GlobalAveragePool"),
}
"""By operator, as rules name it."""

CARRIERS: dict[str, tuple[int, ...] | None] = {
    **dict.fromkeys(("Concat", "Max", "Min"), None),
    "Where": (1, 2),
    **dict.fromkeys(
        (
            *(
                "DepthToSpace",
                "Expand",
                "Flatten",
                "Gather",
                "GatherElements",
                "GatherND",
                "Identity",
                "MaxPool",
            ),
            *(
                "ReduceMax",
                "ReduceMin",
                "Pad",
                "Reshape",
                "Resize",
                "Slice",
                "SpaceToDepth",
                "Split",
                "Squeeze",
            ),
            *("Tile", "Transpose", "Unsqueeze"),
        ),
        (0,),
    ),
}
"""Operators that only choose and move elements, by their order at most; and their data (None: all inputs)."""


def carried(node: ir.Node) -> tuple[list[int], list[ir.Value]] | None:
    """Positions of the data that a node only moves or chooses from, and its outputs of that data."""
    if node.domain or node.op_type not in CARRIERS:
        return None
    if node.op_type == "Resize" and (
        str_attr(node, "mode", "nearest") != "nearest"
        or str_attr(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize"
    ):
        return None
    places = CARRIERS[node.op_type]
    data = [
        i for i in (range(len(node.inputs)) if places is None else places) if input_of(node, i) is not None
    ]
    return data, list(node.outputs if node.op_type == "Split" else node.outputs[:1])


def pads_with_number(node: ir.Node) -> bool:
    """Whether a node puts a number next to the data that it moves: its third input, or 0."""
    return node.op_type == "Pad" and not node.domain and str_attr(node, "mode", "constant") == "constant"


def input_of(node: ir.Node, place: int | None) -> ir.Value | None:
    """An input, or None where it is left out."""
    return node.inputs[place] if place is not None and place < len(node.inputs) else None


def shape_of(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of a constant or of a value on record."""
    tensor = constant_of(value)
    return static_shape(value) if tensor is None else sizes_of(tensor)


def quantized_kind(node: ir.Node) -> ir.DataType | None:
    """The quantized type of a QuantizeLinear or DequantizeLinear, which its zero point has too."""
    quantized = node.inputs[0] if operator_of(node) in DEQUANTIZE else node.outputs[0]
    zero = input_of(node, 2)
    if quantized is not None and quantized.dtype is not None:
        return quantized.dtype
    if zero is not None or operator_of(node) in DEQUANTIZE:
        return zero.dtype if zero is not None else None
    return ir.DataType(int_attr(node, "output_dtype", 0) or ir.DataType.UINT8.value)


def require_same(first: ir.Node, second: ir.Node) -> None:
    """Raise Declined unless two nodes quantize alike: scale, zero point, type, axis and blocks."""
    if has_reference(first) or has_reference(second):
        raise Declined("an attribute refers to one of the enclosing function")
    if quantized_kind(first) is None or quantized_kind(first) != quantized_kind(second):
        raise Declined("the quantized types differ or are unknown")
    if any(int_attr(first, name, 0) != int_attr(second, name, 0) for name in ("block_size", "precision")):
        raise Declined("the blocks differ")
    scale = first.inputs[1]
    per_axis = scale is None or scale.shape is None or len(scale.shape) > 0
    if per_axis and int_attr(first, "axis", 1) != int_attr(second, "axis", 1):
        raise Declined("the axes of the scales differ")
    for place in (1, 2):
        a, b = input_of(first, place), input_of(second, place)
        if a is b:
            continue
        x, y = constant_array(a, SMALL), constant_array(b, SMALL)
        if (x is None and a is not None) or (y is None and b is not None):
            raise Declined("scale or zero point are computed at run time")
        if not np.array_equal(0 if x is None else x, 0 if y is None else y):
            raise Declined("scale or zero point differ")


def spread(node: ir.Node, place: int, like: ir.TensorProtocol) -> np.ndarray:
    """The scales (place 1) or zero points (2) of a QuantizeLinear or DequantizeLinear of a stored tensor.

    They broadcast with the tensor; blocks are written out.

    Raises:
        Declined: they are computed at run time, or do not fit the tensor.
    """
    if has_reference(node):
        raise Declined("an attribute refers to one of the enclosing function")
    value, shape = input_of(node, place), sizes_of(like)
    array = np.zeros(()) if value is None else constant_array(value, None if place == 1 else SMALL)
    if array is None:
        raise Declined("scale or zero point are computed at run time")
    block, axis = int_attr(node, "block_size", 0), int_attr(node, "axis", 1)
    if array.size == 1:
        return array.reshape(())
    if not -len(shape) <= axis < len(shape) or array.ndim != (len(shape) if block else 1):
        raise Declined("the scales do not fit the tensor")
    if block:
        return array.repeat(block, axis).take(range(shape[axis]), axis)
    sizes = [1] * len(shape)
    sizes[axis] = -1
    return array.reshape(sizes)


def stored_floats(node: ir.Node) -> ir.TensorProtocol:
    """What a DequantizeLinear of a constant gives.

    Raises:
        Declined: its input is no constant, or of a type that is not known here.
    """
    tensor, scale = constant_of(node.inputs[0]), node.inputs[1]
    form = None if tensor is None else _BY_TYPE.get(tensor.dtype)
    if tensor is None or form is None or scale is None or scale.dtype is None:
        raise Declined("what is dequantized is no constant of a known type")
    kind = ir.DataType(int_attr(node, "output_dtype", 0) or scale.dtype)

    def floats(integers: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        return dequantize(integers, QuantParams(scales, zeros, form))

    parts = [ir.Tensor(spread(node, place, tensor)) for place in (1, 2)]
    result = mapped(floats, [tensor, *parts], kind)
    return result if is_on_disk(tensor) else ir.Tensor(result.numpy(), dtype=kind)


def stored_integers(node: ir.Node) -> ir.TensorProtocol:
    """What a QuantizeLinear of a constant gives, in any type of 8 or 16 bits.

    Raises:
        Declined: its input is no constant, or the types are not known here.
    """
    tensor, kind = constant_of(node.inputs[0]), quantized_kind(node)
    form = None if kind is None else _BY_TYPE.get(kind)
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or form is None or form.bits < 8:
        raise Declined("what is quantized is no float32 constant, or to no known type")
    if int_attr(node, "precision", 0) or not int_attr(node, "saturate", 1):
        raise Declined("it rounds in another precision, or does not saturate")

    def integers(floats: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> np.ndarray:
        return quantize(floats, QuantParams(scales, zeros, form))

    parts = [ir.Tensor(spread(node, place, tensor)) for place in (1, 2)]
    result = mapped(integers, [tensor, *parts], form.dtype)
    return result if is_on_disk(tensor) else ir.Tensor(result.numpy(), dtype=form.dtype)
