"""Put the body of each model-local function in the place of its calls.

Before: t = my.domain.Scale<factor = 2.0>(x), a function of the model
After:  the nodes of Scale, with its attribute filled in; the function is gone
Declines: the function imports another opset version than the model; it takes a graph as attribute; it
    is called with more inputs or outputs than it has, by itself, or by a function that stays.

A call's outputs keep their names; names inside the body become unique in the model.
"""

from __future__ import annotations

import graphlib
from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxopt.claims import Pass
from onnxopt.graph import function_name, nodes, subgraphs_of, walk
from onnxopt.ledger import Ledger
from onnxopt.rewrite import Declined
from onnxopt.scope import Scope, scopes

__all__ = ["InlineFunctions"]

_RULE = "function"
_MAIN = ("", "", "")
_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)

Key = tuple[str, str, str]
"""Domain, name and overload of a function."""


@dataclass(frozen=True)
class InlineFunctions(Pass):
    """Replace the calls of each function by its body, and remove the function."""

    name = "inline-functions"

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        chosen = _choose(model, ledger) if model.functions else None
        if not chosen:
            return
        before = set(nodes(model))
        _prepare(model, chosen, next(scopes(model)))
        InlinePass(lambda function: function.identifier() in chosen)(model)
        _make_unique(model.graph, set(), next(scopes(model)))
        ledger.touch(node for node in nodes(model) if node not in before)


def _choose(model: ir.Model, ledger: Ledger) -> set[Key]:
    """The functions to inline: callers before what they call, each with leave of the ledger."""
    calls: dict[Key, list[tuple[Key, ir.Node]]] = {key: [] for key in model.functions}
    for caller, node in _nodes_by_owner(model):
        if node.op_identifier() in calls:
            calls[node.op_identifier()].append((caller, node))
    sorter = graphlib.TopologicalSorter(
        {key: [caller for caller, _ in sites] for key, sites in calls.items()}
    )
    try:
        order = [key for key in sorter.static_order() if calls.get(key)]
    except graphlib.CycleError as error:
        ledger.decline(_RULE, function_name(error.args[1][0]), "calls itself")
        return set()
    chosen, imports = {_MAIN}, dict(model.opset_imports)
    for key in order:
        function = model.functions[key]
        try:
            _check(function, calls[key], chosen, imports)
        except Declined as reason:
            ledger.decline(_RULE, function_name(key), str(reason))
            continue
        if ledger.claim(_RULE, function_name(key)):
            chosen.add(key)
            imports.update(function.opset_imports)
    return chosen - {_MAIN}


def _nodes_by_owner(model: ir.Model) -> Iterator[tuple[Key, ir.Node]]:
    yield from ((_MAIN, node) for node in walk(model.graph))
    for key, function in model.functions.items():
        yield from ((key, node) for node in walk(function.graph))


def _check(
    function: ir.Function, sites: list[tuple[Key, ir.Node]], inlined: set[Key], imports: dict[str, int]
) -> None:
    if any(imports.get(domain, version) != version for domain, version in function.opset_imports.items()):
        raise Declined("the function imports another opset version than the model")
    if any(caller not in inlined for caller, _ in sites):
        raise Declined("the function is called by one that stays")
    for _, node in sites:
        if any(attr.type in _GRAPHS for attr in node.attributes.values()):
            raise Declined("the function takes a graph as attribute")
        if len(node.inputs) > len(function.inputs) or len(node.outputs) > len(function.outputs):
            raise Declined("the function is called with more inputs or outputs than it has")


def _prepare(model: ir.Model, chosen: set[Key], scope: Scope) -> None:
    """Bring calls and bodies into the form that onnx_ir's inliner takes.

    It asks for as many outputs as the function has, and renames the value behind each output: that
    must be one of the body's own, and another one for each output.
    """
    for node in nodes(model):
        if node.op_identifier() not in chosen:
            continue
        called = model.functions[node.op_identifier()]
        node.resize_outputs(len(called.outputs))
        for value, formal in zip(node.outputs, called.outputs, strict=True):
            value.name = value.name or scope.fresh(formal.name or "output")
    for function in (model.functions[key] for key in model.functions if key in chosen):
        taken = set(function.inputs)
        for index, value in enumerate(function.outputs):
            if value in taken:
                copy = ir.Node("", "Identity", [value])
                function.append(copy)
                function.outputs[index] = copy.outputs[0]
            taken.add(value)


def _make_unique(graph: ir.Graph, names: set[str], scope: Scope) -> None:
    """Rename values whose name one around them has; `names` holds those of the graphs around."""
    own: dict[ir.Value, None] = dict.fromkeys((*graph.inputs, *graph.initializers.values(), *graph.outputs))
    own.update((value, None) for node in graph for value in node.outputs if value.name)
    added = []
    for value in own:
        if value.name in names:
            value.name = scope.fresh(value.name)
        names.add(value.name or "")
        added.append(value.name or "")
    for node in graph:
        for body in subgraphs_of(node):
            _make_unique(body, names, scope)
    names.difference_update(added)
