"""Compute equal things once.

Before: a = Relu(x); b = Relu(x); y = Add(a, b)
After:  a = Relu(x); y = Add(a, a)
Declines: both outputs are graph outputs; the second is an output of a body and the first lies around it.

Two nodes are equal if operator, inputs (as values, not as names) and attributes are; an attribute at
its default equals one that is absent. A node in a body may use the value of an equal node around it
that runs before it; bodies beside each other do not see each other. Never merged: random operators,
Dropout, operators without an ONNX schema, calls of functions, nodes that hold graphs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import NONDETERMINISTIC, nbytes, roots, subgraphs_of
from onnxopt.ledger import Ledger, site_of
from onnxopt.rewrite import substitute

__all__ = ["EliminateCommonSubexpressions"]

_RULE = "equal nodes"


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """Let the readers of a node read the outputs of an equal one that runs before it.

    max_bytes: tensors in attributes are compared up to this size each.
    """

    name = "eliminate-common-subexpressions"
    example = """
agraph (float[2] x) => (float[2] y) {
    a = Relu(x)
    b = Relu(x)
    y = Add(a, b)
}
    """

    max_bytes: int = 1 << 20

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for root in roots(model):
            _Sweep(model, root.opset_imports, ledger, self.max_bytes).visit(root, {})


@dataclass
class _Sweep:
    """One walk over a root graph and the bodies in it."""

    model: ir.Model
    opsets: Mapping[str, int]
    ledger: Ledger
    max_bytes: int
    defaults: dict[tuple[str, str, str], frozenset[tuple[str, Hashable]] | None] = field(default_factory=dict)
    """What `default_contents` says of each operator."""

    def visit(self, graph: ir.Graph, first: dict[Hashable, ir.Node]) -> None:
        """Merge the nodes of a graph; `first` holds what the graphs around it have computed before."""
        added: list[Hashable] = []
        for node in graph:
            for body in subgraphs_of(node):
                self.visit(body, first)
            key = self.key(node)
            if key is None:
                continue
            if key not in first:
                first[key] = node
                added.append(key)
            else:
                self.merge(node, first[key])
        for key in added:
            del first[key]

    def merge(self, node: ir.Node, kept: ir.Node) -> None:
        site = site_of(node)
        pairs = list(zip(node.outputs, kept.outputs, strict=True))
        if kept.graph is not node.graph and any(old.is_graph_output() for old in node.outputs):
            self.ledger.decline(_RULE, site, "is a graph output whose value comes from outside the graph")
        elif any(old.is_graph_output() and new.is_graph_output() for old, new in pairs):
            self.ledger.decline(_RULE, site, "is a graph output of the same value as another one")
        elif self.ledger.claim(_RULE, site):
            self.ledger.touch(usage.node for old in node.outputs for usage in old.uses())
            for old, new in pairs:
                substitute(old, new)
            assert isinstance(node.graph, ir.Graph)
            node.graph.remove(node, safe=True)

    def key(self, node: ir.Node) -> Hashable:
        """What two equal nodes have in common; None for a node that is never merged."""
        operator, own = node.op_identifier(), node.attributes.data
        if operator not in self.defaults:
            self.defaults[operator] = self.default_contents(node)
        contents = self.defaults[operator]
        if contents is None or (own and subgraphs_of(node)):
            return None
        if own:
            found = dict(contents) | {name: _content(attr, self.max_bytes) for name, attr in own.items()}
            if None in found.values():
                return None
            contents = frozenset(found.items())
        inputs = node.inputs
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        return operator, inputs, tuple([bool(value.name) for value in node.outputs]), contents

    def default_contents(self, node: ir.Node) -> frozenset[tuple[str, Hashable]] | None:
        """The attributes that have a default; None for an operator without a schema, random or a function."""
        version = self.opsets.get(node.domain)
        if version is None or not onnx.defs.has(node.op_type, version, node.domain):
            return None
        if node.op_identifier() in self.model.functions or node.op_type == "Dropout":
            return None
        if node.domain not in ("", "ai.onnx.ml") or node.op_type in NONDETERMINISTIC:
            return None
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        defaults = {name: formal.default_value for name, formal in schema.attributes.items()}
        return frozenset(
            (name, _content(ir.serde.deserialize_attribute(default), self.max_bytes))
            for name, default in defaults.items()
            if default.name
        )


def _content(attr: ir.Attr, max_bytes: int) -> Hashable:
    """An attribute's type and value; None for a large tensor and for kinds that are not compared."""
    if attr.is_ref():
        return attr.type, "reference", attr.ref_attr_name
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        if nbytes(tensor) > max_bytes:
            return None
        if isinstance(tensor, ir.StringTensor):
            data: Hashable = tuple(tensor.string_data())
        else:
            data = hashlib.sha256(tensor.tobytes()).digest()
        return tensor.dtype, tuple(tensor.shape), data
    if attr.type in (ir.AttributeType.INT, ir.AttributeType.STRING):
        return attr.type, attr.value
    if attr.type in (ir.AttributeType.INTS, ir.AttributeType.STRINGS):
        return attr.type, tuple(attr.value)
    if attr.type == ir.AttributeType.FLOAT:
        return attr.type, repr(attr.value)  # 0.0 and -0.0 are equal, but not the same
    if attr.type == ir.AttributeType.FLOATS:
        return attr.type, repr(tuple(attr.value))
    return None
