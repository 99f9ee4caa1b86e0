"""Make a pack: find the weights in the files, gather them into blocks, code one after the other."""

from __future__ import annotations

import hashlib
import itertools
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from onnxopt.errors import ModelError
from onnxopt.model import data_file
from onnxopt.packing.coding import decode, encode
from onnxopt.packing.container import BLOCK, START, Block, Index, Member, Span, name_complaint, write_end
from onnxopt.packing.wire import Stored, tensors_of

__all__ = ["Source", "sources_of", "write_pack"]

_LEAST = 256
"""Bytes below which a tensor stays with what lies around it."""
_ALONE = 1 << 12
"""Bytes from which on a tensor has blocks of its own; smaller ones of a kind share them."""


@dataclass(frozen=True)
class Source:
    """A file to be packed: its name in the pack, where it is, and its tensors in order, none over another."""

    name: str
    path: Path
    tensors: tuple[Stored, ...]


def sources_of(model: Path) -> list[Source]:
    """The model's file, then those of its external data.

    Raises:
        ModelError: it cannot be read, is no model, or its external data is missing, too short, or elsewhere.
    """
    inner, outer = list[Stored](), dict[str, list[Stored]]()
    with model.open("rb") as file:
        for tensor in tensors_of(file, str(model)):
            if tensor.location is None:
                inner.append(tensor)
            else:
                outer.setdefault(posixpath.normpath(tensor.location), []).append(tensor)
    found = [Source(model.name, model, _apart(inner))]
    for location, stored in outer.items():
        where = f"{model}: external data"
        path = data_file(model, location, where)
        end = max(tensor.offset + tensor.size for tensor in stored)
        if path.stat().st_size < end:
            raise ModelError(
                f"{where} is cut off: {location!r} has {path.stat().st_size} bytes, {end} are needed"
            )
        found.append(Source(location, path, _apart(stored)))
    complaint = name_complaint([source.name for source in found])
    if complaint:
        raise ModelError(f"{model}: cannot be packed: {complaint}; rename the file")
    return found


def _apart(tensors: Iterable[Stored]) -> tuple[Stored, ...]:
    """The tensors in the order of the file, without those that lie over one before."""
    kept, end = list[Stored](), 0
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, -tensor.size)):
        if tensor.offset >= end and tensor.size >= _LEAST:
            kept.append(tensor)
            end = tensor.offset + tensor.size
    return tuple(kept)


def write_pack(
    sources: list[Source], target: BinaryIO, progress: Callable[[str, float | None], None]
) -> Index:
    """Write the pack of some files; one block of them is in memory at a time.

    Raises:
        ModelError: a file changed while it was read.
    """
    states = [source.path.stat() for source in sources]
    planned, kinds = _plan(sources, [state.st_size for state in states])
    draft = Index(planned, tuple(Block(kind, "", (), (), 0) for kind in kinds))
    blocks, done, total = [], 0, sum(member.size for member in planned)
    target.write(START)
    for block, spans in zip(draft.blocks, draft.spans(), strict=True):
        data = b"".join(_read(sources, spans))
        blocks.append(_written(data, block.kind, target))
        done += len(data)
        progress("packing", done / total)
    files = tuple(
        Member(member.name, member.size, _sha256(source.path), member.pieces)
        for member, source in zip(planned, sources, strict=True)
    )
    for source, state in zip(sources, states, strict=True):
        now = source.path.stat()
        if (now.st_size, now.st_mtime_ns) != (state.st_size, state.st_mtime_ns):
            raise ModelError(f"{source.path}: was changed while it was packed")
    index = Index(files, tuple(blocks))
    write_end(target, index)
    return index


def _plan(sources: list[Source], sizes: list[int]) -> tuple[tuple[Member, ...], list[str]]:
    """The files with their pieces, and the kinds of all blocks."""
    kinds = list[str]()
    shared = dict[str, tuple[int, int]]()  # kind -> its block that is being filled, and the room in it

    def block_for(kind: str, size: int) -> int:
        number, room = shared.get(kind, (0, 0))
        if size > room or size >= _ALONE:
            number, room = len(kinds), BLOCK
            kinds.append(kind)
        if size < _ALONE:
            shared[kind] = number, room - size
        return number

    members, rest = [], 0
    for source, whole in zip(sources, sizes, strict=True):
        pieces, end = list[int](), 0
        for tensor in source.tensors:
            for start in range(0, tensor.size, BLOCK):
                size = min(BLOCK, tensor.size - start)
                pieces += (tensor.offset + start - end, size, block_for(tensor.kind, size))
                end = tensor.offset + start + size
        members.append(Member(source.name, whole, "", tuple(pieces)))
        rest += whole - sum(pieces[1::3])
    kinds += ["u1"] * -(-rest // BLOCK)
    return tuple(members), kinds


def _read(sources: list[Source], spans: list[Span]) -> Iterator[bytes]:
    for member, group in itertools.groupby(spans, key=lambda span: span.member):
        with sources[member].path.open("rb") as file:
            for span in group:
                file.seek(span.offset)
                data = file.read(span.size)
                if len(data) != span.size:
                    raise ModelError(f"{sources[member].path}: was changed while it was packed")
                yield data


def _written(data: bytes, kind: str, target: BinaryIO) -> Block:
    coded = encode(data, kind)
    if decode(coded, kind, len(data)) != data:
        raise AssertionError(f"the coding {coded.coding} loses bits")
    code = b"".join(coded.streams)
    target.write(code)
    return Block(kind, coded.coding, coded.sizes, tuple(map(len, coded.streams)), zlib.crc32(code))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
