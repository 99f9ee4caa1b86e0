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

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, has_reference, is_deterministic, subgraphs_of, walk
from onnxopt.ledger import Ledger, site_of
from onnxopt.passes.shared.inline import Inliner
from onnxopt.passes.shared.trips import empty_stack, is_one_step, unroll, unroll_step
from onnxopt.rewrite import Declined
from onnxopt.scope import scopes

__all__ = ["UnrollLoop"]

_SMALL = 4096
"""Bytes of a trip count or condition that is read."""
_RULES = ("Loop of no trip", "Loop of one trip", "Loop of several trips")


@dataclass(frozen=True)
class UnrollLoop(Pass):
    """Replace each Loop of few trips, and each Scan of one, by the nodes of its body.

    max_trips: trips of a Loop that is unrolled. max_nodes: nodes that it may become, if it has several;
        constants do not count.
    """

    name = "unroll-loop"
    operators = ("Loop", "Scan")
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
                        unroll(node, trips, inliner)
                elif (
                    not looped
                    and is_one_step(node, inliner.scope.opset)
                    and ledger.claim("Scan of one", site_of(node))
                ):
                    unroll_step(node, inliner)
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
            list(map(empty_stack, body.outputs[len(body.inputs) - 1 :]))
        return trips

    def _check_several(self, body: ir.Graph, trips: int, goes_on: int | None) -> None:
        if goes_on is None:
            raise Declined("whether there is another trip is worked out in the body")
        if trips > self.max_trips:
            raise Declined(f"it has more trips than max_trips={self.max_trips}")
        if trips * sum(node.op_type != "Constant" for node in walk(body)) > self.max_nodes:
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
    return None if array is None or array.size != 1 else int(array.reshape(-1)[0])


def _goes_on(body: ir.Graph) -> int | None:
    """The condition that a body gives: 1 where it hands it on, or a constant; None where it works it out."""
    value = body.outputs[0]
    while (maker := value.producer()) is not None and maker.op_type == "Identity" and not maker.domain:
        assert maker.inputs[0] is not None  # the one input of Identity is not optional
        value = maker.inputs[0]
    return 1 if value is body.inputs[1] else _known(value)
