"""Constant weights of layers: scaled by channel, in pieces, and rounded once to their own type."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.graph import pieces
from onnxopt.rewrite import Declined

__all__ = ["LARGE", "Weight", "rounded"]

LARGE = 1 << 20
"""Bytes above which a weight is not duplicated, and not read to be scaled before it is needed."""
_BLOCK = 1 << 22
"""Elements of a weight that are scaled at once."""


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

    @property
    def shape(self) -> tuple[int, ...]:
        """The stored shape."""
        return tuple(self.tensor.shape.numpy())

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

        The product of a large weight that lies in a file of its own is computed at each reading, so that
        a model with more weights than memory is rewritten without reading them.

        Raises:
            Declined: the product does not fit the weight's type, or is a large duplicate of a shared weight.
        """
        if (scale == 1).all():
            return self.tensor
        dtype, large = self.tensor.dtype, self.tensor.nbytes > LARGE
        if large and len(self.value.uses()) > 1:
            raise Declined("the weight is shared and too large to duplicate")
        factors = np.broadcast_to(scale, self.outputs if outputs else self.inputs)
        on_first = outputs != self.inputs_first
        if large and isinstance(self.tensor, ir.ExternalTensor | ir.LazyTensor):
            return ir.LazyTensor(lambda: self._product(factors, on_first), dtype, ir.Shape(self.shape))
        return _finite(self._product(factors, on_first))

    def _product(self, factors: np.ndarray, on_first: bool) -> ir.TensorProtocol:
        """The weight times a float64 factor a channel, of its first stored axis or (by group) of its second.

        A few rows at a time, so that a large weight is never in memory in float64.
        """
        first, second, *rest = self.shape
        dtype, width = self.tensor.dtype.numpy(), second * int(np.prod(rest))
        rows = max(1, _BLOCK // width)
        result = np.empty((first, second, width // second), dtype)
        by_group = None if on_first else factors.reshape(self.groups, second)
        for start, piece in zip(
            range(0, first, rows), pieces(self.tensor, rows * width * dtype.itemsize), strict=True
        ):
            block = np.frombuffer(piece, dtype).reshape(-1, *result.shape[1:])
            taken = np.arange(start, start + len(block))
            if by_group is None:
                scale = factors[taken][:, None, None]
            else:
                scale = by_group[taken // (first // self.groups)][:, :, None]
            with np.errstate(over="ignore"):
                result[taken] = (block.astype(np.float64) * scale).astype(dtype)
        return ir.Tensor(result.reshape(self.shape), dtype=self.tensor.dtype)

    def times(self, vector: np.ndarray) -> np.ndarray:
        """W x for an x that is the same at every position: float64, one number an output channel."""
        x = np.broadcast_to(vector, self.inputs).reshape(self.groups, -1)
        product: np.ndarray = np.einsum("goir,gi->go", self.blocks, x).reshape(-1)
        return product


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
