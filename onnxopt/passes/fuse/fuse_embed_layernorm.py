"""Fuse the embeddings of a BERT-like encoder into ONNX Runtime's EmbedLayerNormalization.

Before: words = Gather(word_table, ids); types = Gather(type_table, type_ids)             ids: rank 2
        places = Gather(place_table, Slice([0, 1, 2, ...], 0, length of ids))
        y = LayerNormalization(words + types + places, gamma, beta)
After:  y = com.microsoft.EmbedLayerNormalization(int32(ids), int32(type_ids), word_table, place_table,
            type_table, gamma, beta)

The types may be missing; place ids of rank 2 are an input. It is guarded: version 1.31 of the runtime takes
    half as long again for it on the CPU as for the parts.
Declines: the ids are not known to have one shape of rank 2, apart from place ids that are 0, 1, 2, ... up to
    their length; a table is not of rank 2; one of the embeddings is read elsewhere.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.graph import constant_array, float_attr, int_attr
from onnxopt.passes.shared.normalization import FLOATS, of_one_shape, shape_of
from onnxopt.pattern import Patterns
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FuseEmbedLayernorm"]

_LENGTH = """(Unsqueeze(Gather(Shape(ids), 1), ...) | Gather(Shape(ids), 1) | Slice(Shape(ids), 1, 2, ...)
    | Shape(ids, start=1, end=2))"""
_LARGEST = 1 << 20
"""Bytes of a list of place ids."""


@dataclass(frozen=True)
class FuseEmbedLayernorm(Pass):
    """Make one operator of the embeddings of words, types and places and the normalization of their sum."""

    name: ClassVar[str] = "fuse-embed-layernorm"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[
        str
    ] = """agraph (int64[N,S] ids, int64[N,S] type_ids, int64[N,S] place_ids) => (float[N,S,2] y)
        <float[3,2] words = {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}, float[2,2] types = {0.0, 1.0, 2.0, 3.0},
         float[2,2] places = {0.5, 0.0, 0.0, 0.5}, float[2] gamma = {1.0, 2.0}, float[2] beta = {0.0, 1.0}> {
        word = Gather(words, ids)
        type = Gather(types, type_ids)
        place = Gather(places, place_ids)
        some = Add(word, type)
        sum = Add(some, place)
        y = LayerNormalization(sum, gamma, beta)
    }"""
    pattern: ClassVar[str] = f"""
    agraph (int64[batch_1, length_128] ids) => (float[batch_1, length_128, 384] y)
        <float[30000, 384] words, float[2, 384] types, float[128, 384] places, float[384] gamma,
         float[384] beta, int64[128] numbers = {{{", ".join(map(str, range(128)))}}}, int64[1] zero = {{0}},
         int64[batch_1, length_128] type_ids> {{
        type_ids = Sub(ids, ids)
        word = Gather(words, ids)
        type = Gather(types, type_ids)
        length = Shape<start = 1, end = 2>(ids)
        place_ids = Slice(numbers, zero, length)
        place = Gather(places, place_ids)
        some = Add(word, type)
        sum = Add(some, place)
        y = LayerNormalization(sum, gamma, beta)
    }}"""

    def rules(self) -> Sequence[Rule]:
        return (Rule("embeddings and their normalization", ("LayerNormalization",), _fuse),)


@functools.cache
def _embeddings() -> Patterns:
    a, b, c = (f"({name} := Gather(_, _))" for name in "abc")
    return Patterns(
        {
            "three": f"LayerNormalization(Add({a}, {b}, {c}), gamma, ...)",
            "two": f"LayerNormalization(Add({a}, {b}), gamma, ...)",
        }
    )


@functools.cache
def _counted() -> Patterns:
    return Patterns({"numbers from 0 on": f"Slice(numbers, 0, {_LENGTH}, ...)"})


_Pair = tuple[ir.Value | None, ir.Value | None]
"""A table and the ids of its rows."""


def _fuse(node: ir.Node, scope: Scope) -> Edit | None:
    match = _embeddings().find(node, scope)
    if match is None:
        return None
    gathers = [match.node(name) for name in "abc" if name in match.values]
    if int_attr(node, "axis", -1) not in (-1, 2) or len(node.outputs) > 1 or len(node.inputs) < 3:
        raise Declined("it is not along the last axis, has no bias or further outputs")
    pairs: list[_Pair] = [(gather.inputs[0], gather.inputs[1]) for gather in gathers]
    width = shape_of(match["gamma"])
    if shape_of(node.inputs[2]) != width or float_attr(node, "epsilon", 1e-5) < 0:
        raise Declined("the bias has not the shape of the scale, or epsilon is negative")
    if any(int_attr(gather, "axis", 0) for gather in gathers) or width is None:
        raise Declined("an embedding is none of the rows of a table")
    for table, _ in pairs:
        if table is None or table.dtype not in FLOATS or shape_of(table) is None:
            raise Declined("a table is of an unknown shape or another type")
        if len(table.shape or ()) != 2 or (shape_of(table) or ())[1:] != width:
            raise Declined("a table is not as wide as the scale")
    place, place_ids = _place(pairs, scope)
    others = [pair for pair in pairs if pair is not place]
    others.sort(key=lambda pair: -(shape_of(pair[0]) or (0,))[0])
    (words, ids), (types, type_ids) = (*others, (None, None))[:2]
    edit, int32 = Edit(node, scope), {"to": int(ir.DataType.INT32)}
    inputs = [
        edit.op("Cast", (one,), int32) if one is not None and one.dtype != ir.DataType.INT32 else one
        for one in (ids, type_ids, place_ids)
    ]
    inputs[2:] = [words, place[0], types, *node.inputs[1:3], *((None, inputs[2]) if place_ids else ())]
    output, _ = edit.ops(
        "EmbedLayerNormalization",
        inputs,
        {"epsilon": float_attr(node, "epsilon", 1e-5)},
        domain="com.microsoft",
        outputs=2,
    )
    return edit.replace(node.outputs[0], output)


def _place(pairs: Sequence[_Pair], scope: Scope) -> tuple[_Pair, ir.Value | None]:
    """The embedding of places, and their ids where they are not 0, 1, 2, ...

    Raises:
        Declined: there is none.
    """
    for place in reversed(pairs):
        ids = [pair[1] for pair in pairs if pair is not place]
        rank = len(ids[0].shape) if ids[0] is not None and ids[0].shape is not None else None
        if rank == 2 and of_one_shape(ids[0], ids[-1]):
            if _counts(place[1], ids, scope):
                return place, None
            if of_one_shape(place[1], ids[0]):
                return place, place[1]
    raise Declined("ids are not known to have one shape, or those of places to be 0, 1, 2, ...")


def _counts(value: ir.Value | None, ids: Sequence[ir.Value | None], scope: Scope) -> bool:
    """Whether the value is 0, 1, 2, ... up to the length of one of the ids: of shape [S] or [1, S]."""
    node = value.producer() if value is not None else None
    match = _counted().find(node, scope, shared=True) if node is not None else None
    if node is None or match is None or not any(match["ids"] is one for one in ids):
        return False
    numbers = constant_array(match["numbers"], _LARGEST)
    axes, steps = (constant_array(one) for one in (*node.inputs[3:], None, None)[:2])
    if numbers is None or (steps is not None and (steps != 1).any()):
        return False
    along = 0 if axes is None else int(axes.reshape(-1)[0])
    in_order = numbers.size == numbers.shape[-1] and (numbers.reshape(-1) == np.arange(numbers.size)).all()
    return bool(in_order) and numbers.ndim < 3 and along in (-1, numbers.ndim - 1)
