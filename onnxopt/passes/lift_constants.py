"""Store Constant nodes as initializers of the main graph.

Before: w = Constant<value = ...>(); y = MatMul(x, w)
After:  y = MatMul(x, w), where w is an initializer
Declines: the constant is a graph output; it is sparse; it stands in a function, which holds no
    initializers; below IR version 4, where each initializer would be a graph input.

Constants of bodies go to the main graph too, under a new name, so that a weight is stored once and
may lie in an external file.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_of, walk
from onnxopt.ledger import Ledger, site_of
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope, scopes

__all__ = ["LiftConstants"]

_RULE = "Constant"


@dataclass(frozen=True)
class LiftConstants(Pass):
    """Turn each Constant node into an initializer of the main graph."""

    name = "lift-constants"
    operators = ("Constant",)
    example = """
agraph (float[2] x) => (float[2] y) {
    w = Constant<value = float[2] {1, 2}>()
    y = Mul(x, w)
}
    """

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for scope in scopes(model):
            for node in tuple(walk(scope.graph)):
                if node.op_type != "Constant" or node.domain:
                    continue
                site = site_of(node)
                try:
                    tensor = _tensor(node, scope, model)
                except Declined as reason:
                    ledger.decline(_RULE, site, str(reason))
                    continue
                if ledger.claim(_RULE, site):
                    _lift(node, tensor, scope, ledger)


def _tensor(node: ir.Node, scope: Scope, model: ir.Model) -> ir.TensorProtocol:
    """The constant's tensor; raises `Declined` where it cannot become an initializer."""
    if scope.graph is not model.graph:
        raise Declined("functions hold no initializers")
    if not scope.holds_initializers:
        raise Declined("below IR version 4 each initializer is a graph input")
    if node.outputs[0].is_graph_output():
        raise Declined("is a graph output")
    tensor = constant_of(node.outputs[0])
    if tensor is None:
        tensor = _strings(node)
    if tensor is None:
        raise Declined("is sparse")
    return tensor


def _strings(node: ir.Node) -> ir.TensorProtocol | None:
    if "value_string" in node.attributes:
        return ir.StringTensor([node.attributes["value_string"].as_string().encode()], shape=ir.Shape([]))
    if "value_strings" in node.attributes:
        texts = [text.encode() for text in node.attributes["value_strings"].as_strings()]
        return ir.StringTensor(texts, shape=ir.Shape([len(texts)]))
    return None


def _lift(node: ir.Node, tensor: ir.TensorProtocol, scope: Scope, ledger: Ledger) -> None:
    old, graph = node.outputs[0], node.graph
    assert isinstance(graph, ir.Graph)
    name = old.name if graph is scope.graph and old.name else scope.fresh(old.name or "constant")
    shape = ir.Shape(tensor.shape.numpy())
    new = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
    ledger.touch(old.consumers())
    old.replace_all_uses_with(new)
    graph.remove(node, safe=True)
    scope.graph.register_initializer(new)
