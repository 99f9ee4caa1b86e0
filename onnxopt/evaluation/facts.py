"""What is known of values without running the model: constants, what follows from them, and shapes.

A shape that is known in part is an array of Python objects that holds `UNKNOWN` where it is not; operators
that only move elements, and a little arithmetic, carry it on.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation.call import CannotEvaluateError
from onnxopt.evaluation.evaluator import MOVES, evaluate
from onnxopt.evaluation.streaming import stream
from onnxopt.graph import constant_of, has_reference, nbytes

__all__ = ["UNKNOWN", "Facts"]

_ROOM = 1 << 24
"""Bytes that a result may have more than its inputs."""

_ARITHMETIC = frozenset({"Add", "Cast", "Mul", "Sub"})
"""Besides MOVES, what is done to shapes that are known in part."""

_VIEWS = MOVES - {"Concat", "Expand", "Gather"}
"""Operators whose outputs are views of their first input."""


Found = np.ndarray | ir.TensorProtocol
"""Elements in memory, or a tensor that may lie elsewhere."""


_AWAY = (ir.ExternalTensor, ir.LazyTensor)


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
    _known: dict[ir.Value, Found] = field(default_factory=dict)
    _partial: dict[ir.Value, np.ndarray] = field(default_factory=dict)

    def has(self, value: ir.Value) -> bool:
        """Whether the value is a constant, or was learned at least in part; strings are not looked at."""
        if value in self._known or value in self._partial:
            return True
        tensor = constant_of(value)
        return tensor is not None and tensor.dtype != ir.DataType.STRING

    def learned(self, value: ir.Value | None) -> bool:
        """Whether the value is no constant in the graph, but known in full."""
        return value in self._known

    def learned_any(self, values: Iterable[ir.Value | None]) -> bool:
        """Whether one of the values was learned in full."""
        return not self._known.keys().isdisjoint(values)

    def record(self, values: Iterable[ir.Value | None]) -> None:
        """Put on record the shapes of values that were learned in full, where none is, and the types."""
        for value in values:
            if value is not None and value in self._known and (value.shape is None or value.type is None):
                tensor = self.tensor(value)
                value.shape, value.type = ir.Shape(tensor.shape.numpy()), ir.TensorType(tensor.dtype)

    def in_part(self, node: ir.Node) -> bool:
        """Whether an input is known in part only."""
        return bool(self._partial) and any(value in self._partial for value in node.inputs)

    def nbytes(self, value: ir.Value) -> int:
        """Bytes of a value that is known."""
        found = self._find(value)
        return found.nbytes if isinstance(found, np.ndarray) else nbytes(found)

    def inputs(self, node: ir.Node) -> list[Found | None]:
        """The inputs of a node, which are known: arrays, but for weights that would have to be read."""
        found = [None if value is None else self._find(value) for value in node.inputs]
        return [item if isinstance(item, _AWAY) else _array(item) for item in found]

    def tensor(self, value: ir.Value) -> ir.TensorProtocol:
        """A value that is known in full, with memory of its own where it is in memory."""
        found = self._find(value)
        if not isinstance(found, np.ndarray):
            return found
        own = found.base is None and found.flags.c_contiguous
        return ir.Tensor(found if own else np.array(found, order="C"))

    def learn(self, node: ir.Node, inputs: Sequence[Found | None] | None = None) -> None:
        """Evaluate a deterministic node whose inputs are known; `inputs` saves looking them up again.

        Raises:
            CannotEvaluateError: with the reason.
        """
        arrays = [_array(item) for item in (self.inputs(node) if inputs is None else inputs)]
        room = _ROOM + sum(array.nbytes for array in arrays if array is not None)
        self._known.update(zip(node.outputs, evaluate(node, arrays, self.opset, room), strict=False))

    def learn_unread(self, node: ir.Node, inputs: Sequence[Found | None]) -> bool:
        """Evaluate such a node if that takes no memory and reads no weight from its file; whether it does.

        Raises:
            CannotEvaluateError: with the reason.
        """
        outputs = stream(node, inputs, self.opset)
        if outputs is not None:
            self._known.update(zip(node.outputs, outputs, strict=False))
        elif node.op_type in _VIEWS and not isinstance(inputs[0], ir.LazyTensor):
            self.learn(node, inputs)
        else:
            return False
        return True

    def _find(self, value: ir.Value) -> Found:
        """The elements of a value that is known, or the tensor that holds them."""
        found = self._known.get(value)
        if found is None:
            found = self._partial.get(value)
        if found is None:
            found = constant_of(value)
        assert found is not None  # it is known
        return found

    def learn_in_part(self, node: ir.Node) -> bool:
        """Carry on inputs that are known in part; whether the outputs are known in full."""
        if node.domain or node.op_type not in MOVES | _ARITHMETIC or has_reference(node):
            return False
        inputs = [None if value is None else _array(self._find(value)) for value in node.inputs]
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
        if value in self._partial:
            return self._partial[value].shape
        if value in self._known:
            return tuple(self._known[value].shape)
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
        if full:
            self._known[value] = array.astype(dtype.numpy())
        else:
            self._partial[value] = array
        return full


def _array(found: Found | None) -> np.ndarray | None:
    return found if found is None or isinstance(found, np.ndarray) else found.numpy()
