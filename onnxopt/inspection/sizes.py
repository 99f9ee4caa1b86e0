"""How large things are: amounts in a model's own dimension symbols, by the shapes that inference finds."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx
import onnx_ir as ir

from onnxopt.errors import UsageError, did_you_mean
from onnxopt.graph import walk
from onnxopt.inspection.amounts import UNKNOWN, Amount, product
from onnxopt.inspection.outline import Dims, inline, outline
from onnxopt.inspection.values import settle_values

__all__ = ["Shapes", "Sized", "sized"]

_ROUNDS = 4
"""Of inference and shape arithmetic in turns; each reaches through another level of symbolic shapes."""
_STANDARD = frozenset({"", "ai.onnx", "ai.onnx.ml"})
_NO_NUMBERS = frozenset({ir.DataType.UNDEFINED.value, ir.DataType.STRING.value})
_REFUSALS = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError)
_OPERATORS = re.compile(r"[-+*/()\s]+")


class _Record:
    """What the model says of its shapes, with the given sizes put for symbols.

    Unnamed dimensions of graph inputs are named: ``x[0]``. With shapes given, what was recorded for the
    outputs of standard ops may be stale and is left out.
    """

    def __init__(self, graph: ir.Graph, shapes: Mapping[str, Sequence[int]]) -> None:
        self._bound = _bindings(graph, shapes)
        self._inputs: dict[ir.Value, Dims] = {}
        self._is_stale = bool(shapes)
        for value in graph.inputs:
            declared = self.dims(value)
            given = shapes.get(value.name or "")
            if given is not None:
                self._inputs[value] = tuple(given)
            elif declared is not None:
                named = (dim if dim is not None else f"{value.name}[{i}]" for i, dim in enumerate(declared))
                self._inputs[value] = tuple(named)
        self.symbols = frozenset(d for dims in self._inputs.values() for d in dims if isinstance(d, str))

    def dims(self, value: ir.Value) -> Dims | None:
        if value in self._inputs:
            return self._inputs[value]
        if value.shape is None:
            return None
        if self._is_stale:
            node = value.producer()
            if node is not None and node.domain in _STANDARD:
                return None
        return tuple(map(self._settled, value.shape.dims))

    def _settled(self, dim: int | ir.SymbolicDim) -> int | str | None:
        """A symbol becomes its size; a negative size, which some exporters write, is an unknown one."""
        if isinstance(dim, int):
            return dim if dim >= 0 else None
        symbol = _symbol(dim)
        return symbol if symbol is None else self._bound.get(symbol, symbol)


@dataclass(frozen=True)
class _Known:
    """What is known of a value: its dimensions, and its element type where it is a tensor of numbers."""

    dims: Dims | None
    dtype: ir.DataType | None


@dataclass(frozen=True)
class Shapes:
    """Reads sizes of the values of a graph, in the symbols of its graph inputs.

    ``functions`` are those whose calls stayed: no sizes are known inside of them.
    """

    record: Callable[[ir.Value], Dims | None]
    symbols: frozenset[str]
    inferred: Mapping[ir.Value, _Known] = field(default_factory=dict)
    functions: Mapping[tuple[str, str, str], ir.Function] = field(default_factory=dict)

    def sizes(self, value: ir.Value) -> Dims | None:
        """The dimensions as they are written: numbers, names, None where not even a name is known."""
        known = self.inferred.get(value)
        return self.record(value) if known is None else known.dims

    def dtype(self, value: ir.Value) -> ir.DataType | None:
        """The element type of a tensor of numbers, as inferred or else recorded; None if it is not known."""
        known = self.inferred.get(value)
        return _number_type(value.type) if known is None else known.dtype

    def dims(self, value: ir.Value | None) -> tuple[Amount, ...] | None:
        dims = None if value is None else self.sizes(value)
        return None if dims is None else tuple(self._dim(dim) for dim in dims)

    def _dim(self, dim: int | str | None) -> Amount:
        if isinstance(dim, int):
            return Amount.of(dim)
        if dim is None:
            return UNKNOWN
        if dim in self.symbols:
            return Amount.symbol(dim)
        words = [word for word in _OPERATORS.split(dim) if word and not word.isdecimal()]
        return Amount.symbol(f"({dim})") if words and self.symbols.issuperset(words) else UNKNOWN

    def is_known(self, value: ir.Value) -> bool:
        """Whether each dimension is a number or stands in the graph inputs' symbols."""
        dims = self.sizes(value)
        return dims is not None and all(isinstance(dim, int) or dim in self.symbols for dim in dims)

    def dim(self, value: ir.Value | None, axis: int) -> Amount:
        dims = self.dims(value)
        return UNKNOWN if dims is None or not -len(dims) <= axis < len(dims) else dims[axis]

    def elements(self, value: ir.Value | None) -> Amount:
        return product(self.dims(value))

    def nbytes(self, value: ir.Value) -> Amount:
        """Bytes of a dense tensor; unknown for strings, sequences and optionals."""
        dtype = self.dtype(value)
        if dtype is None:
            return UNKNOWN
        elements = self.elements(value)
        if any(elements.terms):
            return elements * Amount.of(max(1, dtype.bitwidth // 8))
        return Amount.of((elements.weight * dtype.bitwidth + 7) // 8)


@dataclass(frozen=True)
class Sized:
    """The graph with its functions inlined, how large its values are, and why inference gave up, or None."""

    graph: ir.Graph
    shapes: Shapes
    failure: str | None


def sized(
    model: ir.Model,
    shapes: Mapping[str, Sequence[int]] | None = None,
    needed: Callable[[ir.Node], Iterable[ir.Value]] | None = None,
) -> Sized:
    """Find the shapes of a model's values, by onnx's own shape inference with data propagation.

    Args:
        model: not changed.
        shapes: static shapes for some graph inputs, by name. A symbol they settle is settled everywhere.
        needed: the values whose sizes will be asked for, of each node; by default its outputs.

    Raises:
        UsageError: a name that is no graph input, a wrong rank, a negative size, or one symbol with two
        sizes.
    """
    record = _Record(model.graph, shapes or {})
    graph, failure, proto = model.graph, None, None
    if model.functions:
        proto = outline(model, record.dims)
        failure = inline(proto)
        graph = ir.from_proto(proto).graph
    called = {node.op_identifier() for node in walk(graph)} if model.functions else set()
    stayed = {key: function for key, function in model.functions.items() if key in called}
    at = Shapes(_Record(graph, {}).dims if proto else record.dims, record.symbols, functions=stayed)
    wanted = {value for node in walk(graph) for value in (needed or _outputs)(node)}
    try:
        inferred = _infer(graph, proto or outline(model, record.dims), at, wanted)
    except _REFUSALS as error:
        return Sized(graph, at, failure or " ".join(str(error).split()) or type(error).__name__)
    return Sized(graph, inferred, failure)


def _outputs(node: ir.Node) -> Iterator[ir.Value]:
    return (value for value in node.outputs if value.name)


def _infer(graph: ir.Graph, proto: onnx.ModelProto, at: Shapes, wanted: Collection[ir.Value]) -> Shapes:
    """Infer shapes, and settle shape arithmetic where that leaves any of the wanted values unknown."""
    for _ in range(_ROUNDS):
        proto = onnx.shape_inference.infer_shapes(proto, data_prop=True)
        at = replace(at, inferred=dict(_read(graph, proto.graph, wanted)))
        if all(map(at.is_known, wanted)):
            return at
        scratch = ir.serde.deserialize_model(proto)
        found = settle_values(scratch)
        proto = ir.serde.serialize_model(scratch)
        if not found:
            break
    return replace(at, inferred=dict(_read(graph, proto.graph, wanted)))


def _read(
    graph: ir.Graph, proto: onnx.GraphProto, wanted: Collection[ir.Value]
) -> Iterator[tuple[ir.Value, _Known]]:
    """What the inferred graph, which has the same nodes, says of the wanted outputs of each."""
    types = {info.name: info.type for info in (*proto.value_info, *proto.output)}
    for node, twin in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            if value in wanted and value.name in types:
                yield value, _known(types[value.name])
        for attr in twin.attribute:
            if attr.type == onnx.AttributeProto.GRAPH:
                yield from _read(node.attributes[attr.name].as_graph(), attr.g, wanted)
            elif attr.type == onnx.AttributeProto.GRAPHS:
                for body, other in zip(node.attributes[attr.name].as_graphs(), attr.graphs, strict=True):
                    yield from _read(body, other, wanted)


def _known(proto: onnx.TypeProto) -> _Known:
    if not proto.HasField("tensor_type"):
        shape = ir.serde.deserialize_type_proto_for_shape(proto)
        return _Known(_plain(shape), None)
    tensor = proto.tensor_type
    dims = None
    if tensor.HasField("shape"):
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") else dim.dim_param or None for dim in tensor.shape.dim
        )
    return _Known(dims, None if tensor.elem_type in _NO_NUMBERS else ir.DataType(tensor.elem_type))


def _number_type(kind: ir.TypeProtocol | None) -> ir.DataType | None:
    return kind.dtype if isinstance(kind, ir.TensorType) and kind.dtype.value not in _NO_NUMBERS else None


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


def _symbol(dim: int | ir.SymbolicDim) -> str | None:
    """The dimension's own name; exporters that know none write nothing, an empty text, or ``?``."""
    return None if isinstance(dim, int) or dim.value in ("", "?") else dim.value


def _plain(shape: ir.Shape | None) -> Dims | None:
    return None if shape is None else tuple(d if isinstance(d, int) else _symbol(d) for d in shape.dims)
