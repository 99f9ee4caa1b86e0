"""How the operators that only move elements relate the axes they read and write."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import onnx_ir as ir

from onnxopt.evaluation import Dim
from onnxopt.graph import constant_of, int_attr, ints_attr, str_attr
from onnxopt.pruning.elements import Elements, Ids

__all__ = ["MOVEMENT", "Rule", "UnrelatedError", "align", "axes_of", "output_axes", "reshape_target"]

Rule = Callable[[Elements, ir.Node], None]


class UnrelatedError(Exception):
    """Nothing can be said of a node's axes: they all stay."""


def axes_of(e: Elements, value: ir.Value | None) -> list[Ids]:
    """The axes of a value; raises `UnrelatedError` where their number is not known."""
    axes = e.axes(value)
    if axes is None:
        raise UnrelatedError("the number of axes is not known")
    return axes


def output_axes(e: Elements, node: ir.Node, index: int = 0) -> list[Ids]:
    """The axes of an output."""
    return axes_of(e, node.outputs[index])


def align(e: Elements, source: Sequence[Ids], target: Sequence[Ids]) -> None:
    """Axes are the same from the last one on, but for those that are repeated."""
    for a, b in zip(reversed(source), reversed(target), strict=False):
        if a is None or len(a) != 1:
            e.same(a, b)


def _source(e: Elements, node: ir.Node) -> list[Ids]:
    return axes_of(e, node.inputs[0])


def _transpose(e: Elements, node: ir.Node) -> None:
    source, target = _source(e, node), output_axes(e, node)
    for axis, ids in zip(ints_attr(node, "perm") or reversed(range(len(source))), target, strict=True):
        e.same(source[axis], ids)


def _squeeze(e: Elements, node: ir.Node) -> None:
    """Axes of one element come or go: Squeeze and Unsqueeze."""
    fewer, more = _source(e, node), output_axes(e, node)
    if node.op_type == "Squeeze":
        fewer, more = more, fewer
    axes = e.dims.ints(node, "axes", 1)
    if axes is None:
        raise UnrelatedError("the axes are not known")
    if not axes:
        axes = [axis for axis, ids in enumerate(more) if ids is not None and len(ids) == 1]
    gone = {axis % len(more) for axis in axes}
    left = [ids for axis, ids in enumerate(more) if axis not in gone]
    if len(left) != len(fewer):
        raise UnrelatedError("the axes are not known")
    for a, b in zip(fewer, left, strict=True):
        e.same(a, b)


def _reshape(e: Elements, node: ir.Node) -> None:
    if node.op_type == "Reshape" and e.opset < 9 and reshape_target(e, node) is None:
        raise UnrelatedError("a shape is computed at run time")
    _regroup(e, _source(e, node), output_axes(e, node), _dims(e, node.inputs[0]), _dims(e, node.outputs[0]))


def _dims(e: Elements, value: ir.Value | None) -> Sequence[Dim]:
    dims = e.dims.of(value)
    assert dims is not None  # its axes are known
    return dims


def reshape_target(e: Elements, node: ir.Node) -> list[int] | None:
    """The target of a Reshape with numbers only: 0 for an axis that stays, -1 for one that is not known."""
    if constant_of(node.inputs[1]) is not None:
        found = e.dims.ints(node, "shape", 1)
        return None if found is None or (0 in found and int_attr(node, "allowzero", 0)) else found
    sizes, source = e.dims.of(node.outputs[0]), e.dims.of(node.inputs[0])
    if sizes is None or source is None:
        return None
    target = [
        size if isinstance(size, int) else 0 if axis < len(source) and source[axis] == size else -1
        for axis, size in enumerate(sizes)
    ]
    return target if target.count(-1) < 2 and int_attr(node, "allowzero", 0) == 0 else None


def _regroup(
    e: Elements, source: Sequence[Ids], target: Sequence[Ids], from_: Sequence[Dim], to: Sequence[Dim]
) -> None:
    """Relate the axes of the same elements in two shapes: blocks of equal products, from both ends."""
    a = [(ids, size) for ids, size in zip(source, from_, strict=True) if size != 1]
    b = [(ids, size) for ids, size in zip(target, to, strict=True) if size != 1]
    for step in (1, -1):
        while taken := _block(*([size for _, size in side[::step]] for side in (a, b))):
            parts = []
            for side, count in zip((a, b), taken, strict=True):
                part = slice(count) if step == 1 else slice(len(side) - count, None)
                parts.append([ids for ids, _ in side[part]])
                del side[part]
            _relate_block(e, *parts)
    e.pin("are mixed with axes of unknown size", *(ids for ids, _ in (*a, *b)))


