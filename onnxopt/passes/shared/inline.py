"""Put the nodes of a body in the place of the node that holds or calls it.

Names are made unique in the whole scope, the graph with all that is nested in it: a value or node keeps its
name where nobody else there has it, and a node's new name starts with that of the node it comes from.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence

import onnx_ir as ir

from onnxopt.graph import nested, subgraphs_of, walk
from onnxopt.ledger import Ledger
from onnxopt.rewrite import Edit
from onnxopt.scope import Scope

__all__ = ["Inliner"]


class Inliner:
    """Puts bodies in place within one scope: `place` each time that a body runs, then `finish`.

    A body is used up when it is placed; `lift` its initializers and `copy` it first to place it again.
    """

    def __init__(self, scope: Scope, ledger: Ledger) -> None:
        self.scope = scope
        self._ledger = ledger
        self._placed: set[ir.Value] = set()

    @functools.cached_property
    def _values(self) -> Counter[str]:
        """How many values of the scope have a name."""
        return _value_names(self.scope.graph)

    @functools.cached_property
    def _nodes(self) -> Counter[str]:
        """How many nodes of the scope have a name."""
        return _node_names(self.scope.graph)

    def copy(self, body: ir.Graph) -> ir.Graph:
        """A copy of a body, of this scope or of another one."""
        self._values.update(_value_names(body))
        self._nodes.update(_node_names(body))
        return body.clone(allow_outer_scope_values=True)

    def drop(self, body: ir.Graph) -> None:
        """Free the names of a body that goes away with its node."""
        self._values.subtract(_value_names(body))
        self._nodes.subtract(_node_names(body))

    def lift(self, body: ir.Graph) -> None:
        """Give a body's initializers to the scope; outputs, or where it holds none, become Constant nodes."""
        constants = []
        for value in tuple(body.initializers.values()):
            tensor = value.const_value
            assert tensor is not None  # the loader refuses initializers without data
            self._rename_value(value)
            assert value.name is not None
            body.initializers.pop(value.name)
            if self.scope.holds_initializers and value not in body.outputs:
                self.scope.graph.register_initializer(value)
                continue
            constant = ir.Node("", "Constant", (), (ir.AttrTensor("value", tensor),))
            new = constant.outputs[0]
            new.name, new.type, new.shape = value.name, value.type, ir.Shape(tensor.shape.numpy())
            value.replace_all_uses_with(new, replace_graph_outputs=True)
            constants.append(constant)
        first = next(iter(body), None)
        if first is None:
            body.extend(constants)
        else:
            body.insert_before(first, constants)

    def place(
        self, body: ir.Graph, anchor: ir.Node, inputs: Sequence[ir.Value | None] = ()
    ) -> list[ir.Value | None]:
        """Move the nodes of a body in front of `anchor`; the values that its outputs are.

        Its own inputs become the values of `inputs`; those beyond them are absent.
        """
        self.lift(body)
        actual: dict[ir.Value, ir.Value | None] = {
            formal: inputs[index] if index < len(inputs) else None for index, formal in enumerate(body.inputs)
        }
        outputs = [actual.get(value, value) for value in body.outputs]
        body.outputs.clear()
        for formal, value in actual.items():
            self._values[formal.name or ""] -= 1
            for usage in tuple(formal.uses()):
                usage.node.replace_input_with(usage.idx, value)
        body.inputs.clear()
        moved = tuple(body)
        body.remove(moved)
        assert isinstance(anchor.graph, ir.Graph)
        anchor.graph.insert_before(anchor, moved)
        for node in moved:
            for key, text in anchor.metadata_props.items():
                node.metadata_props.setdefault(key, text)
            self._rename(node, anchor)
            self._placed.update(node.outputs)
        self._ledger.touch(moved)
        return outputs

    def add(self, edit: Edit, anchor: ir.Node) -> None:
        """Make an edit that only adds, in front of its anchor; its values may be outputs for `finish`."""
        for node in self._made(edit.commit()[0], anchor):
            self._placed.update(node.outputs)

    def finish(self, anchor: ir.Node, outputs: Sequence[ir.Value | None]) -> None:
        """Let the readers of `anchor` read `outputs`, and remove it.

        What was placed or added takes over the names of the anchor's outputs.
        """
        edit, taking = Edit(anchor, self.scope), dict[ir.Value, str]()
        pairs = zip(anchor.outputs, outputs, strict=False)
        for old, new in sorted(pairs, key=lambda pair: not pair[0].is_graph_output()):
            if new is None or not (old.uses() or old.is_graph_output()):
                continue
            if new in self._placed and new not in taking:
                taking[new] = old.name or ""
            elif old.is_graph_output():
                new = edit.op("Identity", [new])
            edit.replace(old, new)
        self._values.subtract(value.name or "" for value in (*taking, *anchor.outputs))
        new_nodes, near = edit.commit()
        for value, name in taking.items():
            value.name = name
        self._values.update(value.name or "" for value in taking)
        self._ledger.touch((*self._made(new_nodes, anchor), *near))
        self._placed.clear()

    def _made(self, nodes: Sequence[ir.Node], anchor: ir.Node) -> Sequence[ir.Node]:
        """Count the names of new nodes, which are those of no value but may be those of nodes elsewhere."""
        for node in nodes:
            self._values.update(value.name or "" for value in node.outputs)
            self._nodes[node.name or ""] += 1
            self._rename(node, anchor)
        return nodes

    def _rename(self, node: ir.Node, anchor: ir.Node) -> None:
        """Give a node, and all that is nested in it, names of their own."""
        inside = [graph for body in subgraphs_of(node) for graph in (body, *nested(body))]
        for inner in (node, *(inner for graph in inside for inner in graph)):
            name = inner.name
            if name and self._nodes[name] > 1:
                like = f"{anchor.name or anchor.op_type}/{name}"
                self._nodes[name] -= 1
                inner.name = next(new for new in _numbered(like) if not self._nodes[new])
                self._nodes[inner.name] = 1
        for value in (*node.outputs, *(value for graph in inside for value in _defined(graph))):
            self._rename_value(value)

    def _rename_value(self, value: ir.Value) -> None:
        name = value.name
        if name and self._values[name] > 1:
            self._values[name] -= 1
            new = self.scope.fresh(name)
            while self._values[new]:  # the scope does not know those of functions that have come in
                new = self.scope.fresh(name)
            value.name = new
            self._values[new] = 1


def _numbered(like: str) -> Iterator[str]:
    yield like
    yield from (f"{like}_{number}" for number in itertools.count(1))


def _defined(graph: ir.Graph) -> Iterator[ir.Value]:
    """The values that a graph defines itself."""
    yield from dict.fromkeys((*graph.inputs, *graph.initializers.values()))
    for node in graph:
        yield from node.outputs


def _value_names(graph: ir.Graph) -> Counter[str]:
    return Counter(value.name or "" for one in (graph, *nested(graph)) for value in _defined(one))


def _node_names(graph: ir.Graph) -> Counter[str]:
    return Counter(node.name or "" for node in walk(graph))
