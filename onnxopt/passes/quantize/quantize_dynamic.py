"""Multiply matrices in 8-bit integers; activations are quantized at run time, so that no data is needed.

Before: y = Gemm(x, w, c)
After:  q, s, z = DynamicQuantizeLinear(x);  i = MatMulInteger(q, qw, z)
        y = Add(Mul(Cast(i), Mul(s, sw)), c)

Before: y = LSTM(x, w, r, b)
After:  y = DynamicQuantizeLSTM(x, qw, qr, b, scales, zero points), of com.microsoft
Declines: the weight is no constant, is a stack of matrices, or not of float32; the constant is the first
    factor; a Gemm with transA, or with a beta other than 1; an LSTM of layout 1. Left in float: convolutions
    (ConvInteger on signed weights takes 5 to 6 times as long as float32, on unsigned ones as long as it),
    GRU and RNN, for which the runtime has no integers, and attention that is fused already.

ONNX Runtime on the CPU fuses each product to DynamicQuantizeMatMul, with the bias, or MatMulIntegerToFloat
where one activation is quantized for several: version 1.31 takes 0.34 of the time of float32 for 128 rows
times 384 x 384, and about the same time for 64 x 64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import float_attr, has_reference, int_attr
from onnxopt.index import operator_of
from onnxopt.passes.shared.stored import elements
from onnxopt.quantization.formats import find_format
from onnxopt.quantization.operands import COMPUTED, Weight, find_weight
from onnxopt.quantization.weights import quantize_weight
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["QuantizeDynamic"]

_LEFT = {
    "Conv": "a convolution of activations that are quantized at run time is slower than in float",
    "ConvTranspose": "there is no ConvTranspose of integers",
    "GRU": "the runtime has no GRU of integers",
    "RNN": "the runtime has no RNN of integers",
    "com.microsoft::Attention": "its products are fused already: quantize before attention is fused",
}
_LSTM = (
    "activation_alpha",
    "activation_beta",
    "activations",
    "clip",
    "direction",
    "hidden_size",
    "input_forget",
)
_SATURATES = 64.0


@dataclass(frozen=True)
class QuantizeDynamic(Pass):
    """Let MatMul, Gemm and LSTM compute in int8, with scales of activations found at run time.

    per_channel: weights have a scale for each output channel, not one for all.
    reduce_range: weights have 7 bits, for processors whose sums of two 8-bit products saturate (AVX2 and
        AVX512 without VNNI).
    contrib: LSTM becomes an operator of ONNX Runtime's own, as the standard has none; without it, it stays.
    minimum: elements of the smallest weight; smaller products are hardly faster.
    layers: only these operators, such as LSTM or Gemm+MatMul; all where empty.
    """

    name: ClassVar[str] = "quantize-dynamic"
    kind: ClassVar[Kind] = "lossy"
    example: ClassVar[str] = """agraph (float[N, 16] x) => (float[N, 4] y) <float[16, 4] w = {
        1, -2, 3, 4, 5, -6, 7, 8, 9, 10, -11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, -22, 23, 24, 25, 26, 27,
        28, 29, -30, 31, 32, 33, 34, 35, 36, -37, 38, 39, 40, 41, 42, 43, 44, -45, 46, 47, 48, 49, 50, 51, 52,
        53, 54, -55, 56, 57, 58, 59, 60, 61, 62, 63, 64}, float[4] c = {1, 2, 3, 4}> {
        y = Gemm(x, w, c)
    }"""

    per_channel: bool = True
    reduce_range: bool = False
    contrib: bool = True
    minimum: int = 64
    layers: tuple[str, ...] = ()

    def rules(self) -> Sequence[Rule]:
        rules = (
            ("product", ("Gemm", "MatMul"), self._product),
            ("recurrent layer", ("LSTM",), self._lstm),
            ("left in float", tuple(_LEFT), _left),
        )
        wanted = [
            (name, [one for one in of if not self.layers or one in self.layers], apply)
            for name, of, apply in rules
        ]
        return [Rule(name, tuple(of), apply) for name, of, apply in wanted if of]

    def _product(self, node: ir.Node, scope: Scope) -> Edit | None:
        x, value, *more = node.inputs
        weight = find_weight(value) if value is not None else None
        if weight is None or x is None or not _is_float(weight):
            return None
        if weight.reason == COMPUTED and not find_weight(x).reason:
            raise Declined("the constant is the first factor; integers are for the second one")
        array = self._array(node, weight, scope)
        alpha, bias = float_attr(node, "alpha", 1.0), more[0] if more else None
        if int_attr(node, "transA", 0) or (bias is not None and float_attr(node, "beta", 1.0) != 1):
            raise Declined("the Gemm transposes what it multiplies, or scales its bias")
        if array.ndim != 2:
            raise Declined(f"the weight has rank {array.ndim}; it is not one matrix")
        if scope.opset < 11:
            raise NewerOpset("DynamicQuantizeLinear", 11)
        ints, scale = self._rounded(array.T if int_attr(node, "transB", 0) else array)
        edit, like = Edit(node, scope), weight.value.name or "weight"
        quantized, step, zero = _activation(edit, node, x)
        whole = edit.op("MatMulInteger", [quantized, edit.constant(ints, f"{like}_quantized"), zero])
        scale = np.asarray(scale * np.float32(alpha))
        scales = edit.op("Mul", [step, edit.constant(scale, f"{like}_scale")])
        product = edit.op("Mul", [edit.op("Cast", [whole], {"to": ir.DataType.FLOAT}), scales])
        return edit.replace(node.outputs[0], product if bias is None else edit.op("Add", [product, bias]))

    def _lstm(self, node: ir.Node, scope: Scope) -> Edit | None:
        if not self.contrib:
            raise Declined("the ONNX standard has no LSTM of integers")
        if int_attr(node, "layout", 0):
            raise Declined("DynamicQuantizeLSTM has no layout 1")
        edit, inputs, ends = (
            Edit(node, scope),
            [*node.inputs, *[None] * (8 - len(node.inputs))],
            list[ir.Value](),
        )
        for position in (1, 2):
            value = inputs[position]
            assert value is not None  # the operator demands it
            weight = find_weight(value)
            array, like = self._array(node, weight, scope), value.name or "weight"
            parts = [self._rounded(direction.T) for direction in array]
            ints, scale = (np.stack([part[index] for part in parts]) for index in (0, 1))
            inputs[position] = edit.constant(ints, f"{like}_quantized")
            zero = np.zeros(scale.shape, np.int8)
            ends += [edit.constant(scale, f"{like}_scale"), edit.constant(zero, f"{like}_zero_point")]
        wanted = [bool(output.name) for output in node.outputs]
        attributes = {name: attr for name, attr in node.attributes.items() if name in _LSTM}
        name, domain = "DynamicQuantizeLSTM", "com.microsoft"
        outputs = edit.ops(name, [*inputs, *ends], attributes, outputs=wanted, domain=domain)
        for old, new, there in zip(node.outputs, outputs, wanted, strict=True):
            if there:
                edit.replace(old, new)
        return edit

    def _array(self, node: ir.Node, weight: Weight, scope: Scope) -> np.ndarray:
        if weight.reason:
            raise Declined(f"the weight {weight.reason}")
        if weight.dtype != ir.DataType.FLOAT:
            raise Declined(f"integers are for float32, not {weight.dtype.name}")
        if has_reference(node):
            raise Declined("an attribute is set by the caller of the function")
        array = elements(weight, scope)
        if array.size < self.minimum:
            raise Declined(f"the weight has fewer than {self.minimum} elements")
        return array

    def _rounded(self, matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A weight `[inputs, outputs]` in int8, and its scales."""
        axis, limit = 1 if self.per_channel else None, _SATURATES if self.reduce_range else None
        ints, params = quantize_weight(matrix, find_format("int8"), axis=axis, limit=limit)
        return ints, params.scale


def _is_float(weight: Weight) -> bool:
    return weight.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


def _activation(edit: Edit, node: ir.Node, x: ir.Value) -> Sequence[ir.Value]:
    """Elements, scale and zero point of an activation; those of a node in front that gives them already."""
    for user, _ in x.uses():
        if user.op_type != "DynamicQuantizeLinear" or user.domain or user.graph is not node.graph:
            continue
        assert isinstance(node.graph, ir.Graph)
        if user in takewhile(lambda other: other is not node, node.graph):
            return user.outputs
    return edit.ops("DynamicQuantizeLinear", [x], outputs=3)


def _left(node: ir.Node, _scope: Scope) -> Edit | None:
    raise Declined(_LEFT[operator_of(node)])
