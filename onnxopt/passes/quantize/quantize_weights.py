"""Store weights in few bits, and turn them into floats again in front of what reads them.

Before: y = MatMul(x, w)
After:  y = MatMul(x, DequantizeLinear(q, scale, zero_point))     by channel, or in blocks (opset 21)
After:  y = MatMulNBits(x, q, scale, zero_point)                  form=matmulnbits, of com.microsoft

Before: y = Gather(DequantizeLinear(q, scale), ids)
After:  y = Mul(Cast(Gather(q, ids)), Gather(scale, ids))         the same numbers, of the wanted rows only

Before: y = Gemm<transB=1>(x, DequantizeLinear<axis=0>(q, scale), c)
After:  y = Gemm(x, DequantizeLinear<axis=1>(q', scale), c)
Declines: the weight is a graph input, a graph output, computed at run time or not finite; something else
    reads it, too; its readers disagree on the axis, in less than 8 bits; it would not become smaller; an
    embedding in less than 8 bits, which Gather does not take; 2 bits where the output channels are no
    multiple of 4; the opset is older than the form.

ONNX Runtime 1.31 on the CPU runs MatMul and Gemm on such a weight as MatMulNBits, which rounds activations to
8 bits, too, in blocks (45 dB): 768 x 768 in int8 takes 0.85 of the time of float32 for 128 rows, and 0.41 for
one. Convolutions and recurrent layers become smaller, not faster: their weights are turned into floats in
each run, at 1.2 to 5 times the time. With the session setting `session.disable_quant_qdq=1` that is done
once, for products too, and all takes the time and the memory of float32.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass, unspelled
from onnxopt.errors import UsageError
from onnxopt.graph import constant_of, float_attr, int_attr, sizes_of
from onnxopt.index import operator_of
from onnxopt.passes.shared.dequantized import gathered, turned
from onnxopt.passes.shared.nbits import BLOCKS, packed
from onnxopt.passes.shared.stored import Stored, elements, operand, weight_rules
from onnxopt.quantization.formats import Format, QuantParams, find_format
from onnxopt.quantization.operands import Weight
from onnxopt.quantization.weights import block_axis, quantize_weight, ternarize, weight_axis
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["QuantizeWeights"]

_PRODUCTS = ("Gemm", "MatMul")


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Store weights as integers or small floats with scales; what is computed stays in floating point.

    type: of the elements: int8, uint8, int4, uint4, int2, uint2, int16, uint16, float8e4m3fn, float8e5m2.
    block: elements that share a scale along the axis that is summed up; 0: one scale a channel.
    per_channel: where there are no blocks, a scale for each output channel, not one for all.
    symmetric: zero is in the middle of the range, so that no zero point is needed (of a signed type).
    form: dequantize, of the ONNX standard; or matmulnbits, of ONNX Runtime, for MatMul and Gemm.
    levels: all; or experimental, ternary (-a, 0, a) or binary (-a, a), which lose most of the accuracy.
    clip: try narrower ranges, and take those with the least squared error.
    power_of_two: scales are powers of two.
    even: elements of 4 bits only where the last axis is even, as TensorRT's parser asks for.
    minimum: elements of the smallest weight; smaller ones hardly pay for the nodes.
    layers: only weights of these operators, such as MatMul+Gather; all where empty.
    known: by the name of a weight, its elements and what they stand for, where that was found out before.
    """

    name: ClassVar[str] = "quantize-weights"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """agraph (float[N, 32] x) => (float[N, 2] y) <float[32, 2] w = {
        127, -254, 1, 2, 3, 4, -5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25,
        26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, 48, 49, 50,
        51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62}> {
        y = MatMul(x, w)
    }"""

    type: str = "int8"
    block: int = 0
    per_channel: bool = True
    symmetric: bool = True
    form: Literal["dequantize", "matmulnbits"] = "dequantize"
    levels: Literal["all", "ternary", "binary"] = "all"
    clip: bool = False
    power_of_two: bool = False
    even: bool = False
    minimum: int = 64
    layers: tuple[str, ...] = ()
    known: Mapping[str, tuple[np.ndarray, QuantParams]] | None = unspelled(None)

    def __post_init__(self) -> None:
        form = find_format(self.type)
        if self.block < 0:
            raise UsageError(f"{self.name}: block is {self.block}; expected 0 or elements that share a scale")
        if self.form == "matmulnbits" and (
            form.bits not in (4, 8) or form.is_float or self.block not in BLOCKS
        ):
            found = f"found {self.type} in blocks of {self.block}"
            raise UsageError(
                f"{self.name}: matmulnbits takes 4 or 8 bit integers in blocks of 16 to 256; {found}"
            )
        if self.levels != "all" and (form.is_float or not form.signed):
            raise UsageError(f"{self.name}: {self.levels} levels are for signed integers, not {self.type}")

    def rules(self) -> Sequence[Rule]:
        return (
            *weight_rules(self.layers, self._quantized),
            Rule("rows taken before they are dequantized", ("Gather",), gathered),
            *(() if self.even else (Rule("product of a transposed weight", ("Gemm",), turned),)),
        )

    def _quantized(self, position: int, node: ir.Node, scope: Scope) -> Edit | None:
        weight = operand(node, position)
        if weight is None:
            return None
        form = find_format(self.type)
        tensor = constant_of(weight.source)
        if node.op_type == "Gather" and tensor is not None and tensor.size in sizes_of(tensor):
            return None  # single numbers, such as scales, and no vectors
        if tensor is not None and tensor.size < self.minimum:
            raise Declined(f"the weight has fewer than {self.minimum} elements")
        if self.form == "matmulnbits":
            return self._packed(node, position, weight, form, scope)
        stored = Stored.of(weight, scope)
        axis, block = self._grid(stored, form)
        newest = max(form.opset, 21 if block else 10 if axis is None else 13)
        if scope.opset < newest:
            raise NewerOpset(
                f"DequantizeLinear {'in blocks' if block else 'by channel'} of {form.name}", newest
            )
        known = (self.known or {}).get(stored.value.name or "")
        ints, params = known or self._rounded(stored.array, form, axis, block, stored.dtype)
        edit = Edit(stored.anchor, scope)
        value = _dequantized(edit, ints, params, stored.value.name or "weight")
        if stored.dtype != ir.DataType.FLOAT:
            value = edit.op("Cast", [value], {"to": stored.dtype})
        return edit.replace(stored.value, value)

    def _rounded(
        self, array: np.ndarray, form: Format, axis: int | None, block: int, dtype: ir.DataType
    ) -> tuple[np.ndarray, QuantParams]:
        if self.levels != "all":
            threshold = 0.7 if self.levels == "ternary" else 0.0
            ints, params = ternarize(array, form, axis=axis, block=block, threshold=threshold)
        else:
            how = {"symmetric": self.symmetric, "power_of_two": self.power_of_two, "clip": self.clip}
            ints, params = quantize_weight(array, form, axis=axis, block=block, **how)
        zero = form.bits if params.zero_point.any() else 0
        if array.size * form.bits + params.scale.size * (32 + zero) >= array.size * dtype.bitwidth:
            raise Declined("the weight would not become smaller")
        return ints, params

    def _grid(self, stored: Stored, form: Format) -> tuple[int | None, int]:
        """The axis along which scales differ, None for one scale, and the elements of a block."""
        kinds = {reader.op_type for reader, _ in stored.readers}
        if "Gather" in kinds and (form.bits < 8 or form.is_float):
            raise Declined(f"Gather takes no {form.name}: embeddings are for int8 or uint8")
        if self.even and form.bits == 4 and stored.array.shape[-1] % 2:
            raise Declined("its last axis is odd, which is not for 4 bits there")
        axes, summed = stored.axes(weight_axis), stored.axes(block_axis)
        if form.bits == 2:
            _require_fours(stored, axes)
        if self.block and summed[0] is not None and stored.array.shape[summed[0]] > self.block:
            if len(summed) > 1:
                raise Declined("the weight has readers that sum it up along different axes")
            return summed[0], self.block
        if len(axes) > 1 and form.bits < 8:
            raise Declined("the weight has readers with output channels in different axes")
        return (axes[0] if self.per_channel and len(axes) == 1 else None), 0

    def _packed(
        self, node: ir.Node, position: int, weight: Weight, form: Format, scope: Scope
    ) -> Edit | None:
        if operator_of(node) not in _PRODUCTS or position != 1:
            raise Declined("MatMulNBits is for the second factor of MatMul and Gemm")
        attributes = [float_attr(node, "alpha", 1), float_attr(node, "beta", 1), int_attr(node, "transA", 0)]
        if attributes != [1, 1, 0]:
            raise Declined("MatMulNBits has no alpha, beta or transA")
        if weight.dtype not in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            raise Declined(f"MatMulNBits does not compute in {weight.dtype.name}")
        array = elements(weight, scope)
        if array.ndim != 2:
            raise Declined("MatMulNBits takes matrices only")
        array = array if int_attr(node, "transB", 0) else array.T
        (ints, params), (n, k) = self._rounded(array, form, 1, self.block, weight.dtype), array.shape
        edit, like = Edit(node, scope), weight.value.name or "weight"
        numbers = {"quantized": packed(ints, form, self.block)}
        numbers["scale"] = params.scale.astype(weight.dtype.numpy())
        if (params.zero_point != (form.low + form.high + 1) / 2).any():
            numbers["zero_point"] = packed(params.zero_point, form)
        inputs = [node.inputs[0], *(edit.constant(one, f"{like}_{name}") for name, one in numbers.items())]
        shape = {"K": k, "N": n, "bits": form.bits, "block_size": self.block, "accuracy_level": 4}
        value = edit.op("MatMulNBits", inputs, shape, domain="com.microsoft")
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            value = edit.op("Add", [value, node.inputs[2]])
        return edit.replace(node.outputs[0], value)


