"""The channels of a model: which can go, in groups of alike ones, and what keeps the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dims
from onnxopt.graph import constant_of, has_reference, nested, sizes_of, walk
from onnxopt.index import operator_of
from onnxopt.ledger import site_of
from onnxopt.pruning.elements import Elements, Layer, Pin, Solution
from onnxopt.pruning.movement import Unrelated
from onnxopt.pruning.relations import RELATIONS
from onnxopt.scope import Scope

__all__ = ["Group", "Structure", "Term", "survey"]


@dataclass(frozen=True)
class Group:
    """Channels that can be cut one by one, and lie in the same axes.

    name: where the first of their layers stands. channels: their numbers, int64 [size].
    layers: the sites of the layers that write them.
    """

    name: str
    channels: np.ndarray
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Term:
    """Something that grows with the product of the sizes of axes: `amount` at their full sizes."""

    amount: float
    axes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Structure:
    """What can be cut of a model's main graph.

    pinned: the site of each layer that keeps all its channels -> why, and where that is.
    macs, parameters: of the layers, by the axes they grow with; `fixed`: multiply-accumulates of the rest.
    """

    scope: Scope
    elements: Elements
    solution: Solution
    groups: tuple[Group, ...]
    pinned: Mapping[str, Pin]
    macs: tuple[Term, ...]
    parameters: tuple[Term, ...]
    fixed: float

    def channels_of(self, value: ir.Value, axis: int) -> np.ndarray | None:
        """The channel that each element of an axis belongs to."""
        axes = self.elements.known().get(value)
        ids = axes[axis] if axes else None
        return None if ids is None else self.solution.channel[ids]


def survey(scope: Scope, shapes: Mapping[str, Sequence[int]] | None = None) -> Structure:
    """Find the channels that can be cut in a graph and those nested in it.

    Args:
        scope: the main graph of a model.
        shapes: sizes of graph inputs at which multiply-accumulates are counted.
    """
    elements = _related(scope)
    solution = elements.solve()
    groups = _grouped(elements, solution)
    return Structure(scope, elements, solution, groups, _pinned(elements, solution), (), (), 0.0)


def _related(scope: Scope) -> Elements:
    e = Elements(Dims(scope), scope.opset)
    for graph in (scope.graph, *nested(scope.graph)):
        what = "of the graph" if graph is scope.graph else "of the body of a node"
        for kind, ports in (("an input", graph.inputs), ("an output", graph.outputs)):
            for value in ports:
                e.site = value.name or ""
                e.pin_value(f"is {kind} {what}", value)
    for node in walk(scope.graph):
        e.site = site_of(node)
        rule = None if has_reference(node) else RELATIONS.get(operator_of(node))
        if rule is None:
            e.pin_node(f"{node.op_type} is not understood", node)
            continue
        try:
            rule(e, node)
        except Unrelated as reason:
            e.pin_node(f"{node.op_type}: {reason}", node)
        except (ArithmeticError, LookupError, ValueError):  # malformed
            e.pin_node(f"{node.op_type} does not fit its inputs", node)
    return e


def _grouped(e: Elements, solution: Solution) -> tuple[Group, ...]:
    """The channels that are not pinned, by the axes they lie in."""
    channel, count = solution.channel, len(e.sizes)
    if solution.pinned.all():
        return ()
    axis = np.repeat(np.arange(count), e.sizes)
    free = ~solution.pinned[channel]
    pairs, members = np.unique(channel[free] * count + axis[free], return_counts=True)
    owners, starts = np.unique(pairs // max(count, 1), return_index=True)
    lies_in = np.stack([pairs % max(count, 1), members], 1)
    alike: dict[bytes, list[int]] = {}
    for owner, rows in zip(owners, np.split(lies_in, starts[1:]), strict=True):
        alike.setdefault(rows.tobytes(), []).append(int(owner))
    number = np.full(len(solution.pinned), -1)
    for n, members_of in enumerate(alike.values()):
        number[members_of] = n
    written: dict[int, dict[str, None]] = {}
    for layer in e.layers:
        for n in np.unique(number[_written(e, solution, layer)]):
            if n >= 0:
                written.setdefault(int(n), {})[site_of(layer.node)] = None
    return tuple(
        Group(next(iter(written[n])), np.array(channels), tuple(written[n]))
        for n, channels in enumerate(alike.values())
        if n in written
    )


def _written(e: Elements, solution: Solution, layer: Layer) -> np.ndarray:
    """The channels that a layer writes."""
    value = layer.node.inputs[layer.weight]
    axes = e.known().get(value) if value is not None else None
    ids = axes[layer.writes] if axes else None
    return np.arange(0) if ids is None else solution.channel[ids]


def _pinned(e: Elements, solution: Solution) -> dict[str, Pin]:
    found = {}
    for layer in e.layers:
        channels = _written(e, solution, layer)
        if len(channels) and solution.pinned[channels].all():
            found[site_of(layer.node)] = solution.pins[solution.why[channels].min()]
    return found
