"""The product of two matrices, as a Gemm or a MatMul, and what a Gemm takes in beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from onnxopt.graph import FLOATS, float_attr, has_reference, int_attr, ints_attr
from onnxopt.passes.shared.layer import require_sole_reader
from onnxopt.rewrite import AttributeValue, Declined, Edit
from onnxopt.scope import Scope

__all__ = ["Product", "gemm", "product_of", "sum_as_gemm", "untransposed"]

Dim = int | ir.SymbolicDim | None


@dataclass(frozen=True)
class Product:
    """alpha A B + beta C; A and B are transposed where `transposed` says so. For a MatMul, A B."""

    node: ir.Node
    factors: tuple[ir.Value, ir.Value]
    transposed: tuple[bool, bool] = (False, False)
    alpha: float = 1.0
    beta: float = 1.0
    c: ir.Value | None = None

    @property
    def dtype(self) -> ir.DataType | None:
        """The type of its elements, where it is known."""
        return next((value.dtype for value in (*self.factors, *self.node.outputs) if value.dtype), None)

    @property
    def sums_nothing(self) -> bool:
        """Whether the axis that is summed up is empty."""
        return 0 in (self.size(0, 1), self.size(1, 0))

    def size(self, factor: int, axis: int) -> Dim:
        """The size of a factor along an axis, as it is multiplied."""
        shape = self.factors[factor].shape
        return None if shape is None else shape.dims[axis ^ self.transposed[factor]]


def product_of(node: ir.Node | None, op_types: Sequence[str], scope: Scope) -> Product | None:
    """The product that a Gemm, or a MatMul of two matrices, computes; None where that is not known."""
    if node is None or node.domain or node.op_type not in op_types or scope.opset < 7:
        return None
    a, b, *more = node.inputs
    if a is None or b is None or has_reference(node):
        return None
    if node.op_type == "MatMul" and any(v.shape is None or len(v.shape) != 2 for v in (a, b)):
        return None
    transposed = bool(int_attr(node, "transA", 0)), bool(int_attr(node, "transB", 0))
    alpha, beta = float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)
    return Product(node, (a, b), transposed, alpha, beta, more[0] if more else None)


def gemm(edit: Edit, product: Product) -> ir.Value:
    """A Gemm in `edit` that computes the product.

    Raises:
        Declined: it is a MatMul, of another type than floating point.
    """
    flags = zip(("transA", "transB"), map(int, product.transposed), strict=True)
    attributes: dict[str, AttributeValue] = {name: flag for name, flag in flags if flag}
    if product.alpha != 1.0:
        attributes["alpha"] = product.alpha
    if product.beta != 1.0 and product.c is not None:
        attributes["beta"] = product.beta
    if product.node.op_type == "MatMul" and product.dtype not in FLOATS:
        raise Declined("the product is not known to be of floating point, as runtimes want it of a Gemm")
    inputs = product.factors if product.c is None else (*product.factors, product.c)
    return edit.op("Gemm", inputs, attributes, name=product.node.name or "")


def sum_as_gemm(node: ir.Node, op_types: Sequence[str], scope: Scope) -> Edit | None:
    """Let a product take in what an Add, or a Sum of two, adds to it.

    Raises:
        Declined: it cannot; of two products the first is named.
    """
    first, second = node.inputs if len(node.inputs) == 2 else (None, None)
    refusal: Declined | None = None
    for value, other in ((first, second), (second, first)):
        if value is None or other is None:
            continue
        try:
            product = product_of(value.producer(), op_types, scope)
            if product is None or not _takes(product, scope):
                continue
            edit = Edit(node, scope)
            return edit.replace(node.outputs[0], _plus(edit, product, other, scope))
        except Declined as reason:
            refusal = refusal or reason
    if refusal is not None:
        raise refusal
    return None


def _takes(product: Product, scope: Scope) -> bool:
    """Whether nothing is added to the product but another product, which takes something in."""
    if product.c is None:
        return True
    inner = product_of(product.c.producer(), ("Gemm", "MatMul"), scope) if product.beta == 1 else None
    return inner is not None and _takes(inner, scope)


def _plus(edit: Edit, product: Product, value: ir.Value, scope: Scope) -> ir.Value:
    """A Gemm in `edit` of the product and a value: A B + (D E + value) is (A B + D E) + value.

    Raises:
        Declined: the product is read elsewhere, or the value may not fit its shape.
    """
    require_sole_reader(product.node)
    if product.sums_nothing:
        raise Declined("the product sums up nothing")
    if product.c is not None:
        inner = product_of(product.c.producer(), ("Gemm", "MatMul"), scope)
        assert inner is not None  # `_takes` has looked
        return gemm(edit, replace(product, c=_plus(edit, inner, value, scope)))
    _require_fit(value, (product.size(0, 0), product.size(1, 1)))
    return gemm(edit, replace(product, c=value, beta=1.0))


def _require_fit(value: ir.Value, shape: Sequence[Dim]) -> None:
    """Raise `Declined` unless the value broadcasts to the shape."""
    if value.shape is None:
        raise Declined("the shape of what is added to the product is unknown")
    dims = value.shape.dims
    if len(dims) > len(shape):
        raise Declined("what is added to the product has more axes")
    for own, wanted in zip(reversed(dims), reversed(shape), strict=False):
        same = own == wanted and not (isinstance(own, ir.SymbolicDim) and own.value is None)
        if own != 1 and not same:
            raise Declined("what is added is not known to fit the product's shape")


def untransposed(product: Product) -> Product | None:
    """The product with what the Transposes before it read; None where there are none.

    Raises:
        Declined: another node, graph or the user reads what a Transpose gives.
    """
    factors, transposed = list(product.factors), list(product.transposed)
    for place, value in enumerate(product.factors):
        node = value.producer()
        if node is None or node.op_type != "Transpose" or node.domain or node.inputs[0] is None:
            continue
        if has_reference(node) or len(ints_attr(node, "perm") or value.shape or ()) != 2:
            continue
        if ints_attr(node, "perm") == (0, 1):
            continue
        require_sole_reader(node)
        factors[place], transposed[place] = node.inputs[0], not transposed[place]
    if tuple(factors) == product.factors:
        return None
    return replace(product, factors=(factors[0], factors[1]), transposed=(transposed[0], transposed[1]))
