"""The sizes of values, and the integers that are computed from them, with names for those that are not known.

A size has the name that it has in a graph input, and so is the same wherever it comes from; one that nothing
is known of has a name of its own. Nodes are looked at when a value they lead to is asked about.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation.call import CannotEvaluateError
from onnxopt.evaluation.evaluator import MOVES, evaluate
from onnxopt.evaluation.extents import SHAPES
from onnxopt.evaluation.sizes import ARITHMETIC, Dim, Shape, Size, named, product
from onnxopt.graph import (
    constant_array,
    constant_of,
    has_reference,
    int_attr,
    ints_attr,
    nested,
    subgraphs_of,
    walk,
)
from onnxopt.index import operator_of
from onnxopt.scope import Scope

__all__ = ["Dims", "DimsOf"]

_SMALL = 1024
"""Bytes of a constant, and elements of a result, that are looked at."""
_NUMBERS = (ir.DataType.INT32, ir.DataType.INT64)
_WHOLE = (*_NUMBERS, ir.DataType.BOOL)
_MADE_UP = re.compile(r"%\d+(\*1)?")
_NO_NAME = re.compile(r"\W*|none|unknown|dynamic|undefined", re.IGNORECASE)
"""What exporters write for sizes that have nothing to do with each other."""


class Dims:
    """What is known of the sizes in one scope and the graphs nested in it; linear in the nodes looked at."""

    def __init__(self, scope: Scope) -> None:
        self._scope = scope
        self._shapes: dict[ir.Value, Shape | None] = {}
        self._contents: dict[ir.Value, np.ndarray] = {}
        self._done: set[ir.Node] = set()
        self._unnamed = 0
        self._loops: set[ir.Graph] | None = None
        shapes = [value.shape for value in scope.graph.inputs if value.shape is not None]
        names = {dim.value for shape in shapes for dim in shape.dims if isinstance(dim, ir.SymbolicDim)}
        self._names = {name for name in names if name is not None and not _NO_NAME.fullmatch(name)}

    def of(self, value: ir.Value | None) -> Shape | None:
        """The sizes of a value's axes; None where even their number is not known."""
        if value is None:
            return None
        self._learn(value)
        if value not in self._shapes:
            self._shapes[value] = self._recorded(value)
        return self._shapes[value]

    def elements(self, value: ir.Value | None) -> np.ndarray | None:
        """The elements of a small tensor of integers, an array of numbers and sizes; None where not known."""
        if value is None or value.dtype not in (None, *_WHOLE):
            return None
        self._learn(value)
        if value not in self._contents and (found := self._constant_or_blank(value)) is not None:
            self._contents[value] = found
        return self._contents.get(value)

    def integers(self, node: ir.Node, name: str, index: int) -> list[Dim] | None:
        """A list of integers: an attribute in older opsets, an input in newer ones; [] where left out."""
        given = ints_attr(node, name)
        value = node.inputs[index] if index < len(node.inputs) else None
        if given is not None or value is None:
            return list(given or ())
        found = self.elements(value)
        return None if found is None else list(found.ravel())

    def ints(self, node: ir.Node, name: str, index: int) -> list[int] | None:
        """The same, where all of them are numbers."""
        found = self.integers(node, name, index)
        numbers = [element for element in found or () if isinstance(element, int)]
        return None if found is None or len(numbers) < len(found) else numbers

    def unknown(self, sign: str = "") -> Dim:
        """A size that nothing is known of; it may be negative where the sign is `?`."""
        self._unnamed += 1
        return named(f"{sign}%{self._unnamed}")

    def _learn(self, value: ir.Value) -> None:
        """Work out the nodes that lead to a value, the first ones first."""
        maker = value.producer()
        stack, opened = [] if maker is None or maker in self._done else [maker], set[ir.Node]()
        while stack:
            node = stack[-1]
            if node not in opened and node not in self._done:
                opened.add(node)
                before = (v.producer() for v in node.inputs if v is not None and not self._on_record(v))
                stack.extend(n for n in before if n is not None and n not in self._done)
                continue
            stack.pop()
            if node not in self._done:
                self._done.add(node)
                self._work_out(node)

    def _on_record(self, value: ir.Value) -> bool:
        """Whether the record leaves nothing to be found out."""
        if value.shape is None or not value.shape.is_static() or self._in_loop(value):
            return False
        return value.dtype is not None and (value.dtype not in _WHOLE or len(value.shape) > 1)

    def _work_out(self, node: ir.Node) -> None:
        if has_reference(node) or any(True for _ in subgraphs_of(node)):
            return
        for value, shape in zip(node.outputs, self._shapes_from(node), strict=False):
            if shape is not None:
                self._shapes[value] = self._with_record(value, shape)
        if not node.domain and len(node.outputs) == 1 and node.outputs[0].dtype in (None, *_WHOLE):
            content = self._content(node)
            if content is not None and content.size <= _SMALL:
                self._contents[node.outputs[0]] = content

    def _shapes_from(self, node: ir.Node) -> Sequence[Shape | None]:
        rule = SHAPES.get(operator_of(node))
        try:
            return rule(self, node) if rule is not None else ()
        except (ArithmeticError, LookupError, RuntimeError, ValueError):  # malformed: it says nothing
            return ()

    def _recorded(self, value: ir.Value) -> Shape | None:
        tensor = constant_of(value)
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        if value.shape is None or self._in_loop(value):
            return None
        given = self._named if self._names_hold or value.is_graph_input() else self._number
        return tuple(map(given, value.shape.dims))

    def _number(self, dim: int | ir.SymbolicDim) -> Dim:
        return dim if isinstance(dim, int) else self.unknown()

    @functools.cached_property
    def _names_hold(self) -> bool:
        """False where onnx's inference may have named sizes wrongly: of a Slice of opset 10."""
        return self._scope.opset != 10 or all(node.op_type != "Slice" for node in walk(self._scope.graph))

    def _named(self, dim: int | ir.SymbolicDim) -> Dim:
        if isinstance(dim, int):
            return dim
        return named(dim.value) if dim.value is not None and dim.value in self._names else self.unknown()

    def _with_record(self, value: ir.Value, shape: Shape) -> Shape:
        """What was worked out, numbers that are on record, and names where nothing else is known."""
        record = self._recorded(value)
        if record is None or len(record) != len(shape):
            return shape
        pairs = zip(record, shape, strict=True)
        return tuple(a if isinstance(a, int) or (_is_new(b) and not _is_new(a)) else b for a, b in pairs)

    def _in_loop(self, value: ir.Value) -> bool:
        """Whether a Loop repeats it: what a Loop carries may change its shape, whatever is on record."""
        maker = value.producer()
        graph = value.graph if maker is None else maker.graph
        if graph is self._scope.graph or graph is None or value.is_initializer():
            return False
        if self._loops is None:
            bodies = [
                body for n in walk(self._scope.graph) if n.op_type == "Loop" for body in subgraphs_of(n)
            ]
            self._loops = {inner for body in bodies for inner in (body, *nested(body))}
        return graph in self._loops

    def _constant_or_blank(self, value: ir.Value) -> np.ndarray | None:
        """A constant's elements, or as many unknown integers as there are."""
        array = constant_array(value, _SMALL)
        if array is not None:
            return array.astype(object) if value.dtype in _WHOLE else None
        shape = self.of(value) if value.dtype in _NUMBERS else None
        sizes = [size for size in shape or () if isinstance(size, int)]
        if shape is None or len(shape) > min(len(sizes), 1) or math.prod(sizes) > 16:
            return None
        return np.array([self.unknown("?") for _ in range(math.prod(sizes))], object).reshape(sizes)

    def _content(self, node: ir.Node) -> np.ndarray | None:
        """The elements of the one output."""
        op = node.op_type
        if op in ("Shape", "Size"):
            shape = self.of(node.inputs[0])
            ends = (node.attributes.get(name) for name in ("start", "end"))
            start, end = (None if attr is None else attr.as_int() for attr in ends)
            if shape is None:
                return None
            return np.array(product(shape) if op == "Size" else shape[start:end], object)
        if op not in MOVES and op not in ARITHMETIC:
            return None
        inputs = [self.elements(value) for value in node.inputs]
        if any(array is None and value is not None for array, value in zip(inputs, node.inputs, strict=True)):
            return None
        known = [array for array in inputs if array is not None]
        if op in ARITHMETIC:
            if op == "Cast" and int_attr(node, "to", 0) not in [dtype.value for dtype in _NUMBERS]:
                return None
            result: np.ndarray = np.asarray(np.frompyfunc(ARITHMETIC[op], len(known), 1)(*known), object)
            return result if all(_fits(element, node.outputs[0].dtype) for element in result.flat) else None
        try:
            arrays = [None if array is None else _narrowed(array) for array in inputs]
            return np.asarray(evaluate(node, arrays, self._scope.opset)[0].astype(object))
        except CannotEvaluateError:
            return None


def _is_new(dim: Dim) -> bool:
    """Whether a size is one that got a name here, for want of one."""
    return _MADE_UP.fullmatch(str(dim)) is not None


def _fits(element: object, dtype: ir.DataType | None) -> bool:
    """Whether a result is known, and did not wrap around on the way to its type."""
    largest = np.iinfo(np.int64 if dtype == ir.DataType.INT64 else np.int32).max
    numbers = [count for _, count in element.terms] if isinstance(element, Size) else [element]
    return all(isinstance(number, int) and -largest - 1 <= number <= largest for number in numbers)


def _narrowed(array: np.ndarray) -> np.ndarray:
    """As integers, where all elements are."""
    return array.astype(np.int64) if all(type(element) is int for element in array.flat) else array


class DimsOf:
    """The `Dims` of the scope that is asked about: one for all rules of a pass, which goes scope by scope."""

    def __init__(self) -> None:
        self._last: tuple[Scope, Dims] | None = None

    def __call__(self, scope: Scope) -> Dims:
        if self._last is None or self._last[0] is not scope:
            self._last = scope, Dims(scope)
        return self._last[1]
