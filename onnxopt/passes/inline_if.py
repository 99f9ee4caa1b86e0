"""Put the nodes of a branch in the place of an If that always takes it.

Before: y = If(true) {t = Exp(x)} {e = Neg(x)}
After:  y = Exp(x)
Declines: the condition is an initializer that is also a graph input; the caller of the enclosing function
    gives a branch.

The branch is settled where the condition is constant; where an If around this one has the same condition;
where both branches are the same; and where the other branch gives a rank that an operator after the If
refuses, so that no run that takes it ends (`dead_branches`). The last is what exporters make of a squeeze:
If(size == 1) {Squeeze(x)} {Identity(x)} in front of an LSTM. Such a run now fails elsewhere, or not at all.

Outputs keep their names. Names inside the branch become unique in the model, its initializers become the
model's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, subgraphs_of
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes.shared.inline import Inliner
from onnxopt.passes.shared.ranks import branches_of, cannot_end, ranks_differ
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope, scopes

__all__ = ["InlineIf"]

_SMALL = 4096
"""Bytes of a condition that is read."""
_OBJECTS = (
    ir.AttributeType.GRAPH,
    ir.AttributeType.GRAPHS,
    ir.AttributeType.TENSOR,
    ir.AttributeType.TENSORS,
    ir.AttributeType.SPARSE_TENSOR,
    ir.AttributeType.SPARSE_TENSORS,
)


@dataclass(frozen=True)
class InlineIf(Pass):
    """Replace each If whose branch is settled by the nodes of that branch.

    dead_branches: take a branch from which no run can end for one that is never taken.
    """

    name = "inline-if"
    operators = ("If",)
    example: ClassVar[str] = """
        agraph (float[2] x) => (float[2] y) <bool yes = {1}> {
            a = Neg(x)
            y = If(yes) <then_branch = then () => (float[2] t) { t = Exp(a) },
                         else_branch = other () => (float[2] e) { e = Abs(x) }>
        }
    """

    dead_branches: bool = True

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for scope in scopes(model):
            _Sweep(scope, ledger, Inliner(scope, ledger), self.dead_branches).visit(scope.graph, {})


@dataclass(frozen=True)
class _Sweep:
    scope: Scope
    ledger: Ledger
    inliner: Inliner
    dead_branches: bool

    def visit(self, graph: ir.Graph, known: Mapping[ir.Value, bool], *, looped: bool = False) -> None:
        """Inline the Ifs of a graph and of what is nested in it.

        known: the conditions of the Ifs around it, and which branch it is in. looped: it is in a Loop, where
        a shape on record may not hold for each run.
        """
        work = deque(graph)
        while work and not self.ledger.exhausted:
            node = work.popleft()
            taken = self.inline(node, known, looped)
            if taken is not None:
                work.extendleft(reversed(taken))
                continue
            branches, condition = branches_of(node), node.inputs[0] if node.inputs else None
            for body in subgraphs_of(node):
                inside = {**known, condition: body is branches[0]} if branches and condition else known
                self.visit(body, inside, looped=looped or node.op_type == "Loop")

    def inline(
        self, node: ir.Node, known: Mapping[ir.Value, bool], looped: bool
    ) -> tuple[ir.Node, ...] | None:
        """Put a branch in place of its If; the nodes that are new there, None where the node stays."""
        branches = branches_of(node)
        if branches is None:
            return None
        try:
            settled = self.settle(node, branches, known, looped)
        except Declined as reason:
            self.ledger.decline("If", site_of(node), str(reason))
            return None
        if settled is None or not self.ledger.claim(settled[0], site_of(node)):
            return None
        taken, other = branches if settled[1] else reversed(branches)
        self.inliner.drop(other)
        nodes = tuple(taken)
        self.inliner.finish(node, self.inliner.place(taken, node))
        return nodes

    def settle(
        self, node: ir.Node, branches: tuple[ir.Graph, ir.Graph], known: Mapping[ir.Value, bool], looped: bool
    ) -> tuple[str, bool] | None:
        """Why an If always takes a branch, and whether that is the first; None where it may take either."""
        condition = node.inputs[0]
        if condition is None:
            return None
        if condition in known:
            return "condition of an If around it", known[condition]
        array = constant_array(condition, _SMALL)
        if array is not None:
            return "constant condition", bool(array.all())
        if _equal(*branches):
            return "equal branches", True
        if self.dead_branches and not looped and ranks_differ(*branches):
            dead = next((body for body in branches if cannot_end(node, body, self.scope)), None)
            if dead is not None:
                return "branch from which no run ends", dead is branches[1]
        if condition.is_initializer():
            raise Declined(
                "the condition is an initializer that is also a graph input "
                "(overridable; --freeze-initializers fixes it)"
            )
        return None


def _equal(first: ir.Graph, second: ir.Graph) -> bool:
    """Whether two branches have the same nodes, in the same order, on the same values."""
    if len(first) != len(second) or first.initializers or second.initializers:
        return False
    twins: dict[ir.Value | None, ir.Value] = {}
    for one, other in zip(first, second, strict=True):
        inputs = tuple(twins.get(value, value) for value in one.inputs)
        if (one.op_identifier(), inputs) != (other.op_identifier(), other.inputs):
            return False
        if len(one.outputs) != len(other.outputs) or _attributes(one) != _attributes(other):
            return False
        twins.update(zip(one.outputs, other.outputs, strict=True))
    return [twins.get(value) for value in first.outputs] == list(second.outputs)


def _attributes(node: ir.Node) -> dict[str, object]:
    """Attributes in a form that can be compared; a tensor or a graph is equal to itself only."""
    return {
        name: attr.value if attr.type in _OBJECTS else (attr.type, attr.ref_attr_name, repr(attr.value))
        for name, attr in node.attributes.items()
    }
