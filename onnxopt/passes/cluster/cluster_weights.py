"""Let the elements of a weight share few numbers, and store which of them each one is.

Before: y = MatMul(x, w)
After:  y = MatMul(x, Gather(codebook, Cast<to = INT32>(codes)))
Declines: the weight is a graph input, a graph output, computed at run time, quantized already, or not finite;
    something else reads it, too; it is depthwise, or too small to gain; its readers disagree on the axis of
    output channels, or these are no multiple of the groups; the opset has no type of so few bits.

Codes take a byte; packed, 4 bits where 16 numbers or fewer are shared (opset 21) and 2 bits for 4 (opset 25).
ONNX Runtime computes the weight once, as it loads the model: the file becomes smaller, time and memory stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.errors import UsageError
from onnxopt.graph import constant_of, nbytes, sizes_of
from onnxopt.index import operator_of
from onnxopt.passes.shared.stored import Stored, operand, weight_rules
from onnxopt.pruning.codebooks import codebook_of
from onnxopt.pruning.levels import INTEGERS
from onnxopt.pruning.weights import convolves_alone
from onnxopt.quantization.operands import CODES, QUANTIZED, find_weight, reads_codebook
from onnxopt.quantization.weights import weight_axis
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["ClusterWeights"]

_MOST = 256
_OF_4_BITS, _FIRST_4_BITS = 16, 21
_OF_2_BITS, _FIRST_2_BITS = 4, 25
_QUANTIZED = f"the weight {QUANTIZED}"


@dataclass(frozen=True)
class ClusterWeights(Pass):
    """Let the elements of a weight share few numbers, found by k-means; what is zero stays zero.

    bits: 2 to 8: so many bits tell which of 2^bits numbers an element is.
    groups: output channels in so many groups of neighbours, each with numbers of its own; all together 256
        numbers at most (16 and 4 for codes of 4 and 2 bits).
    packed: codes of 4 or 2 bits where that is enough, two or four a byte.
    small: weights of fewer elements stay.
    depthwise: weights of depthwise convolutions, too: their channels differ much, and few of all elements are
        theirs.
    layers: only weights of these operators, such as Gemm+MatMul; all where empty.
    """

    name: ClassVar[str] = "cluster-weights"
    kind: ClassVar[Kind] = "lossy"

    example: ClassVar[str] = """agraph (float[N, 8] x) => (float[N, 8] y) <float[8, 8] w = {
        1, -2, 3, 4, 5, -6, 7, 8, 9, 10, -11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, -22, 23, 24, 25, 26, 27,
        28, 29, -30, 31, 32, 33, 34, 35, 36, -37, 38, 39, 40, 41, 42, 43, 44, -45, 46, 47, 48, 49, 50, 51, 52,
        53, 54, -55, 56, 57, 58, 59, 60, 61, 62, 63, 64}> {
        y = MatMul(x, w)
    }"""

    bits: int = 5
    groups: int = 1
    packed: bool = False
    small: int = 64
    depthwise: bool = False
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.name}: bits is {self.bits}; expected 2 to 8")
        if self.groups < 1 or self.groups << self.bits > _MOST:
            shared = f"{self.groups} groups of {1 << self.bits}"
            raise UsageError(f"{self.name}: {shared} numbers; codes of a byte tell {_MOST} apart")

    @property
    def most_bits(self) -> int:
        """Bits of numbers of all groups that codes of a byte tell apart."""
        return (_MOST // self.groups).bit_length() - 1

    def rules(self) -> Sequence[Rule]:
        return (
            *weight_rules(self.layers, self._clustered),
            Rule("weight of integers", tuple(INTEGERS), _quantized),
        )

    def _clustered(self, position: int, node: ir.Node, scope: Scope) -> Edit | None:
        value = node.inputs[position] if position < len(node.inputs) else None
        if value is None or _is_clustered(value):
            return None
        if find_weight(value).reason == QUANTIZED:
            raise Declined(_QUANTIZED)
        weight = operand(node, position)
        if weight is None:
            return None
        tensor = constant_of(weight.source)
        if tensor is None:
            raise Declined("the weight is unpacked from a constant of another type")
        if len(sizes_of(tensor)) < 2:
            return None
        if tensor.size < self.small:
            raise Declined(f"the weight has fewer than {self.small} elements")
        if convolves_alone(node, sizes_of(tensor)) and not self.depthwise:
            raise Declined("the weight is depthwise")
        dtype, stored = self._type(scope), Stored.of(weight, scope)
        numbers, codes = self._shared(stored)
        if codes.size * dtype.bitwidth + numbers.size * stored.dtype.bitwidth >= nbytes(tensor) * 8:
            raise Declined("the weight would not become smaller")
        edit, like = Edit(stored.anchor, scope), stored.value.name or "weight"
        index = edit.constant(ir.Tensor(codes.astype(dtype.numpy()), dtype=dtype), f"{like}{CODES}")
        book = ir.Tensor(numbers.astype(stored.dtype.numpy()), dtype=stored.dtype)
        whole = edit.op("Cast", [index], {"to": ir.DataType.INT32}, name=f"{like}/codes")
        inputs = [edit.constant(book, f"{like}_codebook"), whole]
        return edit.replace(stored.value, edit.op("Gather", inputs, name=f"{like}/shared"))

    def _shared(self, stored: Stored) -> tuple[np.ndarray, np.ndarray]:
        """All codebooks in one, and for each element its place in that."""
        array, size = stored.array, 1 << self.bits
        if self.groups == 1:
            return codebook_of(array, size)
        axes = stored.axes(weight_axis)
        if len(axes) > 1 or axes[0] is None:
            raise Declined("the weight has no single axis of output channels")
        if array.shape[axes[0]] % self.groups:
            raise Declined(
                f"its {array.shape[axes[0]]} output channels are no multiple of {self.groups} groups"
            )
        books, codes, taken = [], [], 0
        for part in np.split(array, self.groups, axes[0]):
            numbers, own = codebook_of(part, size)
            books.append(numbers)
            codes.append(own + np.uint8(taken))
            taken += len(numbers)
        return np.concatenate(books), np.concatenate(codes, axes[0])

    def _type(self, scope: Scope) -> ir.DataType:
        """That of the codes."""
        count = self.groups << self.bits
        if not self.packed or count > _OF_4_BITS:
            return ir.DataType.UINT8
        if scope.opset < _FIRST_4_BITS:
            raise NewerOpset("Cast of uint4", _FIRST_4_BITS)
        small = count <= _OF_2_BITS and scope.opset >= _FIRST_2_BITS
        return ir.DataType.UINT2 if small else ir.DataType.UINT4


def _is_clustered(value: ir.Value) -> bool:
    """Whether a weight is taken from a codebook by stored codes."""
    return reads_codebook(find_weight(value).source.producer())


def _quantized(node: ir.Node, _scope: Scope) -> Edit | None:
    if any(constant_of(node.inputs[position]) is not None for position in INTEGERS[operator_of(node)]):
        raise Declined(_QUANTIZED)
    return None