def _require_fours(stored: Stored, axes: Sequence[int | None]) -> None:
    """ONNX Runtime 1.31 computes products of 2-bit weights wrong for other numbers of output channels."""
    products = any(reader.op_type in _PRODUCTS for reader, _ in stored.readers)
    if products and any(axis is None or stored.array.shape[axis] % 4 for axis in axes):
        raise Declined("ONNX Runtime gets products of 2 bits wrong unless the channels are a multiple of 4")


def _dequantized(edit: Edit, ints: np.ndarray, params: QuantParams, like: str) -> ir.Value:
    """The weight as DequantizeLinear gives it, of three new constants."""
    dtype, attributes = params.format.dtype, dict[str, int]()
    numbers = [edit.constant(ir.Tensor(ints, dtype=dtype), f"{like}_quantized")]
    numbers.append(edit.constant(params.scale, f"{like}_scale"))
    if params.zero_point.any():
        zero = ir.Tensor(params.zero_point.astype(dtype.numpy()), dtype=dtype)
        numbers.append(edit.constant(zero, f"{like}_zero_point"))
    if params.axis is not None:
        attributes["axis"] = params.axis
    if params.block:
        attributes["block_size"] = params.block
    return edit.op("DequantizeLinear", numbers, attributes, name=f"{like}/dequantize")
