"""Fuse the steps of a GRU in pieces into one GRU.

Before: z, r = Split(Sigmoid(x @ W + h @ R + b)); n = Tanh(x @ V + (r * h) @ U + c)
        h' = z * h + (1 - z) * n, and so on from h' and the next x of a sequence
After:  h's, h' = GRU(sequence, [W V], [R U], [b c], h)

Before: n = Tanh(x @ V + c + r * (h @ U + d))
After:  GRU[linear_before_reset=1]

The gates may stand in any order, in one matrix or several, with x and h joined or apart, split or sliced;
h' may be n + z * (h - n).
Declines: the inputs of the steps are not the parts of one sequence, in order; a value inside a cell is read
    elsewhere; a gate that does not depend on both input and state; a state that is broadcast to
    the batch; double, which runtimes do not take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.ledger import Ledger
from onnxopt.passes.shared.cells import Linear, linear
from onnxopt.passes.shared.recurrent import Cell, Rows, fuse_cells
from onnxopt.pattern import Match, Patterns
from onnxopt.scope import Scope

__all__ = ["FuseGru"]

_STATE = Patterns(
    {
        "state": (
            "Add(Mul((z := Sigmoid(a)), h), Mul(Sub(1, z), Tanh(b)))",
            "Add(Mul((z := Sigmoid(a)), Sub(h, (n := Tanh(b)))), n)",
        )
    }
)
_RESET = Patterns({"before": "Mul(Sigmoid(a), h)", "after": "Add(u, Mul(Sigmoid(a), v))"})


@dataclass(frozen=True)
class FuseGru(Pass):
    """Recognise the cells of a GRU, and run them in one operator.

    steps: the fewest steps in a row that are fused.
    """

    name: ClassVar[str] = "fuse-gru"
    kind: ClassVar[Kind] = "reorder"
    operators = ("Sigmoid",)

    example: ClassVar[str] = """
        agraph (float[2,1,1] x, float[1,1] h0) => (float[1,1] h2)
        <float[1,2] w = {1, 2}, float[1,2] r = {0.5, -1}, float[1,1] v = {0.25}, float[1,1] u = {2},
         float one = {1}, int64 i0 = {0}, int64 i1 = {1}, float[1,1] x0, float[1,1] x1, float[1,1] h1,
         float[1,1] rh0, float[1,1] rh1>
        {
            x0 = Gather(x, i0)
            xw0 = MatMul(x0, w)
            hr0 = MatMul(h0, r)
            s0 = Add(xw0, hr0)
            a0, b0 = Split<axis=1>(s0)
            z0 = Sigmoid(a0)
            r0 = Sigmoid(b0)
            rh0 = Mul(r0, h0)
            xv0 = MatMul(x0, v)
            hu0 = MatMul(rh0, u)
            c0 = Add(xv0, hu0)
            n0 = Tanh(c0)
            zh0 = Mul(z0, h0)
            k0 = Sub(one, z0)
            kn0 = Mul(k0, n0)
            h1 = Add(zh0, kn0)
            x1 = Gather(x, i1)
            xw1 = MatMul(x1, w)
            hr1 = MatMul(h1, r)
            s1 = Add(xw1, hr1)
            a1, b1 = Split<axis=1>(s1)
            z1 = Sigmoid(a1)
            r1 = Sigmoid(b1)
            rh1 = Mul(r1, h1)
            xv1 = MatMul(x1, v)
            hu1 = MatMul(rh1, u)
            c1 = Add(xv1, hu1)
            n1 = Tanh(c1)
            zh1 = Mul(z1, h1)
            k1 = Sub(one, z1)
            kn1 = Mul(k1, n1)
            h2 = Add(zh1, kn1)
        }
    """

    steps: int = 2

    def apply(self, model: ir.Model, ledger: Ledger) -> None:
        fuse_cells(model, ledger, "GRU", _cell, self.steps)


def _cell(node: ir.Node, scope: Scope, _rows: Rows) -> Cell | None:
    match = _STATE.find(node, scope) if node.op_type == "Add" else None
    if match is None:
        return None
    h, new = match["h"], match["b"].producer()
    after = _RESET.find(new, scope) if new is not None and new.op_type == "Add" else None
    return _reset_after(match, after, h) if after is not None else _reset_before(match, h, scope)


def _reset_before(match: Match, h: ir.Value, scope: Scope) -> Cell | None:
    """Of the form whose new state takes a product with r * h."""
    new, update = linear(match["b"]), linear(match["a"])
    if new is None or update is None:
        return None
    for value in new.products:
        product = value.producer()
        reset = _RESET.find(product, scope) if product is not None else None
        gate = linear(reset["a"]) if reset is not None and reset.get("h") is h else None
        if reset is not None and gate is not None:
            new = replace(new, products={h if one is value else one: m for one, m in new.products.items()})
            return _made(match, h, [update, gate, new], new.bias, np.zeros_like(new.bias), reset.nodes, 0)
    return None


def _reset_after(match: Match, reset: Match, h: ir.Value) -> Cell | None:
    """Of the form whose new state takes r times a product with h."""
    gates = [linear(value) for value in (match["a"], reset["a"], reset["u"], reset["v"])]
    known = [gate for gate in gates if gate is not None]
    if len(known) < 4 or h in known[2].products or list(known[3].products) != [h]:
        return None
    *both, new, state = known
    return _made(match, h, [*both, new + state], new.bias, state.bias, reset.nodes, 1)


def _made(
    match: Match,
    h: ir.Value,
    gates: Sequence[Linear],
    x_bias: np.ndarray,
    h_bias: np.ndarray,
    nodes: Sequence[ir.Node],
    linear_before_reset: int,
) -> Cell | None:
    """The cell, where all gates depend on one input and on the state; the biases are of the new state."""
    inputs = list(dict.fromkeys(value for gate in gates for value in gate.products if value is not h))
    if len(inputs) != 1 or any(len(gate.products) != 2 for gate in gates):
        return None
    w, r = (np.concatenate([gate.products[value].T for gate in gates])[None] for value in (inputs[0], h))
    zeros = np.zeros(2 * len(h_bias))
    b = np.concatenate([gates[0].bias, gates[1].bias, x_bias, zeros, h_bias])[None]
    inner = (node for gate in gates for node in gate.nodes)
    last = match.nodes[0]
    every = tuple(dict.fromkeys((*match.nodes, *nodes, *inner)))
    return Cell(inputs[0], (h,), (last.outputs[0],), w, r, b, last, every, linear_before_reset)
