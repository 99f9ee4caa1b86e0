"""Constant weights of layers: scaled by channel, in pieces, and rounded once to their own type."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxopt.graph import nbytes, sizes_of, use_count
from onnxopt.rewrite import Declined
from onnxopt.streamed import LARGE, is_on_disk, mapped, read

__all__ = ["LARGE", "Weight", "rounded"]

_BLOCK = 1 << 22
"""Elements of a weight that are held in float64 at once."""


@dataclass(frozen=True)
class Weight:
    """A constant weight, seen as `[groups, outputs, inputs, rest]`.

    It is stored as `[inputs, outputs / groups, *rest]` where `inputs_first`, else as
    `[outputs, inputs / groups, *rest]`.
    """

    value: ir.Value
    tensor: ir.TensorProtocol
    groups: int
    inputs_first: bool

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return sizes_of(self.tensor)

    @property
    def outputs(self) -> int:
        """Number of output channels."""
        return self.shape[1] * self.groups if self.inputs_first else self.shape[0]

    @property
    def inputs(self) -> int:
        """Number of input channels."""
        return self.shape[0] if self.inputs_first else self.shape[1] * self.groups

    @property
    def trailing(self) -> int:
        """How many axes a layer's output has after its channels; its input too, unless transposed."""
        return len(self.shape) - 2

    @property
    def blocks(self) -> np.ndarray:
        """The elements in float64: `[groups, outputs of a group, inputs of a group, rest]`."""
        first, second, *rest = self.shape
        array: np.ndarray = self.tensor.numpy().astype(np.float64)
        array = array.reshape(self.groups, first // self.groups, second, int(np.prod(rest)))
        return array.swapaxes(1, 2) if self.inputs_first else array

    def scaled(self, scale: np.ndarray, *, outputs: bool) -> ir.TensorProtocol:
        """The weight times `scale`: of shape `()`, or one number a channel of its outputs or of its inputs.

        The product of a large weight that lies in a file of its own is computed when it is read, in pieces,
        so that a model with more weights than memory is rewritten without reading them.

        Raises:
            Declined: the product does not fit the weight's type, or is a large duplicate of a shared weight.
        """
        if (scale == 1).all():
            return self.tensor
        large = nbytes(self.tensor) > LARGE
        if large and use_count(self.value) > 1:
            raise Declined("the weight is shared and too large to duplicate")
        factors = self._along(scale, outputs)
        if not isinstance(self.tensor, ir.ExternalTensor | ir.LazyTensor):
            return _finite(ir.Tensor(_product(self.tensor.numpy(), factors)))
        product = mapped(_product, (self.tensor, ir.Tensor(factors)), self.tensor.dtype)
        return product if is_on_disk(self.tensor) else _finite(ir.Tensor(product.numpy()))

    def _along(self, scale: np.ndarray, outputs: bool) -> np.ndarray:
        """A float64 factor a channel, of such a shape that it broadcasts to the weight."""
        first, second = self.shape[:2]
        factors = np.broadcast_to(scale, self.outputs if outputs else self.inputs).astype(np.float64)
        ends = (1,) * self.trailing
        if outputs != self.inputs_first:
            return factors.reshape(first, 1, *ends)
        if self.groups > 1:
            factors = factors.reshape(self.groups, second).repeat(first // self.groups, 0)
        return factors.reshape(-1, second, *ends)

    def times(self, vector: np.ndarray) -> np.ndarray:
        """W x for an x that is the same at every position: float64, one number an output channel."""
        first, second, *rest = self.shape
        x = np.broadcast_to(vector, self.inputs).astype(np.float64)
        size, step = first // self.groups, max(1, _BLOCK // (second * math.prod(rest)))
        result = np.zeros((self.groups, self.outputs // self.groups))
        for start, stop in ((i, min(i + step, first)) for i in range(0, first, step)):
            box = (slice(start, stop), *(slice(0, length) for length in (second, *rest)))
            rows = read(self.tensor, box).astype(np.float64).reshape(stop - start, second, -1).sum(2)
            for group in range(start // size, (stop - 1) // size + 1):
                own = slice(max(start, group * size), min(stop, (group + 1) * size))
                block = rows[own.start - start : own.stop - start]
                if self.inputs_first:
                    result[group] += x[own] @ block
                else:
                    result[group, own.start - group * size : own.stop - group * size] = (
                        block @ x[group * second : (group + 1) * second]
                    )
        return result.reshape(-1)


def _product(weight: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """In float64, rounded once to the type of the weight."""
    with np.errstate(over="ignore"):
        result = np.empty(weight.shape, weight.dtype)
        np.multiply(weight, factors, out=result, dtype=np.float64, casting="unsafe")
    return result


def rounded(array: np.ndarray, dtype: ir.DataType) -> ir.TensorProtocol:
    """The float64 array as a tensor of a type.

    Raises:
        Declined: the type cannot hold it.
    """
    with np.errstate(over="ignore"):
        return _finite(ir.Tensor(array.astype(dtype.numpy()), dtype=dtype))


def _finite(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    if not np.isfinite(tensor.numpy()).all():
        raise Declined(f"the folded constants would not be finite in {tensor.dtype.name}")
    return tensor
