"""A run of a graph's nodes as a model of its own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.graph import detach, subgraphs_of, walk
from onnxopt.model import clone

__all__ = ["needed_from", "part_of"]


def part_of(
    model: ir.Model, start: int, end: int, outputs: Iterable[str], known: Mapping[str, np.ndarray]
) -> ir.Model:
    """The nodes from `start` to `end` of a main graph, as a model that reads what they read.

    Args:
        model: not changed; nodes stand in an order that runs.
        start, end: as of a slice of the list of nodes.
        outputs: names of values that these nodes compute.
        known: an array for each computed value that they read; it tells the type.
    """
    own = clone(model)
    graph = own.graph
    order = list(graph)
    inside = dict.fromkeys(order[start:end])
    values = {value.name: value for node in inside for value in node.outputs}
    graph.outputs[:] = [values[name] for name in outputs]
    fed = []
    for value in _read(inside):
        if value.is_graph_input():
            continue
        kind = ir.TensorType(ir.DataType.from_numpy(known[value.name or ""].dtype))
        fed.append(ir.Value(name=value.name, type=kind))
        value.replace_all_uses_with(fed[-1])
    for node in reversed(order):
        if node not in inside:
            detach(node)
            for inner in [inner for body in subgraphs_of(node) for inner in walk(body)]:
                detach(inner)
            graph.remove(node)
    graph.inputs.extend(fed)
    return own


def needed_from(nodes: Sequence[ir.Node], start: int, outputs: Sequence[ir.Value]) -> list[str]:
    """The names of the computed values before `start` that nodes from there on read, or that are outputs."""
    later = dict.fromkeys(nodes[start:])
    wanted = {**dict.fromkeys(_read(later)), **dict.fromkeys(v for v in outputs if v.producer() not in later)}
    return [value.name or "" for value in wanted if value.producer() is not None]


def _read(inside: Mapping[ir.Node, None]) -> list[ir.Value]:
    """The values from outside that nodes, and those in their bodies, read; constants with the model apart."""
    found: dict[ir.Value, None] = {}
    for node in inside:
        graph = node.graph
        every = (node, *(inner for body in subgraphs_of(node) for inner in walk(body)))
        for value in (value for one in every for value in one.inputs):
            if value is None or value.is_initializer():
                continue
            producer = value.producer()
            if producer in inside or (producer is not None and producer.graph is not graph):
                continue
            if producer is None and value.graph is not graph:
                continue
            found[value] = None
    return list(found)
