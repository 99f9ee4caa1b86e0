"""Operands of attention before their heads are split, and its output after they are put together."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dim, Dims, product
from onnxopt.graph import sole_user
from onnxopt.passes.shared.forms import split
from onnxopt.passes.shared.heads import Heads, Operand
from onnxopt.passes.shared.layout import Layout, flat
from onnxopt.passes.shared.steps import layout_of, written
from onnxopt.rewrite import Edit

__all__ = ["joined", "joined_again", "keep_shape", "reshaped"]

_NAME = re.compile(r"([\w.]+)\*1")
"""A size that is a name and nothing else."""


def joined(edit: Edit, operands: Sequence[Heads], opset: int) -> list[Operand] | None:
    """The operands as [batch, length, heads * size]; None where one is not made of such a value."""
    places = [place for operand in operands if (place := operand.joint) is not None]
    if len(places) < len(operands):
        return None
    wide: dict[ir.Value, ir.Value] = {}
    parts: dict[ir.Value, Sequence[ir.Value]] = {}
    found = []
    for operand, (stage, sizes) in zip(operands, places, strict=True):
        value = wide[stage.value] = wide.get(stage.value) or reshaped(edit, stage.value, sizes)
        if stage.pick is not None:
            if value not in parts:
                widths = [operand.count * operand.size] * stage.number(stage.lost)
                parts[value] = split(edit, value, widths, 2, opset)
            value = parts[value][stage.pick]
        found.append((value, stage.scale))
    return found


def joined_again(value: ir.Value, heads: int, dims: Dims) -> tuple[ir.Value, tuple[int, ...]] | None:
    """What the product of weights and values ends up as: [batch, length, heads * size].

    With sizes, it is a Reshape of that to these.
    """
    shape, found = dims.of(value), None
    layout = Layout.identity(shape) if shape is not None and len(shape) in (3, 4) else None
    while layout is not None:
        first, *others = layout.source
        if len(others) == 2:
            cut = next((i for i in range(len(first)) if _count(layout, first[i:]) == heads), len(first))
            first, others = first[:cut], [first[cut:], *others]
        wanted = first, others[1], (*others[0], *others[2])
        right = _count(layout, others[0]) == heads
        if right and layout.target == wanted:
            return value, ()
        if right and flat(layout.target) == flat(wanted):
            sizes = written(layout.target_shape, layout.shape_of(wanted))
            found = (value, tuple(sizes)) if sizes is not None else found
        node = sole_user(value)
        moves = layout_of(node, dims)
        layout = None if moves is None else layout.then(moves)
        value = value if node is None else node.outputs[0]
    return found


def _count(layout: Layout, leaves: Sequence[int]) -> Dim:
    return product(layout.sizes[leaf] for leaf in leaves)


def keep_shape(new: ir.Value, old: ir.Value, dims: Dims) -> ir.Value:
    """Put on record of a new value what is worked out of the one it stands for, where that has names."""
    shape = dims.of(old)
    if shape is not None:
        named = [None if isinstance(size, int) else _NAME.fullmatch(str(size)) for size in shape]
        pairs = zip(shape, named, strict=True)
        new.shape = ir.Shape([size if isinstance(size, int) else name and name[1] for size, name in pairs])
    return new


def reshaped(edit: Edit, value: ir.Value, sizes: Sequence[int]) -> ir.Value:
    """The value reshaped to sizes; as it is where there are none."""
    return edit.op("Reshape", (value, edit.constant(np.array(sizes, np.int64), "shape"))) if sizes else value
