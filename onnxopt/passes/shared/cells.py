"""Gates of recurrent cells: sums of products of inputs and constant matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_array, float_attr, has_reference, int_attr, ints_attr

__all__ = ["Linear", "columns_of", "linear"]

_DEEP = 12
"""Nodes in a row that a sum may have."""


@dataclass(frozen=True)
class Linear:
    """A sum of products, in float64: of inputs with matrices `[inputs, outputs]`, and a bias `[outputs]`."""

    products: Mapping[ir.Value, np.ndarray]
    bias: np.ndarray
    nodes: tuple[ir.Node, ...] = ()

    def __add__(self, other: Linear) -> Linear:
        both = dict(self.products)
        for value, matrix in other.products.items():
            both[value] = both[value] + matrix if value in both else matrix
        return Linear(both, self.bias + other.bias, self.nodes + other.nodes)


def columns_of(value: ir.Value | None) -> int | None:
    """How many columns a matrix has; None where it may be none, or that is unknown."""
    if value is None or value.shape is None or len(value.shape) != 2:
        return None
    size = value.shape.dims[1]
    return size if isinstance(size, int) else None


def linear(value: ir.Value | None, deep: int = _DEEP) -> Linear | None:
    """The value, a matrix, as a sum of products; None where it is none."""
    node = value.producer() if value is not None else None
    if value is None or node is None or node.domain or not deep or has_reference(node):
        return None
    if node.op_type == "Split":
        whole = linear(node.inputs[0], deep - 1)
        section = _section(value, node, len(whole.bias)) if whole is not None else None
        if whole is None or section is None:
            return None
        parts = {source: matrix[:, section] for source, matrix in whole.products.items()}
        return Linear(parts, whole.bias[section], (*whole.nodes, node))
    if node.op_type == "Add":
        found = [linear(one, deep - 1) or _row(one) for one in node.inputs]
    elif node.op_type in ("Gemm", "MatMul"):
        found = [_product(node), *(linear(one, deep - 1) or _row(one) for one in node.inputs[2:] if one)]
    else:
        return None
    parts_of = [part for part in found if part is not None]
    widths = {len(part.bias) for part in parts_of}
    if len(parts_of) < len(found) or len(widths) > 1:
        return None
    return sum(parts_of, Linear({}, np.zeros(widths.pop()), (node,)))


def _section(value: ir.Value, node: ir.Node, width: int) -> slice | None:
    """Which of `width` columns a Split gives as `value`."""
    if int_attr(node, "axis", 0) not in (1, -1):
        return None
    given = constant_array(node.inputs[1], 4096) if len(node.inputs) > 1 else None
    sizes = ints_attr(node, "split") if given is None else given.tolist()
    if sizes is None and len(node.inputs) < 2 and width % len(node.outputs) == 0:
        sizes = [width // len(node.outputs)] * len(node.outputs)
    if sizes is None:
        return None
    start = sum(sizes[: value.index()])
    return slice(start, start + sizes[value.index() or 0])


def _row(value: ir.Value | None) -> Linear | None:
    """A constant row."""
    array = constant_array(value, 1 << 16)
    if (
        array is None
        or array.dtype.kind != "f"
        or array.ndim not in (1, 2)
        or array.shape[:-1] not in ((), (1,))
    ):
        return None
    return Linear({}, array.reshape(-1).astype(np.float64))


def _product(node: ir.Node) -> Linear | None:
    scaled = any(float_attr(node, name, 1.0) != 1 for name in ("alpha", "beta"))
    matrix = constant_array(node.inputs[1]) if not scaled and not int_attr(node, "transA", 0) else None
    if matrix is None or matrix.dtype.kind != "f" or matrix.ndim != 2:
        return None
    matrix = (matrix.T if int_attr(node, "transB", 0) else matrix).astype(np.float64)
    nodes, start = list[ir.Node](), 0
    result = Linear({}, np.zeros(matrix.shape[1]))
    for value in _joined(node.inputs[0], nodes):
        size = columns_of(value)
        if value is None or size is None:
            return None
        result += Linear({value: matrix[start : start + size]}, np.zeros(matrix.shape[1]))
        start += size
    return result + Linear({}, np.zeros(matrix.shape[1]), tuple(nodes))


def _joined(value: ir.Value | None, nodes: list[ir.Node]) -> Iterator[ir.Value | None]:
    """What Concats join side by side in a value, or the value itself; the Concats go to `nodes`."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Concat" or node.domain or int_attr(node, "axis", 1) not in (1, -1):
        yield value
        return
    nodes.append(node)
    for inner in node.inputs:
        yield from _joined(inner, nodes)
