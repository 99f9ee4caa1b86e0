"""Replace what depends on constants only, and what shapes already say, by its value.

Before: y = MatMul(x, Transpose(w)); s = Gather(Shape(x), 1); z = Reshape(y, Concat([-1], s))
After:  y = MatMul(x, w'); z = Reshape(y, [-1, 64])
A graph output that is constant is given by a Constant node.
Declines: random and quantizing operators; an initializer that is also a graph input; a fold that would
    add more than `max_growth` bytes; what cannot be evaluated exactly.

`max_growth` holds for each fold by itself: bytes of the new constants, less those of the constants that
nobody reads afterwards. So a Cast or Mul that unpacks a compressed weight stays, as does an Expand or a
ConstantOfShape that makes much out of little.

The graph is walked once, in order. Values are worked out on the way but put in place only where a node
reads them that is not folded itself; of a shape that is known in part, that part is followed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import MOVES, CannotEvaluateError, evaluate
from onnxopt.graph import constant_of, has_reference, is_deterministic, static_shape, subgraphs_of
from onnxopt.passes._inference import refine
from onnxopt.pipeline import Pass
from onnxopt.rewrite import Declined, Edit, Ledger, Scope, scopes

__all__ = ["FoldConstants"]

_LARGE = 1 << 20
"""Bytes of inputs from which on the size of a result is asked for before it is worked out."""

_ROOM = 1 << 24
"""Bytes that a result may have more than its inputs; it may still shrink before it is put in place."""

_ARITHMETIC = frozenset({"Add", "Cast", "Mul", "Sub"})
"""Besides MOVES, what is done to shapes that are known in part."""

_QUANTIZING = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Work out what is constant, within a budget of bytes.

    max_growth: bytes that one fold may add to the model.
    """

    name = "fold-constants"
    kind = "reorder"

    max_growth: int = 1 << 12

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for scope in scopes(model):
            _Folder(scope, ledger, self.max_growth).walk(scope.graph)


class _Unknown:
    """A dimension that is not known; so is what is computed from it."""

    def __add__(self, other: object) -> _Unknown:
        return self

    __mul__ = __radd__ = __rmul__ = __rsub__ = __sub__ = __add__


_UNKNOWN = _Unknown()


