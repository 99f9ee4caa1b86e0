"""Make one Attention of its decomposition, in whatever way an exporter spelled it.

Before: y = MatMul(Softmax(MatMul(q, Transpose(k)) * scale + mask), v)
        with q, k and v [batch, heads, length, size], often Transpose(Reshape(x, [0, 0, heads, size]))
After:  y = Attention(x_q, x_k, x_v, mask)                          from opset 23 on
        y = com.microsoft.MultiHeadAttention(x_q, x_k, x_v, mask)   with contrib

    Also with the scale on queries and keys; with batch and heads in one axis; with Where(keep, scores, low)
    for a mask; with zeros put in for NaN where a row is masked whole; with keys and values repeated for
    several queries; with all three side by side in one value.
Declines: a mask, or operands, whose shapes are not known to fit; a scale that is no constant; contrib: rows
    that may be masked whole by -inf, where zeros are put in for NaN.

NaN and infinity in queries or keys come out as NaN, even where the parts put in zeros for NaN. The runtime's
Attention refuses an empty batch, which the parts let through.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.evaluation import Dims, DimsOf, product
from onnxopt.graph import int_attr
from onnxopt.passes.shared.heads import Heads
from onnxopt.passes.shared.joint import joined, joined_again, keep_shape, reshaped
from onnxopt.passes.shared.masks import added_mask
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import Declined, Edit, NewerOpset, Rule
from onnxopt.scope import Scope

__all__ = ["FuseAttention"]

_SCALED = "(c := Mul(MatMul(q, k), scale) | Div(MatMul(q, k), scale) | MatMul(q, k))"
_SCORES = f"(s := {_SCALED} | Reshape({_SCALED}, _))"
_MASKED = (
    f"(m := Add({_SCORES}, mask) | Where(keep, {_SCORES}, low) | Where(drop, low, {_SCORES}) | {_SCORES})"
)
_CORE = Patterns(
    {
        "zeros for NaN": f"MatMul(Where(IsNaN(p), 0, (p := Softmax({_MASKED} | Reshape({_MASKED}, _)))), v)",
        "plain": f"MatMul(Softmax({_MASKED} | Reshape({_MASKED}, _)), v)",
    }
)
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)
_SWAP = (0, 2, 1, 3)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one Attention of its parts; contrib: MultiHeadAttention of com.microsoft."""

    name: ClassVar[str] = "fuse-attention"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 23]>
      agraph (float[B, S, 8] q, float[B, S, 8] k, float[B, S, 8] v) => (float[B, S, 8] y)
      <int64[4] split = {0, 0, 2, 4}, int64[3] join = {0, 0, 8}, float root = {2}> {
        q4 = Reshape (q, split)
        k4 = Reshape (k, split)
        v4 = Reshape (v, split)
        qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        kh = Transpose <perm = [0, 2, 3, 1]> (k4)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        dot = MatMul (qh, kh)
        scores = Div (dot, root)
        weights = Softmax <axis = -1> (scores)
        mixed = MatMul (weights, vh)
        back = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (back, join)
      }"""

    pattern: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 23]>
      agraph (float[1, 128, 384] q, float[1, 128, 384] k, float[1, 128, 384] v) => (float[1, 128, 384] y)
      <int64[4] split = {0, 0, 12, 32}, int64[3] join = {0, 0, 384}, float root = {5.656854},
       float[1, 1, 128] mask> {
        q4 = Reshape (q, split)
        k4 = Reshape (k, split)
        v4 = Reshape (v, split)
        qh = Transpose <perm = [0, 2, 1, 3]> (q4)
        kh = Transpose <perm = [0, 2, 3, 1]> (k4)
        vh = Transpose <perm = [0, 2, 1, 3]> (v4)
        dot = MatMul (qh, kh)
        scores = Div (dot, root)
        masked = Add (scores, mask)
        weights = Softmax <axis = -1> (masked)
        mixed = MatMul (weights, vh)
        back = Transpose <perm = [0, 2, 1, 3]> (mixed)
        y = Reshape (back, join)
      }"""

    contrib: bool = False

    def rules(self) -> Sequence[Rule]:
        return (Rule("attention", ("MatMul",), functools.partial(self._fuse, DimsOf())),)

    def _fuse(self, dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
        match = _CORE.find(node, scope)
        if match is None:
            return None
        dims, edit = dims_of(scope), Edit(node, scope)
        q, k, v = _operands(match, dims, repeated=self.contrib)
        _check_scores(match, scope.opset, q.count, dims)
        dtype = q.stages[-1].value.dtype
        if dtype not in (_TYPES[:1] if self.contrib else _TYPES):
            raise Declined("the type is none that the fused op takes")
        mask = added_mask(edit, scope, dims, match, contrib=self.contrib, half=dtype == _TYPES[1])
        output = node.outputs[0]
        again = joined_again(output, q.count, dims)
        joint = joined(edit, (q, k, v), scope.opset) if self.contrib or again is not None else None
        if len(dims.of(output) or ()) == 3 and (again is None or joint is None):
            raise Declined("heads are not split in front, or not joined behind")
        inputs = joint or [one.split(edit) for one in (q, k, v)]
        scale = _scale(match, inputs[0][1] * inputs[1][1])
        values = [value for value, _ in inputs]
        if not self.contrib:
            if scope.opset < 23:
                raise NewerOpset("Attention", 23)
            counts = {"q_num_heads": q.count, "kv_num_heads": k.count} if joint else {}
            read = (*values, mask)[: 3 + (mask is not None)]
            result = edit.op("Attention", read, {"scale": scale, **counts})
            old, sizes = again if joint and again else (output, ())
            result = reshaped(edit, result, sizes)
        else:
            if joint is None:
                values[0] = _together(edit, values[0], q, k.size == v.size)
            wide = (*values, None, None, mask)[: 3 + 3 * (mask is not None)]
            attributes = {"num_heads": q.count, "scale": scale}
            result = edit.op("MultiHeadAttention", wide, attributes, domain="com.microsoft")
            old, sizes = again or (output, (0, 0, q.count, v.size))
            result = reshaped(edit, result, sizes)
            if again is None:
                result = edit.op("Transpose", (result,), {"perm": _SWAP})
        return edit.replace(old, keep_shape(result, old, dims))


def _operands(match: Match, dims: Dims, *, repeated: bool) -> tuple[Heads, Heads, Heads]:
    """Queries, keys and values; these two with heads that repeat others if `repeated`, or if they must."""
    q, k = Heads.of(match["q"], dims).all_heads(), Heads.of(match["k"], dims, flipped=True)
    v = Heads.of(match["v"], dims, scaled=False)
    a, b, c = (dims.of(match[name]) or () for name in "qkv")
    if not a[:-2] == b[:-2] == c[:-2] or b[-1] != c[-2]:
        raise Declined("queries, keys and values are not known to have the same batch, heads and length")
    if repeated or k.count != v.count or k.apart is None or v.apart is None:
        k, v = k.all_heads(), v.all_heads()
    if k.count != v.count or (len(a) == 3 and q.count != k.count):
        raise Declined("queries, keys and values are not split into heads alike")
    return q, k, v


def _check_scores(match: Match, opset: int, heads: int, dims: Dims) -> None:
    """Raise `Declined` where masking or Softmax see the scores in another shape than [batch, heads, ..]."""
    scaled, scores, masked = (dims.of(match[name]) or () for name in "csm")
    softmax = next(one for one in match.nodes if one.op_type == "Softmax")
    rank = len(scaled)
    if int_attr(softmax, "axis", -1 if opset >= 13 else 1) not in (-1, rank - 1):
        raise Declined("Softmax is not along the last axis")
    split = (*scores[:1], heads, *scaled[-2:])
    views = scores == split and product(scores[:2]) == product(scaled[:-2])
    before = dims.of(softmax.inputs[0])
    if scores != scaled and (not views or before != scaled):
        raise Declined("scores and mask have other axes than batch, heads and lengths")
    if len(masked) != 4 and (
        len(masked) != rank or len(dims.of(match.get("mask")) or ()) > 2 or "low" in match.values
    ):
        raise Declined("the masked scores are not known to have four axes")


def _scale(match: Match, left: float) -> float:
    """What queries times keys are multiplied by, of which a part is left that was multiplied to these."""
    number = match.number("scale") if match.get("scale") is not None else 1.0
    scale = left * (1 / number if number and match.node("c").op_type == "Div" else number)
    if not 0 < scale < math.inf:
        raise Declined("the scale is no positive number")
    return scale


def _together(edit: Edit, queries: ir.Value, q: Heads, same_size: bool) -> ir.Value:
    """Queries as MultiHeadAttention reads them, while keys and values may have heads apart."""
    if not same_size:
        raise Declined("the contrib op takes keys and values that have heads apart in one size only")
    return reshaped(edit, edit.op("Transpose", (queries,), {"perm": _SWAP}), (0, 0, q.count * q.size))
