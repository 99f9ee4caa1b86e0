"""What follows from the ranks that a branch would give: whether a run that takes it can end.

The ranks are written to the values for the while, followed through shape inference and through the Ifs that
they settle, and taken back.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

import onnx_ir as ir

from onnxopt.evaluation import CannotEvaluateError, Facts
from onnxopt.graph import constant_of, has_reference, ints_attr, is_deterministic, subgraphs_of
from onnxopt.inference import refine
from onnxopt.scope import Scope

__all__ = ["branches_of", "cannot_end", "ranks_differ"]

_PATIENCE = 200
"""Nodes that are looked at for one branch."""
_SMALL = 4096
"""Bytes of the constants that are computed with."""
_MATRICES = frozenset({"Gemm"})
_SEQUENCES = frozenset({"GRU", "LSTM", "RNN"})
_CONVOLUTIONS = frozenset({"Conv", "ConvInteger", "ConvTranspose"})


def branches_of(node: ir.Node) -> tuple[ir.Graph, ir.Graph] | None:
    """The then and the else branch of an If; None for other nodes, or where a caller gives them."""
    if node.op_type != "If" or node.domain or has_reference(node):
        return None
    return node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


def ranks_differ(first: ir.Graph, second: ir.Graph) -> bool:
    """Whether two branches surely give an output in different ranks."""
    pairs = zip(first.outputs, second.outputs, strict=True)
    return any(a.shape is not None and b.shape is not None and len(a.shape) != len(b.shape) for a, b in pairs)


def cannot_end(node: ir.Node, branch: ir.Graph, scope: Scope) -> bool:
    """Whether an operator beside this If surely fails on what the branch gives."""
    supposition = _Supposition(scope)
    try:
        supposition.take(node, branch)
        return supposition.fails(node)
    finally:
        supposition.take_back()


@dataclass
class _Supposition:
    scope: Scope
    facts: Facts = field(init=False)
    saved: dict[ir.Value, tuple[ir.TypeProtocol | None, ir.Shape | None]] = field(default_factory=dict)
    work: deque[ir.Node] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.facts = Facts(self.scope.opset)

    def take(self, node: ir.Node, branch: ir.Graph) -> None:
        """Suppose that an If takes a branch."""
        for outer, inner in zip(node.outputs, branch.outputs, strict=True):
            self.save(outer)
            outer.type = outer.type or inner.type
            outer.shape = None if inner.shape is None else inner.shape.copy()
            self.spread(outer)

    def fails(self, start: ir.Node) -> bool:
        """Follow what is supposed, from operator to operator in the graph of `start`."""
        left = _PATIENCE
        while self.work and left:
            left -= 1
            node = self.work.popleft()
            if node.graph is start.graph and self.fails_at(node):
                return True
        return False

    def fails_at(self, node: ir.Node) -> bool:
        """Whether a node cannot run; if it can, what follows for its outputs is noted."""
        if _refuses(node):
            return True
        branches = branches_of(node)
        if branches is not None:
            condition = node.inputs[0]
            if condition is None or not self.facts.has(condition):
                return False
            taken = branches[0] if self.facts.tensor(condition).numpy().all() else branches[1]
            if any(map(self.fails_at, taken)):
                return True
            self.take(node, taken)
        elif not any(True for _ in subgraphs_of(node)):
            self.learn(node)
        return False

    def learn(self, node: ir.Node) -> None:
        for value in node.outputs:
            self.save(value)
            value.shape = None
        changed = refine(node, self.scope.graph.opset_imports)
        if node.op_type in ("Shape", "Size") and not node.domain:
            changed += node.outputs if self.facts.learn_shape(node) else []
        elif self.is_known(node):
            try:
                self.facts.learn(node)
            except CannotEvaluateError:
                return
            changed += node.outputs
        for value in dict.fromkeys(changed):
            self.spread(value)

    def is_known(self, node: ir.Node) -> bool:
        """Whether a node can be worked out."""
        if node.domain or has_reference(node) or not is_deterministic(node) or self.facts.in_part(node):
            return False
        small = (tensor is None or tensor.nbytes <= _SMALL for tensor in map(constant_of, node.inputs))
        return all(value is None or self.facts.has(value) for value in node.inputs) and all(small)

    def save(self, value: ir.Value) -> None:
        self.saved.setdefault(value, (value.type, value.shape))

    def spread(self, value: ir.Value) -> None:
        self.work.extend(usage.node for usage in value.uses())

    def take_back(self) -> None:
        for value, (kind, shape) in self.saved.items():
            value.type, value.shape = kind, shape


def _refuses(node: ir.Node) -> bool:
    """Whether an operator, by its definition, does not take inputs of the ranks on record."""
    if node.domain or not node.inputs:
        return False
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    known = [rank for rank in ranks if rank is not None]
    if ranks[0] is None:
        return False
    if node.op_type in _SEQUENCES:
        return ranks[0] != 3
    if node.op_type in _MATRICES:
        return any(rank != 2 for rank in ranks[:2] if rank is not None)
    if node.op_type in _CONVOLUTIONS:
        return any(rank != ranks[0] for rank in ranks[:2] if rank is not None)
    if node.op_type == "Concat":
        return any(rank != known[0] for rank in known)
    if node.op_type == "Transpose" and not has_reference(node):
        perm = ints_attr(node, "perm")
        return perm is not None and len(perm) != ranks[0]
    return False