@dataclass
class _Folder:
    scope: Scope
    ledger: Ledger
    max_growth: int
    facts: dict[ir.Value, np.ndarray] = field(default_factory=dict)
    """Values worked out so far; as Python objects where a part is not known."""
    settled: set[ir.Node] = field(default_factory=set)
    """Nodes whose outputs were put in place or refused."""
    changed: set[ir.Value] = field(default_factory=set)
    """Values with a better type or shape than shape inference knew of."""
    loose: set[ir.Graph] = field(default_factory=set)
    """Loop bodies: what is carried around may change its shape, whatever the shape on record."""

    def walk(self, graph: ir.Graph) -> None:
        for node in graph:
            if self.ledger.exhausted:
                return
            for body in subgraphs_of(node):
                if node.op_type == "Loop" or graph in self.loose:
                    self.loose.add(body)
                self.walk(body)
            if node.op_type == "Constant" and not node.domain or self.work_out(node):
                continue
            for value in node.inputs:
                self.settle(value)
            if graph not in self.loose and not self.changed.isdisjoint(node.inputs):
                self.changed.update(refine(node, self.scope.graph.opset_imports))
        for value in graph.outputs:
            self.settle(value)

    def work_out(self, node: ir.Node) -> bool:
        """Find the outputs of a node; False where it stays because something is not known."""
        if node.op_type in ("Shape", "Size") and not node.domain:
            return self.note(node, self.dims(node))
        if not all(value is None or self.is_known(value) for value in node.inputs):
            self.decline_overridable(node)
            return False
        partial = any(self.facts[v].dtype == object for v in node.inputs if v in self.facts)
        if partial and (node.domain or node.op_type not in MOVES | _ARITHMETIC):
            return False
        if any(True for _ in subgraphs_of(node)):
            return False
        try:
            self.check(node)
            inputs = [None if value is None else self.read(value) for value in node.inputs]
            if partial and node.op_type == "Cast":
                return self.note(node, [array for array in inputs if array is not None])
            limit = _ROOM + sum(array.nbytes for array in inputs if array is not None)
            return self.note(node, evaluate(node, inputs, self.scope.opset, limit))
        except (CannotEvaluateError, Declined) as reason:
            if not partial:
                self.ledger.decline(node.op_type, _site(node), str(reason))
            return False

    def dims(self, node: ir.Node) -> Sequence[np.ndarray]:
        """The output of Shape or Size, from its input's value or else from the shape on record."""
        source = node.inputs[0]
        if source is None or has_reference(node):
            return ()
        found = self.shape(source)
        if node.op_type == "Size":
            known = [dim for dim in found or () if isinstance(dim, int)]
            return (
                (np.array(math.prod(known), np.int64),)
                if found is not None and len(known) == len(found)
                else ()
            )
        start, end = (node.attributes.get(name) for name in ("start", "end"))
        return (
            ()
            if found is None
            else (np.array(found[start and start.as_int() : end and end.as_int()], object),)
        )

    def shape(self, value: ir.Value) -> Sequence[int | _Unknown] | None:
        if value in self.facts:
            return self.facts[value].shape
        maker = value.producer()
        if value.shape is None or (maker.graph if maker is not None else value.graph) in self.loose:
            return None
        return [dim if isinstance(dim, int) else _UNKNOWN for dim in value.shape.dims]

    def note(self, node: ir.Node, arrays: Sequence[np.ndarray]) -> bool:
        """Keep the outputs; False where they are not known in full."""
        full = bool(arrays)
        for value, array in zip(node.outputs, arrays, strict=False):
            if array.dtype == object:
                dtype = ir.DataType.INT64 if node.op_type == "Shape" else value.dtype
                if dtype not in (ir.DataType.INT32, ir.DataType.INT64):
                    return False
                if all(isinstance(element, int) for element in array.ravel()):
                    array = array.astype(dtype.numpy())
                else:
                    full = False
            self.facts[value] = array
        return full

    def is_known(self, value: ir.Value) -> bool:
        tensor = None if value in self.facts else constant_of(value)
        return value in self.facts or tensor is not None and tensor.dtype != ir.DataType.STRING

    def size(self, value: ir.Value) -> int:
        fact, tensor = self.facts.get(value), constant_of(value)
        return fact.nbytes if fact is not None else tensor.nbytes if tensor is not None else 0

    def read(self, value: ir.Value) -> np.ndarray:
        if value not in self.facts:
            tensor = constant_of(value)
            assert tensor is not None
            return tensor.numpy()
        return self.facts[value]

    def check(self, node: ir.Node) -> None:
        """Raise `Declined` for a node whose inputs are all known, and which must not be worked out."""
        if node.domain:
            raise Declined(f"what operators of domain {node.domain!r} compute is not known here")
        if has_reference(node):
            raise Declined("an attribute is set by the caller of the function")
        if not is_deterministic(node):
            raise Declined("it is random")
        if node.op_type in _QUANTIZING:
            raise Declined("it keeps a weight quantized")
        if sum(self.size(value) for value in node.inputs if value is not None) <= _LARGE:
            return
        refine(node, self.scope.graph.opset_imports)
        used, size = _used(node), 0
        for value in used:
            shape = static_shape(value)
            if shape is None or value.dtype is None:
                raise Declined("the size of the result is not known")
            size += math.ceil(math.prod(shape) * value.dtype.itemsize)
        self.afford(node, size)

    def afford(self, node: ir.Node, size: int) -> None:
        growth = size - self.freed(node)
        if growth > self.max_growth:
            raise Declined(f"it would add {growth / 1e3:,.0f} kB to the model (max_growth={self.max_growth})")

    def freed(self, node: ir.Node) -> int:
        """Bytes of the constants that nobody reads any more when the node's outputs are in place."""
        dying, work, seen, total = {node}, [node], set[ir.Value](), 0
        while work:
            for value in work.pop().inputs:
                if value is None or value in seen or not self.is_known(value) or not _dies(value, dying):
                    continue
                seen.add(value)
                producer = value.producer()
                if value not in self.facts:
                    total += self.size(value)
                elif producer is not None and all(_dies(output, dying) for output in producer.outputs):
                    dying.add(producer)
                    work.append(producer)
        return total

    def settle(self, value: ir.Value | None) -> None:
        """Put a value in place that is read by a node which stays; where that is refused, what it is made from."""
        work = [value]
        while work:
            value = work.pop()
            producer = value.producer() if value is not None and value in self.facts else None
            if producer is None or producer in self.settled or value is None:
                continue
            if self.facts[value].dtype == object:
                continue
            self.settled.add(producer)
            if not self.replace(producer):
                work.extend(producer.inputs)

    def replace(self, node: ir.Node) -> bool:
        edit, used = Edit(node, self.scope), _used(node)
        try:
            self.afford(node, sum(self.facts[value].nbytes for value in used))
        except Declined as reason:
            self.ledger.decline(node.op_type, _site(node), str(reason))
            return False
        made = []
        for value in used:
            tensor = ir.tensor(_own(self.facts[value]))
            if value.is_graph_output():
                new = edit.op("Constant", (), {"value": tensor})
            else:
                new = edit.constant(tensor, value.name)
            edit.replace(value, new)
            made.append(new)
        if not self.ledger.claim(node.op_type, _site(node)):
            return False
        new_nodes, near = edit.commit()
        self.ledger.touch((*new_nodes, *near))
        self.changed.update(made)
        return True

    def decline_overridable(self, node: ir.Node) -> None:
        """Say so where nothing but an initializer that is also a graph input is in the way."""
        others = [v for v in node.inputs if v is not None and not self.is_known(v)]
        if all(v.is_initializer() and v.is_graph_input() for v in others):
            reason = "an input is an initializer that is also a graph input (overridable; --freeze-initializers folds it)"
            self.ledger.decline(node.op_type, _site(node), reason)


def _site(node: ir.Node) -> str:
    return node.outputs[0].name or node.name or node.op_type


def _used(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.outputs if value.uses() or value.is_graph_output()]


def _dies(value: ir.Value, dying: set[ir.Node]) -> bool:
    """Whether nobody but nodes that go away reads the value."""
    return not value.is_graph_output() and all(usage.node in dying for usage in value.uses())


def _own(array: np.ndarray) -> np.ndarray:
    """The array, in memory of its own where it is a view."""
    array = np.asarray(array)
    return array if array.base is None and array.flags.c_contiguous else np.array(array, order="C")
