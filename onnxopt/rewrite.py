"""Rules and the driver that applies them.

A rule looks at one node and says one of three things: `None` (my pattern is not here), an `Edit`
(a described change, not yet made) or it raises `Declined` (my pattern is here, but the rewrite would
be wrong, and why). The driver asks the ledger for leave, makes the change, and looks again only at
what the change touched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.errors import OnnxoptError
from onnxopt.graph import detach, sizes_of, subgraphs_of, use_count, walk
from onnxopt.index import operator_of
from onnxopt.ledger import Ledger, Rewrite, site_of
from onnxopt.scope import Scope, scopes

__all__ = ["AttributeValue", "Declined", "Edit", "NewerOpset", "Rule", "drive", "visit"]

AttributeValue = (
    int | float | str | Sequence[int] | Sequence[float] | Sequence[str] | ir.TensorProtocol | ir.Attr
)


_SCALARS = (
    (int, ir.AttributeType.INT, ir.AttributeType.INTS),
    (float, ir.AttributeType.FLOAT, ir.AttributeType.FLOATS),
    (str, ir.AttributeType.STRING, ir.AttributeType.STRINGS),
)


class Declined(Exception):  # noqa: N818 - a decision, not an error
    """The pattern is there, but the rewrite is not safe; the message says why."""


class NewerOpset(Declined):
    """The pattern is there, but the operator it would become is only in a newer opset."""

    def __init__(self, op_type: str, opset: int) -> None:
        super().__init__(f"{op_type} came with opset {opset}")
        self.opset = opset


class UnendingError(OnnxoptError):
    """A pass goes on rewriting what it has rewritten."""


@dataclass(frozen=True)
class _Planned:
    """A node to be made: ir nodes register as readers when they are built, so they are built at commit."""

    domain: str
    op_type: str
    inputs: tuple[ir.Value | None, ...]
    attributes: Sequence[ir.Attr]
    outputs: tuple[ir.Value, ...]
    name: str | None


class Edit:
    """A change to make: new nodes in front of `anchor`, and the old values they stand for.

    Nothing is changed before `commit`. Nodes that nobody reads any more afterwards are removed,
    from `anchor` upwards.
    """

    def __init__(self, anchor: ir.Node, scope: Scope) -> None:
        self._anchor = anchor
        self._scope = scope
        self._planned: list[_Planned] = []
        self._initializers: list[ir.Value] = []
        self._named: dict[ir.Value, str] = {}
        self._replaced: list[tuple[ir.Value, ir.Value]] = []
        self._named_after_anchor = False

    def constant(self, array: np.ndarray | ir.TensorProtocol, like: str | None) -> ir.Value:
        """A new constant; its name is fresh and starts with `like`."""
        tensor = ir.Tensor(array) if isinstance(array, np.ndarray) else array
        value = ir.Value(type=ir.TensorType(tensor.dtype), shape=ir.Shape(sizes_of(tensor)))
        self._named[value] = like or "constant"
        if self._scope.holds_initializers:
            value.const_value = tensor
            self._initializers.append(value)
        else:
            attr = ir.AttrTensor("value", tensor)
            self._planned.append(_Planned("", "Constant", (), (attr,), (value,), None))
        return value

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        domain: str = "",
        name: str | None = None,
    ) -> ir.Value:
        """A new node with one output; the output. The first node has the anchor's name, if none is given."""
        return self.ops(op_type, inputs, attributes, domain=domain, name=name, outputs=1)[0]

    def ops(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, AttributeValue] | None = None,
        *,
        outputs: int | Sequence[bool],
        domain: str = "",
        name: str | None = None,
    ) -> tuple[ir.Value, ...]:
        """A new node with several outputs, so many or those that are wanted of them; the outputs."""
        attrs = [_attribute(name, value) for name, value in (attributes or {}).items()]
        wanted = [True] * outputs if isinstance(outputs, int) else outputs
        values = tuple(ir.Value() if one else ir.Value(name="") for one in wanted)
        base = self._anchor.outputs[0].name or op_type
        self._named.update({value: base for value in values if value.name is None})
        node_name = name or (None if self._named_after_anchor else self._anchor.name)
        self._named_after_anchor |= node_name == self._anchor.name
        self._planned.append(_Planned(domain, op_type, tuple(inputs), attrs, values, node_name))
        return values

    def replace(self, old: ir.Value, new: ir.Value) -> Edit:
        """Let all that read `old` read `new`; a graph output keeps its name, type and shape."""
        self._replaced.append((old, new))
        return self

    def check(self) -> None:
        """Raise `Declined` where a graph output could not keep its name."""
        for old, new in self._replaced:
            if not old.is_graph_output() or (new in self._named and new not in self._initializers):
                continue
            producer = new.producer()
            if producer is None or producer.graph is not old.graph:
                raise Declined("is a graph output whose value comes from outside the graph")
            if new.is_graph_output():
                raise Declined("is a graph output of the same value as another one")

    def commit(self) -> tuple[list[ir.Node], list[ir.Node]]:
        """Make the change; the new nodes, and the old ones that read or feed what changed."""
        graph = self._anchor.graph
        assert isinstance(graph, ir.Graph)
        taken = [
            old
            for old, new in self._replaced
            if new in self._named and new not in self._initializers and not old.is_initializer()
        ]
        kept = {new: old.name for old, new in reversed(self._replaced) if old in taken}
        names = {value: kept.get(value) or self._scope.fresh(like) for value, like in self._named.items()}
        for old in taken:
            old.name = None
        for value, name in names.items():
            value.name = name
        for value in self._initializers:
            graph.register_initializer(value)
        nodes = [
            ir.Node(p.domain, p.op_type, p.inputs, p.attributes, outputs=p.outputs, name=p.name)
            for p in self._planned
        ]
        graph.insert_before(self._anchor, nodes)
        for planned in self._planned:
            if planned.domain:
                self._scope.graph.opset_imports.setdefault(planned.domain, 1)
        readers = [usage.node for old, _ in self._replaced for usage in old.uses()]
        for old, new in self._replaced:
            substitute(old, new)
        above = _remove_unread([self._anchor, *(p for old, _ in self._replaced if (p := old.producer()))])
        self._rename_survivors(nodes, taken)
        return nodes, [n for n in (*readers, *above) if n.graph is not None]

    def _rename_survivors(self, nodes: Iterable[ir.Node], taken: Iterable[ir.Value]) -> None:
        """Where a replaced node stays for its other outputs, names are not shared with what replaces it."""
        for old in taken:
            producer = old.producer()
            if producer is not None and producer.graph is not None:
                old.name = self._scope.fresh("unused")
        if self._anchor.graph is not None and self._anchor.name:
            for node in nodes:
                if node.name == self._anchor.name:
                    node.name = f"{self._anchor.name}/{node.outputs[0].name}"


