"""The file of a pack: its start, the blocks one behind the other, the index, and the foot.

    start   MAGIC, the version of the format (4 bytes; all numbers with the low byte first)
    blocks  the streams of each block, without anything between them
    index   JSON, by Zstandard: `Index` below
    foot    bytes of the index as stored (8) and as JSON (8); CRC-32 of start, index and these two numbers (4)

Each byte belongs to one of these and is checked: blocks by a CRC-32 each, and restored files by SHA-256.
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from onnxopt.errors import ModelError
from onnxopt.packing import MAGIC
from onnxopt.packing.coding import Coded
from onnxopt.packing.entropy import expand, squeeze, zstandard

__all__ = [
    "BLOCK",
    "Block",
    "Index",
    "Member",
    "Span",
    "name_complaint",
    "open_pack",
    "read_block",
    "write_end",
]

VERSION = 1
BLOCK = 1 << 23
"""Bytes that a block holds at most."""

START = MAGIC + struct.pack("<I", VERSION)
_FOOT = struct.Struct("<QQI")
_KINDS = ("f2", "f4", "f8", "u1", "u2", "u4", "u8")
_LARGEST_INDEX = 1 << 24
_MOST_PIECES = 1 << 20
_UNSUSPICIOUS = 1 << 34
"""Bytes that any pack may hold. Beyond them, it may hold so many times its own size:"""
_RATIO = 1000
_MOST_FILES = 1 << 14
_LONGEST_NAME, _DEEPEST = 1 << 10, 32


@dataclass(frozen=True)
class Member:
    """A file in a pack.

    pieces: three numbers for each piece of a weight, in the order of the file: how many bytes lie between
    it and the piece before, how many bytes it has, and the number of its block. What lies between, of all
    files, is cut into the blocks that come after those.
    """

    name: str
    size: int
    sha256: str
    pieces: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """A block: the kind of its elements, its coding, sizes of its streams, decoded and stored, and CRC-32."""

    kind: str
    coding: str
    sizes: tuple[int, ...]
    stored: tuple[int, ...]
    crc: int


@dataclass(frozen=True, slots=True)
class Span:
    """Bytes of a file, numbered as in the index."""

    member: int
    offset: int
    size: int


@dataclass(frozen=True)
class Index:
    """What is in a pack; the first file is the model's."""

    files: tuple[Member, ...]
    blocks: tuple[Block, ...]

    def spans(self) -> list[list[Span]]:
        """For each block, the spans that it holds one after the other; together, they are all the files.

        Raises:
            ValueError: the pieces do not fit the files or the blocks.
        """
        return list(_spans(self.files, len(self.blocks)))


def _spans(files: Sequence[Member], blocks: int) -> Iterator[list[Span]]:
    of_weights: dict[int, list[Span]] = {}
    rest: list[Span] = []
    for number, member in enumerate(files):
        place = 0
        for skip, size, block in zip(*[iter(member.pieces)] * 3, strict=True):
            rest.append(Span(number, place, skip))
            of_weights.setdefault(block, []).append(Span(number, place + skip, size))
            place += skip + size
        if place > member.size:
            raise ValueError(f"the pieces of {member.name!r} are larger than the file")
        rest.append(Span(number, place, member.size - place))
    others = list(_cut(rest))
    if sorted(of_weights) != list(range(len(of_weights))) or len(of_weights) + len(others) != blocks:
        raise ValueError("its blocks are not those that its files are made of")
    for block in range(len(of_weights)):
        if sum(span.size for span in of_weights[block]) > BLOCK:
            raise ValueError("a block is too large")
        yield of_weights[block]
    yield from others


def _cut(spans: Sequence[Span]) -> Iterator[list[Span]]:
    """The spans in groups of `BLOCK` bytes, the last one of fewer."""
    group, room = list[Span](), BLOCK
    for span in spans:
        offset, size = span.offset, span.size
        while size:
            taken = min(size, room)
            group.append(Span(span.member, offset, taken))
            offset, size, room = offset + taken, size - taken, room - taken
            if not room:
                yield group
                group, room = [], BLOCK
    if group:
        yield group


def write_end(file: BinaryIO, index: Index) -> None:
    """Write what comes after the blocks."""
    fields = {
        "files": [[m.name, m.size, m.sha256, m.pieces] for m in index.files],
        "blocks": [[b.kind, b.coding, b.sizes, b.stored, b.crc] for b in index.blocks],
    }
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    if len(text) > _LARGEST_INDEX:
        raise ModelError(f"pack: the model has too many tensors: an index of {len(text)} bytes")
    code = squeeze(np.frombuffer(text, np.uint8))
    sizes = struct.pack("<QQ", len(code), len(text))
    file.write(code + sizes + struct.pack("<I", zlib.crc32(START + code + sizes)))


