"""Let Attention append to the cache of keys and values itself.

Before: keys = Concat(past_keys, k); values = Concat(past_values, v); y = Attention(q, keys, values, mask)
After:  y, keys, values = Attention(q, k, v, mask, past_keys, past_values)
Declines: another node reads keys or values, which may come before the Attention; it is causal, which is
    counted from the end of a cache on; heads are not apart; keys and values are not known to be as many.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import Dim, Dims, DimsOf
from onnxopt.graph import has_reference, int_attr
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseCache"]


@dataclass(frozen=True)
class FuseCache(Pass):
    """Let Attention read and give the cache of keys and values."""

    name: ClassVar[str] = "fuse-cache"
    example: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 23]>
      agraph (float[B,2,S,4] q, float[B,2,P,4] pk, float[B,2,P,4] pv, float[B,2,S,4] k, float[B,2,S,4] v)
          => (float[B,2,S,4] y, float[B,2,T,4] keys, float[B,2,T,4] values) {
        keys = Concat <axis = 2> (pk, k)
        values = Concat <axis = 2> (pv, v)
        y = Attention (q, keys, values)
      }"""

    def rules(self) -> Sequence[Rule]:
        fuse = functools.partial(_fuse, DimsOf())
        return (Rule("Attention of what a cache grows to", ("Attention",), fuse),)


def _fuse(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    if len(node.inputs) < 3 or len(node.outputs) > 1 or any(node.inputs[4:]):
        return None
    keys, values = (None if value is None else _appended(value.producer()) for value in node.inputs[1:3])
    if keys is None or values is None:
        return None
    if has_reference(node) or "q_num_heads" in node.attributes:
        raise Declined("heads are not apart, as they are in a cache")
    if int_attr(node, "is_causal", 0):
        raise Declined("it is causal, and would be so from the end of the cache on")
    for grown in (keys, values):
        if any(usage.node is not node for usage in grown.outputs[0].uses()) or grown.graph is not node.graph:
            raise Declined("keys or values are read elsewhere, too")
    lengths = [_length(dims_of(scope), grown.inputs[0]) for grown in (keys, values)]
    if lengths[0] is None or lengths[0] != lengths[1]:
        raise Declined("the cached keys and values are not known to be as many")
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    inputs = node.inputs[0], keys.inputs[1], values.inputs[1], mask, keys.inputs[0], values.inputs[0]
    edit = Edit(node, scope)
    results = edit.ops("Attention", inputs, node.attributes, outputs=3)
    for old, new in zip((node, keys, values), results, strict=True):
        edit.replace(old.outputs[0], new)
    return edit


def _length(dims: Dims, cached: ir.Value | None) -> Dim | None:
    shape = dims.of(cached)
    return shape[2] if shape is not None and len(shape) == 4 else None


def _appended(node: ir.Node | None) -> ir.Node | None:
    """The node, if it makes one sequence of two, with heads apart."""
    if node is None or node.op_type != "Concat" or node.domain or len(node.inputs) != 2:
        return None
    return node if not has_reference(node) and int_attr(node, "axis", 0) in (2, -2) else None
