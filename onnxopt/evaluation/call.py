"""What a kernel sees: one node, the arrays it reads, and how much room its result may take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from onnxopt.graph import ints_attr

__all__ = ["Call", "CannotEvaluateError", "Kernel", "Result", "is_float", "widened"]


class CannotEvaluateError(Exception):
    """A node whose outputs are not worked out here; the message says why."""

    @classmethod
    def at(cls, node: ir.Node, error: Exception) -> CannotEvaluateError:
        """For a malformed node, which numpy and the reference evaluator refuse in many ways."""
        text = " ".join(str(error).split())[:120]
        return cls(f"{node.op_type} fails: {type(error).__name__}: {text}")


Result = np.ndarray | tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Call:
    """One node with its inputs. `limit`: bytes that one output may take."""

    node: ir.Node
    inputs: Sequence[np.ndarray | None]
    opset: int
    limit: int

    def array(self, index: int = 0) -> np.ndarray:
        """An input that has to be there."""
        array = self.optional(index)
        if array is None:
            raise CannotEvaluateError("an input is missing")
        return array

    def optional(self, index: int) -> np.ndarray | None:
        """An input, or None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def present(self) -> list[np.ndarray]:
        """The inputs of an operator that takes any number of them."""
        return [self.array(index) for index in range(len(self.inputs))]

    def ints(self, name: str, index: int | None = None) -> tuple[int, ...] | None:
        """Integers: an attribute in older opsets, input `index` in newer ones; None where left out."""
        found = ints_attr(self.node, name)
        array = self.optional(index) if found is None and index is not None else None
        return found if array is None else tuple(int(i) for i in array.ravel())

    def room(self, shape: Sequence[int], itemsize: int) -> None:
        """Refuse a result that would be too large, before it is made."""
        size = math.prod(shape) * itemsize
        if size > self.limit:
            raise CannotEvaluateError(f"the result would take {size / 1e6:,.0f} MB")

    def room_for_broadcast(self) -> None:
        """Refuse what the inputs give when they are broadcast to each other, if it would be too large."""
        arrays = self.present()
        if all(array.shape == arrays[0].shape for array in arrays):
            return
        shape = np.broadcast_shapes(*(array.shape for array in arrays))
        self.room(shape, max(array.dtype.itemsize for array in arrays))


Kernel = Callable[[Call], Result]


def is_float(dtype: np.dtype) -> bool:
    """Whether elements are floats, bfloat16 included, which numpy itself does not know as one."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


def widened(array: np.ndarray) -> np.ndarray:
    """16-bit floats as float32, in which runtimes compute on them; the others as they are."""
    return array.astype(np.float32) if is_float(array.dtype) and array.dtype.itemsize == 2 else array
