"""Make one Attention of its decomposition, in whatever way an exporter spelled it.

Before: y = MatMul(Softmax(MatMul(q, Transpose(k)) * scale + mask), v)
        with q, k and v [batch, heads, length, size], often Transpose(Reshape(x, [0, 0, heads, size]))
After:  y = Attention(x_q, x_k, x_v, mask)                          from opset 23 on
        y = com.microsoft.MultiHeadAttention(x_q, x_k, x_v, mask)   with contrib

    Also with the scale on queries and keys; with Where(keep, scores, low) for a mask; with zeros put in for
    NaN where a row is masked whole; with keys and values repeated for several queries; with all three
    side by side in one value.
Declines: a mask that may be -inf all along a row where the fused op gives zeros and the parts NaN, or the
    other way round; a mask, or operands, whose shapes are not known to fit; a scale that is no constant.

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
from onnxopt.evaluation import Dims, DimsOf
from onnxopt.graph import int_attr
from onnxopt.passes._heads import Heads
from onnxopt.passes._joint import joined, joined_again, keep_shape, reshaped
from onnxopt.passes._masks import added_mask
from onnxopt.pattern import Match, Patterns
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseAttention"]

_SCORES = "(s := Mul(MatMul(q, k), scale) | Div(MatMul(q, k), scale) | MatMul(q, k))"
_MASKED = f"(Add({_SCORES}, mask) | Where(keep, {_SCORES}, low) | Where(drop, low, {_SCORES}) | {_SCORES})"
_CORE = Patterns(
    {
        "zeros for NaN": f"MatMul(Where(IsNaN(p), 0, (p := Softmax((m := {_MASKED})))), v)",
        "plain": f"MatMul(Softmax((m := {_MASKED})), v)",
    }
)
_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class FuseAttention(Pass):
    """Make one Attention of its parts.

    contrib: MultiHeadAttention of com.microsoft. live: take it that masks leave something of each row.
    """

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

    contrib: bool = False
    live: bool = False

    def rules(self) -> Sequence[Rule]:
        return (Rule("attention", ("MatMul",), functools.partial(self._fuse, DimsOf())),)

    def _fuse(self, dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
        match = _CORE.find(node, scope)
        if match is None:
            return None
        if not self.contrib and scope.opset < 23:
            raise Declined("Attention came with opset 23")
        softmax = next(one for one in match.nodes if one.op_type == "Softmax")
        if int_attr(softmax, "axis", -1 if scope.opset >= 13 else 1) not in (-1, 3):
            raise Declined("Softmax is not along the last axis")
        dims, edit = dims_of(scope), Edit(node, scope)
        operands = _operands(match, dims)
        if operands[0].stages[-1].value.dtype not in (_TYPES[:1] if self.contrib else _TYPES):
            raise Declined("the type is none that the fused op takes")
        mask = added_mask(edit, scope, dims, match, contrib=self.contrib, live=self.live)
        output = _contrib if self.contrib else _standard
        return output(edit, scope, dims, match, operands, mask)


def _operands(match: Match, dims: Dims) -> list[Heads]:
    q, k = Heads.of(match["q"], dims).all_heads(), Heads.of(match["k"], dims, flipped=True)
    v = Heads.of(match["v"], dims, scaled=False)
    shapes = [dims.of(match[name]) or () for name in "qkv"]
    if not shapes[0][:2] == shapes[1][:2] == shapes[2][:2] or shapes[1][3] != shapes[2][2]:
        raise Declined("queries, keys and values are not known to have the same batch, heads and length")
    if len(dims.of(match["m"]) or ()) != 4:
        raise Declined("the masked scores are not known to have four axes")
    return [q, k, v]


def _scale(match: Match, q: float, k: float) -> float:
    """What the product of queries and keys is multiplied by, where these are still to be multiplied."""
    number = match.number("scale") if match.get("scale") is not None else 1.0
    scale = q * k * (1 / number if number and match.node("s").op_type == "Div" else number)
    if not 0 < scale < math.inf:
        raise Declined("the scale is no positive number")
    return scale


def _standard(
    edit: Edit, scope: Scope, dims: Dims, match: Match, operands: Sequence[Heads], mask: ir.Value | None
) -> Edit:
    q, k, v = operands
    if k.count != v.count or k.apart is None or v.apart is None:
        k, v = k.all_heads(), v.all_heads()
    output = match.nodes[0].outputs[0]
    again, attributes = joined_again(output, dims), dict[str, AttributeValue]()
    inputs = joined(edit, (q, k, v), scope.opset) if again is not None else None
    if again is None or inputs is None:
        again, inputs = (output, ()), [one.split(edit) for one in (q, k, v)]
    else:
        attributes = {"q_num_heads": q.count, "kv_num_heads": k.count}
    attributes["scale"] = _scale(match, inputs[0][1], inputs[1][1])
    values = [value for value, _ in inputs]
    result = edit.op("Attention", values if mask is None else (*values, mask), attributes)
    result = reshaped(edit, result, again[1])
    return edit.replace(again[0], keep_shape(result, again[0], dims))


def _contrib(
    edit: Edit, scope: Scope, dims: Dims, match: Match, operands: Sequence[Heads], mask: ir.Value | None
) -> Edit:
    """MultiHeadAttention reads [batch, length, heads * size]; keys and values may also have heads apart."""
    q, k, v = (one.all_heads() for one in operands)
    output = match.nodes[0].outputs[0]
    inputs = joined(edit, (q, k, v), scope.opset)
    if inputs is None:
        if k.size != v.size:
            raise Declined("the contrib op takes keys and values that have heads apart in one size only")
        (apart, left), keys, values = (one.split(edit) for one in (q, k, v))
        behind = edit.op("Transpose", (apart,), {"perm": (0, 2, 1, 3)})
        inputs = [(reshaped(edit, behind, (0, 0, q.count * q.size)), left), keys, values]
    again = joined_again(output, dims)
    scale = _scale(match, inputs[0][1], inputs[1][1])
    read = [*(value for value, _ in inputs), *((None, None, mask) if mask is not None else ())]
    attributes = {"num_heads": q.count, "scale": scale}
    result = edit.op("MultiHeadAttention", read, attributes, domain="com.microsoft")
    result = reshaped(edit, result, (0, 0, q.count, v.size) if again is None else again[1])
    if again is None:
        again = output, ()
        result = edit.op("Transpose", (result,), {"perm": (0, 2, 1, 3)})
    return edit.replace(again[0], keep_shape(result, again[0], dims))
