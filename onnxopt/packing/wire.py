"""Where the weights lie in the file of a model: a walk over its protobuf, which is never in memory whole.

The wire format: https://protobuf.dev/programming-guides/encoding. The fields: onnx.proto.
"""

from __future__ import annotations

import math
import os
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import onnx_ir as ir

from onnxopt.errors import ModelError

__all__ = ["Stored", "tensors_of"]

_NESTED = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
"""Message -> its fields that are messages in which tensors lie."""

_FLOATS = {1: 4, 10: 2, 11: 8, 14: 4, 15: 8, 16: 2}
"""Types of ONNX whose elements, or the parts of them, are floats of that many bytes."""
_INTEGERS = {4: 2, 5: 2, 6: 4, 7: 8, 12: 4, 13: 8}
_TYPED = {4: "f4", 5: "u1", 7: "u1", 10: "f8", 11: "u1"}
"""Packed typed fields of a tensor; integers in them are varints, that is to say bytes."""
_RAW, _DIMS, _TYPE, _EXTERNAL = 9, 1, 2, 13

_DEEPEST = 400
"""Messages in each other; protobuf itself reads 100."""
_LONGEST_ENTRY = 1 << 16


@dataclass(frozen=True)
class Stored:
    """A tensor's bytes: in the model's file, or at a place in another one."""

    offset: int
    size: int
    kind: str
    """`f` for floats and `u` for all else, then the bytes of an element."""
    location: str | None = None


@dataclass
class _Tensor:
    """What is known of a tensor, while its fields are being read; they come in any order."""

    data_type: int = 0
    dims: list[int] = field(default_factory=list)
    raw: list[tuple[int, int]] = field(default_factory=list)
    typed: list[Stored] = field(default_factory=list)
    external: dict[str, str] = field(default_factory=dict)

    def stored(self) -> Iterator[Stored]:
        if "location" in self.external:
            offset, size = int(self.external.get("offset", "0")), self._size()
            if offset < 0 or size < 0:
                raise ValueError(f"external data of {size} bytes at {offset}")
            yield Stored(offset, size, self._kind(size), self.external["location"])
        yield from (Stored(offset, size, self._kind(size)) for offset, size in self.raw)
        yield from self.typed

    def _size(self) -> int:
        if "length" in self.external:
            return int(self.external["length"])
        return math.ceil(math.prod(self.dims) * ir.DataType(self.data_type).bitwidth / 8)

    def _kind(self, size: int) -> str:
        width = _FLOATS.get(self.data_type) or _INTEGERS.get(self.data_type, 1)
        return "u1" if size % width else f"{'f' if self.data_type in _FLOATS else 'u'}{width}"


def tensors_of(file: BinaryIO, who: str) -> Iterator[Stored]:
    """The tensors' bytes in a model's file, in the order of the file, in subgraphs and functions too.

    Raises:
        ModelError: the file is no protobuf of a model, or is cut off.
    """
    size = os.fstat(file.fileno()).st_size
    try:
        seen = yield from _walk(file, "model", 0, size, 0)
    except (EOFError, TypeError, ValueError) as error:
        raise ModelError(f"{who}: not an ONNX model, or cut off: {error}") from None
    if 7 not in seen:
        raise ModelError(f"{who}: not an ONNX model: it has no graph")


def _walk(
    file: BinaryIO, message: str, start: int, end: int, depth: int
) -> Generator[Stored, None, set[int]]:
    """The tensors in a message; returns the numbers of its fields."""
    if depth > _DEEPEST:
        raise ValueError(f"messages are nested more than {_DEEPEST} deep")
    nested, seen = _NESTED[message], set()
    for number, wire, first, last in _fields(file, start, end):
        seen.add(number)
        inner = nested.get(number)
        if inner is None:
            continue
        if wire != 2:
            raise ValueError(f"field {number} of a {message} is no message")
        if inner == "tensor":
            yield from _tensor(file, first, last)
        else:
            yield from _walk(file, inner, first, last, depth + 1)
    return seen


def _tensor(file: BinaryIO, start: int, end: int) -> Iterator[Stored]:
    tensor = _Tensor()
    for number, wire, first, last in _fields(file, start, end):
        if number == _TYPE and wire == 0:
            tensor.data_type = first
        elif number == _DIMS:
            tensor.dims += [first] if wire == 0 else _varints(file, first, last)
        elif number == _RAW and wire == 2:
            tensor.raw.append((first, last - first))
        elif number in _TYPED and wire == 2:
            kind = _TYPED[number]
            tensor.typed.append(
                Stored(first, last - first, kind if (last - first) % int(kind[1]) == 0 else "u1")
            )
        elif number == _EXTERNAL and wire == 2:
            entry = {n: _text(file, a, b) for n, w, a, b in _fields(file, first, last) if w == 2}
            tensor.external[entry.get(1, "")] = entry.get(2, "")
    yield from tensor.stored()


def _fields(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Number, wire type, and what it holds: a varint and 0, or where its bytes start and end."""
    place = start
    while place < end:
        file.seek(place)
        tag, place = _varint(file, place)
        number, wire = tag >> 3, tag & 7
        if number == 0 or wire not in (0, 1, 2, 5):
            raise ValueError(f"no field has the tag {tag}")
        if wire == 0:
            value, place = _varint(file, place)
            if place > end:
                raise EOFError("a field is longer than its message")
            yield number, wire, value, 0
            continue
        size = {1: 8, 5: 4}.get(wire, 0)
        if wire == 2:
            size, place = _varint(file, place)
        first, place = place, place + size
        if place > end:
            raise EOFError("a field is longer than its message")
        yield number, wire, first, place


def _varint(file: BinaryIO, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = file.read(1)
        if not byte:
            raise EOFError("it ends in the middle of a number")
        value |= (byte[0] & 0x7F) << shift
        if byte[0] < 0x80:
            return value, place + shift // 7 + 1
    raise ValueError("a number has more than ten bytes")


def _varints(file: BinaryIO, start: int, end: int) -> list[int]:
    values = []
    file.seek(start)
    while start < end:
        value, start = _varint(file, start)
        values.append(value)
    return values


def _text(file: BinaryIO, start: int, end: int) -> str:
    if end - start > _LONGEST_ENTRY:
        raise ValueError("an entry of external data is too long")
    file.seek(start)
    return file.read(end - start).decode()
