"""Let the Attention of com.microsoft project what it reads to queries, keys and values itself.

Before: y = com.microsoft.MultiHeadAttention(MatMul(x, A) + a, MatMul(x, B) + b, MatMul(x, C) + c)
After:  y = com.microsoft.Attention(x, [A B C], [a b c])

    Also where the three are a Split of one product.
    ONNX Runtime 1.31 does not survive an Attention without a bias, so that it always has one.
Declines: a weight or a bias is no constant; a projection is read elsewhere; a shared weight above 1 MiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import has_reference, int_attr, ints_attr, sole_user
from onnxopt.passes.shared.chain import constant_ints
from onnxopt.passes.shared.layer import layer_of, require_sole_reader
from onnxopt.passes.shared.weight import LARGE, rounded
from onnxopt.rewrite import AttributeValue, Declined, Edit, Rule
from onnxopt.scope import Scope
from onnxopt.streamed import concatenated

__all__ = ["FuseProjections"]


@dataclass(frozen=True)
class FuseProjections(Pass):
    """Make one Attention of com.microsoft of a MultiHeadAttention and the products that it reads."""

    name: ClassVar[str] = "fuse-projections"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
      agraph (float[B,S,2] x) => (float[B,S,2] y)
      <float[2,2] A = {1, 2, 3, 4}, float[2,2] C = {5, 6, 7, 8}, float[2,2] D = {9, 10, 11, 12}> {
        q = MatMul (x, A)
        k = MatMul (x, C)
        v = MatMul (x, D)
        y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v)
      }"""

    pattern: ClassVar[str] = """<ir_version: 10, opset_import: ["" : 17, "com.microsoft" : 1]>
      agraph (float[batch_1, length_128, 384] x) => (float[batch_1, length_128, 384] y)
      <float[384, 384] A, float[384, 384] C, float[384, 384] D, float[384] a, float[384] c, float[384] d> {
        q0 = MatMul (x, A)
        k0 = MatMul (x, C)
        v0 = MatMul (x, D)
        q = Add (q0, a)
        k = Add (k0, c)
        v = Add (v0, d)
        y = com.microsoft.MultiHeadAttention <num_heads = 12> (q, k, v)
      }"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("attention of products of one value", ("com.microsoft::MultiHeadAttention",), _fuse),)


def _fuse(node: ir.Node, scope: Scope) -> Edit | None:
    inputs = (*node.inputs, *[None] * 6)
    if (
        None in inputs[:3]
        or any(inputs[3:5])
        or any(inputs[6:])
        or len(node.outputs) > 1
        or has_reference(node)
    ):
        return None
    ends, split = [value.producer() for value in inputs[:3] if value is not None], None
    if ends[0] is not None and ends[0].op_type == "Split" and list(ends[0].outputs) == list(inputs[:3]):
        split = ends[0]
        ends = [None if split.inputs[0] is None else split.inputs[0].producer()]
    layers = [
        layer for end in ends if (layer := layer_of(end)) is not None and layer.node.op_type == "MatMul"
    ]
    if len(layers) < len(ends) or any(layer.source is not layers[0].source for layer in layers):
        return None
    source, weights = layers[0].source, [layer.weight() for layer in layers]
    sizes = [one.outputs for one in weights] if split is None else _sizes(split, weights[0].outputs)
    if source.shape is None or len(source.shape) != 3:
        raise Declined("what is projected is not known to have three axes")
    for layer, weight in zip(layers, weights, strict=True):
        require_sole_reader(layer.end)
        if weight.tensor.nbytes > LARGE and len(weight.value.uses()) > 1 and split is None:
            raise Declined("a weight is shared and too large to duplicate")
    biases = [np.broadcast_to(one.bias_array(), w.outputs) for one, w in zip(layers, weights, strict=True)]
    edit, first = Edit(node, scope), weights[0]
    joint = edit.constant(concatenated([one.tensor for one in weights], 1), first.value.name)
    bias = edit.constant(rounded(np.concatenate(biases), first.tensor.dtype), "bias")
    attributes: dict[str, AttributeValue] = {**node.attributes, "qkv_hidden_sizes": sizes}
    read = [source, joint, bias, *((None, None, inputs[5]) if inputs[5] is not None else ())]
    return edit.replace(node.outputs[0], edit.op("Attention", read, attributes, domain="com.microsoft"))


def _sizes(split: ir.Node, whole: int) -> list[int]:
    """The sizes of the three parts of a product."""
    for value in split.outputs:
        if sole_user(value) is None:
            raise Declined("queries, keys or values are read elsewhere, too")
    if int_attr(split, "axis", 0) not in (2, -1):
        raise Declined("the split is not along the last axis")
    if len(split.inputs) > 1 and split.inputs[1] is not None:
        return list(constant_ints(split.inputs[1], "the sizes are"))
    return list(ints_attr(split, "split") or [whole // 3] * 3)
