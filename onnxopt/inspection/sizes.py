"""How large things are: amounts in a model's own dimension symbols, read off a copy with inferred shapes.

The copy has its functions inlined and its weights hollow, so that no weight is loaded and a model above 2 GB
is never one protobuf; the caller's model stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import graphs, nodes
from onnxopt.inspection.values import LARGEST, settle_values

__all__ = ["UNKNOWN", "ZERO", "Amount", "Shapes", "Sized", "product", "sized"]

_ROUNDS = 4
"""Of inference and shape arithmetic in turns; each reaches through another level of symbolic shapes."""
_STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_OPERATORS = re.compile(r"[-+*/()\s]+")


@dataclass(frozen=True)
class Amount:
    """A polynomial in dimension symbols: ``{("batch",): 9, (): 2}`` is ``9*batch + 2``.

    The symbol ``?`` stands for a size that no shape gives; all terms that hold it print as one ``?``.
    """

    terms: Mapping[tuple[str, ...], int]

    @classmethod
    def of(cls, number: int) -> Amount:
        return cls({(): number} if number else {})

    @classmethod
    def symbol(cls, name: str) -> Amount:
        return cls({(name,): 1})

    def __add__(self, other: Amount) -> Amount:
        total = dict(self.terms)
        for symbols, factor in other.terms.items():
            total[symbols] = total.get(symbols, 0) + factor
        return Amount({symbols: factor for symbols, factor in total.items() if factor})

    def __sub__(self, other: Amount) -> Amount:
        return self + Amount({symbols: -factor for symbols, factor in other.terms.items()})

    def __mul__(self, other: Amount) -> Amount:
        total = ZERO
        for left, factor in self.terms.items():
            total += Amount({tuple(sorted(left + right)): factor * f for right, f in other.terms.items()})
        return total

    @property
    def weight(self) -> int:
        """The value with every symbol at 1, to compare amounts that share no symbol."""
        return sum(self.terms.values())

    def value(self) -> int | str:
        """An int where every size is known, else readable text such as ``'9*batch + 2 + ?'``."""
        if not any(self.terms):
            return self.terms.get((), 0)
        known = {symbols: factor for symbols, factor in self.terms.items() if "?" not in symbols}
        ordered = sorted(known.items(), key=lambda term: (-len(term[0]), term[0]))
        parts = [_monomial(symbols, factor) for symbols, factor in ordered]
        return " + ".join(parts + ["?"] * (len(known) < len(self.terms)))


ZERO = Amount({})
UNKNOWN = Amount.symbol("?")


def _monomial(symbols: tuple[str, ...], factor: int) -> str:
    powers = {symbol: symbols.count(symbol) for symbol in symbols}
    names = [symbol if power == 1 else f"{symbol}**{power}" for symbol, power in powers.items()]
    return "*".join(names if factor == 1 and names else [str(factor), *names])


def product(dims: Iterable[Amount] | None) -> Amount:
    """The product of the dimensions; unknown where the rank is."""
    if dims is None:
        return UNKNOWN
    result = Amount.of(1)
    for dim in dims:
        result *= dim
    return result


@dataclass(frozen=True)
class Shapes:
    """Reads sizes off the values of an inferred model, in the symbols of its graph inputs."""

    symbols: frozenset[str]

    def dims(self, value: ir.Value | None) -> tuple[Amount, ...] | None:
        if value is None or value.shape is None:
            return None
        return tuple(self._dim(dim) for dim in value.shape)

    def _dim(self, dim: int | ir.SymbolicDim) -> Amount:
        if isinstance(dim, int):
            return Amount.of(dim)
        text = dim.value
        if text is None:
            return UNKNOWN
        if text in self.symbols:
            return Amount.symbol(text)
        words = [word for word in _OPERATORS.split(text) if word and not word.isdecimal()]
        return Amount.symbol(f"({text})") if words and self.symbols.issuperset(words) else UNKNOWN

    def is_known(self, value: ir.Value) -> bool:
        """Whether each dimension is a number or stands in the graph inputs' symbols."""
        dims = value.shape
        return dims is not None and all(isinstance(dim, int) or dim.value in self.symbols for dim in dims)

    def dim(self, value: ir.Value | None, axis: int) -> Amount:
        dims = self.dims(value)
        return UNKNOWN if dims is None or not -len(dims) <= axis < len(dims) else dims[axis]

    def elements(self, value: ir.Value | None) -> Amount:
        return product(self.dims(value))

    def nbytes(self, value: ir.Value) -> Amount:
        """Bytes of a dense tensor; unknown for strings, sequences and optionals."""
        if not isinstance(value.type, ir.TensorType) or value.dtype in (None, ir.DataType.STRING):
            return UNKNOWN
        elements, bits = self.elements(value), value.type.dtype.bitwidth
        if any(elements.terms):
            return elements * Amount.of(max(1, bits // 8))
        return Amount.of((elements.weight * bits + 7) // 8)


@dataclass(frozen=True)
class Sized:
    """A copy of a model with inferred shapes, how to read them, and why inference gave up, or None."""

    graph: ir.Graph
    shapes: Shapes
    failure: str | None


def sized(model: ir.Model, shapes: Mapping[str, Sequence[int]] | None = None) -> Sized:
    """Infer shapes on a copy, by onnx's own shape inference with data propagation.

    Args:
        model: not changed.
        shapes: static shapes for some graph inputs, by name. A symbol they settle is settled everywhere.

    Raises:
        UsageError: a name that is no graph input, a wrong rank, a negative size, or one symbol with two
        sizes.
    """
    copy = model.clone()
    if copy.functions:
        copy = InlinePass()(copy).model
    _hollow(copy)
    _settle(copy, _bindings(copy.graph, shapes or {}), shapes or {})
    symbols = frozenset(
        dim.value
        for value in copy.graph.inputs
        for dim in (value.shape or ())
        if not isinstance(dim, int) and dim.value is not None
    )
    known = Shapes(symbols)
    return Sized(copy.graph, known, _infer(copy, known))


def _infer(model: ir.Model, at: Shapes) -> str | None:
    """Write inferred shapes into the model; gives the reason where inference gave up."""
    scratch = model
    for _ in range(_ROUNDS):
        try:
            proto = onnx.shape_inference.infer_shapes(ir.to_proto(scratch), data_prop=True)
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError) as error:
            return " ".join(str(error).split()) or type(error).__name__
        scratch = ir.from_proto(proto)
        if all(at.is_known(v) for node in nodes(scratch) for v in node.outputs) or not settle_values(scratch):
            break
    for node, inferred in zip(model.graph.all_nodes(), scratch.graph.all_nodes(), strict=True):
        for value, known in zip(node.outputs, inferred.outputs, strict=True):
            value.shape, value.type = known.shape, known.type
    return None


def _hollow(model: ir.Model) -> None:
    """Replace each large tensor by one that has its type and shape only, and read the small external ones."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = _hollow_tensor(value.const_value, value.name or "")
        for node in graph:
            for name, attr in node.attributes.items():
                if attr.type == ir.AttributeType.TENSOR and not attr.is_ref():
                    node.attributes[name] = ir.AttrTensor(name, _hollow_tensor(attr.as_tensor(), ""))


def _hollow_tensor(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if tensor.size > LARGEST:
        return ir.ExternalTensor(
            "hollow", 0, 0, tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name
        )
    if isinstance(tensor, ir.ExternalTensor):
        return ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=name)
    return tensor


def _bindings(graph: ir.Graph, shapes: Mapping[str, Sequence[int]]) -> dict[str, int]:
    """What the given shapes say about the symbols of the graph inputs."""
    inputs = {value.name: value for value in graph.inputs if value.name}
    bound: dict[str, int] = {}
    for name, dims in shapes.items():
        if name not in inputs:
            raise UsageError(f"shapes: {name!r} is no input of the graph{did_you_mean(name, inputs)}")
        declared = inputs[name].shape
        if declared is not None and len(declared) != len(dims):
            raise UsageError(f"shapes: input {name!r} has {len(declared)} dimensions, {len(dims)} were given")
        if any(dim < 0 for dim in dims):
            raise UsageError(f"shapes: input {name!r}: {list(dims)} has a negative size")
        for old, new in zip(declared or (), dims, strict=False):
            symbol = _symbol(old)
            if symbol is not None and bound.setdefault(symbol, new) != new:
                raise UsageError(f"shapes: {symbol!r} is {bound[symbol]}, but input {name!r} makes it {new}")
    return bound


def _settle(model: ir.Model, bound: Mapping[str, int], shapes: Mapping[str, Sequence[int]]) -> None:
    """Put sizes for symbols, and names for unnamed dimensions of graph inputs: ``x[0]``.

    With shapes given, what was recorded for the outputs of standard ops may be stale and is inferred anew.
    """
    for graph in graphs(model):
        for node in graph:
            for value in node.outputs:
                stale = bool(shapes) and node.domain in _STANDARD
                value.shape = None if stale or value.shape is None else _substitute(value.shape, bound)
        for value in graph.inputs:
            value.shape = None if value.shape is None else _substitute(value.shape, bound)
    for value in model.graph.inputs:
        given = shapes.get(value.name or "")
        if given is not None:
            value.shape = ir.Shape(given)
        elif value.shape is not None:
            named = [_named(dim, f"{value.name}[{axis}]") for axis, dim in enumerate(value.shape)]
            value.shape = ir.Shape(named)


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    """The dimension's own name; exporters that know none write nothing, an empty text, or ``?``."""
    return None if isinstance(dim, int) or dim.value in ("", "?") else dim.value


def _named(dim: int | ir.SymbolicDim, name: str) -> int | ir.SymbolicDim:
    return dim if isinstance(dim, int) or _symbol(dim) else ir.SymbolicDim(name)


def _substitute(shape: ir.Shape, bound: Mapping[str, int]) -> ir.Shape:
    """Symbols become their sizes; a negative size, which some exporters write, is an unknown one."""
    dims: list[int | ir.SymbolicDim | None] = []
    for dim in shape:
        symbol = _symbol(dim)
        dims.append(bound.get(symbol, dim) if symbol else dim if isinstance(dim, int) and dim >= 0 else None)
    return ir.Shape(dims)
