"""Remove what nobody reads: nodes, optional outputs, initializers, functions, opset imports.

Before: y, mask = Dropout(x); unused = Exp(x); w (an initializer) and the mask are read nowhere
After:  y = Dropout(x)
Declines: nothing. Graph inputs stay, read or not, and so do initializers that are graph inputs:
    they are the signature. Outputs whose presence has a meaning (BatchNormalization in training or
    before opset 14, Attention with a past) stay as well, and so does a node without any output.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import (
    detach,
    function_name,
    graphs,
    has_reference,
    int_attr,
    nodes,
    roots,
    subgraphs_of,
    walk,
)
from onnxopt.ledger import Ledger, site_of

__all__ = ["EliminateDead"]

_KEPT_DOMAINS = ("", "ai.onnx")
"""Always imported: the version of the default operator set says how to read, and to extend, the model."""


@dataclass(frozen=True)
class EliminateDead(Pass):
    """Remove nodes, optional outputs, initializers, functions and opset imports that nobody reads."""

    name = "eliminate-dead"
    example = """
agraph (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
    unused = Mul(x, w)
    y, mask = Dropout(x)
}
    """

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        present = set(nodes(model))
        for root in roots(model):
            _sweep(root, root.opset_imports, present, ledger)
        _remove_initializers(model, present, ledger)
        _remove_functions(model, ledger)
        _remove_imports(model, ledger)


def _is_read(value: ir.Value, present: set[ir.Node]) -> bool:
    """Whether the value is needed; nodes that are gone may still be on record as its readers."""
    return value.is_graph_output() or any(usage.node in present for usage in value.uses())


def _sweep(graph: ir.Graph, opsets: dict[str, int], present: set[ir.Node], ledger: Ledger) -> None:
    """Remove unread nodes from the last to the first, so that one sweep takes whole chains."""
    for node in reversed(graph):
        unread = node.outputs and not any(_is_read(value, present) for value in node.outputs)
        if unread and ledger.claim("unused node", site_of(node)):
            _remove(node, graph, present)
            continue
        for body in subgraphs_of(node):
            _sweep(body, opsets, present, ledger)
        if not unread:
            _drop_outputs(node, opsets, present, ledger)


def _remove(node: ir.Node, graph: ir.Graph, present: set[ir.Node]) -> None:
    """Remove a node, and what the graphs inside it read from around it."""
    inside = [inner for body in subgraphs_of(node) for inner in walk(body)]
    for gone in (node, *inside):
        present.discard(gone)
        detach(gone)
    graph.remove(node)


def _drop_outputs(node: ir.Node, opsets: dict[str, int], present: set[ir.Node], ledger: Ledger) -> None:
    if len(node.outputs) < 2:
        return
    unread = [v for v in node.outputs if v.name and not _is_read(v, present)]
    optional = _optional_outputs(node, opsets) if unread else ()
    dropped = False
    for value in unread:
        if value in optional and ledger.claim("unused output", value.name or ""):
            value.name, dropped = "", True
    if dropped:
        left = len(node.outputs)
        while not node.outputs[left - 1].name:
            left -= 1
        node.resize_outputs(left)
        ledger.touch([node])


def _optional_outputs(node: ir.Node, opsets: dict[str, int]) -> list[ir.Value]:
    """The outputs that the node may leave out, without a change to the others.

    ONNX Runtime runs no Attention that has a past but leaves out the present.
    """
    version = opsets.get(node.domain)
    if (
        version is None
        or node.op_type == "Attention"
        or not onnx.defs.has(node.op_type, version, node.domain)
    ):
        return []
    schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    if node.op_type == "BatchNormalization" and (
        version < 14 or has_reference(node) or int_attr(node, "training_mode", 0) != 0
    ):
        return []
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    return [v for v, formal in zip(node.outputs, schema.outputs, strict=False) if formal.option == optional]


def _remove_initializers(model: ir.Model, present: set[ir.Node], ledger: Ledger) -> None:
    for graph in graphs(model):
        for name, value in tuple(graph.initializers.data.items()):
            if value.is_graph_input() or _is_read(value, present):
                continue
            if ledger.claim("unused initializer", name):
                graph.initializers.pop(name)


def _remove_functions(model: ir.Model, ledger: Ledger) -> None:
    """Remove functions that nobody calls, and then those that only they called."""
    if not model.functions:
        return
    calls = Counter(node.op_identifier() for node in nodes(model))
    work = deque(key for key in model.functions if not calls[key])
    while work:
        key = work.popleft()
        if not ledger.claim("unused function", function_name(key)):
            continue
        for node in walk(model.functions.pop(key).graph):
            called = node.op_identifier()
            calls[called] -= 1
            if called in model.functions and not calls[called]:
                work.append(called)


def _remove_imports(model: ir.Model, ledger: Ledger) -> None:
    """Remove opset imports that no node needs; the main graph also imports what the functions use."""
    if all(domain in _KEPT_DOMAINS for root in roots(model) for domain in root.opset_imports):
        return
    needed = {node.domain for node in nodes(model)} | {key[0] for key in model.functions}
    _narrow(model.graph, needed, "", ledger)
    for key, function in model.functions.items():
        _narrow(
            function.graph,
            {node.domain for node in walk(function.graph)},
            f" in {function_name(key)}",
            ledger,
        )


def _narrow(graph: ir.Graph, needed: set[str], where: str, ledger: Ledger) -> None:
    for domain in tuple(graph.opset_imports):
        unused = domain not in needed and domain not in _KEPT_DOMAINS
        if unused and ledger.claim("unused opset import", domain + where):
            del graph.opset_imports[domain]
