"""Replace what depends on constants only, and what shapes already say, by its value.

Before: y = MatMul(x, Transpose(w)); s = Gather(Shape(x), 1); z = Reshape(y, Concat([-1], s))
After:  y = MatMul(x, w'); z = Reshape(y, [-1, 64])
A graph output that is constant is given by a Constant node.
Declines: random and quantizing operators, and what looks numbers up in a codebook; an initializer that is
    also a graph input; a fold that would add more than `max_growth` bytes; what cannot be evaluated exactly.

`max_growth` holds for each fold by itself: bytes of the new constants, less those of the constants that
nobody reads afterwards. So a Cast or Mul that unpacks a compressed weight stays, as does an Expand or a
ConstantOfShape that makes much out of little. Folds that are too much one by one are judged together where
they read the same weight, which may go with the last of them.

Large weights stay on disk: where they are only moved, cut, joined, converted or scaled, the new constant is
computed from them, in pieces, when it is read.

The graph is walked once, in order. Values are worked out on the way but put in place only where a node
reads them that is not folded itself; of a shape that is known in part, that part is followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import CannotEvaluateError, Facts
from onnxopt.graph import has_reference, is_deterministic, static_shape, subgraphs_of
from onnxopt.inference import refine
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes.shared.growth import Growth, used
from onnxopt.quantization.operands import reads_codebook
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope, scopes
from onnxopt.streamed import LARGE

__all__ = ["FoldConstants"]

_SHAPES = frozenset({ir.DataType.INT32, ir.DataType.INT64})
"""Types of constants whose elements shape inference looks at."""

_QUANTIZING = frozenset({"DequantizeLinear", "DynamicQuantizeLinear", "QuantizeLinear"})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Work out what is constant, within a budget of bytes.

    max_growth: bytes that one fold may add to the model.
    """

    name = "fold-constants"
    kind = "reorder"
    example = """
agraph (float[N, 3] x) => (float[N, 2] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}> {
    t = Transpose(w)
    y = MatMul(x, t)
}
    """

    max_growth: int = 1 << 12

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for scope in scopes(model):
            facts = Facts(scope.opset)
            folder = _Folder(scope, ledger, facts, Growth(facts, scope, self.max_growth))
            folder.walk(scope.graph)
            folder.settle_jointly()


@dataclass
class _Folder:
    scope: Scope
    ledger: Ledger
    facts: Facts
    growth: Growth
    dynamic: set[ir.Value] = field(default_factory=set)
    """Values that depend on what the model is given."""
    settled: set[ir.Node] = field(default_factory=set)
    """Nodes whose outputs were put in place or refused."""
    too_much: list[ir.Node] = field(default_factory=list)
    """Those that were refused because they would add too much."""
    refined: set[ir.Value] = field(default_factory=set)
    """Values of which more is known than shape inference has seen."""

    def walk(self, graph: ir.Graph) -> None:
        self.dynamic.update(value for value in graph.inputs if not value.is_initializer())
        for node in graph:
            if self.ledger.exhausted:
                return
            bodies = subgraphs_of(node)
            for body in bodies:
                if node.op_type == "Loop" or graph in self.facts.loose:
                    # What a Loop carries may change its shape, whatever the shape on record.
                    self.facts.loose.add(body)
                self.walk(body)
            if self.work_out(node, nested=bool(bodies)):
                continue
            if self.facts.learned_any(node.inputs):
                self.settle(node.inputs)
            if not self.refined.isdisjoint(node.inputs) and graph not in self.facts.loose:
                self.refined.update(refine(node, self.scope.graph.opset_imports))
        self.settle(graph.outputs)

    def work_out(self, node: ir.Node, *, nested: bool) -> bool:
        """Find the outputs of a node; False where it stays because they are not known in full."""
        if node.op_type in ("Constant", "Shape", "Size") and not node.domain:
            return node.op_type == "Constant" or self.facts.learn_shape(node)
        if nested or not self.dynamic.isdisjoint(node.inputs):
            self.dynamic.update(node.outputs)
            return False
        missing = [value for value in node.inputs if value is not None and not self.facts.has(value)]
        if missing:
            if all(value.is_initializer() and value.is_graph_input() for value in missing):
                self.decline(node, _OVERRIDABLE)
            return False
        if self.facts.in_part(node):
            return self.facts.learn_in_part(node)
        try:
            self.check(node)
            inputs = self.facts.inputs(node)
            large = sum(item.nbytes for item in inputs if item is not None) > LARGE
            if not (large and self.facts.learn_unread(node, inputs)):
                if large:
                    self.growth.foresee(node)
                self.facts.learn(node, inputs)
        except (CannotEvaluateError, Declined) as reason:
            self.decline(node, str(reason))
            return False
        return True

    def check(self, node: ir.Node) -> None:
        """Raise `Declined` for a node whose inputs are all known, and which is not to be worked out."""
        if node.domain:
            raise Declined(f"what operators of domain {node.domain!r} compute is not known here")
        if has_reference(node):
            raise Declined("an attribute is set by the caller of the function")
        if not is_deterministic(node):
            raise Declined("it is random")
        if node.op_type in _QUANTIZING:
            raise Declined("it keeps a weight quantized")
        users = {use.node for use in node.outputs[0].uses()} if node.op_type == "Cast" else {node}
        if any(map(reads_codebook, users)):
            raise Declined("it keeps a weight in a codebook")

    def settle(self, read: Sequence[ir.Value | None]) -> None:
        """Put values in place that a node which stays reads; where that is refused, what they come from."""
        work = [*reversed(read)]
        while work:
            value = work.pop()
            producer = value.producer() if value is not None and self.facts.learned(value) else None
            if producer is None or producer in self.settled:
                continue
            if not all(self.facts.learned(output) for output in used(producer)):
                continue  # a Split of what is known in part stays
            self.settled.add(producer)
            try:
                self.growth.check([producer])
            except Declined as reason:
                self.decline(producer, str(reason))
                self.too_much.append(producer)
                work.extend(producer.inputs)
                continue
            if not self.replace(producer):
                work.extend(producer.inputs)

    def settle_jointly(self) -> None:
        """Put in place what only together with others does not add too much."""
        groups: dict[ir.Value, list[ir.Node]] = {}
        for node in self.too_much:
            for value in node.inputs:
                if value is None or not self.facts.has(value):
                    continue
                if self.facts.nbytes(value) > self.growth.most:
                    groups.setdefault(value, []).append(node)
        for group in groups.values():
            nodes = [node for node in group if node.graph is not None and used(node)]
            try:
                self.growth.check(nodes)
            except Declined:
                continue
            for node in nodes:
                self.replace(node)

    def replace(self, node: ir.Node) -> bool:
        """Put the outputs of a node in place, all at once; False where that is refused."""
        if not self.ledger.claim(node.op_type, site_of(node)):
            return False
        edit = Edit(node, self.scope)
        for value in used(node):
            tensor = self.facts.tensor(value)
            if value.is_graph_output():
                new = edit.op("Constant", (), {"value": tensor})
            else:
                new = edit.constant(tensor, value.name)
            edit.replace(value, new)
            if tensor.dtype in _SHAPES or static_shape(value) is None or value.dtype is None:
                self.refined.add(new)
        new_nodes, near = edit.commit()
        self.ledger.touch((*new_nodes, *near))
        return True

    def decline(self, node: ir.Node, reason: str) -> None:
        self.ledger.decline(node.op_type, site_of(node), reason)


_OVERRIDABLE = (
    "an input is an initializer that is also a graph input (overridable; --freeze-initializers folds it)"
)
