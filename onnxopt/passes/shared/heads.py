"""Queries, keys or values of attention: split into heads, [batch, heads, length, size], and before that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxopt.evaluation import Dims, product
from onnxopt.graph import constant_array, has_reference, int_attr
from onnxopt.passes.shared.layout import Axes, Layout, flat
from onnxopt.passes.shared.steps import layout_of, written
from onnxopt.rewrite import Declined, Edit

__all__ = ["Heads", "Operand"]

Operand = tuple[ir.Value, float]
"""A value, and what it is still to be multiplied by."""

_LONGEST = 32
"""Ops in a row that are followed."""


@dataclass(frozen=True)
class Stage:
    """A value that an operand is made of.

    layout: from the value to the operand, or to what is left of it where heads only repeat others.
    scale: what it is multiplied by on the way. pick: which slice is taken of the leaf that gets lost.
    """

    value: ir.Value
    layout: Layout
    scale: float = 1.0
    pick: int | None = None

    def above(self, dims: Dims, *, scaled: bool) -> Stage | None:
        """What this value is made of; None where a node does more than to move, to repeat or to scale it."""
        node, layout = self.value.producer(), self.layout
        if node is None or node.domain or has_reference(node):
            return None
        moves = layout_of(node, dims)
        if moves is not None:
            whole = moves.then(layout)
            return None if whole is None else replace(self, value=_first(node), layout=whole)
        if node.op_type in ("Div", "Mul") and scaled:
            return self._scaled(node, dims)
        if node.op_type == "Expand":
            return self._repeated(node, dims)
        return self._picked(node, dims) if node.op_type in ("Gather", "Slice", "Split") else None

    def _scaled(self, node: ir.Node, dims: Dims) -> Stage | None:
        for value, other in (node.inputs, node.inputs[::-1])[: 1 + (node.op_type == "Mul")]:
            array = constant_array(other, 8)
            if value is None or array is None or array.size != 1 or not array.all():
                continue
            if dims.of(value) == dims.of(self.value):
                number = float(array.reshape(-1)[0])
                scale = self.scale / number if node.op_type == "Div" else self.scale * number
                return replace(self, value=value, scale=scale)
        return None

    def _repeated(self, node: ir.Node, dims: Dims) -> Stage | None:
        """Only where each head is repeated by itself: the leaf that is new is the last one of the heads."""
        before, after = dims.of(node.inputs[0]), dims.of(self.value)
        if before is None or after is None or len(before) != len(after):
            return None
        grown = [axis for axis, sizes in enumerate(zip(before, after, strict=True)) if sizes[0] != sizes[1]]
        if len(grown) != 1 or before[grown[0]] != 1:
            return None
        leaves, heads = self.layout.source[grown[0]], self.layout.target[1]
        if len(leaves) != 1 or heads[-1:] != leaves or len(self.layout.target) != 4:
            return None
        return replace(self, value=_first(node), layout=self.layout.resized({leaves[0]: 1}))

    def _picked(self, node: ir.Node, dims: Dims) -> Stage | None:
        """One slice along an axis."""
        found, before = _slice_of(node, self.value, dims), dims.of(node.inputs[0])
        if found is None or before is None or self.pick is not None:
            return None
        axis, index = found[0] % len(before), found[1]
        size, kept = before[axis], len(self.layout.source) == len(before)
        if not isinstance(size, int) or not -size <= index < size or (kept and self.layout.source[axis]):
            return None
        source = list(self.layout.source)
        source[axis : axis + kept] = [(len(self.layout.sizes),)]
        layout = Layout((*self.layout.sizes, size), tuple(source), self.layout.target)
        return Stage(_first(node), layout, self.scale, index % size)

    def axes(self, *, flipped: bool) -> Axes:
        """Those of the operand: batch, heads, length, size; the value tells a batch from heads beside it."""
        first, *others = self.layout.target
        if len(others) == 2:
            given = self.layout.source[0] if self.layout.source else ()
            cut = len(given) if first[: len(given)] == given else len(first)
            first, others = first[:cut], [first[cut:], *others]
        return (first, others[0], others[2], others[1]) if flipped else (first, *others)

    def heads(self, *, flipped: bool) -> int:
        """How many heads are left."""
        return self.number(self.axes(flipped=flipped)[1])

    def number(self, leaves: Sequence[int]) -> int:
        """The size of leaves beside each other; Declined where it is not known."""
        size = product(self.layout.sizes[leaf] for leaf in leaves)
        if not isinstance(size, int):
            raise Declined("the number or the size of the heads is not known")
        return size

    @property
    def lost(self) -> tuple[int, ...]:
        """The leaf of the pick."""
        return tuple(leaf for leaf in flat(self.layout.source) if leaf not in flat(self.layout.target))

    def side_by_side(self, *, flipped: bool) -> Axes:
        """The axes of [batch, length, heads * size]; in front of the heads, the leaf of the pick."""
        batch, heads, length, size = self.axes(flipped=flipped)
        return batch, length, (*self.lost, *heads, *size)


@dataclass(frozen=True)
class Heads:
    """What a matrix product reads, and what that is made of, the last stage first.

    flipped: the last two axes are the other way round.
    """

    stages: tuple[Stage, ...]
    flipped: bool

    @classmethod
    def of(cls, value: ir.Value, dims: Dims, *, flipped: bool = False, scaled: bool = True) -> Heads:
        """The operand, followed through ops that move it or, if `scaled`, scale it.

        Raises:
            Declined: it has neither four axes, nor three with batch and heads in the first one.
        """
        shape = dims.of(value)
        if shape is None or len(shape) not in (3, 4):
            raise Declined("queries, keys or values are not known to have three or four axes")
        stages = [Stage(value, Layout.identity(shape))]
        while len(stages) < _LONGEST and (above := stages[-1].above(dims, scaled=scaled)) is not None:
            stages.append(above)
        return cls(tuple(stages), flipped)

    @property
    def count(self) -> int:
        """The number of heads, without those that only repeat others."""
        return self.stages[-1].heads(flipped=self.flipped)

    @property
    def size(self) -> int:
        """The elements of a head."""
        return self.stages[0].number(self.stages[0].axes(flipped=self.flipped)[3])

    def all_heads(self) -> Heads:
        """The same, with the heads that repeat others."""
        whole = self.stages[0].heads(flipped=self.flipped)
        kept = (stage for stage in self.stages if stage.heads(flipped=self.flipped) == whole)
        return replace(self, stages=tuple(kept)) if len(self.stages[0].layout.target) == 4 else self

    @property
    def apart(self) -> Stage | None:
        """The first value that is [batch, heads, length, size]."""
        found = (one for one in self.stages[::-1] if one.layout.source == one.axes(flipped=self.flipped))
        return next((one for one in found if one.heads(flipped=self.flipped) == self.count), None)

    @property
    def joint(self) -> tuple[Stage, tuple[int, ...]] | None:
        """The first value that is [batch, length, heads * size], or is so by a Reshape to sizes.

        Where the operand is one of several that lie in it side by side, it is as wide as all of them.
        """
        for stage in self.stages[::-1]:
            wanted = stage.side_by_side(flipped=self.flipped)
            if stage.layout.source == wanted and stage.heads(flipped=self.flipped) == self.count:
                return stage, ()
        stage = self.stages[-1]
        wanted, shape = stage.side_by_side(flipped=self.flipped), stage.layout.source_shape
        sizes = written(stage.layout.shape_of(wanted), shape)
        return (stage, tuple(sizes)) if sizes and flat(stage.layout.source) == flat(wanted) else None

    def split(self, edit: Edit) -> Operand:
        """The operand as [batch, heads, length, size]."""
        if (stage := self.apart) is not None:
            return stage.value, stage.scale
        return edit.op("Transpose", (self.stages[0].value,), {"perm": (0, 1, 3, 2)}), 1.0


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None  # what moves elements has some
    return value


def _slice_of(node: ir.Node, value: ir.Value, dims: Dims) -> tuple[int, int] | None:
    """Axis and index, where a node takes one slice."""
    axis = int_attr(node, "axis", 0)
    if node.op_type == "Split":
        return axis, value.index() or 0
    if node.op_type == "Gather":
        found = dims.elements(node.inputs[1])
        index = found.flat[0] if found is not None and found.size == 1 and found.ndim < 2 else None
        return (axis, index) if isinstance(index, int) else None
    starts, ends = dims.ints(node, "starts", 1), dims.ints(node, "ends", 2)
    axes, steps = dims.ints(node, "axes", 3) or [0], dims.ints(node, "steps", 4) or [1]
    one = starts is not None and ends is not None and len(starts) == len(axes) == 1 and steps == [1]
    return (axes[0], starts[0]) if one and starts else None
