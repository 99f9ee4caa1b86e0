"""Put the body of each model-local function in the place of its calls.

Before: t = my.domain.Scale<factor = 2.0>(x), a function of the model
After:  the nodes of Scale, with its attribute filled in; the function is gone
Declines: the function imports another opset version than the model; it takes a graph as attribute; it
    is called with more inputs or outputs than it has, by itself, or by a function that stays.

A call's outputs keep their names; names inside the body become unique in the model.
"""

from __future__ import annotations

import graphlib
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import function_name, subgraphs_of, walk
from onnxopt.ledger import Ledger
from onnxopt.passes.shared.inline import Inliner
from onnxopt.rewrite import Declined
from onnxopt.scope import scopes

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
    example = """
<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
agraph (float[2] x) => (float[2] y) {
    y = my.Shift<by = 2.0>(x)
}
<domain: "my", opset_import: ["" : 17]>
Shift<by>(a) => (b) {
    c = Constant<value_float: float = @by>()
    b = Add(a, c)
}
    """

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        chosen = _choose(model, ledger) if model.functions else None
        if not chosen:
            return
        functions = {key: model.functions.pop(key) for key in tuple(model.functions) if key in chosen}
        for function in functions.values():
            for domain, version in function.opset_imports.items():
                model.opset_imports.setdefault(domain, version)
        scope = next(scopes(model))
        _expand(scope.graph, functions, Inliner(scope, ledger))


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
        absent = {p for p, value in zip_longest(function.inputs, node.inputs) if value is None}
        if any(formal in absent for formal, _ in zip(function.outputs, node.outputs, strict=False)):
            raise Declined("an output of the function is an input that a call leaves out")


def _expand(graph: ir.Graph, functions: Mapping[Key, ir.Function], inliner: Inliner) -> None:
    """Put bodies in the place of all calls of these functions, those in the bodies too."""
    work = deque(graph)
    while work:
        node = work.popleft()
        function = functions.get(node.op_identifier())
        if function is None:
            for inner in subgraphs_of(node):
                _expand(inner, functions, inliner)
            continue
        body = inliner.copy(function.graph)
        _fill_in(body, {**function.attributes, **node.attributes})
        work.extendleft(reversed(body))
        outputs = inliner.place(body, node, node.inputs)
        inliner.finish(node, outputs)


def _fill_in(body: ir.Graph, given: Mapping[str, ir.Attr]) -> None:
    """Give the attributes that refer to the function's their values, or remove those that have none."""
    for node in walk(body):
        for name, attr in tuple(node.attributes.items()):
            if not attr.is_ref():
                continue
            value = given.get(attr.ref_attr_name or "")
            if value is None or value.value is None:
                node.attributes.pop(name)
            else:
                node.attributes[name] = ir.Attr(name, value.type, value.value)
