"""What is known of values without running the model: constants, what follows from them, and shapes.

A shape that is known in part is an array of Python objects that holds `UNKNOWN` where it is not; operators
that only move elements, and a little arithmetic, carry it on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation.call import CannotEvaluateError
from onnxopt.evaluation.evaluator import MOVES, evaluate
from onnxopt.graph import constant_of, has_reference

__all__ = ["UNKNOWN", "Facts"]

_ROOM = 1 << 24
"""Bytes that a result may have more than its inputs."""

_ARITHMETIC = frozenset({"Add", "Cast", "Mul", "Sub"})
"""Besides MOVES, what is done to shapes that are known in part."""


class _Unknown:
    """A dimension that is not known; so is what is computed from it."""

    def __add__(self, other: object) -> _Unknown:
        return self

    __mul__ = __radd__ = __rmul__ = __rsub__ = __sub__ = __add__


UNKNOWN = _Unknown()


@dataclass
class Facts:
    """Values of one scope and of the graphs nested in it, learned node by node in the order of the graph.

    opset: version of the default domain. `loose` graphs are those whose shapes on record are not relied on.
    """

    opset: int
    loose: set[ir.Graph] = field(default_factory=set)
    _arrays: dict[ir.Value, np.ndarray] = field(default_factory=dict)

    def has(self, value: ir.Value) -> bool:
        """Whether the value is a constant, or was learned at least in part; strings are not looked at."""
        tensor = None if value in self._arrays else constant_of(value)
        return value in self._arrays or (tensor is not None and tensor.dtype != ir.DataType.STRING)

    def learned(self, value: ir.Value | None) -> bool:
        """Whether the value is no constant in the graph, but known in full."""
        return value in self._arrays and self._arrays[value].dtype != object

    def in_part(self, node: ir.Node) -> bool:
        """Whether an input is known in part only."""
        return any(self._arrays[v].dtype == object for v in node.inputs if v in self._arrays)

    def nbytes(self, value: ir.Value) -> int:
        """Bytes of a value that is known."""
        tensor = constant_of(value)
        return self._arrays[value].nbytes if tensor is None else tensor.nbytes

    def read(self, value: ir.Value) -> np.ndarray:
        """The elements of a value that is known."""
        tensor = constant_of(value)
        return self._arrays[value] if tensor is None else tensor.numpy()

    def learn(self, node: ir.Node) -> None:
        """Evaluate a deterministic node whose inputs are known.

        Raises:
            CannotEvaluateError: with the reason.
        """
        inputs = [None if value is None else self.read(value) for value in node.inputs]
        room = _ROOM + sum(array.nbytes for array in inputs if array is not None)
        self._arrays.update(zip(node.outputs, evaluate(node, inputs, self.opset, room), strict=False))

    def learn_in_part(self, node: ir.Node) -> bool:
        """Carry on inputs that are known in part; whether the outputs are known in full."""
        if node.domain or node.op_type not in MOVES | _ARITHMETIC or has_reference(node):
            return False
        inputs = [None if value is None else self.read(value) for value in node.inputs]
        try:
            arrays = inputs if node.op_type == "Cast" else evaluate(node, inputs, self.opset)
        except CannotEvaluateError:
            return False
        full = [self._note(value, array) for value, array in zip(node.outputs, arrays, strict=False)]
        return all(full)

    def learn_shape(self, node: ir.Node) -> bool:
        """Find the output of a Shape or Size node; whether it is known in full."""
        source = node.inputs[0]
        dims = None if source is None or has_reference(node) else self._dims(source)
        if dims is None:
            return False
        if node.op_type == "Size":
            sizes = [dim for dim in dims if isinstance(dim, int)]
            return len(sizes) == len(dims) and self._note(node.outputs[0], np.array(math.prod(sizes), object))
        ends = (node.attributes.get(name) for name in ("start", "end"))
        start, end = (None if attr is None else attr.as_int() for attr in ends)
        return self._note(node.outputs[0], np.array(dims[start:end], object))

    def _dims(self, value: ir.Value) -> Sequence[int | _Unknown] | None:
        if value in self._arrays:
            return self._arrays[value].shape
        maker = value.producer()
        if value.shape is None or (value.graph if maker is None else maker.graph) in self.loose:
            return None
        return [dim if isinstance(dim, int) else UNKNOWN for dim in value.shape.dims]

    def _note(self, value: ir.Value, array: np.ndarray | None) -> bool:
        """Keep integers of which some may be unknown; whether all of them are known."""
        dtype, maker = value.dtype, value.producer()
        if dtype is None and maker is not None and maker.op_type in ("Shape", "Size"):
            dtype = ir.DataType.INT64
        if array is None or dtype not in (ir.DataType.INT32, ir.DataType.INT64):
            return False
        full = all(isinstance(element, int) for element in array.ravel())
        self._arrays[value] = array.astype(dtype.numpy()) if full else array
        return full
