"""The fewest ops for a change of layout; which nodes make one, and how they are written down."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dim, Dims, product
from onnxopt.graph import constant_array, has_reference, int_attr, ints_attr
from onnxopt.passes.shared.forms import with_axes
from onnxopt.passes.shared.layout import Layout, Shape, flat, layout_between
from onnxopt.rewrite import Edit

__all__ = ["LAYOUT_OPS", "PLAIN", "Step", "apply_steps", "cost", "layout_of", "steps_for", "take", "written"]

_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
_TRIVIAL = ("Gather", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")
"""What takes or reduces the only element of an axis changes the layout."""
PLAIN = ("Transpose", *_VIEWS)
"""The ops that are nothing but a change of layout."""
LAYOUT_OPS = (*PLAIN, *_TRIVIAL)
"""The ops that can be one."""


@dataclass(frozen=True)
class Step:
    """One op.

    numbers: a Transpose's perm, a Reshape's shape, a Squeeze's or Unsqueeze's axes; else the size of a block.
    mode: that of DepthToSpace.
    """

    op_type: str
    numbers: tuple[int, ...]
    mode: str = ""

    @property
    def weight(self) -> int:
        """The cost: that of moving elements is larger."""
        return 1 if self.op_type in ("Reshape", "Squeeze", "Unsqueeze") else 2


def steps_for(layout: Layout, modes: Sequence[str] = ()) -> list[Step] | None:
    """The fewest ops that do what the layout says; None where a Reshape's shape cannot be written down.

    modes: those of DepthToSpace that may be used; SpaceToDepth undoes the mode DCR.
    """
    source, target = layout.source_shape, layout.target_shape
    if not layout.moves:
        return _view(source, target)
    one = _one_transpose(layout) or _block(layout, modes)
    if one is not None:
        return [one]
    inverse = layout.inverse
    if (perm := _perm_before(layout)) is not None:
        view = _view(tuple(source[axis] for axis in perm), target)
        if view is not None:
            return [Step("Transpose", perm), *view]
    if (order := _perm_before(inverse)) is not None:
        view = _view(source, tuple(target[axis] for axis in order))
        if view is not None:
            return [*view, Step("Transpose", tuple(order.index(axis) for axis in range(len(order))))]
    return _three(layout)


def _three(layout: Layout) -> list[Step] | None:
    """Reshape, Transpose, Reshape."""
    blocks = _blocks(layout)
    in_order = sorted(blocks, key=lambda block: flat(layout.source).index(block[0]))
    sizes = {block: product(layout.sizes[leaf] for leaf in block) for block in blocks}
    first = _view(layout.source_shape, tuple(sizes[block] for block in in_order))
    last = _view(tuple(sizes[block] for block in blocks), layout.target_shape)
    if first is None or last is None:
        return None
    return [*first, Step("Transpose", tuple(in_order.index(block) for block in blocks)), *last]


def _blocks(layout: Layout) -> list[tuple[int, ...]]:
    """The leaves in the order of the target, joined where the source has them in the same order."""
    after, blocks = dict(zip(s := flat(layout.source), s[1:], strict=False)), list[tuple[int, ...]]()
    for leaf in flat(layout.target):
        if blocks and after.get(blocks[-1][-1]) == leaf:
            blocks[-1] = (*blocks[-1], leaf)
        else:
            blocks.append((leaf,))
    return blocks


def _one_transpose(layout: Layout) -> Step | None:
    if sorted(layout.source) != sorted(layout.target):
        return None
    places = {axis: [i for i, other in enumerate(layout.source) if other == axis] for axis in layout.target}
    return Step("Transpose", tuple(places[axis].pop(0) for axis in layout.target))


def _perm_before(layout: Layout) -> tuple[int, ...] | None:
    """The Transpose of the axes as they are after which only a change of shape is left."""
    starts = {axis[0]: place for place, axis in enumerate(layout.source) if axis}
    perm, left = [], list(reversed(flat(layout.target)))
    while left:
        place = starts.get(left[-1])
        if place is None or any(not left or left.pop() != leaf for leaf in layout.source[place]):
            return None
        perm.append(place)
    return (*perm, *(place for place, axis in enumerate(layout.source) if not axis))


def _block(layout: Layout, modes: Sequence[str]) -> Step | None:
    for one, op_type in ((layout, "DepthToSpace"), (layout.inverse, "SpaceToDepth")):
        if len(one.source) != 4 or len(one.target) != 4 or one.source[0] != one.target[0]:
            continue
        deep, (high, wide), (h, w) = one.source[1], one.source[2:], one.target[2:]
        r = h[-1:] + w[-1:]
        if (h, w) != (high + r[:1], wide + r[1:]) or one.sizes[r[0]] != one.sizes[r[1]]:
            continue
        size, shallow = one.sizes[r[0]], one.target[1]
        if isinstance(size, int) and deep == r + shallow and "DCR" in modes:
            return Step(op_type, (size,), "DCR")
        if isinstance(size, int) and deep == shallow + r and "CRD" in modes and one is layout:
            return Step(op_type, (size,), "CRD")
    return None


def _view(source: Shape, target: Shape) -> list[Step] | None:
    """What changes the shape alone: nothing, Unsqueeze, Squeeze, or a Reshape."""
    if source == target:
        return []
    for op_type, small, large in (("Unsqueeze", source, target), ("Squeeze", target, source)):
        if (axes := _ones_between(small, large)) is not None:
            return [Step(op_type, axes)]
    shape = written(target, source)
    return None if shape is None else [Step("Reshape", tuple(shape))]


def _ones_between(small: Shape, large: Shape) -> tuple[int, ...] | None:
    """Where sizes of 1 stand in the larger shape that the smaller one does not have."""
    axes, left = [], list(reversed(small))
    for axis, size in enumerate(large):
        if left and left[-1] == size:
            left.pop()
        elif size == 1:
            axes.append(axis)
        else:
            return None
    return None if left else tuple(axes)


def written(target: Sequence[Dim], source: Shape) -> list[int] | None:
    """A Reshape's shape in numbers: 0 for the input's size on the same axis, -1 for one that is left over.

    None where there is no such list, or where a -1 would stand beside a size that may be 0 at run time.
    """
    sizes = [
        s if isinstance(s, int) else 0 if source[i : i + 1] == (s,) else -1 for i, s in enumerate(target)
    ]
    return None if sizes.count(-1) > 1 or (-1 in sizes and 0 in sizes) else sizes


def layout_of(node: ir.Node | None, dims: Dims) -> Layout | None:
    """What a node does, if it only changes the layout of its first input, which is not known to be empty."""
    if node is None or node.domain or node.op_type not in LAYOUT_OPS or has_reference(node):
        return None
    source = dims.of(node.inputs[0])
    if source is None or 0 in source or (node.op_type in _TRIVIAL and not _is_trivial(node, source, dims)):
        return None
    if node.op_type == "Transpose":
        perm = ints_attr(node, "perm") or tuple(reversed(range(len(source))))
        return Layout.identity(source).transposed(perm) if len(perm) == len(source) else None
    target = dims.of(node.outputs[0])
    return None if target is None else layout_between(source, target)


def _is_trivial(node: ir.Node, source: Shape, dims: Dims) -> bool:
    """Whether all axes that a Gather or Reduce goes along have size 1; a Gather takes the element once."""
    if node.op_type == "Gather":
        axes: list[int] | None = [int_attr(node, "axis", 0)]
        index = constant_array(node.inputs[1], 64)
        if index is None or index.size != 1 or int(index.flat[0]) not in (0, -1):
            return False
    else:
        axes = dims.ints(node, "axes", 1)
    return bool(axes) and all(source[axis : axis + 1 or None] == (1,) for axis in axes or ())


def weight_of(node: ir.Node) -> int:
    """The weight that a step for this node would have."""
    return 1 if node.op_type in _VIEWS else 2


def cost(steps: Sequence[Step]) -> tuple[int, int]:
    """How many ops; and their weights."""
    return len(steps), sum(step.weight for step in steps)


def apply_steps(steps: Iterable[Step], array: np.ndarray) -> np.ndarray:
    """The same to a constant."""
    for step in steps:
        if step.op_type == "Transpose":
            array = array.transpose(step.numbers)
        elif step.op_type == "Reshape":
            array = array.reshape(
                [array.shape[i] if size == 0 else size for i, size in enumerate(step.numbers)]
            )
        else:
            change = np.squeeze if step.op_type == "Squeeze" else np.expand_dims
            array = np.asarray(change(array, step.numbers))
    return np.asarray(array, order="C")


def take(edit: Edit, value: ir.Value, steps: Sequence[Step], opset: int) -> ir.Value:
    """New nodes that change the layout of a value; what comes out."""
    for step in steps:
        if step.op_type == "Transpose":
            value = edit.op("Transpose", (value,), {"perm": step.numbers})
        elif step.op_type == "Reshape":
            value = edit.op("Reshape", (value, edit.constant(np.array(step.numbers, np.int64), "shape")))
        elif step.op_type in ("DepthToSpace", "SpaceToDepth"):
            mode = {"mode": step.mode} if step.mode == "CRD" else {}
            value = edit.op(step.op_type, (value,), {"blocksize": step.numbers[0], **mode})
        else:
            value = with_axes(edit, step.op_type, value, step.numbers, opset)
    return value
