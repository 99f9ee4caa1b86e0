"""Remove nodes whose attributes and constants make them hand their input on unchanged.

Before: y = Transpose<perm = [0, 1, 2]>(x); z = Mul(y, 1); w = Relu(z)
After:  w = Relu(x)
Declines: the constant is a graph input (overridable); the output is a graph output that could not
    keep its name.

Shape and type stay for every input the model takes: a constant that would enlarge the result by
broadcasting leaves the node in place, and an unknown size is taken for a different one. One bit can
change: x + 0 turns -0.0 into +0.0, which compares equal; without it -0.0 stays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.graph import constant_array, has_reference, int_attr, ints_attr, str_attr
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["EliminateNoop"]

_LARGEST = 1 << 16
"""Bytes of a constant that is read to decide."""
_TO_THE_END = 2**31 - 1
"""A Slice that ends here or later takes all of an axis of unknown size, by the ONNX text."""
_NEUTRAL = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1, "And": True, "Or": False}
_COMMUTES = ("Add", "Mul", "And", "Or")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)

Holds = Callable[[ir.Node, ir.Value], bool]
"""Whether a node hands this input of its on unchanged."""


@dataclass(frozen=True)
class EliminateNoop(Pass):
    """Let the readers of a node that changes nothing read its input."""

    name = "eliminate-noop"
    example = """
