"""What patterns are made of: each piece says in which ways a value can be it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import onnx_ir as ir

from onnxopt.graph import constant_of, has_reference

__all__ = ["Any", "Either", "Found", "Key", "Missing", "Named", "Number", "Op", "Piece", "combined"]

_COMMUTATIVE = frozenset({"Add", "And", "Equal", "Max", "Min", "Mul", "Or", "Sum", "Xor"})
_BROADCASTING = _COMMUTATIVE | frozenset(
    ("Div", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Mod", "PRelu", "Pow", "Sub", "Where")
)

Key = tuple[str, str]
_EPS = {
    ir.DataType.FLOAT16: 2.0**-10,
    ir.DataType.BFLOAT16: 2.0**-7,
    ir.DataType.FLOAT: 2.0**-23,
    ir.DataType.DOUBLE: 2.0**-52,
}


@dataclass(frozen=True)
class Found:
    """What is bound so far, and the nodes that are part of the match."""

    values: Mapping[str, ir.Value]
    nodes: tuple[ir.Node, ...]

    def bind(self, name: str, value: ir.Value) -> Iterator[Found]:
        if name not in self.values:
            yield Found({**self.values, name: value}, self.nodes)
        elif self.values[name] is value:
            yield self


class Piece(Protocol):
    """A piece of a pattern."""

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        """The ways in which the value can be what the piece says."""

    def ops(self) -> Iterator[Op | None]:
        """The operators that it can be; None among them where it can be something else."""


@dataclass(frozen=True)
class Any:
    """Any value; one of a name is the same value wherever it occurs."""

    name: str | None

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        if value is None:
            return iter(())
        return iter((found,)) if self.name is None else found.bind(self.name, value)

    def ops(self) -> Iterator[Op | None]:
        yield None


@dataclass(frozen=True)
class Missing:
    """An optional input that is left out."""

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        return iter((found,) if value is None else ())

    def ops(self) -> Iterator[Op | None]:
        yield None


@dataclass(frozen=True)
class Number:
    """A constant of one element: the number, to the rounding of its own type, or any, by a name."""

    number: float | None
    name: str = ""

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        tensor = constant_of(value)
        if value is None or tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
            return
        if self.number is None:
            yield from found.bind(self.name, value)
        elif _is(self.number, float(tensor.numpy().reshape(-1)[0]), tensor.dtype):
            yield found

    def ops(self) -> Iterator[Op | None]:
        yield None


@dataclass(frozen=True)
class Named:
    name: str
    part: Piece

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        for one in self.part.at(value, found):
            assert value is not None
            yield from one.bind(self.name, value)

    def ops(self) -> Iterator[Op | None]:
        return self.part.ops()


@dataclass(frozen=True)
class Either:
    parts: tuple[Piece, ...]

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        for part in self.parts:
            yield from part.at(value, found)

    def ops(self) -> Iterator[Op | None]:
        for part in self.parts:
            yield from part.ops()


@dataclass(frozen=True)
class Op:
    """A node; `is_open` where it may have further inputs. Attributes are numbers that it has to have."""

    domain: str
    op_type: str
    inputs: tuple[Piece, ...]
    is_open: bool = False
    output: int = 0
    attributes: Mapping[str, float] = field(default_factory=dict, hash=False)

    @property
    def key(self) -> Key:
        return self.domain, self.op_type

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        node = None if value is None else value.producer()
        if value is None or node is None or node.op_type != self.op_type or value.index() != self.output:
            return iter(())
        return self.at_node(node, found)

    def ops(self) -> Iterator[Op | None]:
        yield self

    def needed(self) -> tuple[frozenset[Key], ...]:
        """Sets of operators; one of each set at least must feed this one."""
        fed = [tuple(part.ops()) for part in self.inputs]
        return tuple(frozenset(op.key for op in ops if op) for ops in fed if None not in ops)

    def at_node(self, node: ir.Node, found: Found) -> Iterator[Found]:
        """The ways in which the node can be this one."""
        missing = len(self.inputs) - len(node.inputs)
        if self.key != (node.domain, node.op_type) or (missing < 0 and not self.is_open):
            return
        if has_reference(node) or not all(_has(node, *item) for item in self.attributes.items()):
            return
        inputs = (*node.inputs, *[None] * missing)
        if not self._keeps_rank(inputs):
            return
        start = found if node in found.nodes else Found(found.values, (*found.nodes, node))
        yield from _in_order(self.inputs, inputs, start)
        if len(self.inputs) == 2 and self.op_type in _COMMUTATIVE:
            yield from _in_order(self.inputs, inputs[::-1], start)

    def _keeps_rank(self, inputs: Sequence[ir.Value | None]) -> bool:
        """Whether the constants that are matched as numbers leave the rank of the other operands as it is."""
        if self.op_type not in _BROADCASTING or not any(isinstance(part, Number) for part in self.inputs):
            return True
        tensors = [constant_of(value) for value in inputs]
        most = max((len(tensor.shape) for tensor in tensors if tensor is not None), default=0)
        others = [value for value, tensor in zip(inputs, tensors, strict=True) if value and tensor is None]
        if not others:  # a constant that is computed from others has any shape
            return not most
        return not most or all(v.shape is not None and len(v.shape) >= most for v in others)


def _in_order(parts: Sequence[Piece], inputs: Sequence[ir.Value | None], found: Found) -> Iterator[Found]:
    if not parts:
        yield found
        return
    for one in parts[0].at(inputs[0], found):
        yield from _in_order(parts[1:], inputs[1:], one)


def combined(op_type: str, parts: tuple[Piece, ...]) -> Piece:
    """A sum or product in any order and nesting; division by a number is a product with its inverse."""
    if len(parts) == 1:
        return parts[0]
    ways: list[Piece] = []
    for chosen in range(2 ** (len(parts) - 1) - 1):  # the first part stands on the left, not with all others
        left = tuple(part for i, part in enumerate(parts) if not i or chosen >> (i - 1) & 1)
        right = tuple(part for i, part in enumerate(parts) if i and not chosen >> (i - 1) & 1)
        ways.append(Op("", op_type, (combined(op_type, left), combined(op_type, right))))
    for i, part in enumerate(parts):
        if op_type == "Mul" and isinstance(part, Number) and part.number:
            others = combined(op_type, parts[:i] + parts[i + 1 :])
            ways.append(Op("", "Div", (others, Number(1 / part.number))))
    return ways[0] if len(ways) == 1 else Either(tuple(ways))


def _is(wanted: float, number: float, dtype: ir.DataType) -> bool:
    """Whether the number is the wanted one, as its type can hold it."""
    slack = 0 if wanted.is_integer() else _EPS.get(dtype, 0) * abs(wanted)
    return abs(number - wanted) <= slack


def _has(node: ir.Node, name: str, wanted: float) -> bool:
    attr = node.attributes.get(name)
    if attr is None or attr.type not in (ir.AttributeType.FLOAT, ir.AttributeType.INT):
        return False
    return _is(wanted, float(attr.value), ir.DataType.FLOAT)
