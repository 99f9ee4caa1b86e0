"""How fused attention relates the axes it reads and writes: heads go as wholes.

Queries, keys and values are [batch, length, heads * size] or [batch, heads, length, size]. Several heads of
queries, as many for each, may share one of keys and values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import onnx_ir as ir

from onnxopt.graph import int_attr
from onnxopt.index import operator_of
from onnxopt.pruning.elements import Elements, Ids, Layer, Term
from onnxopt.pruning.movement import Rule, UnrelatedError, axes_of

__all__ = ["ATTENTION"]

_PORTS = {
    "Attention": ("q_num_heads", "kv_num_heads", "qkkmkk", "qkkm"),
    "com.microsoft::Attention": ("num_heads", "num_heads", "-wb-pm", "qp"),
    "com.microsoft::MultiHeadAttention": ("num_heads", "num_heads", "qkkb-mkk", "qkkm"),
}
"""What says how many heads queries and keys have; what inputs and outputs are.

q: queries. k: keys or values. p: both, stacked. m: a mask, or products of queries and keys. w, b: a weight,
a bias for all three side by side. -: something whose elements all stay.
"""
_REASON = "are parts of heads"


def _attention(e: Elements, node: ir.Node) -> None:
    *names, reads, writes = _PORTS[operator_of(node)]
    if "qkv_hidden_sizes" in node.attributes or not all(node.inputs[: 3 if reads[0] == "q" else 2]):
        raise UnrelatedError("queries, keys and values are given in another way")
    count, shared = (
        int_attr(node, name, 0) or _size(axes_of(e, node.inputs[n])[1]) for n, name in enumerate(names)
    )
    heads, more, three = e.set_groups(node, shared), e.numbered(count // shared), e.numbered(3)
    e.pin(_REASON, more, three)
    factors = {"q": (heads, more), "m": (heads, more), "w": (three, heads), "b": (three, heads)}
    roles = reads.ljust(len(node.inputs), "-")[: len(node.inputs)] + writes.ljust(len(node.outputs), "-")
    for value, role in zip((*node.inputs, *node.outputs), roles, strict=False):
        if value is not None and value.name:
            _lay_out(e, axes_of(e, value), role, factors.get(role, (heads,)))
    if "w" in reads:
        e.layers.append(Layer(node, 1, 1, 0))
    e.terms.append(Term(node, 1.0, (heads,)))


def _lay_out(e: Elements, axes: Sequence[Ids], role: str, factors: Sequence[Ids]) -> None:
    """Along one axis, heads and what is in each; the others stay."""
    rank = len(axes)
    if role in "qk" and rank not in (3, 4):
        raise UnrelatedError("queries, keys and values are given in another way")
    along = {"q": 2 if rank == 3 else 1, "k": 2 if rank == 3 else 1, "w": 1, "b": 0, "p": 2, "m": rank - 3}
    axis = along.get(role, -1)
    if axis < 0 or (role == "m" and _size(axes[axis]) == 1):
        return e.pin(_REASON, *axes)
    e.pin(_REASON, *axes[:axis], *axes[axis + 1 :])
    inner = e.numbered(_size(axes[axis]) // math.prod(map(_size, factors)))
    e.pin(_REASON, inner)
    return e.product(axes[axis], (*factors, inner), _REASON)


def _size(ids: Ids) -> int:
    if ids is None:
        raise UnrelatedError("the number of heads is not known")
    return len(ids)


ATTENTION: dict[str, Rule] = dict.fromkeys(_PORTS, _attention)
