"""The first and last layers of a model: those with no other layer in front of them, or behind them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import onnx_ir as ir

from onnxopt.graph import subgraphs_of, walk

__all__ = ["first_layers", "last_layers"]


def first_layers(model: ir.Model, layers: Collection[ir.Node]) -> frozenset[ir.Node]:
    """Those of the layers that no other one of them leads to; a node counts together with its bodies."""
    return _outermost(list(model.graph), layers, forwards=True)


def last_layers(model: ir.Model, layers: Collection[ir.Node]) -> frozenset[ir.Node]:
    """Those of the layers that lead to no other one of them."""
    return _outermost(list(reversed(model.graph)), layers, forwards=False)


def _outermost(
    nodes: Sequence[ir.Node], layers: Collection[ir.Node], *, forwards: bool
) -> frozenset[ir.Node]:
    passed: set[ir.Value] = set()
    found: list[ir.Node] = []
    for node in nodes:
        whole = [node, *(inner for body in subgraphs_of(node) for inner in walk(body))]
        read = {value for one in whole for value in one.inputs if value is not None}
        given: Iterable[ir.Value] = node.outputs
        near, far = (read, given) if forwards else (given, read)
        inside = [one for one in whole if one in layers]
        if not passed.isdisjoint(near):
            passed.update(far)
        elif inside:
            found += inside
            passed.update(far)
    return frozenset(found)