def _block(a: Sequence[Dim], b: Sequence[Dim]) -> tuple[int, int] | None:
    """How many of the first sizes of each have the same product, as few as can be; None where unknown."""
    if not a or not b:
        return None
    i, j, left, right = 1, 1, a[0], b[0]
    if left == right:
        return 1, 1
    while isinstance(left, int) and isinstance(right, int) and left != right:
        if left < right:
            if i == len(a):
                return None
            left, i = left * a[i], i + 1
        else:
            if j == len(b):
                return None
            right, j = right * b[j], j + 1
    return (i, j) if isinstance(left, int) and left == right else None


def _relate_block(e: Elements, a: list[Ids], b: list[Ids]) -> None:
    """Axes of the same elements: split into common factors, if there are any."""
    if len(a) == len(b) == 1:
        return e.same(a[0], b[0])
    if any(ids is None for ids in (*a, *b)):
        return e.pin("the size of an axis is not known", *a, *b)
    sizes = [[len(ids) for ids in side if ids is not None] for side in (a, b)]
    marks = sorted({math.prod(side[n:]) for side in sizes for n in range(len(side) + 1)})
    if any(more % less for less, more in itertools.pairwise(marks)):
        return e.pin("are laid out anew", *a, *b)
    factors: dict[int, Ids] = {}  # by the product of those behind them
    whole: list[tuple[Ids, list[int]]] = []
    for ids, behind, upto in _spans(a, b, sizes):
        between = [mark for mark in reversed(marks) if behind <= mark < upto]
        if len(between) == 1 and behind not in factors:
            factors[behind] = ids
        else:
            whole.append((ids, between))
    for low, high in itertools.pairwise(marks):
        factors.setdefault(low, e.numbered(high // low))
    for ids, between in whole:
        e.product(ids, [factors[mark] for mark in between], "are laid out with another axis")
    return None


def _spans(a: list[Ids], b: list[Ids], sizes: list[list[int]]) -> Iterator[tuple[Ids, int, int]]:
    """Of each axis of both sides, how many elements lie behind one of it, and behind all of it."""
    for side, lengths in zip((a, b), sizes, strict=True):
        for n, ids in enumerate(side):
            yield ids, math.prod(lengths[n + 1 :]), math.prod(lengths[n:])


def _depth_to_space(e: Elements, node: ir.Node) -> None:
    """Blocks of places: depth is (block, block, channels) or, in CRD mode, (channels, block, block)."""
    source, target = _source(e, node), output_axes(e, node)
    e.same(source[0], target[0])
    e.pin("are places", *source[2:], *target[2:])
    deep, flat = (source[1], target[1]) if node.op_type == "DepthToSpace" else (target[1], source[1])
    block = e.numbered(int_attr(node, "blocksize", 1) ** 2)
    e.pin("are places", block)
    crd = str_attr(node, "mode", "DCR") == "CRD" and node.op_type == "DepthToSpace"
    e.product(deep, (flat, block) if crd else (block, flat), "are laid out with places")


def _concat(e: Elements, node: ir.Node) -> None:
    target = output_axes(e, node)
    sources = [axes_of(e, value) for value in node.inputs]
    along = int_attr(node, "axis", 1) % len(target)
    for source in sources:
        for axis, (a, b) in enumerate(zip(source, target, strict=True)):
            if axis != along:
                e.same(a, b)
    parts = [source[along] for source in sources]
    whole = [part for part in parts if part is not None]
    e.same(np.concatenate(whole) if len(whole) == len(parts) else None, target[along])
    if len(whole) < len(parts):
        e.pin("the size of an axis is not known", *whole)


def _split(e: Elements, node: ir.Node) -> None:
    source = _source(e, node)
    along, first = int_attr(node, "axis", 0) % len(source), 0
    for index in range(len(node.outputs)):
        target = output_axes(e, node, index)
        for axis, ids in enumerate(target):
            if axis != along:
                e.same(source[axis], ids)
        whole, part = source[along], target[along]
        if whole is None or part is None:
            e.pin("the size of an axis is not known", whole, part)
        else:
            e.same(whole[first : first + len(part)], part)
            first += len(part)


def _slice(e: Elements, node: ir.Node) -> None:
    source, target = _source(e, node), output_axes(e, node)
    names = ("starts", "ends", "axes", "steps")
    starts, ends, axes, steps = (e.dims.ints(node, name, n) for n, name in enumerate(names, 1))
    if axes is None:
        raise UnrelatedError("the axes are not known")
    order = axes or range(len(starts)) if starts is not None else axes or range(len(source))
    cut = {axis % len(source): n for n, axis in enumerate(order)}
    for axis, (a, b) in enumerate(zip(source, target, strict=True)):
        n = cut.get(axis)
        if n is None:
            e.same(a, b)
        elif starts is None or ends is None or steps is None or (steps and steps[n] != 1):
            e.pin("a Slice takes some of them in steps, or is computed at run time", a, b)
        else:
            e.same(None if a is None else a[starts[n] : ends[n]], b)


def _gather(e: Elements, node: ir.Node) -> None:
    source, target = _source(e, node), output_axes(e, node)
    indices, along = axes_of(e, node.inputs[1]), int_attr(node, "axis", 0) % len(source)
    for a, b in zip(source[:along], target[:along], strict=True):
        e.same(a, b)
    for a, b in zip(source[along + 1 :], target[along + len(indices) :], strict=True):
        e.same(a, b)
    tensor, ids = constant_of(node.inputs[1]), source[along]
    if tensor is None or ids is None:
        e.pin("are looked up", ids, *target[along : along + len(indices)], *indices)
        return
    chosen = ids[tensor.numpy()]
    if len(indices) == 1:
        e.same(chosen, target[along])
        e.same(chosen, indices[0])
    else:
        e.pin("are looked up", chosen.ravel(), *target[along : along + len(indices)], *indices)


def _pad(e: Elements, node: ir.Node) -> None:
    source, target = _source(e, node), output_axes(e, node)
    pads, axes = e.dims.ints(node, "pads", 1), e.dims.ints(node, "axes", 3)
    if pads is None or axes is None:
        raise UnrelatedError("a Pad is computed at run time")
    order = [axis % len(source) for axis in axes] or list(range(len(source)))
    edges = dict(zip(order, zip(pads[: len(order)], pads[len(order) :], strict=True), strict=True))
    for axis, (a, b) in enumerate(zip(source, target, strict=True)):
        before, after = edges.get(axis, (0, 0))
        of_constants = min(before, after) >= 0 and str_attr(node, "mode", "constant") == "constant"
        if before == after == 0:
            e.same(a, b)
        elif a is not None and b is not None and of_constants:
            e.same(a, b[before : before + len(a)])
        else:
            e.pin("are padded", a, b)


def _tile(e: Elements, node: ir.Node) -> None:
    for a, b in zip(_source(e, node), output_axes(e, node), strict=True):
        if a is None or b is None:
            e.pin("the size of an axis is not known", a, b)
        else:
            e.same(np.tile(a, len(b) // max(len(a), 1)), b)


def _resize(e: Elements, node: ir.Node) -> None:
    if str_attr(node, "coordinate_transformation_mode", "") == "tf_crop_and_resize":
        raise UnrelatedError("is cropped and resized")
    sizes = node.inputs[3] if len(node.inputs) > 3 else None
    fixed = sizes is None or constant_of(sizes) is not None
    for a, b in zip(_source(e, node), output_axes(e, node), strict=True):
        if fixed and a is not None and b is not None and len(a) == len(b):
            e.same(a, b)
        else:
            e.pin("are resized", a, b)


MOVEMENT: dict[str, Rule] = {
    **dict.fromkeys(("Reshape", "Flatten"), _reshape),
    **dict.fromkeys(("Squeeze", "Unsqueeze"), _squeeze),
    **dict.fromkeys(("DepthToSpace", "SpaceToDepth"), _depth_to_space),
    **dict.fromkeys(("Resize", "Upsample"), _resize),
    "Concat": _concat,
    "Gather": _gather,
    "Pad": _pad,
    "Slice": _slice,
    "Split": _split,
    "Tile": _tile,
    "Transpose": _transpose,
}
