"""The channels of a model: which can go, in groups of alike ones, and what keeps the others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dims
from onnxopt.graph import constant_of, has_reference, nested, static_shape, walk
from onnxopt.index import operator_of
from onnxopt.inference import refine
from onnxopt.inspection.costs import layer_macs, multiplies, sizes_read
from onnxopt.inspection.sizes import sized
from onnxopt.ledger import site_of
from onnxopt.pruning.elements import Elements, Layer, Pin, Solution
from onnxopt.pruning.movement import UnrelatedError
from onnxopt.pruning.relations import RELATIONS
from onnxopt.scope import Scope, scopes

__all__ = ["Group", "Structure", "Term", "survey"]

_USUAL = 128
"""The size of an axis that nothing is known of, but for the first one."""


@dataclass(frozen=True)
class Group:
    """Channels that can be cut one by one, and lie in the same axes.

    name: where the first of their layers stands, and a number where another group has that name.
    channels: their numbers, int64 [size]. layers: the sites of the layers that write them. width: elements of
    a channel along an axis of a weight: 1, or as wide as a head.
    """

    name: str
    channels: np.ndarray
    layers: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class Term:
    """Something that grows with the product of the sizes of axes: `amount` at their full sizes."""

    amount: float
    axes: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Structure:
    """What can be cut of a model's main graph.

    pinned: the site of each layer that keeps all its channels -> why, and where that is.
    layers, constants: multiply-accumulates and elements, by the axes that they grow with.
    fixed: multiply-accumulates of the rest.
    """

    scope: Scope
    elements: Elements
    solution: Solution
    groups: tuple[Group, ...]
    pinned: Mapping[str, Pin]
    layers: tuple[Term, ...]
    constants: tuple[Term, ...]
    fixed: float

    @cached_property
    def group_of(self) -> np.ndarray:
        """The number of the group that each channel is of, -1 where it is of none; int64 [channels]."""
        found = np.full(len(self.solution.pinned), -1)
        for number, group in enumerate(self.groups):
            found[group.channels] = number
        return found

    def channels_of(self, value: ir.Value | None, axis: int) -> np.ndarray:
        """The channel that each element of an axis belongs to; none where the axis is not known."""
        axes = self.elements.known().get(value) if value is not None else None
        ids = axes[axis] if axes else None
        return np.arange(0) if ids is None else self.solution.channel[ids]

    def macs(self, gone: np.ndarray | None = None) -> float:
        """Multiply-accumulates without the channels that are gone; bool [channels]."""
        return self.fixed + self._amount(self.layers, gone)

    def parameters(self, gone: np.ndarray | None = None) -> float:
        """Elements of constants."""
        return self._amount(self.constants, gone)

    def _amount(self, terms: Sequence[Term], gone: np.ndarray | None) -> float:
        if gone is None:
            return sum(term.amount for term in terms)
        kept = ~gone[self.solution.channel]
        return sum(
            term.amount * math.prod(float(kept[ids].mean()) for ids in term.axes if len(ids))
            for term in terms
        )


def survey(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Structure:
    """Find the channels that can be cut in the main graph of a model and the graphs nested in it.

    Args:
        model: without calls of functions, which keep all that they read and write.
        shapes: of graph inputs, at which multiply-accumulates are counted; where one has a size that is not
            known, the first is taken for 1, any other for 128.
    """
    scope = next(iter(scopes(model)))
    e = _related(scope)
    solution = e.solve()
    costs = layer_macs(scope.graph, sized(model, _sizes(model, shapes or {}), sizes_read).shapes)
    macs = {node: float(amount.weight) for node, amount in costs}
    counted = [term for term in e.terms if term.node in macs]
    fixed = sum(macs.values()) - sum(macs[term.node] * term.share for term in counted)
    # a size that is not known counts as 1: no fewer than the axes say
    terms = [Term(max(macs[t.node] * t.share, math.prod(map(len, t.axes))), t.axes) for t in counted]
    return Structure(
        scope,
        e,
        solution,
        _grouped(e, solution),
        _pinned(e, solution),
        tuple(terms),
        tuple(_parameters(e)),
        fixed,
    )


def _sizes(model: ir.Model, shapes: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """A shape for each graph input whose rank is known; one name has one size."""
    named: dict[str, int] = {}
    found: dict[str, Sequence[int]] = {}
    for value in model.graph.inputs:
        if value.shape is None or value.is_initializer():
            continue
        given = shapes.get(value.name or "")
        sizes = []
        for axis, size in enumerate(value.shape.dims):
            usual = size if isinstance(size, int) and size >= 0 else 1 if axis == 0 else _USUAL
            one = usual if given is None else given[axis]
            name = None if isinstance(size, int) else size.value
            sizes.append(one if not name else named.setdefault(name, one))
        found[value.name or ""] = sizes
    return found


def _parameters(e: Elements) -> Iterator[Term]:
    """What constants hold, each once."""
    for value, axes in e.known().items():
        tensor = constant_of(value)
        if tensor is not None and axes:
            yield Term(float(tensor.size), tuple(ids for ids in axes if ids is not None))


def _related(scope: Scope) -> Elements:
    for node in walk(scope.graph):
        if any(static_shape(value) is None for value in node.outputs):
            refine(node, scope.graph.opset_imports)
    e = Elements(Dims(scope), scope.opset)
    for graph in (scope.graph, *nested(scope.graph)):
        what = "of the graph" if graph is scope.graph else "of the body of a node"
        for kind, ports in (("an input", graph.inputs), ("an output", graph.outputs)):
            for value in ports:
                e.site = value.name or ""
                more = " (overridable; --freeze-initializers folds it)" if value.is_initializer() else ""
                e.pin_value(f"is {kind} {what}{more}", value)
    for node in walk(scope.graph):
        e.site = site_of(node)
        why = _why_unrelated(e, node)
        if why:
            e.pin_node(why, node)
            if multiplies(node):
                e.unrelated[e.site] = Pin(why, e.site)
    return e


def _why_unrelated(e: Elements, node: ir.Node) -> str:
    """Relate the axes of a node; why that could not be done, else nothing."""
    rule = None if has_reference(node) else RELATIONS.get(operator_of(node))
    if rule is None:
        return f"{node.op_type} is not understood"
    try:
        rule(e, node)
    except UnrelatedError as reason:
        return f"{node.op_type}: {reason}"
    except (ArithmeticError, LookupError, ValueError):  # malformed
        return f"{node.op_type} does not fit its inputs"
    return ""


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
    written: dict[int, dict[str, int]] = {}
    for layer in e.layers:
        found, members = np.unique(number[_written(e, solution, layer)], return_counts=True)
        for n, size in zip(found.tolist(), members.tolist(), strict=True):
            if n >= 0:
                written.setdefault(n, {})[site_of(layer.node)] = size
    groups, named = [], Counter[str]()
    for n, channels in enumerate(alike.values()):
        if n in written:
            first, width = next(iter(written[n])), min(written[n].values()) // len(channels)
            named[first] += 1
            name = first if named[first] == 1 else f"{first} ({named[first]})"
            groups.append(Group(name, np.array(channels), tuple(written[n]), width))
    return tuple(groups)


def _written(e: Elements, solution: Solution, layer: Layer) -> np.ndarray:
    """The channels that a layer writes."""
    value = layer.node.inputs[layer.weight]
    axes = e.known().get(value) if value is not None else None
    ids = axes[layer.writes] if axes else None
    return np.arange(0) if ids is None else solution.channel[ids]


def _pinned(e: Elements, solution: Solution) -> dict[str, Pin]:
    found = dict(e.unrelated)
    cuttable: dict[str, bool] = {}
    for layer in e.layers:
        site, channels = site_of(layer.node), _written(e, solution, layer)
        if len(channels) and solution.pinned[channels].all():
            found.setdefault(site, solution.pins[solution.why[channels].min()])
        elif len(channels):
            cuttable[site] = True
    return {site: pin for site, pin in found.items() if site not in cuttable}
