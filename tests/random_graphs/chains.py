"""Steps in a row, each on what the one before it gave; and the tables of all steps."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx

from tests.random_graphs.bodies import function, if_step, loop_step
from tests.random_graphs.elements import activation, binary, cast, clip, identity, odd, reduce
from tests.random_graphs.growing import Graph, Step
from tests.random_graphs.layers import affine, batchnorm, block, einsum, layer, pad, parallel, pool
from tests.random_graphs.movement import concat, gather, reshape, slice_step, split, squeeze, transpose
from tests.random_graphs.quantized import integers, quantized, truth
from tests.random_graphs.sizes import read_size, shape_arithmetic, sizes
from tests.random_graphs.spelled import (
    activation_in_pieces,
    attention_in_pieces,
    normalization,
    normalization_in_pieces,
)

__all__ = ["FAMILIES"]


def duplicate(graph: Graph) -> None:
    """An earlier node again, with outputs of its own."""
    known = {value.name: value for value in (*graph.visible(), *graph.stored)}
    nodes = [
        node
        for node in graph.nodes
        if node.op_type != "Constant"
        and all(not name or name in known for name in node.input)
        and not any(attr.HasField("g") for attr in node.attribute)
    ]
    if nodes:
        copy = onnx.NodeProto()
        copy.CopyFrom(graph.rng.choice(nodes))
        exact = [known[name].exact for name in copy.output if name in known]
        copy.name = graph.model.fresh("n")
        copy.output[:] = [graph.model.fresh("v") if name else "" for name in copy.output]
        graph.append(copy, [known[name] for name in copy.input if name], exact=all(exact) and bool(exact))


def chain(graph: Graph) -> None:
    """Steps of one family, each on what the one before it gave."""
    rng, family = graph.rng, graph.rng.choice(_ROWS)
    graph.focus = graph.pick()
    for _ in range(rng.randint(2, 4)):
        rng.choice(family)(graph)
    graph.focus = None


def constant_arithmetic(graph: Graph) -> None:
    """Steps on a constant, and what comes of it beside a value."""
    rng, model = graph.rng, graph.model
    dtype = rng.choice((model.dtype, model.dtype, np.dtype("int64"), np.dtype("int32")))
    graph.focus = graph.constant(
        graph.data([rng.randint(0 if rng.random() < 0.1 else 1, 4) for _ in range(rng.randint(0, 4))], dtype)
    )
    for _ in range(rng.randint(1, 4)):
        rng.choice(_MOVES)(graph)
    found, graph.focus = graph.focus, None
    x = graph.pick(lambda v: v.arrays[0].dtype == found.arrays[0].dtype and not v.stored)
    if x is not None:
        graph.op(rng.choice(("Add", "Mul", "Sub", "Max")), rng.choice(([x, found], [found, x])))


_MOVES = (
    *(activation, affine, cast, clip, concat, gather, identity, integers, odd, pad, reduce),
    *(reshape, shape_arithmetic, slice_step, split, squeeze, transpose),
)
_ROWS: tuple[tuple[Callable[[Graph], None], ...], ...] = (
    (pad, pad, pool, layer),
    (reshape, reshape, squeeze),
    (squeeze,),
    (transpose,),
    (slice_step,),
    (concat, concat, split),
    (clip,),
    (cast,),
    (layer, layer, affine),
    (layer, batchnorm, affine, transpose, reshape),
    (layer, affine, transpose, squeeze, pool, concat, activation),
    (transpose, reshape, slice_step, identity),
    (transpose, reshape, squeeze, shape_arithmetic),
    (normalization, affine, transpose),
    _MOVES,
)
_ALL: tuple[Step, ...] = (
    *((block, 6, False), (chain, 16, False), (constant_arithmetic, 6, False), (layer, 3, False)),
    *((affine, 4, False), (batchnorm, 2, False), (activation, 2, False), (clip, 3, False), (pad, 3, False)),
    *((pool, 2, False), (transpose, 3, False), (reshape, 4, False), (squeeze, 3, False), (cast, 3, False)),
    *((slice_step, 3, False), (concat, 2, False), (split, 2, False), (identity, 2, False)),
    *((shape_arithmetic, 3, False), (integers, 2, False), (binary, 2, False), (reduce, 2, False)),
    *((gather, 2, False), (odd, 3, False), (duplicate, 3, False), (einsum, 1, False), (parallel, 2, False)),
    *((read_size, 3, False), (sizes, 1, False), (quantized, 2, False), (truth, 1, False)),
    *((activation_in_pieces, 3, False), (normalization_in_pieces, 2, False), (normalization, 2, False)),
    *((attention_in_pieces, 1, False), (if_step, 2, True), (loop_step, 2, True), (function, 2, True)),
)

_FOCUSED: dict[str, tuple[Step, ...]] = {
    "activations": ((activation_in_pieces, 60, False), (function, 10, True), (if_step, 5, True)),
    "bodies": ((if_step, 50, True), (loop_step, 40, True), (function, 15, True), (sizes, 10, False)),
    "layers": (
        (block, 60, False),
        (parallel, 30, False),
        (einsum, 10, False),
        (attention_in_pieces, 5, False),
    ),
    "movement": ((chain, 40, False), (transpose, 15, False), (reshape, 15, False), (squeeze, 10, False)),
    "normalizations": (
        *((normalization_in_pieces, 50, False), (normalization, 20, False), (attention_in_pieces, 10, False)),
    ),
    "numbers": ((quantized, 30, False), (integers, 20, False), (truth, 15, False), (cast, 10, False)),
    "sizes": ((shape_arithmetic, 40, False), (read_size, 40, False), (sizes, 20, False), (if_step, 5, True)),
}

FAMILIES: dict[str, tuple[Step, ...]] = {
    "all": _ALL,
    **{name: (*_ALL, *more) for name, more in _FOCUSED.items()},
}
"""Name -> steps; each family has all of them, and more of some."""
