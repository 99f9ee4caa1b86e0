"""What patterns are made of: each piece says in which ways a value can be it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir

from onnxopt.graph import constant_of, has_reference

__all__ = ["Any", "Either", "Found", "Key", "Missing", "Named", "Number", "Op", "Piece"]

_COMMUTATIVE = frozenset({"Add", "And", "Equal", "Max", "Min", "Mul", "Or", "Sum", "Xor"})


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
    """A constant of one element that is the number, to the rounding of its own type."""

    number: float

    def at(self, value: ir.Value | None, found: Found) -> Iterator[Found]:
        tensor = constant_of(value)
        if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
            return
        slack = 0 if self.number.is_integer() else _EPS.get(tensor.dtype, 0) * abs(self.number)
        if abs(float(tensor.numpy().reshape(-1)[0]) - self.number) <= slack:
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
    """A node; `is_open` where it may have further inputs."""

    domain: str
    op_type: str
    inputs: tuple[Piece, ...]
    is_open: bool
    output: int

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

    def needed(self) -> frozenset[Key]:
        """Operators of which one at least must feed this one; empty where anything may."""
        for part in self.inputs:
            ops = tuple(part.ops())
            if None not in ops:
                return frozenset(op.key for op in ops if op is not None)
        return frozenset()

    def at_node(self, node: ir.Node, found: Found) -> Iterator[Found]:
        """The ways in which the node can be this one."""
        missing = len(self.inputs) - len(node.inputs)
        if self.key != (node.domain, node.op_type) or (missing < 0 and not self.is_open):
            return
        if has_reference(node):
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
        if not any(isinstance(part, Number) for part in self.inputs):
            return True
        tensors = [constant_of(value) for value in inputs]
        most = max((len(tensor.shape) for tensor in tensors if tensor is not None), default=0)
        others = [value for value, tensor in zip(inputs, tensors, strict=True) if value and tensor is None]
        return not most or all(v.shape is not None and len(v.shape) >= most for v in others)


def _in_order(parts: Sequence[Piece], inputs: Sequence[ir.Value | None], found: Found) -> Iterator[Found]:
    if not parts:
        yield found
        return
    for one in parts[0].at(inputs[0], found):
        yield from _in_order(parts[1:], inputs[1:], one)
