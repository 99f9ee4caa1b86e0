"""What follows from the ranks that a branch would give: whether a run that takes it can end.

The ranks are written to the values for the while, followed through shape inference and through the Ifs that
they settle, and taken back.
"""

from __future__ import annotations

import contextlib
from collections import deque
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from onnxopt.evaluation import CannotEvaluateError, Facts
from onnxopt.graph import constant_of, has_reference, ints_attr, is_deterministic
from onnxopt.inference import Type, form_of, infer_outputs
from onnxopt.scope import Scope

__all__ = ["branches_of", "cannot_end", "ranks_differ"]

_PATIENCE = 200
"""Nodes that are looked at for one branch."""
_SMALL = 4096
"""Bytes of the constants that are computed with."""
_SEQUENCES = frozenset({"GRU", "LSTM", "RNN"})
_REFUSING = _SEQUENCES | {"Conv", "ConvTranspose", "Gemm", "Transpose"}
"""Operators that a run does not get past with inputs of other ranks than theirs."""


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
        """Follow what is supposed through the graph of `start`; whether an operator on the way fails."""
        seen, left = dict[ir.Node, None](), _PATIENCE
        while self.work and left:
            left -= 1
            node = self.work.popleft()
            if node.graph is start.graph:
                self.follow(node, seen)
        return not self.work and any(map(_refuses, seen))

    def follow(self, node: ir.Node, seen: dict[ir.Node, None]) -> None:
        """Note what follows for the outputs of a node that runs; those of an If are its branch's."""
        seen[node] = None
        branches = branches_of(node)
        if branches is None:
            self.learn(node)
            return
        condition = node.inputs[0]
        if condition is not None and self.facts.has(condition):
            taken = branches[0] if self.facts.tensor(condition).numpy().all() else branches[1]
            for inner in taken:
                self.follow(inner, seen)
            self.take(node, taken)

    def learn(self, node: ir.Node) -> None:
        """What is on record for the outputs is not relied on: it may hold for the other branch only."""
        inferred: dict[ir.Value, Type] = {}
        form = form_of(node, self.scope.graph.opset_imports)
        if form is not None and onnx.defs.has(node.op_type, self.scope.opset) and not node.domain:
            with contextlib.suppress(onnx.shape_inference.InferenceError):
                inferred = infer_outputs(node, form)
        for value in node.outputs:
            self.save(value)
            found = inferred.get(value)
            value.shape = ir.Shape(found[1]) if isinstance(found, tuple) and found[1] is not None else None
            self.spread(value)
        if node.op_type in ("Shape", "Size") and not node.domain:
            self.facts.learn_shape(node)
        elif self.is_known(node):
            with contextlib.suppress(CannotEvaluateError):
                self.facts.learn(node)

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
    """Whether an operator surely fails on inputs of the ranks on record.

    The runtime takes more than the standard says: a vector as the first matrix of a Gemm, an empty vector
    beside tensors of any rank in a Concat.
    """
    if node.domain or not node.inputs or node.op_type not in _REFUSING or has_reference(node):
        return False
    ranks = [None if value is None or value.shape is None else len(value.shape) for value in node.inputs]
    first, second = (*ranks, None)[:2]
    if node.op_type == "Gemm":
        return (first is not None and first > 2) or second not in (None, 2)
    if node.op_type == "Transpose":
        perm = ints_attr(node, "perm")
        return None not in (first, perm) and len(perm or ()) != first
    if node.op_type in _SEQUENCES:
        return first not in (None, 3)
    return None not in (first, second) and first != second
