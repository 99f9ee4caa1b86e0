"""Write shapes that are worked out from other shapes as constants, and drop what keeps its input's shape.

Before: y = Reshape(x, Concat(Gather(Shape(x), 0), [4, 16]))    with float[N, 64] x
After:  y = Reshape(x, [0, 4, 16])
Before: y = Expand(x, Shape(z)), Slice(x, [0], Gather(Shape(z), [0])), Tile(x, ...) or Reshape(x, ...)
After:  y = x       where the sizes of both are the same
Before: s = Cast(Slice(Cast(Shape(x)), 2, 3))
After:  s = Slice(Shape(x), 2, 3), or Shape[start=2, end=3](x) from opset 15 on
Declines: a size that is neither a number nor that of the same axis of the input; two of them in a Reshape,
    where one can be -1, or one beside a size that may be 0 when the model runs.

Sizes are compared as polynomials in the names of the graph inputs' sizes, each of which is one number
wherever it occurs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from onnxopt.claims import Pass
from onnxopt.evaluation import DimsOf
from onnxopt.graph import constant_of, has_reference, int_attr
from onnxopt.passes.shared.chain import freed_by
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["FoldShapes"]

_INTEGERS = (ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL)
_MOVERS = (
    *(
        "Add",
        "Cast",
        "Concat",
        "Div",
        "Equal",
        "Expand",
        "Gather",
        "Mul",
        "Reshape",
        "Shape",
        "Size",
        "Slice",
    ),
    *("Squeeze", "Sub", "Unsqueeze", "Where"),
)
_DEEPEST = 8
_OPEN = "the shape has a size that is neither a number nor one of the input"


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Replace shape arithmetic by constants, by following sizes that have names."""

    name = "fold-shapes"
    example: ClassVar[str] = """agraph (float[N, 64] x) => (float[N, 4, 16] y)
      <int64[1] zero = {0}, int64[2] heads = {4, 16}> {
        shape = Shape (x)
        batch = Gather (shape, zero)
        target = Concat <axis = 0> (batch, heads)
        y = Reshape (x, target)
      }"""

    def rules(self) -> Sequence[Rule]:
        dims_of = DimsOf()
        keeps = functools.partial(_keeps, dims_of)
        return (
            Rule("keeps its input's shape", ("Expand", "Reshape", "Slice", "Tile"), keeps),
            Rule("Reshape to a computed shape", ("Reshape",), functools.partial(_reshape, dims_of)),
            Rule("Expand to a computed shape", ("Expand",), functools.partial(_expand, dims_of)),
            Rule("known integers", _MOVERS, functools.partial(_known, dims_of)),
            Rule("sizes on the way from a Shape", _MOVERS, functools.partial(_sizes, dims_of)),
        )


def _keeps(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    """What only moves elements, in order, and gives as many, gives the same."""
    source, dims = node.inputs[0], dims_of(scope)
    if source is None or has_reference(node):
        return None
    shape = dims.of(node.outputs[0])
    if shape is None or shape != dims.of(source):
        return None
    if node.op_type == "Slice" and scope.opset >= 10 and set(dims.ints(node, "steps", 4) or (1,)) != {1}:
        return None
    return Edit(node, scope).replace(node.outputs[0], source)


def _reshape(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    if len(node.inputs) < 2 or constant_of(node.inputs[1]) is not None or has_reference(node):
        return None
    dims = dims_of(scope)
    source, target = dims.of(node.inputs[0]) or (), dims.integers(node, "shape", 1)
    if target is None:
        return None
    if 0 in target and int_attr(node, "allowzero", 0):
        raise Declined("a size is 0, and means it")
    sizes = [
        s if isinstance(s, int) else 0 if source[i : i + 1] == (s,) else -1 for i, s in enumerate(target)
    ]
    if sizes.count(-1) > 1:
        raise Declined(_OPEN)
    if -1 in sizes and -1 not in target and 0 in sizes:
        raise Declined("a size beside the one that would have to be -1 may be 0")
    edit = Edit(node, scope)
    shape = edit.constant(np.array(sizes, np.int64), "shape")
    return edit.replace(node.outputs[0], edit.op("Reshape", (node.inputs[0], shape)))


def _expand(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    """A 1 in the shape keeps the size of the input."""
    if constant_of(node.inputs[1]) is not None:
        return None
    dims = dims_of(scope)
    source, target = dims.of(node.inputs[0]), dims.integers(node, "shape", 1)
    if target is None or source is None:
        return None
    own = dict(zip(range(len(target))[::-1], source[::-1], strict=False))
    sizes = [s if isinstance(s, int) else 1 if s == own.get(axis) else -1 for axis, s in enumerate(target)]
    if -1 in sizes:
        raise Declined(_OPEN)
    edit = Edit(node, scope)
    shape = edit.constant(np.array(sizes, np.int64), "shape")
    return edit.replace(node.outputs[0], edit.op("Expand", (node.inputs[0], shape)))


def _known(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    output = node.outputs[0]
    if output.dtype not in _INTEGERS or output.is_graph_output():
        return None
    elements = dims_of(scope).elements(output)
    if elements is None or not all(isinstance(element, int) for element in elements.flat):
        return None
    edit = Edit(node, scope)
    return edit.replace(output, edit.constant(elements.astype(output.dtype.numpy()), output.name))


def _sizes(dims_of: DimsOf, node: ir.Node, scope: Scope) -> Edit | None:
    """Integers that are sizes of a value one after the other, by a shorter way from its Shape."""
    output, dims = node.outputs[0], dims_of(scope)
    if output.dtype != ir.DataType.INT64 or node.op_type in ("Shape", "Size"):
        return None
    elements = dims.elements(output)
    source = _shape_above(node) if elements is not None and elements.ndim == 1 and elements.size else None
    shape = None if source is None else dims.of(source.inputs[0])
    if source is None or shape is None or elements is None:
        return None
    starts = [i for i in range(len(shape)) if shape[i : i + elements.size] == tuple(elements)]
    direct = scope.opset >= 15
    whole = not direct and starts[:1] == [0] and elements.size == len(shape)
    if not starts or freed_by(node, source.inputs[:1] if direct else source.outputs) <= (not whole):
        return None
    edit, ends = Edit(node, scope), (starts[0], starts[0] + elements.size)
    if direct:
        value = edit.op("Shape", source.inputs[:1], dict(zip(("start", "end"), ends, strict=True)))
    elif whole:
        value = source.outputs[0]
    elif scope.opset >= 10:
        given = [
            edit.constant(np.array([end], np.int64), name)
            for end, name in zip(ends, ("starts", "ends"), strict=True)
        ]
        value = edit.op("Slice", (source.outputs[0], *given))
    else:
        return None
    return edit.replace(output, value)


def _shape_above(node: ir.Node) -> ir.Node | None:
    """The Shape that this comes from, by way of the first computed inputs."""
    for _ in range(_DEEPEST):
        makers = [
            maker for value in node.inputs if value is not None and (maker := value.producer()) is not None
        ]
        makers = [maker for maker in makers if maker.op_type != "Constant"]
        if not makers or makers[0].op_type == "Shape":
            return makers[0] if makers and not makers[0].domain and not makers[0].attributes else None
        node = makers[0]
    return None
