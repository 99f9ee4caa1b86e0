"""What the rules of a lint are, what they find, and what they see of a model."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import onnx_ir as ir

from onnxopt.graph import constant_of, graphs, has_reference, int_attr, is_deterministic, nodes, roots, walk
from onnxopt.inspection.contents import op_name
from onnxopt.inspection.outline import Dims
from onnxopt.inspection.sizes import Shapes, sized

__all__ = [
    *("WEIGHTED", "Finding", "Rule", "Sight", "constant", "dequantizer", "is_quantized", "numbers", "ops"),
    *("quantized_type", "readers", "rule"),
]

WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
"""Operators whose first two inputs are multiplied, in integers where both are quantized."""

_DOMAINS = frozenset({"", "com.microsoft"})
"""Those of which an operator's name says what it computes."""

Severity = Literal["error", "warning"]
Places = Callable[["Sight"], Iterable[Any]]
Check = Callable[[Any, "Sight"], str | None]


@dataclass(frozen=True)
class Finding:
    """One thing at one place.

    severity: ``error``, the target refuses the model or computes other numbers; ``warning``, it runs slower
    or less exactly than it could. site: name of the node or the tensor. message: what was found and what to
    do. basis: which versions the rule is known for, and where from.
    """

    rule: str
    severity: Severity
    site: str
    message: str
    basis: str

    def to_dict(self) -> dict[str, str]:
        """Plain strings, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Rule:
    """A rule of a target: `check` says what is wrong with one of the `places` and what to do, or None."""

    name: str
    severity: Severity
    basis: str
    places: Places
    check: Check

    def findings(self, seen: Sight) -> Iterator[Finding]:
        """What it finds, in the order of the graph."""
        for place in self.places(seen):
            message = self.check(place, seen)
            if message is not None:
                yield Finding(self.name, self.severity, _site(place), message, self.basis)


def rule(name: str, severity: Severity, basis: str, places: Places) -> Callable[[Check], Rule]:
    """Makes a rule of the function that checks one place."""
    return functools.partial(Rule, name, severity, basis, places)


def ops(*op_types: str) -> Places:
    """The nodes of these operators whose attributes are all known; with none named, all nodes there are."""
    return lambda seen: seen.ops(*op_types)


class Sight:
    """A model with its subgraphs and functions, indexed; nothing in it is changed.

    Of what depends on the arguments of a function nothing is known, and no rule finds anything there; with
    functions in the model, types and sizes are known as far as they are recorded.
    """

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self._nodes = tuple(nodes(model))
        self._by_type: dict[str, list[ir.Node]] = defaultdict(list)
        for node in self._nodes:
            if node.domain in _DOMAINS and not has_reference(node):
                self._by_type[node.op_type].append(node)

    def ops(self, *op_types: str) -> Iterator[ir.Node]:
        """See `ops`."""
        yield from (node for name in op_types for node in self._by_type.get(name, ()))
        yield from () if op_types else self._nodes

    def values(self) -> Iterator[ir.Value]:
        """Inputs, initializers and results of nodes, each once."""
        for graph in graphs(self.model):
            yield from (value for value in graph.inputs if not value.is_initializer())
            yield from graph.initializers.values()
            for node in graph:
                yield from (value for value in node.outputs if value.name)

    def dtype(self, value: ir.Value | None) -> ir.DataType | None:
        """The element type; None where it is not known."""
        if value is None:
            return None
        tensor = constant(value)
        return tensor.dtype if tensor is not None else value.dtype or self._shapes.dtype(value)

    def dims(self, value: ir.Value | None) -> Dims | None:
        """The sizes: numbers, symbols, or None for what is not known; None where the rank is not."""
        tensor = constant(value)
        if value is None or tensor is not None:
            return None if tensor is None else tuple(tensor.shape.numpy())
        return self._shapes.sizes(value)

    def is_settled(self, value: ir.Value | None) -> bool:
        """Whether the value follows from constants (and sizes) alone, so that it is known when building."""
        return value is None or constant(value) is not None or value in self._settled

    @functools.cached_property
    def _shapes(self) -> Shapes:
        return sized(self.model).shapes

    @functools.cached_property
    def _settled(self) -> set[ir.Value]:
        found: set[ir.Value] = set()
        for root in roots(self.model):
            found.update(root.inputs if root is not self.model.graph else ())
            for node in walk(root):
                known = all(v is None or v in found or constant(v) is not None for v in node.inputs)
                flat = node.op_type not in ("If", "Loop", "Scan") and is_deterministic(node)
                if node.op_type in ("Shape", "Size") or (known and flat):
                    found.update(node.outputs)
        return found


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The tensor of an initializer or a Constant, or None; what a user may override counts as well."""
    return value.const_value if value is not None and value.is_initializer() else constant_of(value)


def numbers(value: ir.Value | None) -> np.ndarray:
    """The elements of a constant in float64; none where it is no constant of numbers."""
    tensor = constant(value)
    known = tensor is not None and tensor.dtype != ir.DataType.STRING
    return np.asarray(tensor.numpy() if tensor is not None and known else (), np.float64)


def quantized_type(node: ir.Node, seen: Sight) -> ir.DataType | None:
    """The integer or small float type that a QuantizeLinear gives or a DequantizeLinear takes."""
    if node.op_type == "DequantizeLinear":
        return seen.dtype(node.inputs[0])
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        return seen.dtype(node.inputs[2])
    return ir.DataType(int_attr(node, "output_dtype", 0) or ir.DataType.UINT8)


def dequantizer(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear that gives a value."""
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" else None


def is_quantized(node: ir.Node) -> bool:
    """Whether both of the inputs that are multiplied come from a DequantizeLinear."""
    return all(dequantizer(value) is not None for value in node.inputs[:2])


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value."""
    return [use.node for use in value.uses()]


def _site(place: ir.Node | ir.Value | ir.Graph) -> str:
    if not isinstance(place, ir.Node):
        return place.name or "?"
    return place.name or next((value.name for value in place.outputs if value.name), None) or op_name(place)