agraph (float[2, 3] x) => (float[2, 3] y) <float one = {1}> {
    a = Transpose<perm = [0, 1]>(x)
    b = Mul(a, one)
    y = Relu(b)
}
    """

    def rules(self) -> Sequence[Rule]:
        return tuple(_rule(*row) for row in _TABLE)


def _rule(name: str, op_types: tuple[str, ...], since: int, holds: Holds) -> Rule:
    def apply(node: ir.Node, scope: Scope) -> Edit | None:
        if scope.opset < since or has_reference(node):
            return None
        for index, kept in enumerate(node.inputs[: 2 if node.op_type in _COMMUTES else 1]):
            if kept is None or not holds(node, kept):
                continue
            if any(map(_is_overridable, (*node.inputs[:index], *node.inputs[index + 1 :]))):
                raise Declined("the constant is a graph input (overridable; --freeze-initializers fixes it)")
            return Edit(node, scope).replace(node.outputs[0], kept)
        return None

    return Rule(name, op_types, apply)


def _is_overridable(value: ir.Value | None) -> bool:
    return value is not None and value.is_initializer() and value.is_graph_input()


def _array(value: ir.Value | None) -> np.ndarray | None:
    """A small constant's elements; an overridable initializer's too, so that it is declined by name."""
    if value is None or not _is_overridable(value):
        return constant_array(value, _LARGEST)
    tensor = value.const_value
    if tensor is None or tensor.dtype == ir.DataType.STRING or tensor.nbytes > _LARGEST:
        return None
    return tensor.numpy()


def _ints(node: ir.Node, index: int, attribute: str) -> list[int] | None:
    """Integers that older opsets take as an attribute, newer ones as an input; [] where both are absent."""
    given = ints_attr(node, attribute)
    value = node.inputs[index] if index < len(node.inputs) else None
    if given is not None or value is None:
        return list(given or ())
    array = _array(value)
    return None if array is None else [int(number) for number in array.flat]


def _fits(sizes: Sequence[int], source: ir.Value) -> bool:
    """Whether broadcasting with these sizes leaves the shape of `source` as it is."""
    if not sizes:
        return True
    if source.shape is None or len(sizes) > len(source.shape):
        return False
    own = source.shape.dims[-len(sizes) :]
    return all(size in (1, known) for size, known in zip(sizes, own, strict=True))


def _neutral(node: ir.Node, source: ir.Value) -> bool:
    if node.op_type == "Pow" and source.dtype not in _FLOATS:  # computed in floating point, which rounds
        return False
    array = _array(node.inputs[1] if source is node.inputs[0] else node.inputs[0])
    return array is not None and _fits(array.shape, source) and bool((array == _NEUTRAL[node.op_type]).all())


def _cast(node: ir.Node, source: ir.Value) -> bool:
    return source.dtype is not None and source.dtype.value == int_attr(node, "to", 0)


def _cast_like(node: ir.Node, source: ir.Value) -> bool:
    like = node.inputs[1]
    return like is not None and source.dtype is not None and source.dtype == like.dtype


def _transpose(node: ir.Node, source: ir.Value) -> bool:
    perm = ints_attr(node, "perm")
    if perm is None:
        return source.shape is not None and len(source.shape) <= 1
    return perm == tuple(range(len(perm)))


def _reshape(node: ir.Node, source: ir.Value) -> bool:
    target = _ints(node, 1, "shape")
    if source.shape is None or target is None or len(target) != len(source.shape):
        return False
    copies = int_attr(node, "allowzero", 0) == 0
    left_over = target.count(-1) == 1 and 0 not in source.shape.dims
    return all(
        want == size or (want == 0 and copies) or (want == -1 and left_over)
        for want, size in zip(target, source.shape.dims, strict=True)
    )


def _expand(node: ir.Node, source: ir.Value) -> bool:
    sizes = _array(node.inputs[1])
    return sizes is not None and sizes.ndim == 1 and _fits([int(size) for size in sizes], source)


def _flatten(node: ir.Node, source: ir.Value) -> bool:
    return source.shape is not None and len(source.shape) == 2 and int_attr(node, "axis", 1) in (1, -1)


def _squeeze(node: ir.Node, source: ir.Value) -> bool:
    """Without axes, Squeeze removes every axis of size 1: nothing where there is none."""
    if source.shape is None or _ints(node, 1, "axes") != []:
        return False
    return all(isinstance(size, int) and size != 1 for size in source.shape.dims)


def _slice(node: ir.Node, source: ir.Value) -> bool:
    starts, ends = _ints(node, 1, "starts"), _ints(node, 2, "ends")
    axes, steps = _ints(node, 3, "axes"), _ints(node, 4, "steps")
    if starts is None or ends is None or axes is None or steps is None or any(step != 1 for step in steps):
        return False
    along, rank = axes or range(len(starts)), len(source.shape) if source.shape is not None else None
    if rank is not None and not all(-rank <= axis < rank for axis in along):
        return False
    for start, end, axis in zip(starts, ends, along, strict=True):
        size = source.shape[axis] if source.shape is not None else None
        known = size if isinstance(size, int) else None
        if start != 0 and (known is None or start > -known):
            return False
        if end < (_TO_THE_END if known is None else known):
            return False
    return True


def _resize(node: ir.Node, source: ir.Value) -> bool:
    """By scales of 1, or to the sizes that are there; a crop looks elsewhere, cubic weights may round."""
    crops = str_attr(node, "coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
    numbers = _array([value for value in node.inputs if value is not None][-1])
    if crops or str_attr(node, "mode", "nearest") == "cubic" or "axes" in node.attributes:
        return False
    if numbers is None or source.shape is None:
        return False
    wanted = list(source.shape.dims) if numbers.dtype == np.int64 else [1] * len(source.shape)
    return bool(numbers.tolist() == wanted)


_TABLE: tuple[tuple[str, tuple[str, ...], int, Holds], ...] = (
    # Since opset 7, broadcasting is no attribute; since 6, Cast's type is a number; since 2, Pad says pads.
    ("neutral constant", tuple(_NEUTRAL), 7, _neutral),
    ("Cast to its own type", ("Cast",), 6, _cast),
    ("Cast to its own type", ("CastLike",), 15, _cast_like),
    ("Transpose that keeps the order", ("Transpose",), 1, _transpose),
    ("Reshape to its own shape", ("Reshape",), 1, _reshape),
    ("Expand to its own shape", ("Expand",), 8, _expand),
    ("Flatten of a matrix", ("Flatten",), 1, _flatten),
    ("Squeeze of no axes", ("Squeeze",), 1, _squeeze),
    ("Unsqueeze of no axes", ("Unsqueeze",), 1, lambda node, _: _ints(node, 1, "axes") == []),
    ("Slice of everything", ("Slice",), 1, _slice),
    ("Pad by nothing", ("Pad",), 2, lambda node, _: set(_ints(node, 1, "pads") or (1,)) == {0}),
    ("Resize to the same size", ("Resize", "Upsample"), 9, _resize),
    ("Tile once", ("Tile",), 6, lambda node, _: set(_ints(node, 1, "repeats") or (0,)) == {1}),
    (
        "blocks of one",
        ("DepthToSpace", "SpaceToDepth"),
        1,
        lambda node, _: int_attr(node, "blocksize", 0) == 1,
    ),
    ("one input", ("Concat", "Sum", "Max", "Min", "Mean"), 1, lambda node, _: len(node.inputs) == 1),
    ("Split into one", ("Split",), 1, lambda node, _: len(node.outputs) == 1),
)
