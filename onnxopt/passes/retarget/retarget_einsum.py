"""Write an Einsum of one or two inputs as MatMul, Mul or ReduceSum with few changes of layout.

Before: y = Einsum["bhid,bhjd->bhij"](a, b)
After:  y = MatMul(a, Transpose[perm=(0, 1, 3, 2)](b))
Before: y = Einsum["ij->ji"](a); z = Einsum["bsd,dhk->bshk"](a, w)
After:  y = Transpose(a); z = Reshape(MatMul(a, w'), [0, 0, h, k])
Declines: more than two inputs, an index that one input repeats, sizes of an index that are not surely the
    same, an index of one input alone that is summed next to another input, more than `most` nodes.

The indices of two inputs are those of both and the result (batch), of both alone (summed, K), of the first
and the result (M), and of the second and the result (N): with the axes in that order and those of each kind
joined, [batch, M, K] times [batch, K, N] is [batch, M, N]. Constants are rearranged at no cost.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from onnxopt.claims import Kind, Pass
from onnxopt.evaluation import Dim, Dims, DimsOf, product
from onnxopt.graph import constant_of, has_reference, str_attr
from onnxopt.passes.shared.forms import with_axes
from onnxopt.passes.shared.layout import Layout
from onnxopt.passes.shared.steps import Step, apply_steps, steps_for, take
from onnxopt.rewrite import Declined, Edit, Rule
from onnxopt.scope import Scope

__all__ = ["RetargetEinsum"]


@dataclass(frozen=True)
class RetargetEinsum(Pass):
    """Replace an Einsum by the ops it stands for.

    most: nodes that may take the place of one.
    """

    name = "retarget-einsum"
    kind: ClassVar[Kind] = "reorder"
    example: ClassVar[str] = """agraph (float[2, 4, 5, 8] a, float[2, 4, 6, 8] b) => (float[2, 4, 5, 6] y) {
        y = Einsum <equation = "bhid,bhjd->bhij"> (a, b)
      }"""

    most: int = 3

    def rules(self) -> Sequence[Rule]:
        return (Rule("Einsum", ("Einsum",), functools.partial(_einsum, DimsOf(), self.most)),)


@dataclass(frozen=True)
class _Way:
    """One op on inputs in another layout, and the layout that its result has to be brought into."""

    op_type: str
    order: tuple[int, ...]
    """Which input comes first."""
    inputs: tuple[Layout, ...]
    output: Layout
    axes: tuple[int, ...] = ()


def _einsum(dims_of: DimsOf, most: int, node: ir.Node, scope: Scope) -> Edit | None:
    if has_reference(node):
        return None
    values = [value for value in node.inputs if value is not None]
    terms, result, sizes = _indices(str_attr(node, "equation", ""), values, dims_of(scope))
    found: list[tuple[int, _Way, list[list[Step]], list[Step]]] = []
    for way in _ways(terms, result, sizes):
        changes = [steps_for(layout) for layout in way.inputs]
        last, known = steps_for(way.output), [steps for steps in changes if steps is not None]
        if last is not None and len(known) == len(changes):
            free = [constant_of(values[index]) is not None for index in way.order]
            count = sum(len(steps) for steps, one in zip(known, free, strict=True) if not one)
            found.append((count + bool(way.op_type) + len(last), way, known, last))
    best = min(found, key=lambda one: one[0], default=None)
    if best is None or best[0] > most:
        raise Declined("it takes more nodes than are allowed")
    return _made(node, scope, values, best[1], best[2], best[3])


def _made(
    node: ir.Node,
    scope: Scope,
    values: list[ir.Value],
    way: _Way,
    changes: list[list[Step]],
    last: list[Step],
) -> Edit:
    edit, inputs = Edit(node, scope), list[ir.Value]()
    for index, steps in zip(way.order, changes, strict=True):
        tensor = constant_of(values[index])
        if tensor is not None and steps:
            inputs.append(edit.constant(apply_steps(steps, tensor.numpy()), values[index].name))
        else:
            inputs.append(take(edit, values[index], steps, scope.opset))
    value = inputs[0]
    if way.op_type == "ReduceSum":
        value = with_axes(edit, "ReduceSum", value, way.axes, scope.opset, {"keepdims": 0})
    elif way.op_type:
        value = edit.op(way.op_type, inputs)
    return edit.replace(node.outputs[0], take(edit, value, last, scope.opset))


def _indices(equation: str, values: Sequence[ir.Value], dims: Dims) -> tuple[list[str], str, dict[str, Dim]]:
    """The indices of each input and of the result, one letter an axis, and their sizes."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    terms, sizes = left.split(","), dict[str, Dim]()
    if not arrow:
        result = "".join(sorted(letter for letter in set(left) - set(",.") if left.count(letter) == 1))
    if len(terms) != len(values) or len(terms) > 2 or "." in equation:
        raise Declined("more than two inputs, or axes that are not named")
    for term, value in zip(terms, values, strict=True):
        shape = dims.of(value)
        if shape is None or len(set(term)) < len(term) or len(term) != len(shape):
            raise Declined("an index is repeated in one input, or its shape is not known")
        for letter, size in zip(term, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                raise Declined("the sizes of an index are not surely the same")
    return terms, result, sizes


def _ways(terms: list[str], result: str, sizes: dict[str, Dim]) -> Iterator[_Way]:
    if len(terms) == 1:
        (term,) = terms
        kept = "".join(letter for letter in term if letter in result)
        axes = tuple(axis for axis, letter in enumerate(term) if letter not in result)
        whole = _arranged(term, [*term], sizes)
        output = _arranged(kept, [*result], sizes)
        if whole is not None and output is not None:
            yield _Way("ReduceSum" if axes else "", (0,), (whole,), output, axes)
        return
    for order in ((0, 1), (1, 0)):
        a, b = (terms[index] for index in order)
        both = [letter for letter in a if letter in b]
        batch, summed = [c for c in both if c in result], [c for c in both if c not in result]
        rows, columns = ([c for c in own if c not in both] for own in (a, b))
        if not {*rows, *columns} <= set(result):
            raise Declined("an index of one input alone is summed")
        m, k, n = "".join(rows), "".join(summed), "".join(columns)
        if not summed:
            parts = tuple(_arranged(own, _broadcast(own, result), sizes) for own in (a, b))
            yield from _way("Mul", order, parts, _arranged(result, [*result], sizes))
            return
        groups = [([*batch, m, k], [*batch, k, n], [*batch, m, n])]
        if not batch:
            groups.append(([*rows, k], [k, n], [*rows, n]))
        for left, right, product_ in groups:
            made = "".join(product_)
            inverse = _arranged(result, product_, sizes) if set(made) == set(result) else None
            parts = _arranged(a, left, sizes), _arranged(b, right, sizes)
            yield from _way("MatMul", order, parts, None if inverse is None else inverse.inverse)


def _broadcast(term: str, result: str) -> list[str]:
    """One axis for each of the result, from the first one on that the input has."""
    first = next((place for place, letter in enumerate(result) if letter in term), len(result))
    return [letter if letter in term else "" for letter in result[first:]]


def _way(
    op: str, order: tuple[int, ...], parts: tuple[Layout | None, ...], output: Layout | None
) -> Iterator[_Way]:
    known = tuple(part for part in parts if part is not None)
    if output is not None and len(known) == len(parts):
        yield _Way(op, order, known, output)


def _arranged(term: str, groups: Sequence[str], sizes: dict[str, Dim]) -> Layout | None:
    """From one axis a letter to one axis a group of letters; an empty group is an axis of size 1."""
    letters = "".join(groups)
    if 0 in [sizes[letter] for letter in term]:
        return None
    moved = Layout.identity(tuple(sizes[c] for c in term)).transposed(
        [term.index(letter) for letter in letters]
    )
    return moved.reshaped(tuple(product(sizes[letter] for letter in group) for group in groups))
