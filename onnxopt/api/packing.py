"""`pack` and `unpack`: a model as one small file, and back, the same bytes."""

from __future__ import annotations

import filecmp
import importlib.util
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from onnxopt.api.common import silent
from onnxopt.errors import ModelError, UsageError
from onnxopt.graph import tensor_bytes
from onnxopt.job import Progress
from onnxopt.model import ModelLike, load, reusable
from onnxopt.packing import is_packed
from onnxopt.packing.container import Index, open_pack
from onnxopt.packing.packer import sources_of, write_pack
from onnxopt.packing.unpacker import restore
from onnxopt.protobuf import serialize
from onnxopt.storage import Staged, commit, save, staging

__all__ = ["Package", "pack", "packed_sizes", "unpack"]

_QUICK = 256 << 20
"""Bytes of a model that is packed just to know how large it gets."""


@dataclass(frozen=True)
class Package:
    """A pack and what is in it.

    files: name and bytes of each file, the model's first. packed_bytes: of the pack.
    codings: coding -> blocks, bytes in them, and bytes that they take in the pack.
    """

    files: tuple[tuple[str, int], ...]
    packed_bytes: int
    codings: dict[str, tuple[int, int, int]]

    @property
    def bytes(self) -> int:
        """Bytes of all files together."""
        return sum(size for _, size in self.files)

    @property
    def ratio(self) -> float:
        """How many times smaller the pack is."""
        return self.bytes / self.packed_bytes

    def to_dict(self) -> dict[str, Any]:
        """The same, for JSON."""
        return {
            "files": [{"name": name, "bytes": size} for name, size in self.files],
            "bytes": self.bytes,
            "packed_bytes": self.packed_bytes,
            "ratio": self.ratio,
            "codings": [
                {"coding": coding, "blocks": blocks, "bytes": size, "packed_bytes": packed}
                for coding, (blocks, size, packed) in self.codings.items()
            ],
        }


def pack(model: ModelLike, output: str | os.PathLike[str], *, progress: Progress | None = None) -> Package:
    """Write a model, with its external data, as one small file that `unpack` and `load` read.

    Nothing is lost: the files come back the same to the byte. A model in memory is packed as the file that
    `save` would write. The same files and the same version of zstandard give the same pack.

    Args:
        model: a path, bytes, a binary file, a `ModelProto` or an `ir.Model`; it is not changed.
        output: where to write the pack; it replaces what is there once it is whole.
        progress: called with the share that is done.

    Raises:
        ModelError: no model, external data that is missing or elsewhere, a place that cannot be written to.
        UsageError: zstandard is not installed, or the pack would replace a file of the model.
    """
    target = Path(output)
    with _as_file(model) as path:
        if is_packed(path):
            raise ModelError(f"{path}: is a pack already")
        try:
            sources = sources_of(path)
        except OSError as error:
            raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
        if any(target.resolve() == source.path.resolve() for source in sources):
            raise UsageError(f"{target}: this is a file of the model; give the pack a place of its own")
        with staging(target) as folder:
            staged = folder / "pack"
            with staged.open("wb") as file:
                index = write_pack(sources, file, progress or silent)
            with staged.open("rb") as file:  # what `unpack` would refuse is not written
                open_pack(file, str(target))
            size = staged.stat().st_size
            commit(Staged(staged, None, frozenset(source.path.resolve() for source in sources)), target)
    return _package(index, size)


def unpack(
    path: str | os.PathLike[str], output: str | os.PathLike[str], *, progress: Progress | None = None
) -> Package:
    """Write the model of a pack at `output`, and its external data, if it has any, beside it.

    Nothing is written before all files are restored and their checksums hold.

    Args:
        path: the pack.
        output: where to write the model; it replaces what is there. Data files have the names that the
            model knows them by.
        progress: called with the share that is done.

    Raises:
        ModelError: no pack, a damaged one or one of a newer version; a place that cannot be written to;
            or other data is where a data file belongs.
        UsageError: zstandard is not installed, or the model would replace the pack.
    """
    source, target = Path(path), Path(output)
    if source.resolve() == target.resolve():
        raise UsageError(f"{target}: this is the pack itself; give the model a place of its own")
    with staging(target) as folder:
        index = restore(source, folder, progress or silent)
        _move(index, folder, target.resolve())
    return _package(index, source.stat().st_size)


def _move(index: Index, staged: Path, target: Path) -> None:
    """Move restored files to where they belong, the model last.

    Data files keep their names, which the model knows. One that is there already stays if it is the same.

    Raises:
        ModelError: something else is in the place of a data file, or a link leads out of the folder.
    """
    folder = target.parent.resolve()
    model, *others = index.files
    places = [folder / member.name for member in others]
    for place, member in zip(places, others, strict=True):
        if place.resolve() != place or os.path.normcase(place) == os.path.normcase(target):
            raise ModelError(f"{place}: cannot be written: it is the model itself, or a link leads elsewhere")
        same = place.is_file() and filecmp.cmp(staged / member.name, place, shallow=False)
        if place.exists() and not same:
            raise ModelError(f"{place}: is there already, and other data: unpack into another folder")
    for place, member in zip(places, others, strict=True):
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staged / member.name, place)
    commit(Staged(staged / model.name, None, frozenset(places)), target)


def packed_sizes(*models: ModelLike) -> tuple[int, ...] | None:
    """How many bytes models take once they are packed; None without zstandard, or of more than 256 MB."""
    if importlib.util.find_spec("zstandard") is None:
        return None
    sizes = []
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        for model in models:
            if tensor_bytes(load(model)) > _QUICK:
                return None
            if isinstance(model, str | os.PathLike) and is_packed(model):
                sizes.append(os.path.getsize(model))
            else:
                sizes.append(pack(model, Path(folder, "pack")).packed_bytes)
    return tuple(sizes)


@contextmanager
def _as_file(model: ModelLike) -> Iterator[Path]:
    """The model as a file: its own, or a temporary one for what is in memory."""
    model = reusable(model)
    if isinstance(model, str | os.PathLike):
        yield Path(model)
        return
    with tempfile.TemporaryDirectory(prefix="onnxopt-") as folder:
        path = Path(folder, "model.onnx")
        if isinstance(model, onnx.ModelProto):
            model = serialize(model)
        if isinstance(model, bytes):
            path.write_bytes(model)
        else:
            save(load(model), path)
        yield path


def _package(index: Index, size: int) -> Package:
    codings = dict[str, tuple[int, int, int]]()
    for block, spans in zip(index.blocks, index.spans(), strict=True):
        number, raw, packed = codings.get(block.coding, (0, 0, 0))
        raw += sum(span.size for span in spans)
        codings[block.coding] = number + 1, raw, packed + sum(block.stored)
    files = tuple((member.name, member.size) for member in index.files)
    return Package(files, size, dict(sorted(codings.items())))