def open_pack(file: BinaryIO, who: str) -> tuple[Index, list[int]]:
    """The index of a pack, and where each of its blocks starts; all of it checked but the blocks themselves.

    Raises:
        ModelError: it is no pack, of another version, damaged, or larger unpacked than an honest pack.
        UsageError: zstandard is not installed.
    """
    zstandard()
    size = os.fstat(file.fileno()).st_size
    start = file.read(len(START))
    if not start.startswith(MAGIC):
        raise ModelError(f"{who}: not a pack of onnxopt")
    if start != START:
        found = int.from_bytes(start[len(MAGIC) :], "little")
        raise ModelError(
            f"{who}: version {found} of the format is not known, only {VERSION}: it is damaged or newer"
        )
    try:
        text, end = _index_text(file, size)
        index = _parse(json.loads(text))
        total = sum(member.size for member in index.files)
        if total > max(_UNSUSPICIOUS, _RATIO * size):
            raise ValueError(f"{size} bytes that unpack to {total} are no honest pack")
        index.spans()
        starts = [len(START)]
        for block in index.blocks:
            starts.append(starts[-1] + sum(block.stored))
        if starts.pop() != end:
            raise ValueError("the blocks do not fill it")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ModelError(f"{who}: the pack is damaged: {_reason(error)}") from None
    return index, starts


def _reason(error: Exception) -> str:
    return str(error) if type(error) is ValueError else "its index makes no sense"


def _index_text(file: BinaryIO, size: int) -> tuple[bytes, int]:
    if size < len(START) + _FOOT.size:
        raise ValueError("it is cut off")
    file.seek(size - _FOOT.size)
    foot = file.read(_FOOT.size)
    stored, raw, crc = _FOOT.unpack(foot)
    end = size - _FOOT.size - stored
    if end < len(START) or stored > _LARGEST_INDEX or raw > _LARGEST_INDEX:
        raise ValueError("it is cut off, or something follows it")
    file.seek(end)
    code = file.read(stored)
    if zlib.crc32(START + code + foot[:16]) != crc:
        raise ValueError("the checksum of its index does not hold")
    return expand(code, raw), end


def _parse(fields: Mapping[str, Any]) -> Index:
    if not isinstance(fields, dict):
        raise TypeError
    files = tuple(
        Member(_text(name), _number(size), _text(sha256), _numbers(pieces))
        for name, size, sha256, pieces in fields["files"]
    )
    blocks = tuple(
        Block(_text(kind), _text(coding), _numbers(sizes), _numbers(stored), _number(crc))
        for kind, coding, sizes, stored, crc in fields["blocks"]
    )
    if not files:
        raise ValueError("there is no file in it")
    if sum(len(member.pieces) for member in files) > 3 * _MOST_PIECES:
        raise ValueError(f"its weights are in more than {_MOST_PIECES} pieces")
    complaint = name_complaint([member.name for member in files])
    if complaint:
        raise ValueError(complaint)
    if any(block.kind not in _KINDS for block in blocks):
        raise ValueError("a block is of a kind that is not known: a newer onnxopt may read it")
    if any(max(block.sizes, default=0) > 2 * BLOCK + 8 or len(block.sizes) > 16 for block in blocks):
        raise ValueError("a stream is too large")
    return Index(files, blocks)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _number(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise TypeError
    return value


def _numbers(values: object) -> tuple[int, ...]:
    if not isinstance(values, list):
        raise TypeError
    return tuple(map(_number, values))


def name_complaint(names: Sequence[str]) -> str | None:
    """What is wrong with names of files to be unpacked; None if they are few, relative, plain and apart."""
    if len(names) > _MOST_FILES:
        return f"{len(names)} files, more than {_MOST_FILES}"
    for name in names:
        parts = name.split("/")
        if len(name) > _LONGEST_NAME or len(parts) > _DEEPEST:
            return f"{name[:32]!r}... is too long a file name"
        if any(part in ("", ".", "..") for part in parts) or any(
            c in '\\:*?"<>|' or ord(c) < 32 for c in name
        ):
            return f"{name!r} is no plain relative file name"
        if any(0xD800 <= ord(char) < 0xE000 for char in name):
            return f"{name!r} is no text"
    folded = [name.casefold() for name in names]
    if len(set(folded)) < len(folded):
        return "two of the files have the same name"
    taken = set(folded)
    for name in folded:
        if any(str(parent) in taken for parent in PurePosixPath(name).parents):
            return f"{name!r} lies in a folder that is a file"
    return None


def read_block(file: BinaryIO, block: Block, start: int) -> Coded:
    """The stored streams of a block.

    Raises:
        ValueError: its checksum does not hold.
    """
    file.seek(start)
    code = file.read(sum(block.stored))
    if len(code) != sum(block.stored) or zlib.crc32(code) != block.crc:
        raise ValueError("the checksum of a block does not hold")
    streams, place = [], 0
    for size in block.stored:
        streams.append(code[place : place + size])
        place += size
    return Coded(block.coding, block.sizes, tuple(streams))