def _attribute(name: str, value: AttributeValue) -> ir.Attr:
    """The attribute that a Python value stands for; onnx_ir takes longer over this than over a whole edit."""
    for scalar, one, several in _SCALARS:
        if isinstance(value, scalar):
            return ir.Attr(name, one, value)
        if isinstance(value, tuple | list) and value and all(isinstance(item, scalar) for item in value):
            return ir.Attr(name, several, value)
    return ir.convenience.convert_attribute(name, value)


def substitute(old: ir.Value, new: ir.Value) -> None:
    """Let all that read `old` read `new`; where `old` is a graph output, `new` takes its place and name."""
    if new.type is None:
        new.type = old.type
    if new.shape is None and old.shape is not None and new.graph is old.graph:
        new.shape = old.shape.copy()  # what is known in a branch holds where the branch runs only
    if old.is_graph_output():
        if old.name is not None:
            name, old.name = old.name, None
            new.name = name
        new.type = old.type
        new.shape = old.shape.copy() if old.shape is not None else None
    old.replace_all_uses_with(new, replace_graph_outputs=True)


def _remove_unread(start: Iterable[ir.Node]) -> list[ir.Node]:
    """Remove nodes whose outputs nobody reads, from `start` upwards; the nodes above that are still read."""
    work, above = deque(start), dict[ir.Node, None]()
    unread: dict[ir.Node, ir.Graph] = {}
    while work:
        node = work.popleft()
        if node in unread or not isinstance(node.graph, ir.Graph):
            continue
        if any(use_count(v) or v.is_graph_output() for v in node.outputs):
            above[node] = None
            continue
        unread[node] = node.graph
        work.extend(p for v in node.inputs if v is not None and (p := v.producer()))
        detach(node)
        for inner in [inner for body in subgraphs_of(node) for inner in walk(body)]:
            detach(inner)
            if isinstance(inner.graph, ir.Graph):
                inner.graph.remove(inner)
    for graph in dict.fromkeys(unread.values()):
        graph.remove([node for node in unread if unread[node] is graph])
    return [node for node in above if node.graph is not None]


@dataclass(frozen=True)
class Rule:
    """A rewrite of one pattern, found from the node it ends in.

    name: short, in words, for reports.
    op_types: the operators that the pattern can end in; `domain::Op` outside the default domain.
    apply: looks at such a node; gives an `Edit`, None, or raises `Declined`. It changes nothing.
    """

    name: str
    op_types: tuple[str, ...]
    apply: Callable[[ir.Node, Scope], Edit | None]


def drive(model: ir.Model, rules: Sequence[Rule], ledger: Ledger) -> None:
    """Apply the rules in every scope until none fires, re-examining only what changed.

    Time is linear in the nodes of the rules' operators plus rewrites: a work list holds the nodes to look at.
    """
    by_operator: dict[str, list[Rule]] = {}
    for rule in rules:
        for operator in rule.op_types:
            by_operator.setdefault(operator, []).append(rule)
    index = ledger.index(model)
    for scope in scopes(model):
        work = deque(index.find(scope.graph, by_operator))
        waiting = set(work)
        left = 100 + 20 * len(work)
        while work and not ledger.exhausted:
            node = work.popleft()
            waiting.discard(node)
            touched = visit(node, by_operator.get(operator_of(node), ()), scope, ledger)
            left -= bool(touched)
            if left < 0:
                raise UnendingError(f"{ledger.pass_name}: keeps rewriting around node {node.name!r}")
            for other in touched:
                if other not in waiting and operator_of(other) in by_operator:
                    work.append(other)
                    waiting.add(other)


def visit(node: ir.Node, rules: Sequence[Rule], scope: Scope, ledger: Ledger) -> list[ir.Node]:
    """Apply the first of these rules that fires at a node; the nodes to look at again."""
    for rule in rules:
        if node.graph is None:
            break
        if ledger.left_out and ledger.leaves_out(Rewrite(ledger.pass_name, rule.name, site_of(node))):
            continue
        try:
            edit = rule.apply(node, scope)
            if edit is None:
                ledger.retract(rule.name, site_of(node))
                continue
            edit.check()
        except Declined as reason:
            ledger.decline(rule.name, site_of(node), str(reason))
            if isinstance(reason, NewerOpset):
                ledger.opsets_wanted.add(reason.opset)
            continue
        except Exception:
            ledger.visiting = Rewrite(ledger.pass_name, rule.name, site_of(node))
            raise
        if ledger.claim(rule.name, site_of(node)):
            new, near = edit.commit()
            ledger.touch((*new, *near))
            return [*new, *near]
    return []
