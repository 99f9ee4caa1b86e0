"""Put the trips of a Loop one after the other, where they are few and their number is known.

Before: s, trace = Loop(2, true, x) {(i, go, a) => go, Add(a, w), Neg(a)}
After:  a1 = Add(x, w); s = Add(a1, w); trace = Concat(Unsqueeze(Neg(x), 0), Unsqueeze(Neg(a1), 0))
Declines: more trips or nodes than `max_trips` and `max_nodes` allow, but one trip or none is always put in
    place; the condition is worked out by the body or is an initializer that is also a graph input; a body
    of several trips holds random operators or those of unknown domains, which may draw anew in each; no
    trip, and the shape of a stacked output is not known.

A Scan over an axis of size 1 is one trip: its inputs lose that axis, its outputs get it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import (
    constant_array,
    has_reference,
    int_attr,
    ints_attr,
    is_deterministic,
    static_shape,
    subgraphs_of,
    walk,
)
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes._inline import Inliner
from onnxopt.rewrite import Declined, Edit
from onnxopt.scope import Scope, scopes

__all__ = ["UnrollLoop"]

_SMALL = 4096
"""Bytes of a trip count or condition that is read."""
_RULES = ("Loop of no trip", "Loop of one trip", "Loop of several trips")


@dataclass(frozen=True)
class UnrollLoop(Pass):
    """Replace each Loop of few trips, and each Scan of one, by the nodes of its body.

    max_trips: trips of a Loop that is unrolled. max_nodes: nodes that it may become, if it has several.
    """

    name = "unroll-loop"
    example: ClassVar[str] = """
        agraph (float[2] x) => (float[2] y, float[2, 2] trace) <int64 two = {2}, bool yes = {1}> {
            y, trace = Loop(two, yes, x) <body = trip (int64 i, bool go, float[2] a)
                    => (bool on, float[2] b, float[2] c) {
                on = Identity(go)
                b = Exp(a)
                c = Neg(a)
            }>
        }
    """

    max_trips: int = 4
    max_nodes: int = 64

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        for scope in scopes(model):
            self._visit(scope.graph, Inliner(scope, ledger), ledger, looped=False)

    def _visit(self, graph: ir.Graph, inliner: Inliner, ledger: Ledger, *, looped: bool) -> None:
        """Inner loops first. looped: the graph is in a Loop, where a shape on record may not hold."""
        for node in tuple(graph):
            for body in subgraphs_of(node):
                self._visit(body, inliner, ledger, looped=looped or node.op_type == "Loop")
            if node.domain or node.op_type not in ("Loop", "Scan") or has_reference(node):
                continue
            if not any(value.uses() or value.is_graph_output() for value in node.outputs):
                continue
            try:
                if node.op_type == "Loop":
                    trips = self._trips(node)
                    if trips is not None and ledger.claim(_RULES[min(trips, 2)], site_of(node)):
                        _unroll(node, trips, inliner)
                elif (
                    not looped
                    and _is_one_step(node, inliner.scope.opset)
                    and ledger.claim("Scan of one", site_of(node))
                ):
                    _step(node, inliner)
            except Declined as reason:
                ledger.decline(node.op_type, site_of(node), str(reason))

    def _trips(self, node: ir.Node) -> int | None:
        """How often a Loop runs its body; None where that is known only when it runs."""
        body = node.attributes["body"].as_graph()
        limit, start = (*node.inputs[:2], None, None)[:2]
        count, condition, goes_on = _known(limit), _known(start), _goes_on(body)
        if start is not None and condition is None:
            return None
        if condition == 0 or (count is not None and count <= 0):
            trips = 0
        elif goes_on == 0 and (limit is None or count is not None):
            trips = 1
        elif count is None:
            return None
        else:
            trips = count
        if trips > 1:
            self._check_several(body, trips, goes_on)
        if not trips:
            list(map(_empty, body.outputs[len(body.inputs) - 1 :]))
        return trips

    def _check_several(self, body: ir.Graph, trips: int, goes_on: int | None) -> None:
        if goes_on is None:
            raise Declined("whether there is another trip is worked out in the body")
        if trips > self.max_trips:
            raise Declined(f"it has more trips than max_trips={self.max_trips}")
        if trips * sum(1 for _ in walk(body)) > self.max_nodes:
            raise Declined(f"it would become more nodes than max_nodes={self.max_nodes}")
        if not all(map(is_deterministic, walk(body))):
            raise Declined("a trip may draw other random numbers than the one before")


def _known(value: ir.Value | None) -> int | None:
    """The one element of a constant; None where it is absent or not constant."""
    array = constant_array(value, _SMALL)
    if array is None and value is not None and value.is_initializer():
        raise Declined(
            "the trip count or condition is an initializer that is also a graph input "
            "(overridable; --freeze-initializers fixes it)"
        )
    return None if array is None else int(array.reshape(-1)[0])


def _goes_on(body: ir.Graph) -> int | None:
    """The condition that a body gives: 1 where it hands it on, or a constant; None where it works it out."""
    value = body.outputs[0]
    while (maker := value.producer()) is not None and maker.op_type == "Identity" and not maker.domain:
        assert maker.inputs[0] is not None  # the one input of Identity is not optional
        value = maker.inputs[0]
    return 1 if value is body.inputs[1] else _known(value)


def _unroll(node: ir.Node, trips: int, inliner: Inliner) -> None:
    body = node.attributes["body"].as_graph()
    states, rows = len(body.inputs) - 2, list[list[ir.Value | None]]()
    carried = list(node.inputs[2:])
    inliner.lift(body)
    for trip in range(trips):
        edit = Edit(node, inliner.scope)
        number = _scalar(edit, np.array(trip, np.int64), body.inputs[0])
        condition = _scalar(edit, np.array(True), body.inputs[1])
        inliner.add(edit)
        one = body if trip == trips - 1 else inliner.copy(body)
        outputs = _place(one, node, [number, condition, *carried], inliner)
        carried = outputs[1 : states + 1]
        rows.append(outputs[states + 1 :])
    edit = Edit(node, inliner.scope)
    if trips:
        stacked = [_stack(edit, column, inliner.scope) for column in zip(*rows, strict=True)]
    else:
        stacked = [edit.constant(_empty(value), value.name) for value in body.outputs[states + 1 :]]
        inliner.drop(body)
    inliner.add(edit)
    inliner.finish(node, [*carried, *stacked])


def _scalar(edit: Edit, array: np.ndarray, formal: ir.Value) -> ir.Value | None:
    """A constant for the trip's number or condition, in the body's rank for it; None if it reads none."""
    if not formal.uses() and not formal.is_graph_output():
        return None
    rank = 0 if formal.shape is None else len(formal.shape)
    return edit.constant(array.reshape((1,) * rank), formal.name)


def _place(
    body: ir.Graph, node: ir.Node, inputs: Sequence[ir.Value | None], inliner: Inliner
) -> list[ir.Value | None]:
    """Place a body; the shapes on record in it are given up where they may be those of another trip."""
    pairs = [(formal, value) for formal, value in zip(body.inputs, inputs, strict=True) if value is not None]
    shapes = [(static_shape(formal), static_shape(value)) for formal, value in pairs]
    if any(formal is None or formal != value for formal, value in shapes):
        for inner in walk(body):
            for value in inner.outputs:
                value.shape = None
    return inliner.place(body, node, inputs)


def _stack(edit: Edit, values: Sequence[ir.Value | None], scope: Scope) -> ir.Value:
    """The values of all trips along a new first axis."""
    rows = [_along(edit, "Unsqueeze", value, 0, scope) for value in values]
    return rows[0] if len(rows) == 1 else edit.op("Concat", rows, {"axis": 0})


def _empty(value: ir.Value) -> np.ndarray:
    """What a Loop without trips gives for an output that stacks this value."""
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        raise Declined("no trip, and the shape of a stacked output is not known")
    return np.zeros((0, *shape), value.dtype.numpy())


def _axes(node: ir.Node, name: str, count: int) -> tuple[int, ...]:
    return ints_attr(node, name) or (0,) * count


def _is_one_step(node: ir.Node, opset: int) -> bool:
    """Whether a Scan goes over axes of size 1. Before opset 9 it had a batch axis."""
    count = int_attr(node, "num_scan_inputs", 0)
    scanned = zip(node.inputs[len(node.inputs) - count :], _axes(node, "scan_input_axes", count), strict=True)
    return opset >= 9 and all(
        v is not None and v.shape is not None and v.shape[axis] == 1 for v, axis in scanned
    )


def _step(node: ir.Node, inliner: Inliner) -> None:
    body, count = node.attributes["body"].as_graph(), int_attr(node, "num_scan_inputs", 0)
    states = len(node.inputs) - count
    edit = Edit(node, inliner.scope)
    axes = _axes(node, "scan_input_axes", count)
    sliced = [
        _along(edit, "Squeeze", value, axis, inliner.scope)
        for value, axis in zip(node.inputs[states:], axes, strict=True)
    ]
    inliner.add(edit)
    outputs = _place(body, node, [*node.inputs[:states], *sliced], inliner)
    edit, axes = Edit(node, inliner.scope), _axes(node, "scan_output_axes", len(outputs) - states)
    stacked = [
        _along(edit, "Unsqueeze", value, axis, inliner.scope)
        for value, axis in zip(outputs[states:], axes, strict=True)
    ]
    inliner.add(edit)
    inliner.finish(node, [*outputs[:states], *stacked])


def _along(edit: Edit, op_type: str, value: ir.Value | None, axis: int, scope: Scope) -> ir.Value:
    """Squeeze or Unsqueeze of one axis, which is an attribute before opset 13."""
    if scope.opset < 13:
        return edit.op(op_type, [value], {"axes": [axis]})
    return edit.op(op_type, [value, edit.constant(np.array([axis]), "axes")])
